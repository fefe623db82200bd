"""Hosts, as operators see and change them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import peewee
from google.protobuf.message import Message

from mcloud.compute.v1 import host_pb2, host_service_pb2
from mcloud_base import errors
from mcloud_controlplane.compute.model import Claim, Domain, Host, locked, shared
from mcloud_controlplane.core import auth, convert, database, listing, tables
from mcloud_controlplane.core.mutation import Mutation

_SILENT_US = 30_000_000
_MASK = (
    "labels",
    "spec.disabled",
    "spec.disabled_reason",
    "spec.availability_zone",
    "spec.cpu_allocation_ratio",
    "spec.memory_allocation_ratio",
    "spec.disk_allocation_ratio",
)


def messages(rows: Sequence[Host]) -> list[host_pb2.Host]:
    """Return hosts' rows as messages, in one statement for any number of them."""
    fn = peewee.fn
    sums: Any = (
        Claim.select(
            Claim.host_id,
            fn.SUM(Claim.vcpu_count),
            fn.SUM(Claim.memory_mib),
            fn.SUM(Claim.disk_gib),
            fn.COUNT(Claim.domain_id),
        )
        .where(Claim.host_id.in_([row.id for row in rows]))
        .group_by(Claim.host_id)
    )
    claimed = {host: values for host, *values in sums.tuples()}
    return [_message(row, claimed.get(row.id, [0, 0, 0, 0])) for row in rows]


def _message(row: Host, claimed: Sequence[Any]) -> host_pb2.Host:
    up = abs(database.now() - row.report_time) <= _SILENT_US  # not of before a clock was set back
    status = host_pb2.HostStatus(
        state=host_pb2.HostStatus.STATE_UP if up else host_pb2.HostStatus.STATE_DOWN,
        underlay_ip=row.underlay_ip,
        agent_version=row.agent_version,
        hypervisor_type=row.hypervisor_type,
        hypervisor_version=row.hypervisor_version,
        cpu_arch=row.cpu_arch,
        total=host_pb2.HostResources(
            vcpu_count=row.vcpu_count, memory_mib=row.memory_mib, disk_gib=row.disk_gib
        ),
        reserved=host_pb2.HostResources(
            vcpu_count=row.reserved_vcpu_count,
            memory_mib=row.reserved_memory_mib,
            disk_gib=row.reserved_disk_gib,
        ),
        claimed=host_pb2.HostResources(
            vcpu_count=int(claimed[0]), memory_mib=int(claimed[1]), disk_gib=int(claimed[2])
        ),
        instance_count=int(claimed[3]),
    )
    if row.report_time:
        status.last_report_time.CopyFrom(convert.timestamp(row.report_time))
    return host_pb2.Host(
        metadata=convert.metadata(row),
        spec=host_pb2.HostSpec.FromString(bytes(row.spec)),
        status=status,
    )


def get(id_: str, *, lock: bool = False) -> Host:
    """Return a host.

    Args:
        lock: it is to be changed.

    Raises:
        errors.NotFound: HOST_NOT_FOUND.
    """
    query = Host.select().where((Host.id == id_) & Host.delete_time.is_null())
    row: Host | None = (locked(query) if lock else query).first()
    if row is None:
        raise errors.NotFound("HOST_NOT_FOUND", f"there is no host {id_}", id=id_)
    return row


def get_message(id_: str) -> host_pb2.Host:
    """Return a host as its message."""
    return messages([get(id_)])[0]


def list_page(
    caller: auth.Caller, request: host_service_pb2.ListHostsRequest
) -> host_service_pb2.ListHostsResponse:
    """Return a page."""
    revision = shared.revision()
    page = listing.page(
        Host,
        request,
        caller,
        fields={
            "id": Host.id,
            "name": Host.name,
            "disabled": Host.disabled,
            "state": _state_is,
        },
        where=Host.delete_time.is_null(),
        visible=True,
    )
    return host_service_pb2.ListHostsResponse(
        hosts=messages(page.rows), next_page_token=page.next_page_token, revision=str(revision)
    )


def _state_is(value: str) -> Any:
    if value not in ("UP", "DOWN"):
        raise errors.InvalidArgument("BAD_FILTER", "state is UP or DOWN")
    moment = database.now()
    alive = Host.report_time.between(moment - _SILENT_US, moment + _SILENT_US)
    return alive if value == "UP" else ~alive


def load(found: list[str]) -> Mapping[str, Message]:
    """Return the messages of these ids, for a watch."""
    rows = list(Host.select().where(Host.id.in_(found) & Host.delete_time.is_null()))
    return {message.metadata.id: message for message in messages(rows)}


def update(work: Mutation, request: host_service_pb2.UpdateHostRequest) -> host_pb2.Host:
    """Change what the operator decides."""
    row = get(request.id, lock=True)
    spec = convert.apply_mask(row, request, host_pb2.HostSpec, _MASK)
    row.disabled = spec.disabled
    row.availability_zone = spec.availability_zone
    for field in ("cpu_allocation_ratio", "memory_allocation_ratio", "disk_allocation_ratio"):
        value = getattr(spec, field)
        if not 0 <= value <= 1000:
            raise errors.bad_field(f"spec.{field}", "must be between 0 and 1000")
        setattr(row, field, value)
    row.save()
    work.concerns("host", row.id, row.name)
    tables.changed("host", row.id, "")
    return messages([row])[0]


def delete(work: Mutation, request: host_service_pb2.DeleteHostRequest) -> host_pb2.Host:
    """Forget a host that carries nothing."""
    row = get(request.id, lock=True)
    convert.require_version(row, request.resource_version)
    carried = Domain.select().where((Domain.host_id == row.id) & Domain.absent_time.is_null())
    if carried.exists():
        raise errors.WrongState(
            "HOST_IN_USE",
            f"host {row.name} carries {carried.count()} domain(s); delete their instances first",
        )
    row.delete_time = row.update_time = database.now()
    row.version += 1
    row.save()
    work.concerns("host", row.id, row.name)
    tables.changed("host", row.id, "", "DELETED")
    return messages([row])[0]
