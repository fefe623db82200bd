"""How this machine becomes a host and stays one (mcloud.identity.v1.EnrolmentService)."""

from __future__ import annotations

import asyncio
import datetime
import json
import shutil
import socket
import ssl
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import grpc
import structlog
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes

from mcloud.identity.v1 import enrolment_pb2, enrolment_service_pb2, enrolment_service_pb2_grpc
from mcloud_agents import dh_parameters
from mcloud_agents.backoff import Backoff
from mcloud_base import endpoints, errors, rpc, tls

log = structlog.get_logger()

CONNECT_TIMEOUT_S = 20.0
LONGEST_SLEEP_S = 3600.0  # clocks are set; certificates do not live shorter than this


@dataclass(frozen=True)
class Membership:
    """What enrolment told, beside key and certificates."""

    host_id: str
    name: str
    control_plane: str
    internal_endpoint: str


class Keep(Protocol):
    """Where a host's key and certificates are kept."""

    def key(self) -> bytes:
        """Return the host's key; it is made once, so that a repeated enrolment is of one host."""

    def load(self) -> tuple[tls.Identity, Membership] | None:
        """Return who the host is, or None if it has not been enrolled.

        Raises:
            DataLoss: IDENTITY_DAMAGED.
        """

    def save(self, identity: tls.Identity, membership: Membership) -> None:
        """Keep who the host is from now on."""

    def publish(self, identity: tls.Identity) -> None:
        """Show the identity to whoever else on the host uses it."""


class Files:
    """The host's key and certificates on disk, for the agent and for QEMU.

    Args:
        directory: the agent's own.
        pki_dir: where QEMU and libvirt look.
        group: may read QEMU's files; empty if QEMU runs as root.
    """

    def __init__(self, directory: Path, pki_dir: Path, group: str = "") -> None:
        self._directory = directory
        self._pki_dir = pki_dir
        self._group = group

    def key(self) -> bytes:
        """Return the host's key; it is made once, so that a repeated enrolment is of one host."""
        path = self._directory / "key.pem"
        if not path.exists():
            tls.write_private(path, tls.new_key())
        return path.read_bytes()

    def load(self) -> tuple[tls.Identity, Membership] | None:
        """Return who the host is, or None if it has not been enrolled.

        Raises:
            DataLoss: IDENTITY_DAMAGED: something is missing, or key and certificate are no pair.
        """
        path = self._directory / "host.json"
        if not path.exists():
            return None
        try:
            membership = Membership(**json.loads(path.read_bytes()))
            key, certificate, authority = (
                (self._directory / f"{name}.pem").read_bytes()
                for name in ("key", "certificate", "authority")
            )
            paired = _public_key_of(key) == _public_key_in(certificate)
        except (OSError, ValueError, TypeError) as error:
            raise self._damaged(str(error)) from error
        if not paired:
            raise self._damaged("key and certificate are no pair")
        return tls.Identity(key, certificate, authority), membership

    def _damaged(self, why: str) -> errors.DataLoss:
        return errors.DataLoss(
            "IDENTITY_DAMAGED",
            f"{self._directory}: {why}; enrol again with --force",
            directory=self._directory,
        )

    def save(self, identity: tls.Identity, membership: Membership) -> None:
        """Write everything, what says that it is there last."""
        tls.write_private(self._directory / "certificate.pem", identity.certificate)
        tls.write_private(self._directory / "authority.pem", identity.authority)
        self.publish(identity)
        tls.write_private(
            self._directory / "host.json", json.dumps(asdict(membership), indent=1).encode()
        )

    def publish(self, identity: tls.Identity) -> None:
        """Lay the identity out for QEMU; files that are right are not touched.

        Source: https://www.qemu.org/docs/master/system/tls.html
        """
        files = {
            "ca-cert.pem": identity.authority,
            dh_parameters.FILE: dh_parameters.FFDHE2048,
        }
        for role in ("client", "server"):
            files[f"{role}-key.pem"] = identity.key
            files[f"{role}-cert.pem"] = identity.certificate
        for name, content in files.items():
            path = self._pki_dir / name
            if not path.exists() or path.read_bytes() != content:
                tls.write_private(path, content)
            if self._group:
                shutil.chown(path, group=self._group)
                path.chmod(0o640)


async def enrol(
    files: Keep,
    control_plane: str,
    join_token: str,
    *,
    name: str,
    underlay_ip: str,
    force: bool = False,
) -> Membership:
    """Make this machine a host. One that is a host already stays the host it is.

    Args:
        control_plane: host:port of the public port.
        join_token: SECRET.FINGERPRINT, as CreateJoinToken returned it.
        force: ask for a certificate also if there is one: it may have been revoked.

    Raises:
        InvalidArgument: BAD_JOIN_TOKEN: it has another form; BAD_ENDPOINT.
        PermissionDenied: AUTHORITY_MISMATCH: who answers is not whom the token names.
        Unauthenticated: BAD_JOIN_TOKEN: unknown, expired, or used by another machine.
        WrongState: ENROLLED_ELSEWHERE: this machine is another cloud's host.
        Unavailable: CONTROL_PLANE_UNREACHABLE.
    """
    _, dot, expected = join_token.rpartition(".")
    if not dot or len(expected) != 64:
        raise errors.InvalidArgument(
            "BAD_JOIN_TOKEN", "a join token is SECRET.FINGERPRINT, whole, as it was printed"
        )
    try:
        known = files.load()
    except errors.DataLoss:
        if not force:
            raise
        known = None
    if known and tls.fingerprint(known[0].authority) != expected:
        raise errors.WrongState(
            "ENROLLED_ELSEWHERE",
            f"this machine is the host {known[1].host_id} of another cloud; remove its state first",
            host=known[1].host_id,
        )
    if known and not force and expiry(known[0].certificate) > _now():
        files.publish(known[0])
        return known[1]
    authority = await asyncio.to_thread(find_authority, control_plane, expected)
    credentials = grpc.ssl_channel_credentials(authority)
    async with rpc.channel(
        control_plane, credentials, server_name=endpoints.SERVICE_NAME
    ) as channel:
        issued = await rpc.call(
            enrolment_service_pb2_grpc.EnrolmentServiceStub(channel).Enrol,
            enrolment_service_pb2.EnrolRequest(
                secret=join_token,
                csr=tls.signing_request(files.key(), name),
                host_name=name,
                underlay_ip=underlay_ip,
            ),
            timeout_s=30,
        )
    if tls.fingerprint(issued.authority) != expected:
        raise _mismatch(control_plane)
    membership = Membership(issued.host_id, name, control_plane, issued.internal_endpoint)
    files.save(tls.Identity(files.key(), issued.certificate, issued.authority), membership)
    return membership


