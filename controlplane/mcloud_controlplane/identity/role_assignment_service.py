"""Serves mcloud.identity.v1.RoleAssignmentService."""

from __future__ import annotations

from mcloud.common.v1 import operation_pb2
from mcloud.identity.v1 import (
    role_assignment_pb2,
    role_assignment_service_pb2,
    role_assignment_service_pb2_grpc,
)
from mcloud_controlplane.core import auth
from mcloud_controlplane.core.auth import Context
from mcloud_controlplane.core.database import Database
from mcloud_controlplane.core.mutation import Frame
from mcloud_controlplane.identity import role_assignment_store as store


class RoleAssignmentServicer(role_assignment_service_pb2_grpc.RoleAssignmentServiceServicer):
    """Role assignments."""

    def __init__(self, database: Database, frame: Frame) -> None:
        self._database = database
        self._frame = frame

    async def CreateRoleAssignment(
        self, request: role_assignment_service_pb2.CreateRoleAssignmentRequest, context: Context
    ) -> operation_pb2.Operation:
        """Make one."""
        return await self._frame.mutate(
            request, lambda work, asked: store.create(work, asked, self._database)
        )

    async def GetRoleAssignment(
        self, request: role_assignment_service_pb2.GetRoleAssignmentRequest, context: Context
    ) -> role_assignment_pb2.RoleAssignment:
        """Return one."""
        return await self._database.read_few(lambda: store.message(store.get(request.id)))

    async def ListRoleAssignments(
        self, request: role_assignment_service_pb2.ListRoleAssignmentsRequest, context: Context
    ) -> role_assignment_service_pb2.ListRoleAssignmentsResponse:
        """Return a page."""
        return await self._database.read(store.list_page, auth.caller(), request)

    async def DeleteRoleAssignment(
        self, request: role_assignment_service_pb2.DeleteRoleAssignmentRequest, context: Context
    ) -> operation_pb2.Operation:
        """Delete one."""
        return await self._frame.mutate(
            request, lambda work, asked: store.delete(work, asked, self._database)
        )
