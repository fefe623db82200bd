"""The hosts that store volumes: which has room, what each is to have, what each has."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import peewee
import structlog
from google.rpc import status_pb2

from mcloud.common.v1 import session_pb2
from mcloud.volume.v1 import export_pb2
from mcloud_base import errors
from mcloud_controlplane.core import database, sessions, tables
from mcloud_controlplane.core.session_follower import Pending
from mcloud_controlplane.volume.model import Attachment, StorageHost, Volume, locked, shared

log = structlog.get_logger()

# A capability by which an agent says how much it stores at most: "storage_gib=500".
_CAPACITY = re.compile(r"storage_gib=(\d{1,9})")
_RECENTLY_US = 120_000_000  # that a host which has fallen silent may be heard of again


def on_hello(host_id: str, hello: session_pb2.Hello) -> None:
    """Note how much a host stores."""
    found = [match for text in hello.capabilities if (match := _CAPACITY.fullmatch(text))]
    capacity = int(found[0][1]) if found else 0
    StorageHost.insert(host_id=host_id, capacity_gib=capacity).on_conflict(
        conflict_target=[StorageHost.host_id], update={"capacity_gib": capacity}
    ).execute()


def is_silent(host_id: str) -> bool:
    """Tell whether a host's lease has run out."""
    session = shared.host_session
    here = (session.host_id == host_id) & shared.connected()
    return not session.select(session.host_id).where(here).exists()


def silent(host_id: str) -> errors.Unavailable:
    """Return the error for a host that does not answer."""
    return errors.Unavailable(
        "STORAGE_HOST_SILENT",
        f"host {host_id}, which stores the volume, does not answer",
        details=(errors.retry_after(5),),
        host_id=host_id,
    )


def host_error(row: Volume) -> errors.Error | None:
    """Return what its host says hinders it."""
    if row.error is None:
        return None
    return errors.from_status(status_pb2.Status.FromString(bytes(row.error)))


def why(row: Volume) -> errors.Unavailable:
    """Return why a wait for a volume's host was in vain."""
    error = host_error(row)
    if error is None:
        return silent(row.host_id)
    return errors.Unavailable(
        "STORAGE_HOST_FAILED",
        f"host {row.host_id}, which stores the volume, could not do it: {error.message}",
        host_id=row.host_id,
    )


def choose(size_gib: int) -> str:
    """Return the host with the least on it of those that have room, and lock its room.

    Raises:
        errors.Exhausted: NO_STORAGE.
        errors.Unavailable: STORAGE_HOST_SILENT: none answers, but some did a moment ago. So it is
            after the database was away, in which no host's word could be written down.
    """
    session = shared.host_session
    # Outside of the lock: in which order to try. The lock is taken on one row at a time.
    alive = session.select(session.host_id).where(session.storage & shared.connected())
    hosts = [row.host_id for row in alive]
    used = _used_gib(hosts)
    for host_id in sorted(hosts, key=lambda host: (used.get(host, 0), host)):
        row = locked(StorageHost.select().where(StorageHost.host_id == host_id)).first()
        now_used = _used_gib([host_id]).get(host_id, 0)
        if row is not None and (not row.capacity_gib or now_used + size_gib <= row.capacity_gib):
            return str(host_id)
    recently = session.lease_expire_time > database.now() - _RECENTLY_US
    if not hosts and session.select().where(session.storage & recently).exists():
        raise errors.Unavailable(
            "STORAGE_HOST_SILENT",
            "no host that stores volumes answers just now; try again in a moment",
            details=(errors.retry_after(2),),
        )
    raise errors.Exhausted(
        "NO_STORAGE",
        f"no host that stores volumes has room for {size_gib} GiB ({len(hosts)} answer)",
        size_gib=size_gib,
        hosts=len(hosts),
    )


def _used_gib(hosts: Iterable[str]) -> dict[str, int]:
    query: Any = (
        Volume.select(Volume.host_id, peewee.fn.SUM(Volume.size_gib))
        .where(Volume.host_id.in_(list(hosts)))
        .group_by(Volume.host_id)
        .tuples()
    )
    return {host_id: int(total) for host_id, total in query}


def is_gone(row: Volume) -> bool:
    """Tell whether nothing of a volume is on any host."""
    return not row.host_id or not row.desired_generation


def bury(row: Volume) -> None:
    """Desire that its host removes a volume. The row is not saved."""
    if not row.absent and not is_gone(row):
        row.absent = True
        row.desired_generation += 1


def forget(row: Volume) -> None:
    """Record that nothing of a volume is on a host any more."""
    if row.delete_time is not None:
        row.delete_instance()
        tables.changed("volume", row.id, row.project_id, "DELETED")
        return
    row.host_id, row.absent, row.error, row.endpoints = "", False, None, []
    row.desired_generation = row.observed_generation = row.allocated_bytes = 0
    row.save()
    tables.changed("volume", row.id, row.project_id)


