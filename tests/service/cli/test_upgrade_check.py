"""mcloud admin upgrade-check."""

from __future__ import annotations

import yaml

from mcloud_controlplane.core import migrations
from service.cli.conftest import Cli


def test_it_says_whether_the_next_release_may_start(cli: Cli) -> None:
    cli.log_in("--system")
    text = cli.run("admin", "upgrade-check")
    rows = {line.split()[0]: line for line in text.splitlines() if line}
    for name in migrations.DATABASES:
        newest = migrations.THIS.migrations(name)[-1].number
        assert rows[name].split()[1:3] == [str(newest), "-"]
        assert rows[name].endswith("the next release may be started")
    assert "identity,compute,scheduler" in rows[migrations.THIS.version]

    found = yaml.safe_load(cli.run("admin", "upgrade-check", "-o", "yaml"))
    assert found == cli.json("admin", "upgrade-check")
    assert found["upgrade_ready"] is True
    (process,) = found["databases"][0]["processes"]
    assert process["release"] == migrations.THIS.version
    first = found["databases"][0]["migrations"][0]
    assert (first["name"], first["kind"]) == ("0001_first_tables", "KIND_EXPAND")
    assert first["run_time"]
