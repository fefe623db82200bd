"""Serves mcloud.network.v1.NetworkService."""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial

from mcloud.common.v1 import operation_pb2
from mcloud.network.v1 import network_pb2, network_service_pb2, network_service_pb2_grpc
from mcloud_controlplane.core import auth, listing
from mcloud_controlplane.core.auth import Context
from mcloud_controlplane.core.database import Database
from mcloud_controlplane.core.mutation import Frame
from mcloud_controlplane.network import network_store
from mcloud_controlplane.network.model import shared


class NetworkServicer(network_service_pb2_grpc.NetworkServiceServicer):
    """Networks."""

    def __init__(self, database: Database, frame: Frame, *, underlay_mtu: int) -> None:
        self._database = database
        self._frame = frame
        self._create = partial(network_store.create, underlay_mtu=underlay_mtu)

    async def CreateNetwork(
        self, request: network_service_pb2.CreateNetworkRequest, context: Context
    ) -> operation_pb2.Operation:
        """Make one."""
        return await self._frame.mutate(request, self._create)

    async def GetNetwork(
        self, request: network_service_pb2.GetNetworkRequest, context: Context
    ) -> network_pb2.Network:
        """Return one."""
        caller = auth.caller()
        return await self._database.read_few(
            lambda: network_store.message(network_store.get(caller, request.id))
        )

    async def ListNetworks(
        self, request: network_service_pb2.ListNetworksRequest, context: Context
    ) -> network_service_pb2.ListNetworksResponse:
        """Return a page."""
        return await self._database.read(network_store.list_page, auth.caller(), request)

    async def WatchNetworks(
        self, request: network_service_pb2.WatchNetworksRequest, context: Context
    ) -> AsyncIterator[network_service_pb2.WatchNetworksResponse]:
        """Stream changes."""
        async for event in listing.watch(
            self._database,
            shared,
            "network",
            network_pb2.Network,
            request,
            auth.caller(),
            network_store.load,
            with_shared=True,
        ):
            yield network_service_pb2.WatchNetworksResponse(
                type=event.type, network=event.message, revision=event.revision
            )

    async def UpdateNetwork(
        self, request: network_service_pb2.UpdateNetworkRequest, context: Context
    ) -> operation_pb2.Operation:
        """Change one."""
        return await self._frame.mutate(request, network_store.update)

    async def DeleteNetwork(
        self, request: network_service_pb2.DeleteNetworkRequest, context: Context
    ) -> operation_pb2.Operation:
        """Delete one."""
        return await self._frame.mutate(request, network_store.delete)
