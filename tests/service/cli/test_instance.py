"""Booting where there is no host: what is shown, explained and undone."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from service.cli.conftest import Cli

Golden = Callable[[str, str], None]
Mask = Callable[[str], str]


@pytest.fixture
def prepared(cli: Cli, tmp_path: Path) -> Iterator[Cli]:
    """A cloud with all that an instance needs, but for a host."""
    disk = tmp_path / "disk.raw"
    disk.write_bytes(os.urandom(1 << 20))
    cli.run("flavor", "create", "m1.small", "--vcpus", "1", "--memory", "512", "--disk", "1")
    cli.run("image", "create", "guest", "--file", str(disk), "--disk-format", "raw")
    cli.run("network", "create", "lan")
    cli.run("subnet", "create", "lan4", "--network", "lan", "--cidr", "10.0.0.0/24")
    cli.run("security-group", "create", "norprod_sec_grp")
    cli.run("keypair", "create", "my_key", "--private-key", str(tmp_path / "key"))
    yield cli
    for name in cli.run("list", "-o", "id").split():
        cli.run("delete", name, "--wait")
    cli.run("keypair", "delete", "my_key")
    cli.run("security-group", "delete", "norprod_sec_grp")
    cli.run("subnet", "delete", "lan4")
    cli.run("network", "delete", "lan")
    cli.run("image", "delete", "guest")
    cli.run("flavor", "delete", "m1.small")


BOOT = (
    *("boot", "--flavor", "m1.small", "--image", "guest", "--nic", "net-id=lan"),
    *("--security-group", "norprod_sec_grp", "--key-name", "my_key"),
)


def test_boot_without_a_host(prepared: Cli, golden: Golden, mask: Mask) -> None:
    done = prepared.invoke(*BOOT, "stack_testvm", "--wait")
    assert done.exit_code == 1
    golden("cli/boot-no-host.txt", mask(f"{done.stdout}---\n{done.stderr}"))

    listed = prepared.run("list")
    golden("cli/list.txt", mask(listed))
    assert "lan=10.0.0." in listed
    golden("cli/explain.txt", mask(prepared.run("instance", "explain", "stack_testvm")))

    operation = prepared.run("operation", "list", "--limit", "1", "-o", "id").strip()
    golden("cli/trace.txt", mask(prepared.run("operation", "trace", operation)))
    rows = prepared.json("operation", "trace", operation)
    assert [row["number"] for row in rows] == sorted(row["number"] for row in rows)
    assert "(NO_VALID_HOST)" in prepared.error("operation", "wait", operation, code=1)
    assert "(NO_VALID_HOST)" in prepared.error("operation", "watch", operation, code=1)
    shown = prepared.json("operation", "show", operation)
    assert shown["request"]["name"] == "stack_testvm"
    assert "FAILED" in prepared.run("operation", "show", operation)

    said = prepared.error(*BOOT, "stack_testvm", code=4)
    assert "(INSTANCE_NAME_TAKEN)" in said
    assert "mcloud instance show stack_testvm" in said
    prepared.run("instance", "update", "stack_testvm", "--name", "other")
    assert prepared.run("delete", "other", "--wait").endswith("Deleted instance other\n")
    assert "(INSTANCE_NOT_FOUND)" in prepared.error("show", "other", code=3)


def test_boot_without_waiting_says_how_to(prepared: Cli) -> None:
    said = prepared.run(*BOOT, "quick").splitlines()

    operation = said[1].split()[1]
    assert said[0].startswith("instance   i-")
    assert said[2] == f"{operation} goes on. See: mcloud operation wait {operation}"
    assert "(NO_VALID_HOST)" in prepared.error("operation", "wait", operation, code=1)


def test_many_by_one_command(prepared: Cli, golden: Golden, mask: Mask) -> None:
    done = prepared.invoke(*BOOT, "worker", "--count", "3", "--wait")
    assert done.exit_code == 1
    golden("cli/boot-many-no-host.txt", mask(done.stdout))
    assert "worker: 0 of 3 done, 3 failed\n" in done.stderr
    assert "Error: 3 of 3 could not be done; the first, worker-1: no host" in done.stderr
    assert prepared.run("list", "-o", "name").split() == ["worker-1", "worker-2", "worker-3"]
    ids = prepared.run("operation", "list", "--limit", "4", "-o", "id").split()
    shown = {id_: prepared.json("operation", "show", id_) for id_ in ids}
    ((id_, whole),) = ((id_, found) for id_, found in shown.items() if "parts" in found)
    assert whole["parts"] == {"count": 3, "failed_count": 3}
    assert "0 of 3 done, 3 failed" in prepared.run("operation", "show", id_)
    listed = prepared.run("operation", "list", "--filter", f"parent_id={id_}", "-o", "id")
    assert set(listed.split()) == set(ids) - {id_}
    assert id_ in prepared.run("operation", "show", listed.split()[0])

    quick = prepared.run(*BOOT, "quick", "--count", "2").splitlines()
    assert quick[0] == "instance   quick-1 to quick-2"
    operation = quick[1].split()[1]
    assert "2 of 2 could not be done" in prepared.error("operation", "wait", operation, code=1)
    begun = prepared.run(*BOOT, "now", "--count", "2", "-o", "id").split()
    assert len(begun) == 2
    assert json.loads(prepared.run(*BOOT, "soon", "--count", "2", "-o", "json"))["parts"]
    assert "INSTANCE_NAME_TAKEN" in prepared.error(*BOOT, "worker", "--count", "2", code=4)
    assert "501 is not in the range" in prepared.error(*BOOT, "x", "--count", "501", code=2)


def test_boot_in_a_server_group(prepared: Cli) -> None:
    prepared.run("server-group", "create", "web", "--policy", "affinity")
    prepared.error(*BOOT, "--server-group", "web", "web-1", "--wait", code=1)
    group = prepared.json("server-group", "show", "web")
    shown = prepared.run("instance", "show", "web-1")
    assert ["placement.server_group_id", group["metadata"]["id"]] in map(
        str.split, shown.splitlines()
    )
    assert group["status"]["instance_ids"] == prepared.run("list", "-o", "id").split()
    said = prepared.error("server-group", "delete", "web", code=4)
    assert "has 1 instance(s); delete them first (SERVER_GROUP_IN_USE)" in said
    prepared.run("delete", "web-1", "--wait")
    prepared.run("server-group", "delete", "web")
    said = prepared.error(*BOOT, "--server-group", "web", "x", code=3)
    assert said == "Error: there is no server group web (SERVER_GROUP_NOT_FOUND)\n"


def test_dry_run_makes_nothing(prepared: Cli) -> None:
    assert "(NO_VALID_HOST)" in prepared.error(*BOOT, "dry", "--dry-run", code=1)
    assert prepared.run("list", "-o", "name") == ""


def test_what_is_missing_is_named(prepared: Cli) -> None:
    common = ("boot", "--image", "guest", "x")
    assert "there is no flavor none" in prepared.error(*common, "--flavor", "none", code=3)
    said = prepared.error(*BOOT, "--volume", "none", "x", code=3)
    assert said == "Error: there is no volume none (VOLUME_NOT_FOUND)\n"
    assert "must name a network or a port" in prepared.error(
        *BOOT, "--nic", "ip=1.1.1.1", "x", code=2
    )
    assert "is not KEY=VALUE" in prepared.error(*BOOT, "--meta", "x", "x", code=2)


def test_verbs_in_the_wrong_state(prepared: Cli) -> None:
    prepared.error(*BOOT, "web", "--wait", code=1)

    for verb in ("start", "stop", "reboot"):
        assert "(BAD_STATE)" in prepared.error("instance", verb, "web", code=4)


def test_capacity(prepared: Cli) -> None:
    assert prepared.run("capacity", "m1.small").startswith("0 more of m1.small fit, on 0 hosts")
    assert prepared.run("capacity", "m1.small", "-o", "name") == "0\n"


def test_completion(prepared: Cli) -> None:
    def complete(words: str, position: int) -> list[str]:
        prepared.env = {
            "_MCLOUD_COMPLETE": "bash_complete",
            "COMP_WORDS": words,
            "COMP_CWORD": str(position),
        }
        found = prepared.invoke().stdout.split()
        prepared.env = {}
        return found

    assert complete("mcloud key", 1) == ["plain,keypair"]
    assert complete("mcloud flavor show m1", 3) == ["plain,m1.small"]
    assert complete("mcloud boot --image g", 3) == ["plain,guest"]
    assert "_MCLOUD_COMPLETE=bash_complete" in prepared.run("completion", "bash")
    assert "_MCLOUD_COMPLETE=zsh_complete" in prepared.run("completion", "zsh")
    prepared.home = prepared.home.with_name("nobody")
    assert complete("mcloud flavor show m1", 3) == []
    prepared.home = prepared.home.with_name("home")