def find_authority(control_plane: str, expected: str) -> bytes:
    """Return the authority's certificate, PEM, out of the chain that the server sends.

    Nothing that the server says is believed but this one certificate, whose fingerprint the join
    token has carried here by another way.

    Raises:
        InvalidArgument: BAD_ENDPOINT. PermissionDenied: AUTHORITY_MISMATCH.
        Unavailable: CONTROL_PLANE_UNREACHABLE.
    """
    failure: OSError | None = None
    for each in endpoints.split(control_plane):
        try:
            chain = _chain_of(endpoints.divide(each))
        except OSError as error:
            failure = error
            continue
        for der in chain:
            pem = x509.load_der_x509_certificate(der).public_bytes(serialization.Encoding.PEM)
            if tls.fingerprint(pem) == expected:
                return pem
        raise _mismatch(each)
    raise errors.Unavailable(
        "CONTROL_PLANE_UNREACHABLE", f"{control_plane}: {failure}", endpoint=control_plane
    ) from failure


def _chain_of(address: tuple[str, int]) -> list[bytes]:
    """Return the certificates, DER, that a server sends, whoever it is."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection(address, timeout=CONNECT_TIMEOUT_S) as plain,
        context.wrap_socket(plain, server_hostname=endpoints.SERVICE_NAME) as connection,
    ):
        return _chain(connection)


async def keep_renewed(
    files: Keep,
    identity: tls.Identity,
    underlay_ip: str,
    channel: Callable[[], grpc.aio.Channel],
    use: Callable[[tls.Identity], object],
) -> None:
    """Renew the certificate at two thirds of its life, again and again, until cancelled.

    Args:
        channel: returns the one in use.
        use: is told the new identity, once it is on disk.
    """
    backoff = Backoff(5, 300)
    while True:
        wait_s = renewal_due(identity.certificate) - _now().timestamp()
        if wait_s > 0:
            await asyncio.sleep(min(wait_s, LONGEST_SLEEP_S))
            continue
        backoff.begin()
        try:
            identity = await renew(files, identity, underlay_ip, channel())
        except errors.Error as error:
            log.warning("certificate not renewed", error=str(error))
            await asyncio.sleep(backoff.pause_s())
        else:
            log.info("certificate renewed", expires=str(expiry(identity.certificate)))
            use(identity)


async def renew(
    files: Keep, identity: tls.Identity, underlay_ip: str, channel: grpc.aio.Channel
) -> tls.Identity:
    """Get a fresh certificate for the same key, so that key and certificate never disagree."""
    known = files.load()
    if known is None:
        raise errors.WrongState("NOT_ENROLLED", "this machine is not a host")
    issued: enrolment_pb2.IssuedCertificate = await rpc.call(
        enrolment_service_pb2_grpc.EnrolmentServiceStub(channel).RenewCertificate,
        enrolment_service_pb2.RenewCertificateRequest(
            csr=tls.signing_request(identity.key, known[1].host_id), underlay_ip=underlay_ip
        ),
        timeout_s=30,
    )
    fresh = tls.Identity(identity.key, issued.certificate, issued.authority)
    await asyncio.to_thread(files.save, fresh, known[1])
    return fresh


def expiry(certificate: bytes) -> datetime.datetime:
    """Return when a PEM certificate ends to be good, UTC."""
    return x509.load_pem_x509_certificate(certificate).not_valid_after_utc


def renewal_due(certificate: bytes) -> float:
    """Return when two thirds of a PEM certificate's life have passed, in seconds since 1970."""
    loaded = x509.load_pem_x509_certificate(certificate)
    start, end = loaded.not_valid_before_utc, loaded.not_valid_after_utc
    return (start + (end - start) * 2 / 3).timestamp()


def _chain(connection: ssl.SSLSocket) -> list[bytes]:
    """Return the certificates that the server sent, DER.

    Python has it as a public method from 3.13 on; before, as one of the object below.
    """
    public: Callable[[], list[bytes]] | None = getattr(connection, "get_unverified_chain", None)
    if public is not None:
        return public()
    inner: Any = getattr(connection, "_sslobj")  # noqa: B009
    return [ssl.PEM_cert_to_DER_cert(part.public_bytes()) for part in inner.get_unverified_chain()]


def _public_key_of(key: bytes) -> bytes:
    return _der(serialization.load_pem_private_key(key, None).public_key())


def _public_key_in(certificate: bytes) -> bytes:
    return _der(x509.load_pem_x509_certificate(certificate).public_key())


def _der(key: PublicKeyTypes) -> bytes:
    return key.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def _mismatch(control_plane: str) -> errors.PermissionDenied:
    return errors.PermissionDenied(
        "AUTHORITY_MISMATCH",
        f"{control_plane} does not belong to the cloud that the join token is of",
        endpoint=control_plane,
    )


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
