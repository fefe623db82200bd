"""What the volumes' records always are (core/invariants.py), and what is on hosts of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import peewee

from mcloud.volume.v1 import invariant_service_pb2 as pb
from mcloud.volume.v1 import invariant_service_pb2_grpc
from mcloud_base import errors
from mcloud_controlplane.core import database, invariants, tables
from mcloud_controlplane.core.auth import Context
from mcloud_controlplane.core.invariants import Invariant, Violation
from mcloud_controlplane.volume import storage_store, volume_store
from mcloud_controlplane.volume.model import Attachment, Volume, locked, shared

_PAGE = 1000
_exists: Callable[[Any], Any] = peewee.fn.EXISTS
# A volume's state beside that of its attachment.
_STATES = {"RESERVED": "RESERVED", "CONNECTED": "IN_USE", "DISCONNECTING": "IN_USE"}


def _without_volume() -> Any:
    return ~_exists(Volume.select(Volume.id).where(Volume.id == Attachment.volume_id))


def _attachments() -> Iterator[Violation]:
    for row in Attachment.select().where(_without_volume()).order_by(Attachment.id):
        yield Violation(
            subject=row.id,
            owner_id=row.instance_id,
            host_id=row.host_id,
            detail=f"it is of volume {row.volume_id}, which is not there",
        )


def _drop_attachment(violation: Violation) -> bool:
    this = (Attachment.id == violation.subject) & _without_volume()
    row = locked(Attachment.select().where(this)).first()
    if row is None:
        return False
    row.delete_instance()
    tables.changed("attachment", row.id, row.project_id, "DELETED")
    return True


def _differing() -> Any:
    """Return the volumes whose attachment does not say the same, or is not there.

    One statement, so that it sees the two as they are at one moment.
    """
    mine = Attachment.volume_id == Volume.id
    same = mine & (Attachment.id == Volume.attachment_id)
    same &= Attachment.instance_id == Volume.instance_id
    states = peewee.Case(Attachment.state, tuple(_STATES.items()))
    same &= states == Volume.state
    some = Attachment.select(Attachment.id).where(mine)
    one = Attachment.select(Attachment.id).where(same)
    free = (Volume.attachment_id == "") & ~Volume.state.in_(("RESERVED", "IN_USE"))
    return (_exists(some) & ~_exists(one)) | (~_exists(some) & ~free)


def _volumes() -> Iterator[Violation]:
    for row in Volume.select().where(_differing()).order_by(Volume.id):
        yield Violation(
            subject=row.id,
            owner_id=row.instance_id,
            host_id=row.host_id,
            detail=f"it is {row.state} with attachment {row.attachment_id or '(none)'}, "
            "and its attachments say otherwise",
        )


def _follow_attachment(violation: Violation) -> bool:
    this = (Volume.id == violation.subject) & _differing()
    row = locked(Volume.select().where(this)).first()
    if row is None:
        return False
    found = Attachment.get_or_none(Attachment.volume_id == row.id)
    row.attachment_id = found.id if found else ""
    row.instance_id = found.instance_id if found else ""
    if found:
        row.state = _STATES[found.state]
    elif row.state in ("RESERVED", "IN_USE"):
        row.state = "AVAILABLE"
    volume_store.save(row)
    return True


def _deserted() -> Any:
    table = shared.operation
    working = table.select(table.id).where(
        (table.resource_id == Volume.id) & table.state.in_(invariants.RUNNING)
    )
    stuck = (Volume.state == "CREATING") | ((Volume.state == "DELETING") & ~Volume.absent)
    return stuck & ~_exists(working)


def _transitions() -> Iterator[Violation]:
    for row in Volume.select().where(_deserted()).order_by(Volume.id):
        yield Violation(
            subject=row.id,
            host_id=row.host_id,
            detail=f"it is {row.state}, and no operation works on it",
            repair="put it in ERROR; its owner can delete it"
            if row.state == "CREATING"
            else "have its host remove it",
        )


def _settle(violation: Violation) -> bool:
    this = (Volume.id == violation.subject) & _deserted()
    row = locked(Volume.select().where(this)).first()
    if row is None:
        return False
    if row.state == "CREATING":
        row.state, row.fault = "ERROR", "the operation that made it was lost"
        volume_store.save(row)
    elif storage_store.is_gone(row):
        storage_store.forget(row)
    else:
        storage_store.bury(row)
        volume_store.save(row)
    return True


INVARIANTS = (
    Invariant("ATTACHMENT_WITHOUT_VOLUME", _attachments, _drop_attachment, "end the attachment"),
    Invariant("VOLUME_DIFFERS", _volumes, _follow_attachment, "have it say what they say"),
    Invariant("VOLUME_WITHOUT_OPERATION", _transitions, _settle),
    invariants.of_operations(shared, (volume_store.CREATE, volume_store.DELETE)),
)
count = invariants.count_rows(Volume, Attachment)


class InvariantServicer(
    invariants.InvariantServicer, invariant_service_pb2_grpc.InvariantServiceServicer
):
    """Serves mcloud.volume.v1.InvariantService."""

    async def ListStoredVolumes(
        self, request: pb.ListStoredVolumesRequest, context: Context
    ) -> pb.ListStoredVolumesResponse:
        """Return what is to be on hosts."""
        return await self._database.read(_stored, request.after_id)

    async def RefreshStoredVolume(
        self, request: pb.RefreshStoredVolumeRequest, context: Context
    ) -> pb.RefreshStoredVolumeResponse:
        """Have a host go over a volume."""
        await self._database.write(_refresh, request)
        return pb.RefreshStoredVolumeResponse()

    async def BuryUnknownVolume(
        self, request: pb.BuryUnknownVolumeRequest, context: Context
    ) -> pb.BuryUnknownVolumeResponse:
        """Have a host remove what no row names."""
        await self._database.write(_bury_unknown, request)
        return pb.BuryUnknownVolumeResponse()


def _stored(after: str) -> pb.ListStoredVolumesResponse:
    connected = Attachment.select(Attachment.id).where(
        (Attachment.volume_id == Volume.id) & (Attachment.state != "RESERVED")
    )
    query: Any = (
        Volume.select(Volume, _exists(connected).alias("served"))
        .where((Volume.id > after) & (Volume.host_id != "") & (Volume.desired_generation > 0))
        .order_by(Volume.id)
        .limit(_PAGE)
    )
    return pb.ListStoredVolumesResponse(
        volumes=[
            pb.StoredVolume(
                volume_id=row.id,
                host_id=row.host_id,
                desired_generation=row.desired_generation,
                observed_generation=row.observed_generation,
                absent=row.absent,
                served=bool(row.served),
            )
            for row in query
        ]
    )


def _refresh(request: pb.RefreshStoredVolumeRequest) -> None:
    row = locked(Volume.select().where(Volume.id == request.volume_id)).first()
    if row is not None and row.desired_generation == request.generation:
        row.desired_generation += 1
        volume_store.save(row)


def _bury_unknown(request: pb.BuryUnknownVolumeRequest) -> None:
    """Make the row of a tombstone; it goes when the host says that the volume is gone.

    Raises:
        errors.WrongState: VOLUME_KNOWN.
    """
    row = Volume.find(request.volume_id)
    if row is not None:
        if row.host_id == request.host_id and row.absent:
            return
        raise errors.WrongState(
            "VOLUME_KNOWN", f"volume {row.id} is there; delete it as its owner", id=row.id
        )
    moment = database.now()
    Volume.create(
        id=request.volume_id,
        create_time=moment,
        update_time=moment,
        delete_time=moment,
        size_gib=0,
        state="DELETING",
        host_id=request.host_id,
        desired_generation=request.generation + 1,
        absent=True,
    )
    tables.changed("volume", request.volume_id, "", "ADDED")
