"""Images in the database."""

from __future__ import annotations

from collections.abc import Mapping

from google.protobuf.message import Message

from mcloud.common.v1 import options_pb2
from mcloud.image.v1 import image_pb2, image_service_pb2
from mcloud_base import errors, ids
from mcloud_controlplane.core import auth, contract, convert, database, listing, tables
from mcloud_controlplane.core.mutation import Mutation
from mcloud_controlplane.image import quota_store
from mcloud_controlplane.image.model import Image, locked, shared

_Rule = options_pb2.Rule

_UPDATABLE = (
    "name",
    "labels",
    "spec.visibility",
    "spec.min_disk_gib",
    "spec.min_memory_mib",
    "spec.description",
    "spec.protected",
    "spec.properties",
)


def message(row: Image) -> image_pb2.Image:
    """Return an image's row as its message."""
    state = "DELETING" if row.delete_time is not None else row.state
    return image_pb2.Image(
        metadata=convert.metadata(row),
        spec=image_pb2.ImageSpec.FromString(bytes(row.spec)),
        status=image_pb2.ImageStatus(
            state=contract.enum_value(state, image_pb2.ImageStatus.State),
            size_bytes=row.size_bytes,
            virtual_size_bytes=row.virtual_size_bytes,
            sha256=row.sha256,
            fault=row.fault,
            uploaded_bytes=row.uploaded_bytes if row.state == "SAVING" else 0,
        ),
    )


def not_found(id_: str) -> errors.NotFound:
    """Return the error for an image that is not there, or not there for the caller."""
    return errors.NotFound("IMAGE_NOT_FOUND", f"there is no image {id_}", id=id_)


def get(caller: auth.Caller, id_: str) -> Image:
    """Return an image that the caller may read.

    Services see every image; a host's delegate those that its token names, also deleted ones,
    because the guests that were started from them may have to be started again.

    Raises:
        errors.NotFound: IMAGE_NOT_FOUND.
        errors.PermissionDenied: NOT_DELEGATED.
    """
    if caller.delegation is not None and id_ not in caller.delegation.image_ids:
        raise errors.PermissionDenied(
            "NOT_DELEGATED", f"the token does not name image {id_}", id=id_
        )
    row = Image.find(id_)
    if row is None or (row.delete_time is not None and caller.delegation is None):
        raise not_found(id_)
    if row.state == "DELETED":  # its bytes are being removed
        raise not_found(id_)
    if (
        caller.kind == _Rule.CALLER_USER
        and not caller.sees(row.project_id)
        and row.visibility != "PUBLIC"
    ):
        raise not_found(id_)
    return row


def get_owned(caller: auth.Caller, id_: str) -> Image:
    """Return an image that the caller may change, and lock it.

    Raises:
        errors.NotFound: IMAGE_NOT_FOUND.
        errors.PermissionDenied: IMAGE_NOT_OWNED, it is another project's public one.
    """
    living = Image.select().where((Image.id == id_) & Image.delete_time.is_null())
    row: Image | None = locked(living).first()
    if row is None or (not caller.sees(row.project_id) and row.visibility != "PUBLIC"):
        raise not_found(id_)
    if not caller.sees(row.project_id):
        raise errors.PermissionDenied(
            "IMAGE_NOT_OWNED", f"image {id_} belongs to another project", id=id_
        )
    return row


def create(work: Mutation, request: image_service_pb2.CreateImageRequest) -> image_pb2.Image:
    """Make an image without bytes."""
    spec = image_pb2.ImageSpec()
    spec.CopyFrom(request.spec)
    visibility = _visibility(work.caller, spec)
    project_id = work.caller.project_id
    quota_store.require_image(project_id)
    moment = database.now()
    row = Image.create(
        id=ids.new("img"),
        name=request.name,
        project_id=project_id,
        labels=dict(request.labels),
        create_time=moment,
        update_time=moment,
        spec=spec.SerializeToString(),
        state="QUEUED",
        visibility=visibility,
        disk_format=contract.enum_name(spec.disk_format, image_pb2.DiskFormat),
        is_protected=spec.protected,
    )
    work.concerns("image", row.id, row.name)
    log_change(row, "ADDED")
    return message(row)


def update(work: Mutation, request: image_service_pb2.UpdateImageRequest) -> image_pb2.Image:
    """Change what the mask names."""
    row = get_owned(work.caller, request.id)
    spec = convert.apply_mask(row, request, image_pb2.ImageSpec, _UPDATABLE)
    if "spec.visibility" in request.update_mask.paths:
        visibility = _visibility(work.caller, spec)
        if visibility != row.visibility:
            log_change(row, "DELETED")  # for those who may not see it any more
        row.visibility = visibility
        row.spec = spec.SerializeToString()
    row.is_protected = spec.protected
    row.save()
    work.concerns("image", row.id, row.name, row.project_id)
    log_change(row, "MODIFIED")
    return message(row)


def delete(work: Mutation, request: image_service_pb2.DeleteImageRequest) -> image_pb2.Image:
    """Delete an image; its bytes stay for as long as instances use it.

    Raises:
        errors.WrongState: IMAGE_PROTECTED.
    """
    row = get_owned(work.caller, request.id)
    convert.require_version(row, request.resource_version)
    if row.is_protected:
        raise errors.WrongState(
            "IMAGE_PROTECTED",
            f"image {row.name} is protected; take the protection off first",
            id=row.id,
        )
    row.delete_time = row.update_time = database.now()
    row.version += 1
    row.save()
    work.concerns("image", row.id, row.name, row.project_id)
    log_change(row, "DELETED")
    return message(row)


def list_page(
    caller: auth.Caller, request: image_service_pb2.ListImagesRequest
) -> image_service_pb2.ListImagesResponse:
    """Return a page of the project's images and everybody's."""
    revision = shared.revision()
    page = listing.page(
        Image,
        request,
        caller,
        fields={
            "id": Image.id,
            "name": Image.name,
            "state": Image.state,
            "visibility": Image.visibility,
        },
        where=Image.delete_time.is_null(),
        visible=(Image.project_id == caller.project_id) | (Image.visibility == "PUBLIC"),
    )
    return image_service_pb2.ListImagesResponse(
        images=[message(row) for row in page.rows],
        next_page_token=page.next_page_token,
        revision=str(revision),
    )


def load(caller: auth.Caller, found: list[str]) -> Mapping[str, Message]:
    """Return the messages of those of these ids that the caller sees, for a watch."""
    query = Image.select().where(Image.id.in_(found) & Image.delete_time.is_null())
    return {
        row.id: message(row)
        for row in query
        if row.visibility == "PUBLIC" or caller.sees(row.project_id)
    }


def log_change(row: Image, change: str) -> None:
    """Log a change for those who see the image: its project, or everybody."""
    everybody = row.visibility == "PUBLIC"
    tables.changed("image", row.id, "" if everybody else row.project_id, change)


def _visibility(caller: auth.Caller, spec: image_pb2.ImageSpec) -> str:
    """Return the column; the spec says PRIVATE where the user said nothing."""
    if spec.visibility == image_pb2.IMAGE_VISIBILITY_PUBLIC:
        caller.require_system(_Rule.ROLE_ADMIN, "a public image")
    elif not spec.visibility:
        spec.visibility = image_pb2.IMAGE_VISIBILITY_PRIVATE
    return contract.enum_name(spec.visibility, image_pb2.ImageVisibility)
