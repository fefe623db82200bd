"""Making, naming, listing, changing and deleting each kind of thing."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization

from mcloud_base import errors
from mcloud_cli.session import Options, Session
from service.cli.conftest import Cli

Golden = Callable[[str, str], None]
Mask = Callable[[str], str]


def test_flavor(cli: Cli, golden: Golden, mask: Mask) -> None:
    size = ("--vcpus", "1", "--memory", "512", "--disk", "1")
    made = cli.run("flavor", "create", "m1.small", *size, "--label", "tier=web")
    listed = cli.run("flavor", "list", "--filter", 'name="m1.small"')
    golden("cli/flavor.txt", mask(f"{made}\n{listed}"))

    said = cli.error("flavor", "create", "m1.small", *size, code=4)
    assert said == "Error: there is a flavor m1.small (FLAVOR_NAME_TAKEN)\n"
    assert cli.json("flavor", "show", "m1.small")["spec"]["memory_mib"] == "512"
    assert cli.id("flavor", "show", "m1.small").startswith("flv-")
    assert cli.run("flavor", "delete", "m1.small") == "Deleted flavor m1.small\n"
    said = cli.error("flavor", "show", "m1.small", code=3)
    assert said == "Error: there is no flavor m1.small (FLAVOR_NOT_FOUND)\n"


def test_keypair_made_here(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "key"
    cli.run("keypair", "create", "made", "--private-key", str(file))

    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    key = serialization.load_ssh_private_key(file.read_bytes(), None)
    public = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    kept = cli.json("keypair", "show", "made")["spec"]["public_key"]
    assert kept.split()[:2] == public.decode().split()

    said = cli.error("keypair", "create", "other", "--private-key", str(file), code=2)
    assert "is not overwritten" in said
    second = tmp_path / "second"
    cli.error("keypair", "create", "made", "--private-key", str(second), code=4)
    assert not second.exists()
    cli.run("keypair", "delete", "made")


def test_keypair_brought(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "bad.pub"
    file.write_text("this is no key\n")
    said = cli.error("keypair", "create", "bad", "--public-key", str(file), code=1)

    assert "(BAD_PUBLIC_KEY)" in said


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(os.urandom((3 << 20) + 512))
    return path


def test_server_group(cli: Cli, golden: Golden, mask: Mask) -> None:
    make = ("server-group", "create")
    made = cli.run(*make, "web", "--policy", "anti-affinity", "--max-per-host", "2")
    cli.run(*make, "db", "--policy", "soft-affinity", "--label", "tier=db")
    listed = cli.run("server-group", "list", "--order-by", "name", "--long")
    golden("cli/server-group.txt", mask(f"{made}\n{listed}"))

    said = cli.error(*make, "web", "--policy", "affinity", code=4)
    assert said == "Error: the project has a server group web (SERVER_GROUP_NAME_TAKEN)\n"
    said = cli.error(*make, "x", "--policy", "affinity", "--max-per-host", "2", code=2)
    assert "--max-per-host is for --policy anti-affinity only" in said
    cli.run("server-group", "update", "db", "--name", "store")
    assert cli.json("server-group", "show", "store")["spec"]["policy"] == "POLICY_SOFT_AFFINITY"
    assert cli.run("server-group", "delete", "web", "store").splitlines() == [
        "Deleted server group web",
        "Deleted server group store",
    ]


def test_image_round_trip(cli: Cli, disk: Path, tmp_path: Path) -> None:
    made = cli.run(
        "image", "create", "disk", "--file", str(disk), "--disk-format", "raw", "-o", "id"
    )
    shown = cli.json("image", "show", made.strip())

    assert shown["status"]["state"] == "STATE_ACTIVE"
    assert shown["status"]["sha256"] == hashlib.sha256(disk.read_bytes()).hexdigest()
    assert "3.0 MiB" in cli.run("image", "list")

    back = tmp_path / "back.raw"
    # What an interrupted download has left is continued.
    (tmp_path / "back.raw.partial").write_bytes(disk.read_bytes()[: 1 << 20])
    cli.run("image", "save", "disk", "--file", str(back))
    assert back.read_bytes() == disk.read_bytes()
    assert not (tmp_path / "back.raw.partial").exists()

    (tmp_path / "back.raw.partial").write_bytes(b"x" * 100)
    said = cli.error("image", "save", "disk", "--file", str(back), code=1)
    assert "(IMAGE_CORRUPT)" in said

    cli.run("image", "update", "disk", "--protected", "--min-memory", "64")
    assert "(IMAGE_PROTECTED)" in cli.error("image", "delete", "disk", code=4)
    cli.run("image", "update", "disk", "--unprotected")
    cli.run("image", "delete", "disk")


def test_image_that_is_not_what_it_says(cli: Cli, disk: Path) -> None:
    said = cli.error(
        "image", "create", "bad", "--file", str(disk), "--disk-format", "qcow2", code=1
    )

    assert "(IMAGE_REFUSED)" in said
    cli.run("image", "delete", "bad")


def test_public_image_is_the_systems(cli: Cli, disk: Path) -> None:
    image = ("--file", str(disk), "--disk-format", "raw")
    cli.run("image", "create", "everyones", *image, "--public")

    assert "public" in cli.run("image", "list", "--filter", 'name="everyones"')
    cli.run("image", "delete", "everyones")


def test_interrupted_upload_goes_on(cli: Cli, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MCLOUD_CONFIG_DIR", str(cli.home))
    session = Session(Options())
    spec = {"disk_format": "DISK_FORMAT_RAW"}
    operation = session.call("image.ImageService/CreateImage", name="half", spec=spec)
    half = disk.read_bytes()[: 1 << 20]
    parts = [{"start": {"id": operation.resource.id}}, {"chunk": half}]
    with pytest.raises(errors.InvalidArgument, match="UPLOAD_UNFINISHED"):
        session.send("image.ImageService/UploadImageData", parts, timeout_s=30)
    session.close()
    assert cli.json("image", "show", "half")["status"]["uploaded_bytes"] == str(1 << 20)

    cli.run("image", "upload", "half", "--file", str(disk))

    shown = cli.json("image", "show", "half")
    assert shown["status"]["sha256"] == hashlib.sha256(disk.read_bytes()).hexdigest()
    cli.run("image", "delete", "half")


def test_networks(cli: Cli, golden: Golden, mask: Mask) -> None:
    said = [
        cli.run("network", "create", "lan"),
        cli.run("subnet", "create", "lan4", "--network", "lan", "--cidr", "10.7.0.0/24"),
        cli.run("network", "create", "out", "--external", "--physical-network", "ext"),
        cli.run("subnet", "create", "out4", "--network", "out", "--cidr", "203.0.113.0/24"),
        cli.run("router", "create", "gate", "--external-network", "out"),
        cli.run("router", "add", "subnet", "gate", "lan4"),
        cli.run("router", "list"),
        cli.run("subnet", "list"),
        cli.run("port", "create", "mine", "--network", "lan", "--ip", "10.7.0.9"),
        cli.run("floating-ip", "create", "out", "--port", "mine"),
        cli.run("floating-ip", "list"),
    ]
    golden("cli/networks.txt", mask("\n".join(said)))

    address = cli.json("floating-ip", "list")[0]["status"]["floating_ip_address"]
    assert "(INTERFACE_IN_USE)" in cli.error("router", "remove", "subnet", "gate", "lan4", code=4)
    cli.run("floating-ip", "disassociate", address)
    assert cli.json("floating-ip", "show", address)["spec"].get("port_id", "") == ""
    cli.run("floating-ip", "associate", address, "--port", "mine")
    cli.run("floating-ip", "delete", address)
    cli.run("port", "delete", "mine")
    cli.run("router", "remove", "subnet", "gate", "lan4")
    cli.run("router", "delete", "gate")
    cli.run("subnet", "update", "lan4", "--dns", "9.9.9.9")
    assert "9.9.9.9" in cli.run("subnet", "list")
    cli.run("subnet", "delete", "lan4", "out4")
    cli.run("network", "delete", "lan", "out")


def test_two_of_one_name(cli: Cli) -> None:
    ids = {cli.id("network", "create", "twin") for _ in range(2)}
    said = cli.error("network", "show", "twin", code=1)

    assert "(NAME_AMBIGUOUS)" in said
    assert all(id_ in said for id_ in ids)
    cli.run("network", "delete", *ids)


def test_odd_names_are_found(cli: Cli) -> None:
    name = 'a "quoted" \\ näme 雲'
    cli.run("network", "create", name)

    assert cli.run("network", "show", name, "-o", "name") == f"{name}\n"
    cli.run("network", "delete", name)


def test_security_group(cli: Cli, golden: Golden, mask: Mask) -> None:
    cli.run("security-group", "create", "norprod_sec_grp", "--description", "of the article")
    rule = ("security-group", "rule", "create", "norprod_sec_grp")
    cli.run(*rule, "--protocol", "tcp", "--dst-port", "22")
    cli.run(*rule, "--protocol", "tcp", "--dst-port", "8000:8080", "--remote-ip", "10.0.0.0/8")
    last = cli.id(*rule, "--protocol", "icmp", "--remote-group", "norprod_sec_grp")
    golden("cli/security-group.txt", mask(cli.run("security-group", "show", "norprod_sec_grp")))

    assert "not N or FIRST:LAST" in cli.error(*rule, "--dst-port", "ssh", code=2)
    cli.run("security-group", "rule", "delete", last)
    assert "icmp" not in cli.run("security-group", "rule", "list", "norprod_sec_grp")
    cli.run("security-group", "delete", "norprod_sec_grp")


def test_update_needs_something(cli: Cli) -> None:
    cli.run("network", "create", "plain")

    assert "say what to change" in cli.error("network", "update", "plain", code=2)
    cli.run("network", "update", "plain", "--name", "fancy", "--label", "a=b")
    assert cli.json("network", "show", "fancy")["metadata"]["labels"] == {"a": "b"}
    cli.run("network", "delete", "fancy")


def test_quotas_of_all_services(cli: Cli) -> None:
    cli.run("project", "create", "sorprod")
    said = cli.json(
        *("quota", "set", "sorprod", "--ports", "2000", "--security-group-rules", "-1"),
        *("--volume-gib", "5", "--image-gib", "3", "--images", "-1"),
    )
    assert {service: operation["state"] for service, operation in said.items()} == dict.fromkeys(
        ("image", "network", "volume"), "STATE_SUCCEEDED"
    )

    shown = [line.split() for line in cli.run("quota", "show", "sorprod").splitlines()]
    assert shown[0] == ["OF", "USED", "LIMIT"]
    for row in (
        ["key", "pair", "0", "100"],
        ["image", "0", "none"],
        ["image", "bytes", "0", "B", "3.0", "GiB"],
        ["port", "0", "2000"],
        ["security", "group", "rule", "0", "none"],
        ["floating", "ip", "0", "50"],
        ["volume", "(GiB)", "0", "5"],
    ):
        assert row in shown
    found = cli.json("quota", "show", "sorprod")
    assert list(found) == ["compute", "image", "network", "volume"]
    assert found["network"]["limits"]["port_count"] == "2000"
    assert found["image"]["limits"] == {"image_count": "-1", "image_bytes": str(3 << 30)}

    assert "say what to set" in cli.error("quota", "set", "sorprod", code=2)
    assert "--ports" in cli.error("quota", "set", "sorprod", "--ports", "-2", code=2)
    cli.run("project", "delete", "sorprod")


def test_projects_users_roles_quota(cli: Cli, tmp_path: Path) -> None:
    secret = tmp_path / "password"
    secret.write_text("correct horse battery\n")
    cli.run("project", "create", "norprod", "--description", "north")
    cli.run("user", "create", "eve", "--password-file", str(secret), "--email", "eve@example.org")
    said = cli.run("role", "add", "member", "--user", "eve", "--project", "norprod")
    assert said == "eve is member in project norprod\n"
    assert "member  norprod" in " ".join(cli.run("role", "list", "--user", "eve").split("   "))
    assert "(ROLE_ASSIGNED)" in cli.error(
        "role", "add", "member", "--user", "eve", "--project", "norprod", code=4
    )
    cli.run("quota", "set", "norprod", "--instances", "3", "--memory", "-1", "--server-groups", "4")
    shown = [line.split() for line in cli.run("quota", "show", "norprod").splitlines()]
    assert ["instance", "0", "3"] in shown
    assert ["memory", "(MiB)", "0", "none"] in shown
    assert ["server", "group", "0", "4"] in shown
    assert ["port", "0", "500"] in shown

    eve = Cli(cli.cloud, tmp_path / "eve")
    eve.run(
        "login",
        *("--endpoint", cli.cloud.endpoint, "--ca", str(cli.cloud.ca)),
        *("--username", "eve", "--password-file", str(secret)),
    )
    new = tmp_path / "new"
    new.write_text("battery staple correct\n")
    eve.env = {"MCLOUD_PASSWORD": "correct horse battery"}
    eve.run("user", "set-password", "--password-file", str(new))

    said = cli.run("role", "remove", "member", "--user", "eve", "--project", "norprod")
    assert said == "eve is no longer member in project norprod\n"
    said = cli.error("role", "remove", "member", "--user", "eve", "--project", "norprod", code=3)
    assert "(ROLE_ASSIGNMENT_NOT_FOUND)" in said
    cli.run("user", "update", "eve", "--disable")
    assert "no" in cli.run("user", "list", "--filter", 'name="eve"').splitlines()[1].split()
    cli.run("user", "delete", "eve")
    cli.run("project", "delete", "norprod")


def test_join_token(cli: Cli) -> None:
    secret = cli.run("join-token", "create", "host-1").strip()

    assert "." in secret
    assert secret not in cli.run("join-token", "list", "-o", "json")
    assert "host-1" in cli.run("join-token", "list")
    cli.run("join-token", "delete", "host-1")


def test_hosts_and_domains_of_an_empty_cloud(cli: Cli) -> None:
    assert cli.run("host", "list").splitlines()[1:] == []
    assert cli.run("domain", "list").splitlines()[1:] == []
    assert cli.json("host", "list") == []
    assert "(HOST_NOT_FOUND)" in cli.error("host", "enable", "nowhere", code=3)
    assert "things checked, 0 findings" in cli.run("admin", "verify")
    assert cli.run("admin", "repair", "--dry-run").strip() == "Nothing to repair"
    only = ("--only", "CLAIM_WITHOUT_DOMAIN", "--resource", "d-0")
    assert cli.run("admin", "repair", "--yes", *only).strip() == "Nothing to repair"


def test_lists_take_filter_order_and_limit(cli: Cli) -> None:
    for name in ("c", "a", "b"):
        cli.run("network", "create", f"order-{name}", "--label", "test=order")
    arguments = ("network", "list", "--filter", "labels.test=order", "-o", "name")

    assert cli.run(*arguments, "--order-by", "name").split() == ["order-a", "order-b", "order-c"]
    assert cli.run(*arguments, "--limit", "2", "--order-by", "name desc").split() == [
        "order-c",
        "order-b",
    ]
    assert "(BAD_FILTER)" in cli.error("network", "list", "--filter", "nonsense", code=1)
    cli.run("network", "delete", "order-a", "order-b", "order-c")
