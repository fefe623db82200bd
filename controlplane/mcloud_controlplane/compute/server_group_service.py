"""Serves mcloud.compute.v1.ServerGroupService."""

from __future__ import annotations

from collections.abc import AsyncIterator

from mcloud.common.v1 import operation_pb2
from mcloud.compute.v1 import (
    server_group_pb2,
    server_group_service_pb2,
    server_group_service_pb2_grpc,
)
from mcloud_controlplane.compute import server_group_store
from mcloud_controlplane.compute.model import shared
from mcloud_controlplane.core import auth, listing
from mcloud_controlplane.core.auth import Context
from mcloud_controlplane.core.database import Database
from mcloud_controlplane.core.mutation import Frame


class ServerGroupServicer(server_group_service_pb2_grpc.ServerGroupServiceServicer):
    """Server groups."""

    def __init__(self, database: Database, frame: Frame) -> None:
        self._database = database
        self._frame = frame

    async def CreateServerGroup(
        self, request: server_group_service_pb2.CreateServerGroupRequest, context: Context
    ) -> operation_pb2.Operation:
        """Record one."""
        return await self._frame.mutate(request, server_group_store.create)

    async def GetServerGroup(
        self, request: server_group_service_pb2.GetServerGroupRequest, context: Context
    ) -> server_group_pb2.ServerGroup:
        """Return one."""
        caller = auth.caller()
        return await self._database.read_few(
            lambda: server_group_store.message(server_group_store.get(caller, request.id))
        )

    async def ListServerGroups(
        self, request: server_group_service_pb2.ListServerGroupsRequest, context: Context
    ) -> server_group_service_pb2.ListServerGroupsResponse:
        """Return a page."""
        return await self._database.read(server_group_store.list_page, auth.caller(), request)

    async def WatchServerGroups(
        self, request: server_group_service_pb2.WatchServerGroupsRequest, context: Context
    ) -> AsyncIterator[server_group_service_pb2.WatchServerGroupsResponse]:
        """Stream changes."""
        async for event in listing.watch(
            self._database,
            shared,
            "server_group",
            server_group_pb2.ServerGroup,
            request,
            auth.caller(),
            server_group_store.load,
        ):
            yield server_group_service_pb2.WatchServerGroupsResponse(
                type=event.type, server_group=event.message, revision=event.revision
            )

    async def UpdateServerGroup(
        self, request: server_group_service_pb2.UpdateServerGroupRequest, context: Context
    ) -> operation_pb2.Operation:
        """Change name or labels."""
        return await self._frame.mutate(request, server_group_store.update)

    async def DeleteServerGroup(
        self, request: server_group_service_pb2.DeleteServerGroupRequest, context: Context
    ) -> operation_pb2.Operation:
        """Delete one."""
        return await self._frame.mutate(request, server_group_store.delete)
