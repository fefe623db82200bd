"""Quotas of instances: counted from rows, under the lock of the project's quota row."""

from __future__ import annotations

from typing import Any

import peewee
from google.rpc import error_details_pb2

from mcloud.compute.v1 import quota_pb2, quota_service_pb2
from mcloud_base import errors
from mcloud_controlplane.compute.model import Instance, KeyPair, Quota, locked
from mcloud_controlplane.core.mutation import Mutation

_FIELDS = ("instance_count", "vcpu_count", "memory_mib", "key_pair_count")


def require(
    project_id: str, *, instances: int = 0, vcpus: int = 0, memory_mib: int = 0, key_pairs: int = 0
) -> None:
    """Refuse what would exceed the project's limits. Locks the project's row until the commit.

    Raises:
        errors.Exhausted: QUOTA_EXCEEDED, with every violation as QuotaFailure.
    """
    limits = _locked(project_id)
    used = usage(project_id, with_keys=bool(key_pairs))
    wanted = dict(zip(_FIELDS, (instances, vcpus, memory_mib, key_pairs), strict=True))
    violations = [
        error_details_pb2.QuotaFailure.Violation(
            subject=f"project:{project_id}",
            description=f"{field}: {getattr(used, field)} used, {wanted[field]} asked, "
            f"{getattr(limits, field)} allowed",
        )
        for field in _FIELDS
        if wanted[field]
        and getattr(limits, field) >= 0
        and getattr(used, field) + wanted[field] > getattr(limits, field)
    ]
    if violations:
        raise errors.Exhausted(
            "QUOTA_EXCEEDED",
            f"the project's quota does not allow it: {violations[0].description}",
            details=(error_details_pb2.QuotaFailure(violations=violations),),
        )


def usage(project_id: str, *, with_keys: bool = True) -> quota_pb2.QuotaUsage:
    """Count what a project has; without its keys, they are said to be none."""
    fn = peewee.fn
    living = (Instance.project_id == project_id) & Instance.delete_time.is_null()
    counts: Any = Instance.select(
        fn.COUNT(Instance.id),
        fn.COALESCE(fn.SUM(Instance.vcpu_count), 0),
        fn.COALESCE(fn.SUM(Instance.memory_mib), 0),
    ).where(living)
    ((instances, vcpus, memory),) = counts.tuples()
    keys = KeyPair.select().where(KeyPair.project_id == project_id).count() if with_keys else 0
    return quota_pb2.QuotaUsage(
        instance_count=instances,
        vcpu_count=int(vcpus),
        memory_mib=int(memory),
        key_pair_count=keys,
    )


def get(project_id: str) -> quota_pb2.Quota:
    """Return limits and usage; a project without a row has the defaults."""
    row = Quota.get_or_none(Quota.project_id == project_id) or Quota(project_id=project_id)
    return _message(row)


def update(work: Mutation, request: quota_service_pb2.UpdateQuotaRequest) -> quota_pb2.Quota:
    """Set limits.

    Raises:
        errors.InvalidArgument: BAD_UPDATE_MASK.
    """
    paths = [path.removeprefix("limits.") for path in request.update_mask.paths]
    if not paths or any(path not in _FIELDS for path in paths):
        raise errors.InvalidArgument(
            "BAD_UPDATE_MASK", f"update_mask may name {', '.join(_FIELDS)}"
        )
    row = _locked(request.project_id)
    for path in paths:
        setattr(row, path, getattr(request.limits, path))
    row.save()
    work.concerns("quota", request.project_id, "", request.project_id)
    return _message(row)


def _locked(project_id: str) -> Quota:
    query = locked(Quota.select().where(Quota.project_id == project_id))
    row: Quota | None = query.first()
    if row is None:
        Quota.insert(project_id=project_id).on_conflict_ignore().execute()
        row = query.get()
    return row


def _message(row: Quota) -> quota_pb2.Quota:
    return quota_pb2.Quota(
        project_id=row.project_id,
        limits=quota_pb2.QuotaLimits(**{field: getattr(row, field) for field in _FIELDS}),
        usage=usage(row.project_id),
    )
