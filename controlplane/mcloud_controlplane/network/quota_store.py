"""Quotas: counted from rows, under the lock of the project's row."""

from __future__ import annotations

from typing import Any

from google.rpc import error_details_pb2

from mcloud.network.v1 import quota_pb2
from mcloud_base import errors
from mcloud_controlplane.core.quotas import Quotas
from mcloud_controlplane.network import model

# Ports that routers and floating addresses have are no project's own.
_SERVICES = ("router", "floating_ip")

_COUNTED: dict[str, Any] = {
    "network": model.Network,
    "subnet": model.Subnet,
    "port": model.Port,
    "security_group": model.SecurityGroup,
    "security_group_rule": model.SecurityGroupRule,
    "router": model.Router,
    "floating_ip": model.FloatingIp,
}


def ensure_room(project_id: str, resource: str) -> None:
    """Refuse one more of a resource than the project may have. Holds the lock until the commit.

    Args:
        resource: as in the columns of Quota: "network".

    Raises:
        errors.Exhausted: QUOTA_EXCEEDED.
    """
    ensure_within(getattr(QUOTAS.lock(project_id), f"{resource}_count"), project_id, resource)


def ensure_within(limit: int, project_id: str, resource: str) -> None:
    """Refuse one more of a resource than a limit; the project's row is locked.

    Raises:
        errors.Exhausted: QUOTA_EXCEEDED.
    """
    if limit < 0:
        return
    count = _count(project_id, resource)
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


def usage(project_id: str) -> dict[str, int]:
    """Count what a project has."""
    return {f"{resource}_count": _count(project_id, resource) for resource in _COUNTED}


def _count(project_id: str, resource: str) -> int:
    table = _COUNTED[resource]
    own = table.project_id == project_id
    if table is model.Port:
        own &= ~model.Port.owner_type.in_(_SERVICES)
    return int(table.select().where(own).count())


QUOTAS = Quotas(model.Quota, quota_pb2.Quota, usage)
