"""Serves mcloud.identity.v1.EnrolmentService: how machines become hosts, and stay."""

from __future__ import annotations

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from mcloud.common.v1 import operation_pb2
from mcloud.identity.v1 import enrolment_pb2, enrolment_service_pb2, enrolment_service_pb2_grpc
from mcloud_base import tls
from mcloud_controlplane.core import auth, convert, pki
from mcloud_controlplane.core.auth import Context
from mcloud_controlplane.core.database import Database
from mcloud_controlplane.core.mutation import Frame
from mcloud_controlplane.identity import enrolment_store as store


class EnrolmentServicer(enrolment_service_pb2_grpc.EnrolmentServiceServicer):
    """Join tokens and certificates.

    Args:
        internal_endpoint: what hosts are told to connect to.
    """

    def __init__(
        self, database: Database, frame: Frame, authority: pki.Authority, internal_endpoint: str
    ) -> None:
        self._database = database
        self._frame = frame
        self._authority = authority
        self._internal_endpoint = internal_endpoint

    async def CreateJoinToken(
        self, request: enrolment_service_pb2.CreateJoinTokenRequest, context: Context
    ) -> enrolment_service_pb2.CreateJoinTokenResponse:
        """Make one and show its secret."""
        return await self._database.write(
            store.create,
            self._frame,
            auth.caller(),
            auth.call().method,
            request,
            tls.fingerprint(self._authority.certificate),
        )

    async def ListJoinTokens(
        self, request: enrolment_service_pb2.ListJoinTokensRequest, context: Context
    ) -> enrolment_service_pb2.ListJoinTokensResponse:
        """Return a page."""
        return await self._database.read(store.list_page, auth.caller(), request)

    async def DeleteJoinToken(
        self, request: enrolment_service_pb2.DeleteJoinTokenRequest, context: Context
    ) -> operation_pb2.Operation:
        """Delete one."""
        return await self._frame.mutate(request, store.delete)

    async def Enrol(
        self, request: enrolment_service_pb2.EnrolRequest, context: Context
    ) -> enrolment_pb2.IssuedCertificate:
        """Make a machine a host."""
        host_id, certificate = await self._database.write(
            store.enrol, self._database, self._authority, request
        )
        return self._issued(host_id, certificate)

    async def RenewCertificate(
        self, request: enrolment_service_pb2.RenewCertificateRequest, context: Context
    ) -> enrolment_pb2.IssuedCertificate:
        """Give the calling host a fresh certificate."""
        caller = auth.caller().certificate
        assert caller is not None, "the contract admits hosts only"
        certificate = await self._database.write(
            store.renew, self._database, self._authority, caller, request
        )
        return self._issued(caller.host_id, certificate)

    async def RevokeHostCertificates(
        self, request: enrolment_service_pb2.RevokeHostCertificatesRequest, context: Context
    ) -> enrolment_service_pb2.RevokeHostCertificatesResponse:
        """End a host's membership."""
        count = await self._database.write(store.revoke, request.host_id)
        return enrolment_service_pb2.RevokeHostCertificatesResponse(revoked_count=count)

    async def ListRevokedCertificates(
        self, request: enrolment_service_pb2.ListRevokedCertificatesRequest, context: Context
    ) -> enrolment_service_pb2.ListRevokedCertificatesResponse:
        """Return what is revoked and not yet expired."""
        return enrolment_service_pb2.ListRevokedCertificatesResponse(
            serials=await self._database.read(store.revoked_serials)
        )

    def _issued(
        self, host_id: str, certificate: x509.Certificate
    ) -> enrolment_pb2.IssuedCertificate:
        end = int(certificate.not_valid_after_utc.timestamp()) * 1_000_000
        return enrolment_pb2.IssuedCertificate(
            host_id=host_id,
            certificate=certificate.public_bytes(serialization.Encoding.PEM),
            authority=self._authority.certificate,
            expire_time=convert.timestamp(end),
            internal_endpoint=self._internal_endpoint,
        )
