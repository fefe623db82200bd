"""The scheduler's part of the compute database: hosts, claims, explanations."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import peewee

from mcloud.scheduler.v1 import placement_pb2, placement_service_pb2
from mcloud_base import errors
from mcloud_controlplane.compute.model import (
    Claim,
    Domain,
    Host,
    Instance,
    Placement,
    shared,
)
from mcloud_controlplane.core import convert, database, tables
from mcloud_controlplane.core.database import Database
from mcloud_controlplane.scheduler.hosts import HostRecord
from mcloud_controlplane.settings import Settings


def load_hosts(
    settings: Settings, found: Collection[str] | None
) -> Mapping[str, HostRecord | None]:
    """Return what is recorded of hosts: of all (None), or of these; None for one that is gone."""
    living = Host.delete_time.is_null()
    query = Host.select().where(living if found is None else living & Host.id.in_(list(found)))
    fn = peewee.fn
    sums: Any = Claim.select(
        Claim.host_id,
        fn.SUM(Claim.vcpu_count),
        fn.SUM(Claim.memory_mib),
        fn.SUM(Claim.disk_gib),
        fn.COUNT(Claim.domain_id),
    ).group_by(Claim.host_id)
    if found is not None:
        sums = sums.where(Claim.host_id.in_(list(found)))
    claimed = {host: (float(v), float(m), float(d), int(n)) for host, v, m, d, n in sums.tuples()}
    records: dict[str, HostRecord | None] = dict.fromkeys(found or ())
    for row in query:
        vcpus, memory, disk, count = claimed.get(row.id, (0.0, 0.0, 0.0, 0))
        records[row.id] = HostRecord(
            id=row.id,
            name=row.name,
            enabled=not row.disabled,
            zone=row.availability_zone,
            arch=row.cpu_arch,
            limit=limits(settings, row),
            claimed=(vcpus, memory, disk),
            instance_count=count,
            failure_count=row.failure_count,
            report_time=row.report_time,
        )
    return records


def limits(settings: Settings, row: Any) -> tuple[float, float, float]:
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
    head = shared.revision()
    oldest = shared.change.select(peewee.fn.MIN(shared.change.revision)).scalar()
    if after is None or (after < head and (oldest is None or after + 1 < oldest)):
        return head, None
    rows = (
        shared.change.select(shared.change.resource_id)
        .where((shared.change.revision > after) & (shared.change.type == "host"))
        .distinct()
    )
    return head, {row.resource_id for row in rows}


def find_claim(domain_id: str) -> placement_pb2.Claim | None:
    """Return a domain's claim."""
    row = Claim.get_or_none(Claim.domain_id == domain_id)
    return None if row is None else _claim(row)


def claim(
    store: Database,
    settings: Settings,
    request: placement_service_pb2.SelectDestinationsRequest,
    host_id: str,
    explanation: placement_pb2.PlacementExplanation,
    *,
    wait: bool = False,
) -> placement_pb2.Claim | None:
    """Hold room on a host and queue the domain there, in one transaction; None if it is taken.

    The operation's row is compared with the lease number, the host's row is locked, then the
    conditional INSERT repeats every constraint (a conditional INSERT alone overcommitted on
    PostgreSQL: 33 of 20).

    Args:
        wait: for whoever has the host's row locked; otherwise that is None, too.

    Raises:
        errors.Conflict: STALE_LEASE.
        errors.WrongState: ID_RETIRED, the domain was removed already.
    """
    check_lease(store, request.operation_id, request.lease_number)
    earlier = Claim.get_or_none(Claim.domain_id == request.domain_id)
    if earlier is not None:
        return _claim(earlier)
    if Domain.select().where(Domain.id == request.domain_id).exists():
        raise errors.WrongState(
            "ID_RETIRED", f"domain {request.domain_id} has been removed", id=request.domain_id
        )
    query = Host.select().where((Host.id == host_id) & Host.delete_time.is_null() & ~Host.disabled)
    host = (store.locked(query) if wait else store.locked_or_skipped(query)).first()
    if host is None:
        return None
    need, moment = request.resources, database.now()
    vcpus, memory, disk = limits(settings, host)
    if not _insert_if_room(request, host_id, (vcpus, memory, disk), moment):
        return None
    Domain.create(
        id=request.domain_id,
        instance_id=request.instance_id,
        project_id=request.project_id,
        host_id=host_id,
        operation_id=request.operation_id,
        generation=1,
        create_time=moment,
    )
    Instance.update(
        host_id=host_id,
        domain_id=request.domain_id,
        version=Instance.version + 1,
        update_time=moment,
    ).where(Instance.id == request.instance_id).execute()
    explanation.chosen_host_id, explanation.chosen_host_name = host_id, host.name
    record_placement(request, explanation)
    tables.changed("host", host_id, "")
    tables.changed("domain", request.domain_id, request.project_id, "ADDED")
    tables.changed("instance", request.instance_id, request.project_id)
    return placement_pb2.Claim(
        domain_id=request.domain_id,
        host_id=host_id,
        host_name=host.name,
        resources=need,
        create_time=convert.timestamp(moment),
    )


