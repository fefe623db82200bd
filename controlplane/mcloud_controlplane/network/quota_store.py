"""Quotas: counted from rows, under the lock of the project's row."""

from __future__ import annotations

from typing import Any

from google.rpc import error_details_pb2

from mcloud_base import errors
from mcloud_controlplane.network.model import Quota, locked


def ensure_room(project_id: str, resource: str, used: Any) -> None:
    """Refuse one more of a resource than the project may have. Holds the lock until the commit.

    Args:
        resource: as in the columns of Quota: "network".
        used: a select of those that the project has.

    Raises:
        errors.Exhausted: QUOTA_EXCEEDED.
    """
    query = locked(Quota.select().where(Quota.project_id == project_id))
    row = query.first()
    if row is None:
        Quota.insert(project_id=project_id).on_conflict_ignore().execute()
        row = query.get()
    limit, count = getattr(row, f"{resource}_count"), used.count()
    if count >= limit:
        words = resource.replace("_", " ")
        violation = error_details_pb2.QuotaFailure.Violation(
            subject=f"project:{project_id}", description=f"{words}: {count} of {limit} used"
        )
        raise errors.Exhausted(
            "QUOTA_EXCEEDED",
            f"the project has {count} {words}s of {limit}; delete some or ask for more",
            details=(error_details_pb2.QuotaFailure(violations=[violation]),),
            resource=resource,
            limit=limit,
            used=count,
        )
