"""Serves mcloud.network.v1.FloatingIpService."""

from __future__ import annotations

from collections.abc import AsyncIterator

from mcloud.common.v1 import operation_pb2
from mcloud.network.v1 import floating_ip_pb2, floating_ip_service_pb2, floating_ip_service_pb2_grpc
from mcloud_controlplane.core import auth, listing
from mcloud_controlplane.core.auth import Context
from mcloud_controlplane.core.database import Database
from mcloud_controlplane.core.mutation import Frame
from mcloud_controlplane.network import floating_ip_store
from mcloud_controlplane.network.model import shared


class FloatingIpServicer(floating_ip_service_pb2_grpc.FloatingIpServiceServicer):
    """Floating addresses."""

    def __init__(self, database: Database, frame: Frame) -> None:
        self._database = database
        self._frame = frame

    async def CreateFloatingIp(
        self, request: floating_ip_service_pb2.CreateFloatingIpRequest, context: Context
    ) -> operation_pb2.Operation:
        """Make one."""
        return await self._frame.mutate(request, floating_ip_store.create)

    async def GetFloatingIp(
        self, request: floating_ip_service_pb2.GetFloatingIpRequest, context: Context
    ) -> floating_ip_pb2.FloatingIp:
        """Return one."""
        caller = auth.caller()
        return await self._database.read_few(
            lambda: floating_ip_store.message(floating_ip_store.get(caller, request.id))
        )

    async def ListFloatingIps(
        self, request: floating_ip_service_pb2.ListFloatingIpsRequest, context: Context
    ) -> floating_ip_service_pb2.ListFloatingIpsResponse:
        """Return a page."""
        return await self._database.read(floating_ip_store.list_page, auth.caller(), request)

    async def WatchFloatingIps(
        self, request: floating_ip_service_pb2.WatchFloatingIpsRequest, context: Context
    ) -> AsyncIterator[floating_ip_service_pb2.WatchFloatingIpsResponse]:
        """Stream changes."""
        async for event in listing.watch(
            self._database,
            shared,
            "floating_ip",
            floating_ip_pb2.FloatingIp,
            request,
            auth.caller(),
            floating_ip_store.load,
        ):
            yield floating_ip_service_pb2.WatchFloatingIpsResponse(
                type=event.type, floating_ip=event.message, revision=event.revision
            )

    async def UpdateFloatingIp(
        self, request: floating_ip_service_pb2.UpdateFloatingIpRequest, context: Context
    ) -> operation_pb2.Operation:
        """Change one."""
        return await self._frame.mutate(request, floating_ip_store.update)

    async def DeleteFloatingIp(
        self, request: floating_ip_service_pb2.DeleteFloatingIpRequest, context: Context
    ) -> operation_pb2.Operation:
        """Delete one."""
        return await self._frame.mutate(request, floating_ip_store.delete)
