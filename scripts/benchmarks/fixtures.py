"""Rows written straight into a database: what a benchmark needs there and does not measure.

They are such as the API would have made; what each benchmark leaves out of them it says itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any, TypeVar

from benchmarks.cloud import ControlPlane
from mcloud_base import ids
from mcloud_controlplane.compute import model as compute
from mcloud_controlplane.core import database, schema, tables
from mcloud_controlplane.core.database import Database
from mcloud_controlplane.identity import epoch_store
from mcloud_controlplane.identity import model as identity
from mcloud_controlplane.scheduler import server_group_store
from mcloud_controlplane.scheduler import store as scheduler
from mcloud_controlplane.settings import Settings

T = TypeVar("T")

HOST_VCPUS, HOST_MEMORY_MIB, HOST_DISK_GIB = 40, 131_072, 2_000
_CPU_RATIO = 4  # the settings' default
_CLAIMS = 9  # each a tenth of a host
_REPORT_S = 10.0
_BATCH = (
    500  # resources changed by one transaction, so that the change log's rows are like real ones
)


class Rows:
    """A database of a running control plane."""

    def __init__(self, opened: Database) -> None:
        self._opened = opened

    def do(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run a unit of the control plane's own."""
        return self._opened.write_now(function, *arguments)

    def insert(self, table: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Insert rows as the driver takes them. Within a unit."""
        names = list(rows[0])
        columns = ", ".join(f'"{name}"' for name in names)
        marks = ", ".join([self._opened.peewee.param] * len(names))
        sql = f'INSERT INTO "{table}" ({columns}) VALUES ({marks})'
        cursor = self._opened.peewee.cursor()
        cursor.executemany(sql, [tuple(row[name] for name in names) for row in rows])

    def row(self, table: str, id_: str) -> dict[str, Any]:
        """Return a row as the driver gives it. Within a unit."""
        mark = self._opened.peewee.param
        sql = f'SELECT * FROM "{table}" WHERE id = {mark}'
        cursor: Any = self._opened.peewee.execute_sql(sql, (id_,))
        names = [each[0] for each in cursor.description]
        return dict(zip(names, cursor.fetchone(), strict=True))


@contextmanager
def opened(plane: ControlPlane, name: str) -> Iterator[Rows]:
    """Open the compute or the identity database."""
    module = {"compute": compute, "identity": identity}[name]
    settings = Settings.model_validate({"state_dir": plane.directory, "database": plane.database})
    found = schema.connect(settings.database_url(name), module.database, module.shared)
    try:
        yield Rows(found)
        found.write_now(found.execute, "ANALYZE")  # as the server does by and by
    finally:
        found.close()


def copy_instance(plane: ControlPlane, id_: str, count: int) -> None:
    """Add copies of an instance, of the same project and host, made one after the other.

    Only the rows of the instances: what else they have (domain, claim, port) no list reads.
    """

    def write(rows: Rows) -> None:
        like = rows.row("instance", id_)
        copies = []
        for number in range(count):
            new = ids.new("i")
            changes = {"id": new, "name": f"copy-{new}", "hostname": f"copy-{new}"}
            made = {"domain_id": ids.new("d"), "create_time": like["create_time"] + number}
            copies.append({**like, **changes, **made})
        rows.insert("instance", copies)

    with opened(plane, "compute") as rows:
        rows.do(write, rows)


def add_hosts(plane: ControlPlane, count: int, *, full: bool) -> None:
    """Add hosts without agents; `full`: nine tenths of each are claimed.

    Within `hosts_reporting` they count as alive.
    """
    with opened(plane, "compute") as rows:
        for first in range(0, count, _BATCH):
            rows.do(_write_hosts, rows, range(first, min(first + _BATCH, count)), full)


@asynccontextmanager
async def hosts_reporting(plane: ControlPlane) -> AsyncIterator[None]:
    """Have every host heard of, as the agents' reports would."""

    def report() -> None:
        with opened(plane, "compute") as rows:
            rows.do(lambda: compute.Host.update(report_time=database.now()).execute())

    async def keep() -> None:
        while True:
            await asyncio.to_thread(report)
            await asyncio.sleep(_REPORT_S)

    keeping = asyncio.create_task(keep())
    try:
        yield
    finally:
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)


def _write_hosts(rows: Rows, numbers: range, full: bool) -> None:
    moment = database.now()
    for number in numbers:
        host_id = ids.new("h")
        compute.Host.create(
            id=host_id,
            name=f"bench-{number:05d}",
            vcpu_count=HOST_VCPUS,
            memory_mib=HOST_MEMORY_MIB,
            disk_gib=HOST_DISK_GIB,
            cpu_arch="x86_64",
            hypervisor_type="qemu",
            create_time=moment,
            update_time=moment,
            report_time=moment,
        )
        tables.changed("host", host_id, "", "ADDED")
        if full:
            rows.insert("claim", [_claim(host_id, moment) for _ in range(_CLAIMS)])


def _claim(host_id: str, moment: int) -> dict[str, Any]:
    return {
        "domain_id": ids.new("d"),
        "instance_id": ids.new("i"),
        "host_id": host_id,
        "vcpu_count": HOST_VCPUS * _CPU_RATIO // 10,
        "memory_mib": HOST_MEMORY_MIB // 10,
        "disk_gib": HOST_DISK_GIB // 10,
        "create_time": moment,
    }


def add_server_groups(plane: ControlPlane, count: int) -> list[str]:
    """Add server groups with anti-affinity, each with a member on every second host."""
    made = [ids.new("grp") for _ in range(count)]

    def write(rows: Rows) -> None:
        moment = database.now()
        hosts = [row.id for row in compute.Host.select(compute.Host.id)][::2]
        for id_ in made:
            compute.ServerGroup.create(
                id=id_,
                name=id_,
                create_time=moment,
                update_time=moment,
                policy="ANTI_AFFINITY",
                max_instances_per_host=1,
            )
            members = [{**_claim(each, moment), "server_group_id": id_} for each in hosts]
            rows.insert("claim", members)

    if count:
        with opened(plane, "compute") as rows:
            rows.do(write, rows)
    return made


def misplaced(plane: ControlPlane) -> int:
    """Return on how many hosts members of server groups are where they must not be."""
    with opened(plane, "compute") as rows:
        groups = rows.do(server_group_store.load_hard)
    return sum(len(group.misplaced()) for group in groups.values())


def overcommitted(plane: ControlPlane) -> int:
    """Return how many hosts have given out more than they have."""
    with opened(plane, "compute") as rows:
        records = rows.do(scheduler.load_hosts, Settings.model_validate({}), None)
    return sum(
        any(used > most for used, most in zip(record.claimed, record.limit, strict=True))
        for record in records.values()
        if record is not None
    )


def revoke(plane: ControlPlane, count: int) -> None:
    """Revoke the tokens of so many users, who have none."""
    with opened(plane, "identity") as rows:
        for first in range(0, count, _BATCH):
            users = [ids.new("u") for _ in range(min(_BATCH, count - first))]
            rows.do(lambda users=users: epoch_store.revoke(*users))
