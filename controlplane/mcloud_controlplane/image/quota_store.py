"""What a project's images may take, counted from rows under the lock of its quota row."""

from __future__ import annotations

import peewee
from google.rpc import error_details_pb2

from mcloud_base import errors
from mcloud_controlplane.image.model import Image, Quota, locked


def require_image(project_id: str) -> None:
    """Refuse a project that has as many images as it may.

    Raises:
        errors.Exhausted: QUOTA_EXCEEDED.
    """
    limit = _lock(project_id).image_count
    used = Image.select().where(_counted(project_id)).count()
    if used + 1 > limit:
        raise _exceeded(project_id, "images", used, limit)


def room(project_id: str, image_id: str) -> int:
    """Return how many bytes one image may have, beside the project's others."""
    limit = _lock(project_id).image_bytes
    others = (
        Image.select(peewee.fn.COALESCE(peewee.fn.SUM(Image.reserved_bytes), 0))
        .where(_counted(project_id) & (Image.id != image_id))
        .scalar()
    )
    return int(limit) - int(others)


def bytes_exceeded(project_id: str, allowed: int) -> errors.Exhausted:
    """Return the error for an image that does not fit."""
    return _exceeded(project_id, "bytes of images left for this one", allowed, allowed)


def _counted(project_id: str) -> peewee.Expression:
    return (Image.project_id == project_id) & Image.delete_time.is_null()


def _lock(project_id: str) -> Quota:
    Quota.insert(project_id=project_id).on_conflict_ignore().execute()
    row: Quota = locked(Quota.select().where(Quota.project_id == project_id)).get()
    return row


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
