"""What is really there, read past mcloud: libvirt, processes, taps, disks, rules, tables."""

from __future__ import annotations

import subprocess
from collections import Counter
from collections.abc import Callable

import psycopg

from faults.processes import RealHost
from faults.users import User
from mcloud_base import ids

# By what it counts: the database and the query.
_TABLES = {
    "claims": ("compute", "SELECT COUNT(*) FROM claim"),
    "instances": ("compute", "SELECT COUNT(*) FROM instance WHERE delete_time IS NULL"),
    "domains placed": ("compute", "SELECT COUNT(*) FROM domain WHERE absent_time IS NULL"),
    "ports": ("network", "SELECT COUNT(*) FROM port WHERE owner_id LIKE 'i-%'"),
    "addresses": ("network", "SELECT COUNT(*) FROM address WHERE port_id IN"
                  " (SELECT id FROM port WHERE owner_id LIKE 'i-%')"),
    "image uses": ("image", "SELECT COUNT(*) FROM image_use"),
    "volumes": ("volume", "SELECT COUNT(*) FROM volume WHERE delete_time IS NULL"),
    "attachments": ("volume", "SELECT COUNT(*) FROM attachment"),
}  # fmt: skip
_UNFINISHED = "SELECT COUNT(*) FROM operation WHERE state IN ('RUNNING', 'UNDOING')"
_CREATED = "SELECT COUNT(*) FROM operation WHERE method LIKE '%/CreateInstance'"


def differences(host: RealHost, database: str, users: list[User], created: int) -> list[str]:
    """Compare what is there with what users expect; a sentence for each difference.

    Args:
        database: URL, with {name}.
        created: instances that were asked for, each with a request id of its own.
    """
    wanted = [each for user in users for each in user.instances]
    running = [each for each in wanted if each.running]
    volumes = [volume for user in users for volume in user.volumes]
    attached = [volume for each in wanted for volume in each.volumes]
    in_use = [volume for each in running for volume in each.volumes]
    expected: dict[str, int] = {
        "claims": len(wanted),
        "instances": len(wanted),
        "domains placed": len(wanted),
        "ports": len(wanted),
        "addresses": len(wanted),
        "image uses": len(wanted),
        "volumes": len(volumes),
        "attachments": len(attached),
        "guest processes": len(running),
        "taps": len(running),
        "disk directories": len(wanted),
        "volume data": len(volumes),
    }
    found = {what: _query(database, *each) for what, each in _TABLES.items()}
    found["guest processes"] = len(host.named("qemu-system-x86_64"))
    found["taps"] = _taps(host)
    found["disk directories"] = len(list((host.files / "lib/compute/instances").glob("*")))
    data = (host.files / "lib/volumes").glob("vol-*")
    found["volume data"] = len({path.name.partition(".")[0] for path in data})
    told = [
        f"{what}: {found[what]}, expected {count}"
        for what, count in expected.items()
        if found[what] != count
    ]
    told += _domains(host, {ids.libvirt_uuid(each.id) for each in wanted})
    servers = len(host.named("qemu-storage-daemon"))
    if servers < len(in_use):
        told.append(f"volume servers: {servers}, expected at least {len(in_use)}")
    for name in ("compute", "network", "volume", "image", "identity"):
        if count := _query(database, name, _UNFINISHED):
            told.append(f"unfinished operations of {name}: {count}")
    # A request that was refused, or never arrived, made none.
    if (count := _query(database, "compute", _CREATED)) > created:
        told.append(f"creations recorded: {count}, asked for: {created}")
    return told


def _query(database: str, name: str, query: str) -> int:
    with psycopg.connect(database.format(name=name)) as connection:
        row = connection.execute(query).fetchone()  # type: ignore[call-overload]
    assert row is not None
    return int(row[0])


def _taps(host: RealHost) -> int:
    """Count the guests' interfaces: those that a QEMU holds open."""
    links = host.run("ip", "-o", "link", "show", "type", "tun").splitlines()
    return len(links)


def _domains(host: RealHost, wanted: set[str]) -> list[str]:
    command = ["virsh", "-c", host.uri, "list", "--all", "--uuid"]
    listed = subprocess.run(command, check=True, timeout=60, capture_output=True, text=True)
    found = Counter(listed.stdout.split())
    say: dict[str, Callable[[str], bool]] = {
        "is not there": lambda uuid: uuid in wanted and not found[uuid],
        "belongs to nobody": lambda uuid: uuid not in wanted,
        "is there more than once": lambda uuid: found[uuid] > 1,
    }
    return [
        f"domain {uuid} {what}"
        for what, is_so in say.items()
        for uuid in sorted(wanted | set(found))
        if is_so(uuid)
    ]
