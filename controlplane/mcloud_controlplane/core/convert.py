"""Between rows and messages, where every resource does it alike."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, TypeVar

from google.protobuf import field_mask_pb2, timestamp_pb2
from google.protobuf.message import Message

from mcloud.common.v1 import metadata_pb2
from mcloud_base import errors, ids
from mcloud_controlplane.core import database, tables

MessageT = TypeVar("MessageT", bound=Message)


def timestamp(microseconds: int) -> timestamp_pb2.Timestamp:
    """Return a time in microseconds since 1970 as a Timestamp."""
    return timestamp_pb2.Timestamp(
        seconds=microseconds // 1_000_000, nanos=microseconds % 1_000_000 * 1000
    )


def fill(moment: timestamp_pb2.Timestamp, microseconds: int) -> None:
    """Set a message's own Timestamp, which takes a third of making one that is copied there."""
    moment.seconds = microseconds // 1_000_000
    moment.nanos = microseconds % 1_000_000 * 1000


def microseconds(moment: timestamp_pb2.Timestamp) -> int:
    """Return a Timestamp as microseconds since 1970."""
    return moment.seconds * 1_000_000 + moment.nanos // 1000


def metadata(row: tables.Resource) -> metadata_pb2.ResourceMetadata:
    """Return the metadata of a resource's row."""
    message = metadata_pb2.ResourceMetadata(
        id=row.id,
        name=row.name,
        project_id=row.project_id,
        labels=row.labels,
        resource_version=str(row.version),
        generation=row.generation,
    )
    fill(message.create_time, row.create_time)
    fill(message.update_time, row.update_time)
    if row.delete_time is not None:
        fill(message.delete_time, row.delete_time)
    return message


def new_row(prefix: str, request: Any, project_id: str) -> dict[str, Any]:
    """Return a Resource's columns as a Create request (name, labels, spec) fills them."""
    moment = database.now()
    return {
        "id": ids.new(prefix),
        "name": request.name,
        "project_id": project_id,
        "labels": dict(request.labels),
        "create_time": moment,
        "update_time": moment,
        "spec": request.spec.SerializeToString(),
    }


def require_version(row: tables.Resource, wanted: str) -> None:
    """Refuse if the caller has seen another version of the resource.

    Raises:
        errors.Conflict: VERSION_CONFLICT.
    """
    if wanted and wanted != str(row.version):
        raise errors.Conflict(
            "VERSION_CONFLICT",
            f"{row.id} has changed (it is at {row.version}, not {wanted}); read it again",
            id=row.id,
        )


def apply_mask(
    row: tables.Resource, request: Any, spec_type: type[MessageT], allowed: Collection[str]
) -> MessageT:
    """Apply the update_mask of an Update request to name, labels and the stored spec.

    Args:
        allowed: the paths that the rpc lists.

    Returns:
        The new spec, for the columns that are made of it. The row is not saved.

    Raises:
        errors.InvalidArgument: BAD_UPDATE_MASK.
        errors.Conflict: VERSION_CONFLICT.
    """
    require_version(row, request.resource_version)
    paths = list(request.update_mask.paths)
    wrong = [path for path in paths if path not in allowed]
    if wrong or not paths:
        raise errors.InvalidArgument(
            "BAD_UPDATE_MASK",
            f"update_mask may name {', '.join(allowed)}; not {', '.join(wrong) or 'nothing'}",
        )
    spec = spec_type.FromString(bytes(row.spec))
    inner = field_mask_pb2.FieldMask(
        paths=[path.removeprefix("spec.") for path in paths if path.startswith("spec.")]
    )
    if "name" in paths:
        row.name = request.name
    if "labels" in paths:
        row.labels = dict(request.labels)
    if inner.paths:
        inner.MergeMessage(
            request.spec, spec, replace_message_field=True, replace_repeated_field=True
        )
        row.spec = spec.SerializeToString()
        row.generation += 1
    row.version += 1
    row.update_time = database.now()
    return spec
