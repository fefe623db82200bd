"""What a project's volumes may take, counted from rows under the lock of its quota row."""

from __future__ import annotations

import peewee
from google.rpc import error_details_pb2

from mcloud.volume.v1 import quota_pb2
from mcloud_base import errors
from mcloud_controlplane.core.quotas import Quotas
from mcloud_controlplane.volume.model import Quota, Volume


def require_volume(project_id: str, size_gib: int) -> None:
    """Refuse a volume that would be too many or too much.

    Raises:
        errors.Exhausted: QUOTA_EXCEEDED.
    """
    limits, used = QUOTAS.lock(project_id), usage(project_id)
    for what, field, asked in (
        ("volumes", "volume_count", 1),
        ("GiB of volumes", "volume_gib", size_gib),
    ):
        if 0 <= getattr(limits, field) < used[field] + asked:
            raise _exceeded(project_id, what, used[field], asked, getattr(limits, field))


def usage(project_id: str) -> dict[str, int]:
    """Count what a project has."""
    count, gib = (
        Volume.select(
            peewee.fn.COUNT(Volume.id), peewee.fn.COALESCE(peewee.fn.SUM(Volume.size_gib), 0)
        )
        .where((Volume.project_id == project_id) & Volume.delete_time.is_null())
        .scalar(as_tuple=True)
    )
    return {"volume_count": int(count), "volume_gib": int(gib)}


QUOTAS = Quotas(Quota, quota_pb2.Quota, usage)


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
