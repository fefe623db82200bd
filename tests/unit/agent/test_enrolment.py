"""Becoming a host and staying one, against a real TLS server with a real authority."""

from __future__ import annotations

import asyncio
import datetime
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from fakes import pki
from mcloud.identity.v1 import enrolment_pb2, enrolment_service_pb2, enrolment_service_pb2_grpc
from mcloud_agents import enrolment
from mcloud_agents.link import Link
from mcloud_base import endpoints, errors, rpc, tls

HOST_ID = "h-0123456789abcdefghjk"


class Identity(enrolment_service_pb2_grpc.EnrolmentServiceServicer):
    """Identity's part in it: one join token, one host."""

    def __init__(self, life: datetime.timedelta = datetime.timedelta(days=1)) -> None:
        self.authority = pki.Authority()
        self.life = life
        self.requests: list[enrolment_service_pb2.EnrolRequest] = []
        self.renewed = asyncio.Event()
        self.peers: list[str] = []
        self.gate: asyncio.Event | None = None  # that renewals wait for

    @property
    def join_token(self) -> str:
        return f"s3cr3t.{tls.fingerprint(self.authority.certificate)}"

    def _issue(self, csr: bytes, address: str) -> enrolment_pb2.IssuedCertificate:
        certificate = self.authority.sign(
            csr, HOST_ID, uri=tls.HOST_URI + HOST_ID, addresses=(address,), life=self.life
        )
        return enrolment_pb2.IssuedCertificate(
            host_id=HOST_ID,
            certificate=certificate,
            authority=self.authority.certificate,
            internal_endpoint="127.0.0.1:7701",
        )

    async def Enrol(  # noqa: N802
        self, request: enrolment_service_pb2.EnrolRequest, context: grpc.aio.ServicerContext
    ) -> enrolment_pb2.IssuedCertificate:
        self.requests.append(request)
        if request.secret != self.join_token:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "BAD_JOIN_TOKEN")
        return self._issue(request.csr, request.underlay_ip)

    async def RenewCertificate(  # noqa: N802
        self,
        request: enrolment_service_pb2.RenewCertificateRequest,
        context: grpc.aio.ServicerContext,
    ) -> enrolment_pb2.IssuedCertificate:
        (pem,) = context.auth_context()["x509_pem_cert"]
        self.peers.append(tls.fingerprint(pem))
        self.renewed.set()
        if self.gate is not None:
            await self.gate.wait()
        return self._issue(request.csr, request.underlay_ip)


@asynccontextmanager
async def serving(identity: Identity, *, internal: bool = False) -> AsyncIterator[str]:
    own = identity.authority.identity("identity", dns=(endpoints.SERVICE_NAME, "localhost"))
    chain = own.certificate + own.authority
    server = grpc.aio.server()
    enrolment_service_pb2_grpc.add_EnrolmentServiceServicer_to_server(identity, server)
    credentials = grpc.ssl_server_credentials(
        [(own.key, chain)],
        identity.authority.certificate if internal else None,
        require_client_auth=internal,
    )
    port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(grace=0)


@pytest.fixture
def files(tmp_path: Path) -> enrolment.Files:
    return enrolment.Files(tmp_path / "identity", tmp_path / "pki")


async def _enrol(
    files: enrolment.Files, endpoint: str, token: str, *, force: bool = False
) -> enrolment.Membership:
    return await enrolment.enrol(
        files, endpoint, token, name="node-1", underlay_ip="192.0.2.7", force=force
    )


