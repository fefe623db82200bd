"""What a project's images may take, counted from rows under the lock of its quota row."""

from __future__ import annotations

import peewee
from google.rpc import error_details_pb2

from mcloud.image.v1 import quota_pb2
from mcloud_base import errors
from mcloud_controlplane.core.quotas import Quotas
from mcloud_controlplane.image.model import Image, Quota

_BOUNDLESS = 1 << 62  # bytes, where there is no limit


def require_image(project_id: str) -> None:
    """Refuse a project that has as many images as it may.

    Raises:
        errors.Exhausted: QUOTA_EXCEEDED.
    """
    limit = QUOTAS.lock(project_id).image_count
    if limit < 0:
        return
    used = Image.select().where(_counted(project_id)).count()
    if used + 1 > limit:
        raise _exceeded(project_id, "images", used, limit)


def room(project_id: str, image_id: str) -> int:
    """Return how many bytes one image may have, beside the project's others."""
    limit = QUOTAS.lock(project_id).image_bytes
    if limit < 0:
        return _BOUNDLESS
    others = (
        Image.select(peewee.fn.COALESCE(peewee.fn.SUM(Image.reserved_bytes), 0))
        .where(_counted(project_id) & (Image.id != image_id))
        .scalar()
    )
    return int(limit) - int(others)


def usage(project_id: str) -> dict[str, int]:
    """Count what a project has."""
    count, reserved = (
        Image.select(
            peewee.fn.COUNT(Image.id), peewee.fn.COALESCE(peewee.fn.SUM(Image.reserved_bytes), 0)
        )
        .where(_counted(project_id))
        .scalar(as_tuple=True)
    )
    return {"image_count": int(count), "image_bytes": int(reserved)}


def bytes_exceeded(project_id: str, allowed: int) -> errors.Exhausted:
    """Return the error for an image that does not fit."""
    return _exceeded(project_id, "bytes of images left for this one", allowed, allowed)


def _counted(project_id: str) -> peewee.Expression:
    return (Image.project_id == project_id) & Image.delete_time.is_null()


def _exceeded(project_id: str, what: str, used: int, limit: int) -> errors.Exhausted:
    violation = error_details_pb2.QuotaFailure.Violation(
        subject=f"project:{project_id}", description=f"{what}: {used} of {limit} used"
    )
    return errors.Exhausted(
        "QUOTA_EXCEEDED",
        f"the project has {used} of at most {limit} {what}; delete some, or ask for more",
        details=(error_details_pb2.QuotaFailure(violations=[violation]),),
        limit=limit,
        used=used,
    )


QUOTAS = Quotas(Quota, quota_pb2.Quota, usage)