def _insert_if_room(
    request: placement_service_pb2.SelectDestinationsRequest,
    host_id: str,
    limit: tuple[float, float, float],
    moment: int,
) -> bool:
    need = request.resources
    fn = peewee.fn

    def used(column: Any) -> Any:
        # (A select itself takes + for UNION.)
        return fn.COALESCE(Claim.select(fn.SUM(column)).where(Claim.host_id == host_id), 0)

    def value(item: Any, kind: str) -> Any:
        return peewee.Value(item).cast(kind)  # PostgreSQL cannot tell a parameter's type here

    row = (
        value(request.domain_id, "text"),
        value(request.instance_id, "text"),
        value(host_id, "text"),
        value(need.vcpu_count, "integer"),
        value(need.memory_mib, "bigint"),
        value(need.disk_gib, "bigint"),
        value(moment, "bigint"),
    )
    room = peewee.Select(None, row).where(
        (used(Claim.vcpu_count) + need.vcpu_count <= limit[0])
        & (used(Claim.memory_mib) + need.memory_mib <= limit[1])
        & (used(Claim.disk_gib) + need.disk_gib <= limit[2])
    )
    columns = [
        Claim.domain_id, Claim.instance_id, Claim.host_id, Claim.vcpu_count,
        Claim.memory_mib, Claim.disk_gib, Claim.create_time,
    ]  # fmt: skip
    Claim.insert_from(room, columns).execute()
    return bool(Claim.select().where(Claim.domain_id == request.domain_id).exists())


def check_lease(store: Database, operation_id: str, lease_number: int) -> None:
    """Refuse a runner that has been overtaken. Locks the operation's row.

    Raises:
        errors.Conflict: STALE_LEASE.
    """
    table = shared.operation
    row = store.locked(table.select(table.lease_number).where(table.id == operation_id)).first()
    if row is not None and row.lease_number != lease_number:
        raise errors.Conflict(
            "STALE_LEASE", f"another runner works on {operation_id}", id=operation_id
        )


def record_placement(
    request: placement_service_pb2.SelectDestinationsRequest,
    explanation: placement_pb2.PlacementExplanation,
) -> None:
    """Store the explanation of an attempt, successful or not."""
    moment = database.now()
    attempt = 1 + Placement.select().where(Placement.domain_id == request.domain_id).count()
    explanation.domain_id, explanation.attempt = request.domain_id, attempt
    explanation.time.CopyFrom(convert.timestamp(moment))
    Placement.create(
        domain_id=request.domain_id,
        attempt=attempt,
        instance_id=request.instance_id,
        explanation=explanation.SerializeToString(),
        time=moment,
    )


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
    row = Host.get_or_none(Host.id == host_id)
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
    rows = Host.select(Host.id, Host.report_number).where(Host.id.in_([id_ for id_, _ in streams]))
    newest = {(row.id, row.report_number) for row in store.locked(rows.order_by(Host.id))}
    current = newest & set(streams)
    Host.update(report_time=moment).where(Host.id.in_([id_ for id_, _ in current])).execute()
    return current, moment


def report_times() -> dict[str, int]:
    """Return when each host has reported last: µs since 1970."""
    query = Host.select(Host.id, Host.report_time).where(Host.delete_time.is_null())
    return {row.id: row.report_time for row in query}


def _claim(row: Any) -> placement_pb2.Claim:
    host = Host.get_or_none(Host.id == row.host_id)
    return placement_pb2.Claim(
        domain_id=row.domain_id,
        host_id=row.host_id,
        host_name=host.name if host else "",
        resources=placement_pb2.Resources(
            vcpu_count=row.vcpu_count, memory_mib=row.memory_mib, disk_gib=row.disk_gib
        ),
        create_time=convert.timestamp(row.create_time),
    )