class VolumeSource:
    """What hosts are to store and serve, for their sessions."""

    def desired(self, host_ids: Sequence[str]) -> Mapping[str, Sequence[session_pb2.Desired]]:
        """Return what the hosts have not reached."""
        return _desired(host_ids, Volume.observed_generation < Volume.desired_generation)

    def pending(self, *, urgent: bool) -> Sequence[Pending]:
        """Return the volumes whose desired generation their hosts have not reached."""
        query: Any = Volume.select(
            Volume.host_id, Volume.id, Volume.desired_generation, Volume.absent
        ).where(Volume.observed_generation < Volume.desired_generation)
        return [Pending(*row) for row in query.tuples()]

    def everything(self, host_id: str) -> Sequence[session_pb2.Desired]:
        """Return everything that is to be on the host, and its tombstones."""
        return _desired([host_id], Volume.desired_generation > 0).get(host_id, [])

    def observed(self, reports: Sequence[sessions.HostReport], epoch: str) -> None:
        """Record what hosts have of volumes."""
        for host_id, incarnation, report in reports:
            if report.epoch == epoch:
                self._observe(host_id, incarnation, report)

    def _observe(self, host_id: str, incarnation: int, report: session_pb2.Observed) -> None:
        row = locked(
            Volume.select().where((Volume.id == report.id) & (Volume.host_id == host_id))
        ).first()
        if row is None:
            return
        if (incarnation, report.sequence) <= (row.incarnation, row.sequence):
            return
        before = (row.observed_generation, row.error, row.endpoints)
        row.incarnation, row.sequence = incarnation, report.sequence
        if report.HasField("error"):
            row.error = report.error.SerializeToString()
        elif report.absent and row.absent and report.generation >= row.desired_generation:
            forget(row)
            return
        elif report.absent and not row.absent:
            # The host has not got it: what is desired is sent again, and it says what it finds.
            row.observed_generation = 0
            log.warning("volume is not on its host", volume=row.id, host=host_id)
        else:
            row.observed_generation, row.error = report.generation, None
            _apply_status(row, report)
        row.save()
        if before != (row.observed_generation, row.error, row.endpoints):
            tables.changed("volume", row.id, row.project_id)
        if row.error is None and row.observed_generation >= row.desired_generation:
            _end_disconnecting(row)


def _apply_status(row: Volume, report: session_pb2.Observed) -> None:
    status = export_pb2.VolumeOnHost()
    if not report.status.Unpack(status):
        return
    row.allocated_bytes = status.allocated_bytes
    row.endpoints = [
        {
            "attachment_id": endpoint.attachment_id,
            "address": endpoint.address,
            "port": endpoint.port,
            "export_name": endpoint.export_name,
        }
        for endpoint in status.endpoints
    ]


def _end_disconnecting(row: Volume) -> None:
    """Free attachments of their hosts: the volume is served to nobody any more."""
    for attachment in Attachment.select().where(
        (Attachment.volume_id == row.id) & (Attachment.state == "DISCONNECTING")
    ):
        attachment.state = row.state = "RESERVED"
        attachment.host_id = attachment.domain_id = attachment.certificate_subject = ""
        for changed, type_ in ((attachment, "attachment"), (row, "volume")):
            changed.version += 1
            changed.update_time = database.now()
            changed.save()
            tables.changed(type_, changed.id, changed.project_id)


def _desired(
    host_ids: Sequence[str], condition: peewee.Expression
) -> dict[str, list[session_pb2.Desired]]:
    """Return what is desired of volumes, by host."""
    condition &= Volume.host_id.in_(list(host_ids))
    clients: dict[str, list[export_pb2.ExportClient]] = {}
    connected = (
        Attachment.select()
        .join(Volume, on=(Attachment.volume_id == Volume.id))
        .where((Attachment.state == "CONNECTED") & condition)
        .order_by(Attachment.id)
    )
    for each in connected:
        clients.setdefault(each.volume_id, []).append(
            export_pb2.ExportClient(
                attachment_id=each.id,
                host_id=each.host_id,
                certificate_subject=each.certificate_subject,
            )
        )
    found: dict[str, list[session_pb2.Desired]] = {}
    for row in Volume.select().where(condition).order_by(Volume.id):
        spec = None
        if not row.absent:
            spec = export_pb2.VolumeDesired(
                size_bytes=row.size_gib << 30, clients=clients.get(row.id, ())
            )
        desired = sessions.desired(row.id, row.desired_generation, spec)
        found.setdefault(row.host_id, []).append(desired)
    return found