async def test_a_machine_becomes_a_host(files: enrolment.Files, tmp_path: Path) -> None:
    identity = Identity()
    async with serving(identity) as endpoint:
        membership = await _enrol(files, endpoint, identity.join_token)

    assert membership == enrolment.Membership(HOST_ID, "node-1", endpoint, "127.0.0.1:7701")
    known = files.load()
    assert known is not None
    assert known[1] == membership
    assert known[0].authority == identity.authority.certificate
    certificate = x509.load_pem_x509_certificate(known[0].certificate)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [str(ip) for ip in names.get_values_for_type(x509.IPAddress)] == ["192.0.2.7"]
    assert {path.name for path in (tmp_path / "pki").iterdir()} == {
        "ca-cert.pem",
        "client-cert.pem",
        "client-key.pem",
        "dh-params.pem",
        "server-cert.pem",
        "server-key.pem",
    }
    for path in (*(tmp_path / "pki").iterdir(), *(tmp_path / "identity").iterdir()):
        assert path.stat().st_mode & 0o777 == 0o600


async def test_a_repeat_is_harmless(files: enrolment.Files, tmp_path: Path) -> None:
    identity = Identity()
    async with serving(identity) as endpoint:
        first = await _enrol(files, endpoint, identity.join_token)
        (tmp_path / "pki" / "server-cert.pem").unlink()
        assert await _enrol(files, endpoint, identity.join_token) == first
        assert (tmp_path / "pki" / "server-cert.pem").exists()
        assert len(identity.requests) == 1
        assert await _enrol(files, endpoint, identity.join_token, force=True) == first
        keys = {_public_key(request.csr) for request in identity.requests}
        assert len(identity.requests) == 2
        assert len(keys) == 1  # by which identity knows that it is the same machine


async def test_somebody_else_is_not_joined(files: enrolment.Files) -> None:
    identity, stranger = Identity(), Identity()
    async with serving(stranger) as endpoint:
        with pytest.raises(errors.PermissionDenied, match="AUTHORITY_MISMATCH"):
            await _enrol(files, endpoint, identity.join_token)
    assert not stranger.requests  # and was not told the secret
    assert files.load() is None


async def test_who_only_shows_the_authority_is_not_joined(files: enrolment.Files) -> None:
    """A host has a certificate of the same authority, but not one of a service."""
    identity = Identity()
    own = identity.authority.identity(HOST_ID, uri=tls.HOST_URI + HOST_ID, dns=("localhost",))
    server = grpc.aio.server()
    enrolment_service_pb2_grpc.add_EnrolmentServiceServicer_to_server(identity, server)
    credentials = grpc.ssl_server_credentials([(own.key, own.certificate + own.authority)])
    port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    try:
        channel = rpc.channel(
            f"127.0.0.1:{port}",
            grpc.ssl_channel_credentials(identity.authority.certificate),
            server_name=endpoints.SERVICE_NAME,
        )
        async with channel:
            stub = enrolment_service_pb2_grpc.EnrolmentServiceStub(channel)
            with pytest.raises(errors.Unavailable):
                await rpc.call(stub.Enrol, enrolment_service_pb2.EnrolRequest(), timeout_s=1)
    finally:
        await server.stop(grace=0)
    assert not identity.requests


@pytest.mark.parametrize("token", ["", "s3cr3t", "s3cr3t.abc"])
async def test_half_a_token_is_refused(files: enrolment.Files, token: str) -> None:
    with pytest.raises(errors.InvalidArgument, match="BAD_JOIN_TOKEN"):
        await _enrol(files, "127.0.0.1:1", token)


async def test_a_used_token_is_refused(files: enrolment.Files) -> None:
    identity = Identity()
    async with serving(identity) as endpoint:
        with pytest.raises(errors.Unauthenticated):
            await _enrol(files, endpoint, "other." + identity.join_token.partition(".")[2])


async def test_nobody_there_is_said_so(files: enrolment.Files) -> None:
    with pytest.raises(errors.Unavailable, match="CONTROL_PLANE_UNREACHABLE"):
        await _enrol(files, "127.0.0.1:1", Identity().join_token)
    with pytest.raises(errors.InvalidArgument, match="BAD_ENDPOINT"):
        await _enrol(files, "localhost", Identity().join_token)


