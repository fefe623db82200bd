"""Serves mcloud.network.v1.SubnetService."""

from __future__ import annotations

from collections.abc import AsyncIterator

from mcloud.common.v1 import operation_pb2
from mcloud.network.v1 import subnet_pb2, subnet_service_pb2, subnet_service_pb2_grpc
from mcloud_controlplane.core import auth, listing
from mcloud_controlplane.core.auth import Context
from mcloud_controlplane.core.database import Database
from mcloud_controlplane.core.mutation import Frame
from mcloud_controlplane.network import subnet_store
from mcloud_controlplane.network.model import shared


class SubnetServicer(subnet_service_pb2_grpc.SubnetServiceServicer):
    """Subnets."""

    def __init__(self, database: Database, frame: Frame) -> None:
        self._database = database
        self._frame = frame

    async def CreateSubnet(
        self, request: subnet_service_pb2.CreateSubnetRequest, context: Context
    ) -> operation_pb2.Operation:
        """Make one."""
        return await self._frame.mutate(request, subnet_store.create)

    async def GetSubnet(
        self, request: subnet_service_pb2.GetSubnetRequest, context: Context
    ) -> subnet_pb2.Subnet:
        """Return one."""
        caller = auth.caller()
        return await self._database.read_few(
            lambda: subnet_store.message(subnet_store.get(caller, request.id))
        )

    async def ListSubnets(
        self, request: subnet_service_pb2.ListSubnetsRequest, context: Context
    ) -> subnet_service_pb2.ListSubnetsResponse:
        """Return a page."""
        return await self._database.read(subnet_store.list_page, auth.caller(), request)

    async def WatchSubnets(
        self, request: subnet_service_pb2.WatchSubnetsRequest, context: Context
    ) -> AsyncIterator[subnet_service_pb2.WatchSubnetsResponse]:
        """Stream changes."""
        async for event in listing.watch(
            self._database,
            shared,
            "subnet",
            subnet_pb2.Subnet,
            request,
            auth.caller(),
            subnet_store.load,
            with_shared=True,
        ):
            yield subnet_service_pb2.WatchSubnetsResponse(
                type=event.type, subnet=event.message, revision=event.revision
            )

    async def UpdateSubnet(
        self, request: subnet_service_pb2.UpdateSubnetRequest, context: Context
    ) -> operation_pb2.Operation:
        """Change one."""
        return await self._frame.mutate(request, subnet_store.update)

    async def DeleteSubnet(
        self, request: subnet_service_pb2.DeleteSubnetRequest, context: Context
    ) -> operation_pb2.Operation:
        """Delete one."""
        return await self._frame.mutate(request, subnet_store.delete)
