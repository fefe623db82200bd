"""Serves mcloud.compute.v1.FlavorService."""

from __future__ import annotations

from collections.abc import AsyncIterator

from mcloud.common.v1 import operation_pb2
from mcloud.compute.v1 import flavor_pb2, flavor_service_pb2, flavor_service_pb2_grpc
from mcloud_controlplane.compute import flavor_store
from mcloud_controlplane.compute.model import shared
from mcloud_controlplane.core import auth, listing
from mcloud_controlplane.core.auth import Context
from mcloud_controlplane.core.database import Database
from mcloud_controlplane.core.mutation import Frame


class FlavorServicer(flavor_service_pb2_grpc.FlavorServiceServicer):
    """Flavors."""

    def __init__(self, database: Database, frame: Frame) -> None:
        self._database = database
        self._frame = frame

    async def CreateFlavor(
        self, request: flavor_service_pb2.CreateFlavorRequest, context: Context
    ) -> operation_pb2.Operation:
        """Make one."""
        return await self._frame.mutate(request, flavor_store.create)

    async def GetFlavor(
        self, request: flavor_service_pb2.GetFlavorRequest, context: Context
    ) -> flavor_pb2.Flavor:
        """Return one."""
        return await self._database.read_few(
            lambda: flavor_store.message(flavor_store.get(request.id))
        )

    async def ListFlavors(
        self, request: flavor_service_pb2.ListFlavorsRequest, context: Context
    ) -> flavor_service_pb2.ListFlavorsResponse:
        """Return a page."""
        return await self._database.read(flavor_store.list_page, auth.caller(), request)

    async def WatchFlavors(
        self, request: flavor_service_pb2.WatchFlavorsRequest, context: Context
    ) -> AsyncIterator[flavor_service_pb2.WatchFlavorsResponse]:
        """Stream changes."""
        async for event in listing.watch(
            self._database,
            shared,
            "flavor",
            flavor_pb2.Flavor,
            request,
            auth.caller(),
            flavor_store.load,
            everybody=True,
        ):
            yield flavor_service_pb2.WatchFlavorsResponse(
                type=event.type, flavor=event.message, revision=event.revision
            )

    async def DeleteFlavor(
        self, request: flavor_service_pb2.DeleteFlavorRequest, context: Context
    ) -> operation_pb2.Operation:
        """Delete one."""
        return await self._frame.mutate(request, flavor_store.delete)
