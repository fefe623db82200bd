"""Serves mcloud.network.v1.PortService."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator

from mcloud.common.v1 import operation_pb2
from mcloud.network.v1 import port_pb2, port_service_pb2, port_service_pb2_grpc
from mcloud_controlplane.core import auth, convert, listing
from mcloud_controlplane.core.auth import Context
from mcloud_controlplane.core.database import Database
from mcloud_controlplane.core.mutation import Frame
from mcloud_controlplane.network import binding_store, port_store
from mcloud_controlplane.network.model import shared


class PortServicer(port_service_pb2_grpc.PortServiceServicer):
    """Ports."""

    def __init__(self, database: Database, frame: Frame) -> None:
        self._database = database
        self._frame = frame

    async def CreatePort(
        self, request: port_service_pb2.CreatePortRequest, context: Context
    ) -> operation_pb2.Operation:
        """Make one."""
        return await self._frame.mutate(request, port_store.create)

    async def GetPort(
        self, request: port_service_pb2.GetPortRequest, context: Context
    ) -> port_pb2.Port:
        """Return one."""
        caller = auth.caller()
        return await self._database.read_few(
            lambda: port_store.message(port_store.get(caller, request.id))
        )

    async def ListPorts(
        self, request: port_service_pb2.ListPortsRequest, context: Context
    ) -> port_service_pb2.ListPortsResponse:
        """Return a page."""
        return await self._database.read(port_store.list_page, auth.caller(), request)

    async def WatchPorts(
        self, request: port_service_pb2.WatchPortsRequest, context: Context
    ) -> AsyncIterator[port_service_pb2.WatchPortsResponse]:
        """Stream changes."""
        async for event in listing.watch(
            self._database,
            shared,
            "port",
            port_pb2.Port,
            request,
            auth.caller(),
            port_store.load,
        ):
            yield port_service_pb2.WatchPortsResponse(
                type=event.type, port=event.message, revision=event.revision
            )

    async def UpdatePort(
        self, request: port_service_pb2.UpdatePortRequest, context: Context
    ) -> operation_pb2.Operation:
        """Change one."""
        return await self._frame.mutate(request, port_store.update)

    async def DeletePort(
        self, request: port_service_pb2.DeletePortRequest, context: Context
    ) -> operation_pb2.Operation:
        """Delete one."""
        return await self._frame.mutate(request, port_store.delete)

    async def EnsurePort(
        self, request: port_service_pb2.EnsurePortRequest, context: Context
    ) -> port_pb2.Port:
        """Reserve one for an instance (step 4)."""
        return await self._database.write(binding_store.ensure, request)

    async def BindPort(
        self, request: port_service_pb2.BindPortRequest, context: Context
    ) -> port_service_pb2.BindPortResponse:
        """Bind one to the calling host (steps 12 and 13)."""
        answer = await self._database.write(binding_store.bind, auth.caller(), request)
        call = auth.call()
        step = operation_pb2.OperationStep(
            number=13,
            name="network authorizes",
            service="network",
            host=socket.gethostname(),
            state=operation_pb2.OperationStep.STATE_DONE,
            start_time=convert.timestamp(call.authorize_start_time),
            end_time=convert.timestamp(call.authorize_end_time),
        )
        call.hand_over(step)
        return answer

    async def UnbindPort(
        self, request: port_service_pb2.UnbindPortRequest, context: Context
    ) -> port_pb2.Port:
        """Take one off a domain that is gone."""
        return await self._database.write(binding_store.unbind, request)

    async def ReleasePort(
        self, request: port_service_pb2.ReleasePortRequest, context: Context
    ) -> port_service_pb2.ReleasePortResponse:
        """Undo EnsurePort."""
        return await self._database.write(binding_store.release, request)

    async def ListOwnedPorts(
        self, request: port_service_pb2.ListOwnedPortsRequest, context: Context
    ) -> port_service_pb2.ListOwnedPortsResponse:
        """Return those of instances."""
        return await self._database.read(binding_store.list_owned, request)
