"""Quotas of instances: counted from rows, under the lock of the project's quota row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import peewee
from google.rpc import error_details_pb2

from mcloud.compute.v1 import quota_pb2
from mcloud_base import errors
from mcloud_controlplane.compute.model import Instance, KeyPair, Quota, ServerGroup
from mcloud_controlplane.core.quotas import Quotas
from mcloud_controlplane.core.statements import Kept

_FIELDS = ("instance_count", "vcpu_count", "memory_mib", "key_pair_count", "server_group_count")


def require(
    project_id: str,
    *,
    instances: int = 0,
    vcpus: int = 0,
    memory_mib: int = 0,
    key_pairs: int = 0,
    server_groups: int = 0,
) -> None:
    """Refuse what would exceed the project's limits. Locks the project's row until the commit.

    Raises:
        errors.Exhausted: QUOTA_EXCEEDED, with every violation as QuotaFailure.
    """
    limits = QUOTAS.lock(project_id)
    asked = (instances, vcpus, memory_mib, key_pairs, server_groups)
    wanted = {
        field: count
        for field, count in zip(_FIELDS, asked, strict=True)
        if count and getattr(limits, field) >= 0
    }
    if not wanted:
        return  # of what is not limited nothing is counted: it would be more with each instance
    used = usage(project_id, instances_only=not (key_pairs or server_groups))
    violations = [
        error_details_pb2.QuotaFailure.Violation(
            subject=f"project:{project_id}",
            description=f"{field}: {used[field]} used, {wanted[field]} asked, "
            f"{getattr(limits, field)} allowed",
        )
        for field in wanted
        if used[field] + wanted[field] > getattr(limits, field)
    ]
    if violations:
        raise errors.Exhausted(
            "QUOTA_EXCEEDED",
            f"the project's quota does not allow it: {violations[0].description}",
            details=(error_details_pb2.QuotaFailure(violations=violations),),
        )


def usage(project_id: str, *, instances_only: bool = False) -> dict[str, int]:
    """Count what a project has; with `instances_only`, there is said to be nothing else."""
    ((instances, vcpus, memory),) = _USED.run(Instance._meta.database, [project_id])
    keys, groups = (
        0 if instances_only else model.select().where(model.project_id == project_id).count()
        for model in (KeyPair, ServerGroup)
    )
    return dict(zip(_FIELDS, (instances, int(vcpus), int(memory), keys, groups), strict=True))


def _used(project_ids: Sequence[str]) -> Any:
    fn = peewee.fn
    living = (Instance.project_id == project_ids[0]) & Instance.delete_time.is_null()
    return Instance.select(
        fn.COUNT(Instance.id),
        fn.COALESCE(fn.SUM(Instance.vcpu_count), 0),
        fn.COALESCE(fn.SUM(Instance.memory_mib), 0),
    ).where(living)


_USED = Kept(_used)
QUOTAS = Quotas(Quota, quota_pb2.Quota, usage)
