"""What always is (core/invariants.py).

A scheduler's view of the hosts is what is recorded; server groups' hard rules are kept.
"""

from __future__ import annotations

from typing import Protocol

from mcloud.common.v1 import invariant_pb2
from mcloud.scheduler.v1 import invariant_service_pb2_grpc
from mcloud_base import errors
from mcloud_controlplane.core import tables
from mcloud_controlplane.core.auth import Context
from mcloud_controlplane.core.database import Database
from mcloud_controlplane.scheduler import server_group_store

KIND = "HOST_VIEW_DIFFERS"
RULE = "SERVER_GROUP_RULE_BROKEN"  # for a person to decide who of its members is to go


class View(Protocol):
    """The hosts in memory."""

    async def compare(self) -> tuple[int, list[str]]:
        """Return how many hosts are known, and those that are not as recorded."""


class InvariantServicer(invariant_service_pb2_grpc.InvariantServiceServicer):
    """Serves mcloud.scheduler.v1.InvariantService."""

    def __init__(self, opened: Database, view: View) -> None:
        self._database = opened
        self._view = view

    async def ListViolations(
        self, request: invariant_pb2.ListViolationsRequest, context: Context
    ) -> invariant_pb2.ListViolationsResponse:
        """Compare, and look for server groups whose members are where they must not be."""
        count, found = await self._view.compare()
        groups = await self._database.read(server_group_store.load_hard)
        violations = [
            invariant_pb2.Violation(
                kind=KIND,
                subject=id_,
                host_id=id_,
                detail="the scheduler believes something else than its row and claims say",
                repair="have every scheduler read the host again",
            )
            for id_ in found
        ]
        violations += (
            invariant_pb2.Violation(
                kind=RULE,
                subject=group.id,
                host_id=host_id,
                detail=f"{group.members[host_id]} of its members run there, which its policy "
                f"{group.policy} does not allow",
            )
            for group in groups.values()
            for host_id in group.misplaced()
        )
        return invariant_pb2.ListViolationsResponse(
            checked_count=count + len(groups), violations=violations
        )

    async def MendViolation(
        self, request: invariant_pb2.MendViolationRequest, context: Context
    ) -> invariant_pb2.MendViolationResponse:
        """Log a change of the host: whoever follows the log reads it again.

        Raises:
            errors.WrongState: NOT_MENDABLE.
        """
        violation = request.violation
        if violation.kind != KIND:
            raise errors.WrongState(
                "NOT_MENDABLE", f"{violation.kind} of {violation.subject} is not of the scheduler's"
            )
        await self._database.write(tables.changed, "host", violation.subject, "")
        return invariant_pb2.MendViolationResponse()
