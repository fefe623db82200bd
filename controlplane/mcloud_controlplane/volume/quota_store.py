"""What a project's volumes may take, counted from rows under the lock of its quota row."""

from __future__ import annotations

import peewee
from google.rpc import error_details_pb2

from mcloud_base import errors
from mcloud_controlplane.volume.model import Quota, Volume, locked


def require_volume(project_id: str, size_gib: int) -> None:
    """Refuse a volume that would be too many or too much.

    Raises:
        errors.Exhausted: QUOTA_EXCEEDED.
    """
    Quota.insert(project_id=project_id).on_conflict_ignore().execute()
    quota: Quota = locked(Quota.select().where(Quota.project_id == project_id)).get()
    count, gib = (
        Volume.select(
            peewee.fn.COUNT(Volume.id), peewee.fn.COALESCE(peewee.fn.SUM(Volume.size_gib), 0)
        )
        .where((Volume.project_id == project_id) & Volume.delete_time.is_null())
        .scalar(as_tuple=True)
    )
    for what, used, asked, limit in (
        ("volumes", int(count), 1, quota.volume_count),
        ("GiB of volumes", int(gib), size_gib, quota.volume_gib),
    ):
        if used + asked > limit:
            raise _exceeded(project_id, what, used, asked, int(limit))


def _exceeded(project_id: str, what: str, used: int, asked: int, limit: int) -> errors.Exhausted:
    violation = error_details_pb2.QuotaFailure.Violation(
        subject=f"project:{project_id}",
        description=f"{what}: {used} of {limit} used, {asked} asked for",
    )
    return errors.Exhausted(
        "QUOTA_EXCEEDED",
        f"the project has {used} of at most {limit} {what}, so {asked} more are too many",
        details=(error_details_pb2.QuotaFailure(violations=[violation]),),
        limit=limit,
        used=used,
    )
