"""Serves mcloud.network.v1.SecurityGroupService."""

from __future__ import annotations

from collections.abc import AsyncIterator

from mcloud.common.v1 import operation_pb2
from mcloud.network.v1 import (
    security_group_pb2,
    security_group_service_pb2,
    security_group_service_pb2_grpc,
)
from mcloud_controlplane.core import auth, listing
from mcloud_controlplane.core.auth import Context
from mcloud_controlplane.core.database import Database
from mcloud_controlplane.core.mutation import Frame
from mcloud_controlplane.network import security_group_store
from mcloud_controlplane.network.model import shared


class SecurityGroupServicer(security_group_service_pb2_grpc.SecurityGroupServiceServicer):
    """Security groups."""

    def __init__(self, database: Database, frame: Frame) -> None:
        self._database = database
        self._frame = frame

    async def CreateSecurityGroup(
        self, request: security_group_service_pb2.CreateSecurityGroupRequest, context: Context
    ) -> operation_pb2.Operation:
        """Make one."""
        return await self._frame.mutate(request, security_group_store.create)

    async def GetSecurityGroup(
        self, request: security_group_service_pb2.GetSecurityGroupRequest, context: Context
    ) -> security_group_pb2.SecurityGroup:
        """Return one."""
        caller = auth.caller()
        return await self._database.read_few(
            lambda: security_group_store.message(security_group_store.get(caller, request.id))
        )

    async def ListSecurityGroups(
        self, request: security_group_service_pb2.ListSecurityGroupsRequest, context: Context
    ) -> security_group_service_pb2.ListSecurityGroupsResponse:
        """Return a page."""
        await self._ensure_default()
        return await self._database.read(security_group_store.list_page, auth.caller(), request)

    async def WatchSecurityGroups(
        self, request: security_group_service_pb2.WatchSecurityGroupsRequest, context: Context
    ) -> AsyncIterator[security_group_service_pb2.WatchSecurityGroupsResponse]:
        """Stream changes."""
        async for event in listing.watch(
            self._database,
            shared,
            "security_group",
            security_group_pb2.SecurityGroup,
            request,
            auth.caller(),
            security_group_store.load,
        ):
            yield security_group_service_pb2.WatchSecurityGroupsResponse(
                type=event.type, security_group=event.message, revision=event.revision
            )

    async def UpdateSecurityGroup(
        self, request: security_group_service_pb2.UpdateSecurityGroupRequest, context: Context
    ) -> operation_pb2.Operation:
        """Change one."""
        return await self._frame.mutate(request, security_group_store.update)

    async def DeleteSecurityGroup(
        self, request: security_group_service_pb2.DeleteSecurityGroupRequest, context: Context
    ) -> operation_pb2.Operation:
        """Delete one."""
        return await self._frame.mutate(request, security_group_store.delete)

    async def CreateSecurityGroupRule(
        self, request: security_group_service_pb2.CreateSecurityGroupRuleRequest, context: Context
    ) -> operation_pb2.Operation:
        """Add a rule to one."""
        return await self._frame.mutate(request, security_group_store.create_rule)

    async def DeleteSecurityGroupRule(
        self, request: security_group_service_pb2.DeleteSecurityGroupRuleRequest, context: Context
    ) -> operation_pb2.Operation:
        """Remove a rule."""
        return await self._frame.mutate(request, security_group_store.delete_rule)

    async def _ensure_default(self) -> None:
        """Make the caller's project its "default" group, if it has none yet."""
        project_id = auth.caller().project_id
        if project_id and not await self._database.read(
            security_group_store.find_default, project_id
        ):
            await self._database.write(security_group_store.ensure_default, project_id)
