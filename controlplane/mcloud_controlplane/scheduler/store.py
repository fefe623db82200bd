"""Hosts in the compute database: what a scheduler knows of them, and what they report."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import peewee

from mcloud.scheduler.v1 import placement_service_pb2
from mcloud_base import errors
from mcloud_controlplane.compute.model import Claim, Host, locked, locked_or_skipped, shared
from mcloud_controlplane.core import database, statements, tables
from mcloud_controlplane.core.database import Database
from mcloud_controlplane.core.statements import Kept
from mcloud_controlplane.scheduler.hosts import HostRecord, Resources
from mcloud_controlplane.settings import Settings

# What a HostRecord is made of.
_KNOWN = (
    Host.id, Host.name, Host.disabled, Host.availability_zone, Host.cpu_arch,
    Host.vcpu_count, Host.reserved_vcpu_count, Host.cpu_allocation_ratio,
    Host.memory_mib, Host.reserved_memory_mib, Host.memory_allocation_ratio,
    Host.disk_gib, Host.reserved_disk_gib, Host.disk_allocation_ratio,
    Host.failure_count, Host.report_time,
)  # fmt: skip
_NAMES = [field.name for field in _KNOWN]


def load_hosts(
    settings: Settings, found: Collection[str] | None
) -> Mapping[str, HostRecord | None]:
    """Return what is recorded of hosts: of all (None), or of these; None for one that is gone."""
    hosts = _hosts()
    if found is not None:
        hosts = hosts.where(Host.id.in_(list(found)))
    return {**dict.fromkeys(found or ()), **_records(settings, hosts.tuples())}


def lock_hosts(
    opened: Database, settings: Settings, found: Collection[str], *, wait: bool
) -> dict[str, HostRecord]:
    """Lock hosts' rows, and return what is recorded of them; not those that are gone.

    Args:
        wait: for whoever has one locked; otherwise that one is left out, too.
    """
    ids = list(found)
    if opened.is_postgresql:  # what is claimed is added up by a statement that begins afterwards
        lock = _LOCK if wait else _LOCK_OR_SKIP
        ids = [id_ for (id_,) in lock.run(opened.peewee, ids)]
    return _records(settings, _THESE.run(opened.peewee, ids)) if ids else {}


def _hosts() -> Any:
    """Return the query for hosts, each with the sums of its claims."""
    fn = peewee.fn
    sums = (
        fn.COALESCE(fn.SUM(Claim.vcpu_count), 0),
        fn.COALESCE(fn.SUM(Claim.memory_mib), 0),
        fn.COALESCE(fn.SUM(Claim.disk_gib), 0),
        fn.COUNT(Claim.domain_id),
    )
    return (
        Host.select(*_KNOWN, *sums)
        .join(Claim, peewee.JOIN.LEFT_OUTER, on=(Claim.host_id == Host.id))
        .where(Host.delete_time.is_null())
        .group_by(Host.id)
    )


def _rows(ids: Sequence[str]) -> Any:
    return Host.select(Host.id).where(Host.id.in_(ids)).order_by(Host.id)


_THESE = Kept(lambda ids: _hosts().where(Host.id.in_(ids)))
_LOCK = Kept(lambda ids: locked(_rows(ids)))
_LOCK_OR_SKIP = Kept(lambda ids: locked_or_skipped(_rows(ids)))


def _records(settings: Settings, rows: Iterable[Any]) -> dict[str, HostRecord]:
    records = {}
    for *values, vcpus, memory, disk, count in rows:
        row = SimpleNamespace(**dict(zip(_NAMES, values, strict=True)))
        records[row.id] = HostRecord(
            id=row.id,
            name=row.name,
            enabled=not row.disabled,
            zone=row.availability_zone,
            arch=row.cpu_arch,
            limit=limits(settings, row),
            claimed=(float(vcpus), float(memory), float(disk)),
            instance_count=count,
            failure_count=row.failure_count,
            report_time=row.report_time,
        )
    return records


def limits(settings: Settings, row: Any) -> Resources:
    """Return what may be claimed on a host: (vCPUs, MiB, GiB)."""
    return (
        float(
            int(
                (row.vcpu_count - row.reserved_vcpu_count)
                * (row.cpu_allocation_ratio or settings.cpu_allocation_ratio)
            )
        ),
        float(
            int(
                (row.memory_mib - row.reserved_memory_mib)
                * (row.memory_allocation_ratio or settings.memory_allocation_ratio)
            )
        ),
        float(
            int(
                (row.disk_gib - row.reserved_disk_gib)
                * (row.disk_allocation_ratio or settings.disk_allocation_ratio)
            )
        ),
    )


def load_and_changed(
    settings: Settings, after: int
) -> tuple[Mapping[str, HostRecord | None], set[str] | None]:
    """Return what is recorded of all hosts, and which changed after a revision (None: any may).

    The changes are read last: what is recorded by then and not read is among them.
    """
    records = load_hosts(settings, None)
    return records, changed_hosts(after)[1]


def changed_hosts(after: int | None) -> tuple[int, set[str] | None]:
    """Return the revision now, and the hosts whose row or claims changed after one; None: all.

    It is all, too, where the log does not reach back that far any more (core/pruner.py).
    """
    if after is None:
        return shared.revision(), None
    rows = database.execute(_CHANGED_HOSTS, [after]).fetchall()
    head, oldest, _ = rows[0]
    if after < head and (oldest is None or after + 1 < oldest):
        return int(head), None
    return int(head), {id_ for _, _, id_ in rows if id_ is not None}


# One statement, so that the revision is that of the changes; a row at least.
_CHANGED_HOSTS = """
    SELECT DISTINCT deployment.revision, (SELECT MIN(revision) FROM change), change.resource_id
    FROM deployment
    LEFT JOIN change ON change.type = 'host' AND change.revision > ?
    WHERE deployment.id = 1
