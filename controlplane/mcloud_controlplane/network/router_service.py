"""Serves mcloud.network.v1.RouterService."""

from __future__ import annotations

from collections.abc import AsyncIterator

from mcloud.common.v1 import operation_pb2
from mcloud.network.v1 import router_pb2, router_service_pb2, router_service_pb2_grpc
from mcloud_controlplane.core import auth, listing
from mcloud_controlplane.core.auth import Context
from mcloud_controlplane.core.database import Database
from mcloud_controlplane.core.mutation import Frame
from mcloud_controlplane.network import router_store
from mcloud_controlplane.network.model import shared


class RouterServicer(router_service_pb2_grpc.RouterServiceServicer):
    """Routers."""

    def __init__(self, database: Database, frame: Frame) -> None:
        self._database = database
        self._frame = frame

    async def CreateRouter(
        self, request: router_service_pb2.CreateRouterRequest, context: Context
    ) -> operation_pb2.Operation:
        """Make one."""
        return await self._frame.mutate(request, router_store.create)

    async def GetRouter(
        self, request: router_service_pb2.GetRouterRequest, context: Context
    ) -> router_pb2.Router:
        """Return one."""
        caller = auth.caller()
        return await self._database.read_few(
            lambda: router_store.message(router_store.get(caller, request.id))
        )

    async def ListRouters(
        self, request: router_service_pb2.ListRoutersRequest, context: Context
    ) -> router_service_pb2.ListRoutersResponse:
        """Return a page."""
        return await self._database.read(router_store.list_page, auth.caller(), request)

    async def WatchRouters(
        self, request: router_service_pb2.WatchRoutersRequest, context: Context
    ) -> AsyncIterator[router_service_pb2.WatchRoutersResponse]:
        """Stream changes."""
        async for event in listing.watch(
            self._database,
            shared,
            "router",
            router_pb2.Router,
            request,
            auth.caller(),
            router_store.load,
        ):
            yield router_service_pb2.WatchRoutersResponse(
                type=event.type, router=event.message, revision=event.revision
            )

    async def UpdateRouter(
        self, request: router_service_pb2.UpdateRouterRequest, context: Context
    ) -> operation_pb2.Operation:
        """Change one."""
        return await self._frame.mutate(request, router_store.update)

    async def DeleteRouter(
        self, request: router_service_pb2.DeleteRouterRequest, context: Context
    ) -> operation_pb2.Operation:
        """Delete one."""
        return await self._frame.mutate(request, router_store.delete)

    async def AddRouterInterface(
        self, request: router_service_pb2.AddRouterInterfaceRequest, context: Context
    ) -> operation_pb2.Operation:
        """Join a subnet to one."""
        return await self._frame.mutate(request, router_store.add_interface)

    async def RemoveRouterInterface(
        self, request: router_service_pb2.RemoveRouterInterfaceRequest, context: Context
    ) -> operation_pb2.Operation:
        """Take a subnet off one."""
        return await self._frame.mutate(request, router_store.remove_interface)