async def test_a_host_of_another_cloud_stays_one(files: enrolment.Files) -> None:
    identity, other = Identity(), Identity()
    async with serving(identity) as endpoint, serving(other) as elsewhere:
        await _enrol(files, endpoint, identity.join_token)
        with pytest.raises(errors.WrongState, match="ENROLLED_ELSEWHERE"):
            await _enrol(files, elsewhere, other.join_token)


async def test_a_lost_key_is_said_so_and_can_be_got_over(
    files: enrolment.Files, tmp_path: Path
) -> None:
    identity = Identity()
    async with serving(identity) as endpoint:
        await _enrol(files, endpoint, identity.join_token)
        (tmp_path / "identity" / "key.pem").unlink()
        with pytest.raises(errors.DataLoss, match="IDENTITY_DAMAGED"):
            await _enrol(files, endpoint, identity.join_token)
        assert await _enrol(files, endpoint, identity.join_token, force=True)
        assert files.load() is not None


async def test_the_certificate_is_renewed_and_used(files: enrolment.Files, tmp_path: Path) -> None:
    """At two thirds of its life; the link then calls with the new one, through the same stub."""
    identity = Identity(life=datetime.timedelta(seconds=1))  # starts 5 minutes ago: due at once
    async with serving(identity) as endpoint:
        await _enrol(files, endpoint, identity.join_token)
    known = files.load()
    assert known is not None
    identity.life = datetime.timedelta(days=1)
    # What it enrolled with is over; the link begins with one that is good.
    good = identity.authority.sign(tls.signing_request(known[0].key, HOST_ID), HOST_ID)
    first = tls.Identity(known[0].key, good, known[0].authority)
    async with serving(identity, internal=True) as endpoint:
        link = Link(endpoint, first)
        stub = enrolment_service_pb2_grpc.EnrolmentServiceStub(link)
        done: asyncio.Queue[tls.Identity] = asyncio.Queue()

        def use(fresh: tls.Identity) -> None:
            link.renew(fresh)
            done.put_nowait(fresh)

        keeper = asyncio.create_task(
            enrolment.keep_renewed(files, known[0], "192.0.2.7", lambda: link, use)
        )
        async with asyncio.timeout(30):
            fresh = await done.get()
        request = enrolment_service_pb2.RenewCertificateRequest(
            csr=tls.signing_request(fresh.key, HOST_ID), underlay_ip="192.0.2.7"
        )
        await rpc.call(stub.RenewCertificate, request)
        assert identity.peers == [first.fingerprint(), fresh.fingerprint()]
        assert (tmp_path / "pki" / "server-cert.pem").read_bytes() == fresh.certificate
        now = files.load()
        assert now is not None
        assert now[0] == fresh
        assert not keeper.done()  # it sleeps until the next time
        keeper.cancel()
        await asyncio.wait({keeper})
        await link.close()


async def test_a_call_under_way_is_not_cut_off_by_a_renewal() -> None:
    identity = Identity()
    identity.gate = asyncio.Event()
    own = identity.authority.identity(HOST_ID)
    async with serving(identity, internal=True) as endpoint:
        link = Link(endpoint, own)
        stub = enrolment_service_pb2_grpc.EnrolmentServiceStub(link)
        request = enrolment_service_pb2.RenewCertificateRequest(
            csr=tls.signing_request(own.key, HOST_ID), underlay_ip="192.0.2.7"
        )
        slow = asyncio.create_task(rpc.call(stub.RenewCertificate, request, timeout_s=30))
        async with asyncio.timeout(30):
            await identity.renewed.wait()
        fresh = identity.authority.identity(HOST_ID)
        link.renew(fresh)
        identity.gate.set()
        assert (await slow).host_id == HOST_ID
        await rpc.call(stub.RenewCertificate, request)
        assert identity.peers == [own.fingerprint(), fresh.fingerprint()]
        await link.close()


def _public_key(csr: bytes) -> bytes:
    loaded = x509.load_pem_x509_csr(csr)
    return loaded.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