"""


def take_report_stream(host_id: str, report: placement_service_pb2.ReportHostRequest) -> int:
    """Record a host's first report on a stream; return the stream's number.

    Raises:
        errors.AlreadyExists: HOST_NAME_TAKEN.
    """
    taken = Host.select().where(
        (Host.name == report.name) & (Host.id != host_id) & Host.delete_time.is_null()
    )
    if taken.exists():
        raise errors.AlreadyExists(
            "HOST_NAME_TAKEN",
            f"another host is called {report.name}; give this one a name of its own",
        )
    moment = database.now()
    row = Host.find(host_id)
    if row is None:
        Host.insert(
            id=host_id, name=report.name, create_time=moment, update_time=moment
        ).on_conflict_ignore().execute()
        tables.changed("host", host_id, "", "ADDED")
    elif row.delete_time is not None:
        raise errors.PermissionDenied(
            "HOST_DELETED", f"host {host_id} has been deleted; enrol again"
        )
    Host.update(report_number=Host.report_number + 1).where(Host.id == host_id).execute()
    return int(Host.get_by_id(host_id).report_number)


def apply_report(
    host_id: str, number: int, report: placement_service_pb2.ReportHostRequest
) -> bool:
    """Record what a host tells. False: the stream is old."""
    moment = database.now()
    mine = (Host.id == host_id) & (Host.report_number == number)
    tables.changed("host", host_id, "")
    return bool(
        Host.update(
            report_time=moment,
            incarnation=report.incarnation,
            name=report.name,
            vcpu_count=report.total.vcpu_count,
            memory_mib=report.total.memory_mib,
            disk_gib=report.total.disk_gib,
            reserved_vcpu_count=report.reserved.vcpu_count,
            reserved_memory_mib=report.reserved.memory_mib,
            reserved_disk_gib=report.reserved.disk_gib,
            underlay_ip=report.underlay_ip,
            agent_version=report.agent_version,
            hypervisor_type=report.hypervisor_type,
            hypervisor_version=report.hypervisor_version,
            cpu_arch=report.cpu_arch,
            traits=list(report.traits),
            update_time=moment,
            version=Host.version + 1,
        )
        .where(mine)
        .execute()
    )


def keep_alive(
    store: Database, streams: Collection[tuple[str, int]]
) -> tuple[set[tuple[str, int]], int]:
    """Record that hosts have reported, with nothing new to tell.

    Args:
        streams: (host, number of its stream).

    Returns:
        Those that are their hosts' newest, and the time that was recorded.
    """
    moment = database.now()
    ids = statements.padded([id_ for id_, _ in streams])
    rows = Host.select(Host.id, Host.report_number).where(Host.id.in_(ids))
    newest = {(row.id, row.report_number) for row in store.locked(rows.order_by(Host.id))}
    current = newest & set(streams)
    here = Host.id.in_(statements.padded([id_ for id_, _ in current]))
    Host.update(report_time=moment).where(here).execute()
    return current, moment


def report_times() -> dict[str, int]:
    """Return when each host has reported last: µs since 1970."""
    query: Any = Host.select(Host.id, Host.report_time).where(Host.delete_time.is_null())
    return dict(query.tuples())
