"""Serves mcloud.identity.v1.ApplicationCredentialService."""

from __future__ import annotations

from mcloud.common.v1 import operation_pb2
from mcloud.identity.v1 import (
    application_credential_pb2,
    application_credential_service_pb2,
    application_credential_service_pb2_grpc,
)
from mcloud_controlplane.core import auth
from mcloud_controlplane.core.auth import Context
from mcloud_controlplane.core.database import Database
from mcloud_controlplane.core.mutation import Frame
from mcloud_controlplane.identity import application_credential_store as store


class ApplicationCredentialServicer(
    application_credential_service_pb2_grpc.ApplicationCredentialServiceServicer
):
    """Application credentials."""

    def __init__(self, database: Database, frame: Frame) -> None:
        self._database = database
        self._frame = frame

    async def CreateApplicationCredential(
        self,
        request: application_credential_service_pb2.CreateApplicationCredentialRequest,
        context: Context,
    ) -> application_credential_service_pb2.CreateApplicationCredentialResponse:
        """Make one and show its secret."""
        return await self._database.write(
            store.create, self._frame, self._database, auth.caller(), auth.call().method, request
        )

    async def GetApplicationCredential(
        self,
        request: application_credential_service_pb2.GetApplicationCredentialRequest,
        context: Context,
    ) -> application_credential_pb2.ApplicationCredential:
        """Return one."""
        caller = auth.caller()
        return await self._database.read_few(lambda: store.message(store.get(caller, request.id)))

    async def ListApplicationCredentials(
        self,
        request: application_credential_service_pb2.ListApplicationCredentialsRequest,
        context: Context,
    ) -> application_credential_service_pb2.ListApplicationCredentialsResponse:
        """Return a page."""
        return await self._database.read(store.list_page, auth.caller(), request)

    async def DeleteApplicationCredential(
        self,
        request: application_credential_service_pb2.DeleteApplicationCredentialRequest,
        context: Context,
    ) -> operation_pb2.Operation:
        """Delete one."""
        return await self._frame.mutate(request, store.delete)
