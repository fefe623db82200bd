"""Volumes in the database."""

from __future__ import annotations

import secrets
from collections.abc import Mapping

from google.protobuf import any_pb2
from google.protobuf.message import Message

from mcloud.volume.v1 import volume_pb2, volume_service_pb2
from mcloud_base import errors, ids
from mcloud_controlplane.core import auth, contract, convert, database, listing, tables
from mcloud_controlplane.core.mutation import Mutation
from mcloud_controlplane.volume import quota_store, storage_store
from mcloud_controlplane.volume.model import Volume, locked, shared

CREATE = "create_volume"
DELETE = "delete_volume"
OPERATION_DEADLINE_S = 180.0


def message(row: Volume) -> volume_pb2.Volume:
    """Return a volume's row as its message."""
    return volume_pb2.Volume(
        metadata=convert.metadata(row),
        spec=volume_pb2.VolumeSpec.FromString(bytes(row.spec)),
        status=volume_pb2.VolumeStatus(
            state=contract.enum_value(row.state, volume_pb2.VolumeStatus.State),
            host_id=row.host_id,
            attachment_id=row.attachment_id,
            instance_id=row.instance_id,
            fault=row.fault,
        ),
    )


def not_found(id_: str) -> errors.NotFound:
    """Return the error for a volume that is not there, or not there for the caller."""
    return errors.NotFound("VOLUME_NOT_FOUND", f"there is no volume {id_}", id=id_)


def get(caller: auth.Caller, id_: str) -> Volume:
    """Return a volume of the caller's, also one that is being deleted.

    Raises:
        errors.NotFound: VOLUME_NOT_FOUND.
    """
    row = Volume.find(id_)
    if row is None or not caller.sees(row.project_id):
        raise not_found(id_)
    return row


def _get_locked(caller: auth.Caller, id_: str) -> Volume:
    row: Volume | None = locked(Volume.select().where(Volume.id == id_)).first()
    if row is None or not caller.sees(row.project_id):
        raise not_found(id_)
    return row


def create(work: Mutation, request: volume_service_pb2.CreateVolumeRequest) -> None:
    """Record a volume; the workflow has it made."""
    size_gib = request.spec.size_gib
    quota_store.require_volume(work.caller.project_id, size_gib)
    storage_store.choose(size_gib)  # to refuse at once what cannot be; the workflow decides
    row = Volume.create(
        **convert.new_row("vol", request, work.caller.project_id),
        size_gib=size_gib,
        state="CREATING",
    )
    work.concerns("volume", row.id, row.name)
    work.start(CREATE, "{}", deadline_s=OPERATION_DEADLINE_S)
    tables.changed("volume", row.id, row.project_id, "ADDED")


def update(work: Mutation, request: volume_service_pb2.UpdateVolumeRequest) -> volume_pb2.Volume:
    """Change what the mask names."""
    row = _get_locked(work.caller, request.id)
    allowed = ("name", "labels", "spec.description")
    convert.apply_mask(row, request, volume_pb2.VolumeSpec, allowed)
    row.save()
    work.concerns("volume", row.id, row.name, row.project_id)
    tables.changed("volume", row.id, row.project_id)
    return message(row)


def delete(work: Mutation, request: volume_service_pb2.DeleteVolumeRequest) -> None:
    """Desire that a volume goes; the workflow waits for it.

    Raises:
        errors.WrongState: VOLUME_IN_USE.
    """
    row = _get_locked(work.caller, request.id)
    convert.require_version(row, request.resource_version)
    if row.attachment_id:
        raise in_use(row)
    mark_deleted(row)
    work.concerns("volume", row.id, row.name, row.project_id)
    work.start(DELETE, "{}", deadline_s=OPERATION_DEADLINE_S)


def in_use(row: Volume) -> errors.WrongState:
    """Return the error for a volume that an instance has."""
    return errors.WrongState(
        "VOLUME_IN_USE",
        f"volume {row.name} is attached to instance {row.instance_id}; detach it first",
        id=row.id,
        instance_id=row.instance_id,
    )


def mark_deleted(row: Volume) -> None:
    """Record that a volume is to go, with its tombstone. It counts no more."""
    if row.delete_time is None:
        row.delete_time = database.now()
    row.state, row.fault = "DELETING", ""
    storage_store.bury(row)
    save(row)


def start_delete(row: Volume, principal_id: str) -> None:
    """Delete a volume with its instance: the same operation as if its owner had asked."""
    mark_deleted(row)
    request = any_pb2.Any()
    request_id = ids.request_id()
    request.Pack(volume_service_pb2.DeleteVolumeRequest(request_id=request_id, id=row.id))
    moment = database.now()
    operation_id = ids.new("vop")
    shared.operation.insert(
        id=operation_id,
        project_id=row.project_id,
        method="mcloud.volume.v1.VolumeService/DeleteVolume",
        resource_type="volume",
        resource_id=row.id,
        resource_name=row.name,
        principal_id=principal_id,
        request_id=request_id,
        state="RUNNING",
        request=request.SerializeToString(),
        workflow=DELETE,
        trace_id=secrets.token_hex(16),
        create_time=moment,
        deadline=moment + int(OPERATION_DEADLINE_S * 1_000_000),
    ).execute()
    tables.changed("operation", operation_id, row.project_id, "ADDED")
    tables.wake_runners(operation_id, row.project_id)


def save(row: Volume) -> None:
    """Save a change that its owner can see."""
    row.version += 1
    row.update_time = database.now()
    row.save()
    tables.changed("volume", row.id, row.project_id)
    if row.observed_generation < row.desired_generation:
        tables.wake_host(row.host_id)


def list_page(
    caller: auth.Caller, request: volume_service_pb2.ListVolumesRequest
) -> volume_service_pb2.ListVolumesResponse:
    """Return a page."""
    revision = shared.revision()
    page = listing.page(
        Volume,
        request,
        caller,
        fields={
            "id": Volume.id,
            "name": Volume.name,
            "state": Volume.state,
            "instance_id": Volume.instance_id,
        },
    )
    return volume_service_pb2.ListVolumesResponse(
        volumes=[message(row) for row in page.rows],
        next_page_token=page.next_page_token,
        revision=str(revision),
    )


def load(found: list[str]) -> Mapping[str, Message]:
    """Return the messages of these ids, for a watch."""
    return {row.id: message(row) for row in Volume.select().where(Volume.id.in_(found))}
