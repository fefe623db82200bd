"""Who uses an image, in the database; and what may be removed because nobody does."""

from __future__ import annotations

from mcloud.image.v1 import image_service_pb2
from mcloud_base import errors
from mcloud_controlplane.core import database, effects
from mcloud_controlplane.core.statements import Kept
from mcloud_controlplane.image import image_store
from mcloud_controlplane.image.model import Image, ImageUse, shared

_PAGE = 1000


def ensure(request: image_service_pb2.EnsureImageUseRequest) -> image_service_pb2.ImageUse:
    """Record a use, and tell the image.

    Raises:
        errors.NotFound: IMAGE_NOT_FOUND.
        errors.WrongState: IMAGE_NOT_ACTIVE, ID_RETIRED.
        errors.Conflict: STALE_LEASE.
    """
    effects.ensure_may(shared, _key(request), request.lease_number)
    # The lock keeps the sweeper from removing the bytes meanwhile.
    row = Image.find_locked(request.image_id)
    use = ImageUse(
        instance_id=request.instance_id,
        image_id=request.image_id,
        project_id=request.project_id,
    )
    if refusal := _refusal(request, row):
        here = ImageUse.instance_id == use.instance_id
        if not ImageUse.select().where(here & (ImageUse.image_id == use.image_id)).exists():
            raise refusal
    else:
        _MAKE.run(ImageUse._meta.database, [use.instance_id, use.image_id, use.project_id])
    assert row is not None, "it stays while it is used"
    answer = message(use)
    answer.image.CopyFrom(image_store.message(row))
    return answer


_MAKE = Kept(
    lambda values: ImageUse.insert(
        instance_id=values[0], image_id=values[1], project_id=values[2]
    ).on_conflict_ignore()
)


def _refusal(
    request: image_service_pb2.EnsureImageUseRequest, row: Image | None
) -> errors.Error | None:
    """Return why nobody can begin to use an image."""
    seen = row is not None and (row.project_id == request.project_id or row.visibility == "PUBLIC")
    if row is None or not seen or row.delete_time is not None:
        return image_store.not_found(request.image_id)
    if row.state != "ACTIVE":
        return errors.WrongState(
            "IMAGE_NOT_ACTIVE", f"image {row.id} is {row.state}; upload its bytes", id=row.id
        )
    return None


def release(request: image_service_pb2.ReleaseImageUseRequest) -> None:
    """Remove a use, and let it never come again.

    Raises:
        errors.Conflict: STALE_LEASE.
    """
    effects.retire(shared, _key(request), request.lease_number)
    ImageUse.delete().where(
        (ImageUse.instance_id == request.instance_id) & (ImageUse.image_id == request.image_id)
    ).execute()


def list_after(instance_id: str) -> list[image_service_pb2.ImageUse]:
    """Return uses by instance id; those of one instance are never parted."""
    order = (ImageUse.instance_id, ImageUse.image_id)
    query = ImageUse.select().where(ImageUse.instance_id > instance_id).order_by(*order)
    rows = list(query.limit(_PAGE))
    if len(rows) == _PAGE:
        last = rows[-1]
        rows += ImageUse.select().where(
            (ImageUse.instance_id == last.instance_id) & (ImageUse.image_id > last.image_id)
        )
    return [message(row) for row in rows]


def message(row: ImageUse) -> image_service_pb2.ImageUse:
    """Return a use's row as its message."""
    return image_service_pb2.ImageUse(
        image_id=row.image_id, instance_id=row.instance_id, project_id=row.project_id
    )


def unused(limit: int = 100) -> list[str]:
    """Return deleted images that nobody uses or writes to."""
    query = Image.select(Image.id).where(_removable()).order_by(Image.delete_time).limit(limit)
    return [row.id for row in query]


def condemn(id_: str) -> bool:
    """Take an image out of everybody's sight before its bytes go; return whether it may go."""
    removable = (Image.id == id_) & _removable()
    return bool(Image.update(state="DELETED").where(removable).execute())


def forget(id_: str) -> None:
    """Remove the row of an image whose bytes are gone."""
    Image.delete().where((Image.id == id_) & _removable()).execute()


def _removable() -> object:
    used = ImageUse.select(ImageUse.image_id)
    return (
        Image.delete_time.is_null(False)
        & (Image.upload_expire_time < database.now())
        & Image.id.not_in(used)
    )


def _key(
    request: image_service_pb2.EnsureImageUseRequest | image_service_pb2.ReleaseImageUseRequest,
) -> str:
    return f"{request.image_id}/{request.instance_id}"
