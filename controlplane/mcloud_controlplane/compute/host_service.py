"""Serves mcloud.compute.v1.HostService."""

from __future__ import annotations

from collections.abc import AsyncIterator

from mcloud.common.v1 import operation_pb2
from mcloud.compute.v1 import host_pb2, host_service_pb2, host_service_pb2_grpc
from mcloud_controlplane.compute import host_store
from mcloud_controlplane.compute.model import shared
from mcloud_controlplane.core import auth, listing
from mcloud_controlplane.core.auth import Context
from mcloud_controlplane.core.database import Database
from mcloud_controlplane.core.mutation import Frame


class HostServicer(host_service_pb2_grpc.HostServiceServicer):
    """Hosts."""

    def __init__(self, database: Database, frame: Frame) -> None:
        self._database = database
        self._frame = frame

    async def GetHost(
        self, request: host_service_pb2.GetHostRequest, context: Context
    ) -> host_pb2.Host:
        """Return one."""
        return await self._database.read_few(host_store.get_message, request.id)

    async def ListHosts(
        self, request: host_service_pb2.ListHostsRequest, context: Context
    ) -> host_service_pb2.ListHostsResponse:
        """Return a page."""
        return await self._database.read(host_store.list_page, auth.caller(), request)

    async def WatchHosts(
        self, request: host_service_pb2.WatchHostsRequest, context: Context
    ) -> AsyncIterator[host_service_pb2.WatchHostsResponse]:
        """Stream changes."""
        async for event in listing.watch(
            self._database,
            shared,
            "host",
            host_pb2.Host,
            request,
            auth.caller(),
            host_store.load,
            everybody=True,
        ):
            yield host_service_pb2.WatchHostsResponse(
                type=event.type, host=event.message, revision=event.revision
            )

    async def UpdateHost(
        self, request: host_service_pb2.UpdateHostRequest, context: Context
    ) -> operation_pb2.Operation:
        """Change one."""
        return await self._frame.mutate(request, host_store.update)

    async def DeleteHost(
        self, request: host_service_pb2.DeleteHostRequest, context: Context
    ) -> operation_pb2.Operation:
        """Forget one."""
        return await self._frame.mutate(request, host_store.delete)
