"""Serves mcloud.compute.v1.KeyPairService."""

from __future__ import annotations

from collections.abc import AsyncIterator

from mcloud.common.v1 import operation_pb2
from mcloud.compute.v1 import key_pair_pb2, key_pair_service_pb2, key_pair_service_pb2_grpc
from mcloud_controlplane.compute import key_pair_store
from mcloud_controlplane.compute.model import shared
from mcloud_controlplane.core import auth, listing
from mcloud_controlplane.core.auth import Context
from mcloud_controlplane.core.database import Database
from mcloud_controlplane.core.mutation import Frame


class KeyPairServicer(key_pair_service_pb2_grpc.KeyPairServiceServicer):
    """Key pairs."""

    def __init__(self, database: Database, frame: Frame) -> None:
        self._database = database
        self._frame = frame

    async def CreateKeyPair(
        self, request: key_pair_service_pb2.CreateKeyPairRequest, context: Context
    ) -> operation_pb2.Operation:
        """Record one."""
        return await self._frame.mutate(request, key_pair_store.create)

    async def GetKeyPair(
        self, request: key_pair_service_pb2.GetKeyPairRequest, context: Context
    ) -> key_pair_pb2.KeyPair:
        """Return one."""
        caller = auth.caller()
        return await self._database.read_few(
            lambda: key_pair_store.message(key_pair_store.get(caller, request.id))
        )

    async def ListKeyPairs(
        self, request: key_pair_service_pb2.ListKeyPairsRequest, context: Context
    ) -> key_pair_service_pb2.ListKeyPairsResponse:
        """Return a page."""
        return await self._database.read(key_pair_store.list_page, auth.caller(), request)

    async def WatchKeyPairs(
        self, request: key_pair_service_pb2.WatchKeyPairsRequest, context: Context
    ) -> AsyncIterator[key_pair_service_pb2.WatchKeyPairsResponse]:
        """Stream changes."""
        async for event in listing.watch(
            self._database,
            shared,
            "key_pair",
            key_pair_pb2.KeyPair,
            request,
            auth.caller(),
            key_pair_store.load,
        ):
            yield key_pair_service_pb2.WatchKeyPairsResponse(
                type=event.type, key_pair=event.message, revision=event.revision
            )

    async def DeleteKeyPair(
        self, request: key_pair_service_pb2.DeleteKeyPairRequest, context: Context
    ) -> operation_pb2.Operation:
        """Delete one."""
        return await self._frame.mutate(request, key_pair_store.delete)
