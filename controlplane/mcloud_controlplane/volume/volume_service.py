"""Serves mcloud.volume.v1.VolumeService."""

from __future__ import annotations

from collections.abc import AsyncIterator

from mcloud.common.v1 import operation_pb2
from mcloud.volume.v1 import volume_pb2, volume_service_pb2, volume_service_pb2_grpc
from mcloud_controlplane.core import auth, listing
from mcloud_controlplane.core.auth import Context
from mcloud_controlplane.core.database import Database
from mcloud_controlplane.core.mutation import Frame
from mcloud_controlplane.volume import volume_store
from mcloud_controlplane.volume.model import shared


class VolumeServicer(volume_service_pb2_grpc.VolumeServiceServicer):
    """Volumes."""

    def __init__(self, database: Database, frame: Frame) -> None:
        self._database = database
        self._frame = frame

    async def CreateVolume(
        self, request: volume_service_pb2.CreateVolumeRequest, context: Context
    ) -> operation_pb2.Operation:
        """Record one; the workflow has it made."""
        return await self._frame.mutate(request, volume_store.create)

    async def GetVolume(
        self, request: volume_service_pb2.GetVolumeRequest, context: Context
    ) -> volume_pb2.Volume:
        """Return one."""
        caller = auth.caller()
        return await self._database.read_few(
            lambda: volume_store.message(volume_store.get(caller, request.id))
        )

    async def ListVolumes(
        self, request: volume_service_pb2.ListVolumesRequest, context: Context
    ) -> volume_service_pb2.ListVolumesResponse:
        """Return a page."""
        return await self._database.read(volume_store.list_page, auth.caller(), request)

    async def WatchVolumes(
        self, request: volume_service_pb2.WatchVolumesRequest, context: Context
    ) -> AsyncIterator[volume_service_pb2.WatchVolumesResponse]:
        """Stream changes."""
        async for event in listing.watch(
            self._database,
            shared,
            "volume",
            volume_pb2.Volume,
            request,
            auth.caller(),
            volume_store.load,
        ):
            yield volume_service_pb2.WatchVolumesResponse(
                type=event.type, volume=event.message, revision=event.revision
            )

    async def UpdateVolume(
        self, request: volume_service_pb2.UpdateVolumeRequest, context: Context
    ) -> operation_pb2.Operation:
        """Change one."""
        return await self._frame.mutate(request, volume_store.update)

    async def DeleteVolume(
        self, request: volume_service_pb2.DeleteVolumeRequest, context: Context
    ) -> operation_pb2.Operation:
        """Bury one; the workflow waits until it is gone."""
        return await self._frame.mutate(request, volume_store.delete)
