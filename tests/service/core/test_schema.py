"""Databases are made, moved on and refused by numbered migrations, on both kinds alike."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from fakes import releases
from fixtures_postgresql import postgresql_server, postgresql_url  # noqa: F401
from mcloud_base import errors
from mcloud_controlplane.compute import model
from mcloud_controlplane.core import migrations, processes, schema
from mcloud_controlplane.core.database import Database

Release = migrations.Release
NUMBERS = [each.number for each in migrations.THIS.migrations("compute")]
_OPEN = (
    "import sys; from mcloud_controlplane.compute import model; model.open_database(sys.argv[1])"
)


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def url_of(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], str]:
    if request.param == "sqlite":
        return lambda name: f"sqlite://{tmp_path}/{name}.db"
    pattern = str(request.getfixturevalue("postgresql_url"))
    return lambda name: pattern.replace("{name}", name)


@pytest.fixture
def url(url_of: Callable[[str], str]) -> str:
    return url_of("compute")


def process(release: Release = migrations.THIS) -> processes.Process:
    return processes.Process(release, ("compute",))


def numbers(opened: Database) -> list[int]:
    table = model.shared.schema_migration
    return opened.read_now(lambda: [row.number for row in table.select().order_by(table.number)])


def migrator(opened: Database, release: Release) -> migrations.Migrator:
    return migrations.Migrator("compute", opened, model.shared, release)


def shape(opened: Database) -> dict[str, Any]:
    """Return tables, columns and indexes, as the database itself tells them."""
    found = {}
    store: Any = opened.peewee
    where = None
    if opened.is_postgresql:
        where = store.execute_sql("SELECT current_schema()").fetchone()[0]
    for table in store.get_tables(where):
        columns = [(c.name, c.data_type, c.null) for c in store.get_columns(table, where)]
        indexes = {
            (i.name, tuple(i.columns), i.unique, re.sub(r"(?s).* WHERE|[\s()\"]", "", i.sql or ""))
            for i in store.get_indexes(table, where)
            if i.sql and not i.name.startswith("sqlite_")
        }
        found[table] = columns, store.get_primary_keys(table, where), indexes
    return found


@pytest.mark.parametrize("name", migrations.DATABASES)
def test_models_are_what_the_migrations_make(url_of: Callable[[str], str], name: str) -> None:
    """A model that changes needs a migration: NNNN_name.py in the folder beside it."""
    module = importlib.import_module(f"mcloud_controlplane.{name}.model")
    with closing(module.open_database(url_of(name))) as opened:
        opened.read_now(lambda: None)
        migrated = opened.read_now(shape, opened)
        everything = [*module.shared.models(), *module.MODELS]
        opened.write_now(opened.peewee.drop_tables, everything)
        assert opened.read_now(shape, opened) == {}
        opened.write_now(opened.peewee.create_tables, everything)
        assert opened.read_now(shape, opened) == migrated


def test_every_migration_says_what_it_is() -> None:
    for name in migrations.DATABASES:
        for each in migrations.THIS.migrations(name):
            assert each.summary.endswith("."), each.name
            assert re.fullmatch(r"\d+\.\d+", each.since), each.name


def test_several_processes_make_a_database_once(url: str) -> None:
    racers = [subprocess.Popen([sys.executable, "-c", _OPEN, url]) for _ in range(3)]
    assert [racer.wait(timeout=120) for racer in racers] == [0, 0, 0]
    with closing(model.open_database(url)) as opened:
        assert numbers(opened) == NUMBERS


def test_tables_from_before_the_numbers_are_taken_over(url: str) -> None:
    opened = schema.connect(url, model.database, model.shared)
    first = migrations.THIS.migrations("compute")[0]

    def make() -> None:
        first.up(migrations.Schema(opened))
        model.shared.deployment.create(id=1, epoch="e1", schema_version=1, request_key="k")
        opened.execute(
            "INSERT INTO quota (project_id, instance_count, vcpu_count, memory_mib, key_pair_count)"
            " VALUES ('p-1', 1, 7, 1, 1)"
        )

    opened.write_now(make)
    opened.close()
    with closing(model.open_database(url)) as opened:
        assert numbers(opened) == NUMBERS
        quota = opened.read_now(lambda: model.Quota.get_by_id("p-1"))
        assert (quota.vcpu_count, quota.server_group_count) == (7, 50)
        row = opened.read_now(lambda: model.shared.deployment.get_by_id(1))
        assert (row.epoch, row.schema_version) == ("e1", NUMBERS[-1])


def test_a_change_fills_in_parts_and_says_who_ran_it(url: str, tmp_path: Path) -> None:
    with closing(model.open_database(url)) as opened:
        opened.write_now(lambda: [_instance(number) for number in range(250)])
    newer = process(releases.to_0_2(tmp_path))
    with closing(model.open_database(url, newer)) as opened:
        assert numbers(opened) == [*NUMBERS, 901]
        row = opened.read_now(lambda: model.shared.schema_migration.get_by_id(901))
        assert (row.name, row.kind, row.since) == ("0901_memory_bytes", "EXPAND", "0.2")
        assert (row.release, row.filled) == ("0.2.0", True)
        sql = "SELECT count(*) FROM instance WHERE memory_bytes = memory_mib * 1048576"
        assert opened.read_now(lambda: opened.peewee.execute_sql(sql).fetchone()[0]) == 250


def _instance(number: int) -> None:
    model.Instance.create(
        id=f"i-{number}", name=f"n{number}", project_id="p-1", state="ACTIVE", flavor_id="f",
        flavor_name="f", image_id="m", vcpu_count=1, memory_mib=64 + number, disk_gib=1,
        hostname="h", create_time=1, update_time=1,
    )  # fmt: skip


def test_what_an_older_process_needs_is_not_taken_from_it(url: str, tmp_path: Path) -> None:
    older = process()
    release = releases.to_0_2(tmp_path)
    model.open_database(url, older).close()
    with closing(model.open_database(url, process(release))) as new:
        with pytest.raises(errors.WrongState) as refused:
            migrator(new, release).advance(contract=True)
        assert refused.value.reason == "OLDER_RELEASE_ALIVE"
        assert migrations.THIS.version in str(refused.value)
        assert numbers(new) == [*NUMBERS, 901]

        new.write_now(older._delete, model.shared)
        migrator(new, release).advance(contract=True)
        assert numbers(new) == [*NUMBERS, 901, 902]
    with pytest.raises(errors.WrongState) as refused:
        model.open_database(url, process())
    assert refused.value.reason == "SCHEMA_UNKNOWN"
    assert "newer release" in str(refused.value)


def test_a_process_that_was_killed_is_waited_for_a_while_only(url: str, tmp_path: Path) -> None:
    release = releases.to_0_2(tmp_path)
    model.open_database(url, process()).close()
    with closing(model.open_database(url, process(release))) as opened:
        table = model.shared.process
        long_ago = table.heartbeat_time - int(processes.ALIVE_S * 1e6)
        older = table.release == migrations.THIS.version
        opened.write_now(lambda: table.update(heartbeat_time=long_ago).where(older).execute())
        migrator(opened, release).advance(contract=True)
        assert numbers(opened)[-1] == 902


async def test_a_process_that_was_overtaken_notices(url: str, tmp_path: Path) -> None:
    frozen = process()
    release = releases.to_0_2(tmp_path)
    with closing(model.open_database(url, frozen)) as opened:
        opened.write_now(frozen._delete, model.shared)  # as if it had been silent for too long
        migrator(opened, release).advance(contract=True)
        (use,) = frozen._uses
        with pytest.raises(errors.WrongState) as refused:
            await use.database.write(frozen._refresh, use)
        assert refused.value.reason == "SCHEMA_UNKNOWN"


def test_a_new_database_is_at_the_newest_schema_at_once(url: str, tmp_path: Path) -> None:
    with closing(model.open_database(url, process(releases.to_0_2(tmp_path)))) as opened:
        assert numbers(opened) == [*NUMBERS, 901, 902]


@pytest.mark.parametrize(
    ("kinds", "reason"),
    [
        ([("EXPAND", "0.2")], ""),
        ([("EXPAND", "0.2"), ("EXPAND", "0.2")], ""),
        ([("EXPAND", "0.2"), ("EXPAND", "0.3")], "SCHEMA_UNKNOWN"),
        ([("EXPAND", "0.2"), ("CONTRACT", "0.2")], "SCHEMA_UNKNOWN"),
    ],
)
def test_an_older_daemon_starts_over_what_the_next_release_added(
    url: str, tmp_path: Path, kinds: list[tuple[str, str]], reason: str
) -> None:
    files = {
        f"09{number:02}_x": releases.EMPTY.format(kind=kind, since=since)
        for number, (kind, since) in enumerate(kinds)
    }
    model.open_database(url, process(releases.newer(tmp_path, files))).close()
    if not reason:
        model.open_database(url).close()
        return
    with pytest.raises(errors.WrongState) as refused:
        model.open_database(url)
    assert refused.value.reason == reason


def test_what_the_next_release_adds_waits_for_what_this_one_takes(url: str, tmp_path: Path) -> None:
    model.open_database(url).close()
    files = {
        "0901_x": releases.EMPTY.format(kind="CONTRACT", since="0.2"),
        "0902_x": releases.EMPTY.format(kind="EXPAND", since="0.3"),
    }
    with pytest.raises(errors.WrongState) as refused:
        model.open_database(url, process(releases.newer(tmp_path, files, version="0.3.0")))
    assert refused.value.reason == "SCHEMA_BEHIND"
    assert "mcloud-controlplane migrate" in str(refused.value)
