"""Join tokens and the certificates of hosts in the database."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

import peewee
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization

from mcloud.identity.v1 import enrolment_pb2, enrolment_service_pb2
from mcloud_base import errors, ids, tls
from mcloud_controlplane.core import auth, convert, database, listing, pki, tables
from mcloud_controlplane.core.mutation import Frame, Mutation
from mcloud_controlplane.core.statements import Kept
from mcloud_controlplane.identity import epoch_store, login_store
from mcloud_controlplane.identity.model import Certificate, Epoch, JoinToken, shared

_LONGEST_TTL_S = 7 * 86_400
_USUAL_TTL_S = 3600
_KEPT_US = 86_400_000_000  # of join tokens that have expired
_BATCH = 500


def message(row: JoinToken) -> enrolment_pb2.JoinToken:
    """Return a join token's row as its message."""
    return enrolment_pb2.JoinToken(
        metadata=convert.metadata(row),
        expire_time=convert.timestamp(row.expire_time),
        host_id=row.host_id,
    )


def create(
    frame: Frame,
    caller: auth.Caller,
    method: str,
    request: enrolment_service_pb2.CreateJoinTokenRequest,
    fingerprint: str,
) -> enrolment_service_pb2.CreateJoinTokenResponse:
    """Make a join token; its secret exists in the answer only.

    Raises:
        errors.AlreadyExists: ALREADY_ISSUED.
    """
    ttl_s = request.ttl.ToSeconds() if request.HasField("ttl") else _USUAL_TTL_S
    if not 0 < ttl_s <= _LONGEST_TTL_S:
        raise errors.bad_field("ttl", "must be more than 0 and at most 7 days")
    made = ids.new("jt")
    if earlier := frame.accept(caller, method, request, made):
        raise already_issued(earlier)
    moment = database.now()
    random = secrets.token_urlsafe(32)
    row = JoinToken.create(
        id=made,
        name=request.name,
        create_time=moment,
        update_time=moment,
        secret_hash=login_store.digest(random),
        expire_time=moment + ttl_s * 1_000_000,
    )
    tables.changed("join_token", row.id, "", "ADDED")
    return enrolment_service_pb2.CreateJoinTokenResponse(
        join_token=message(row), secret=f"{random}.{fingerprint}"
    )


def already_issued(id_: str) -> errors.AlreadyExists:
    """Return the error for the repeat of a request whose secret has been shown."""
    return errors.AlreadyExists(
        "ALREADY_ISSUED",
        f"this request made {id_}, whose secret is not shown again; delete it and make another",
        id=id_,
    )


def list_page(
    caller: auth.Caller, request: enrolment_service_pb2.ListJoinTokensRequest
) -> enrolment_service_pb2.ListJoinTokensResponse:
    """Return a page of the join tokens."""
    revision = shared.revision()
    page = listing.page(
        JoinToken,
        request,
        caller,
        fields={"id": JoinToken.id, "name": JoinToken.name, "host_id": JoinToken.host_id},
        visible=True,
    )
    return enrolment_service_pb2.ListJoinTokensResponse(
        join_tokens=[message(row) for row in page.rows],
        next_page_token=page.next_page_token,
        revision=str(revision),
    )


def delete(
    work: Mutation, request: enrolment_service_pb2.DeleteJoinTokenRequest
) -> enrolment_pb2.JoinToken:
    """Delete a join token. A host that it has made stays one."""
    row = JoinToken.find(request.id)
    if row is None:
        raise errors.NotFound(
            "JOIN_TOKEN_NOT_FOUND", f"there is no join token {request.id}", id=request.id
        )
    row.delete_instance()
    work.concerns("join_token", row.id, row.name)
    tables.changed("join_token", row.id, "", "DELETED")
    return message(row)


def enrol(
    store: database.Database,
    authority: pki.Authority,
    request: enrolment_service_pb2.EnrolRequest,
) -> tuple[str, x509.Certificate]:
    """Bind a join token to the key that comes with it and sign; a repeat is for the same host.

    Raises:
        errors.Unauthenticated: BAD_JOIN_TOKEN.
        errors.InvalidArgument: BAD_CSR.
    """
    random, _, _ = request.secret.rpartition(".")
    hashed = login_store.digest(random)
    row = store.locked(JoinToken.select().where(JoinToken.secret_hash == hashed)).first()
    if row is None or row.expire_time <= database.now():
        raise _bad_join_token()
    host_id = row.host_id or ids.new("h")
    certificate = authority.issue_host(request.csr, host_id, request.underlay_ip)
    key_hash = _key_hash(certificate)
    if row.key_hash not in ("", key_hash):
        raise _bad_join_token()
    epoch_store.lock(store, host_id)
    if not row.host_id:
        JoinToken.update(
            host_id=host_id,
            key_hash=key_hash,
            version=JoinToken.version + 1,
            update_time=database.now(),
        ).where(JoinToken.id == row.id).execute()
        tables.changed("join_token", row.id, "")
    _record(host_id, certificate)
    return host_id, certificate


def renew(
    store: database.Database,
    authority: pki.Authority,
    caller: auth.Certificate,
    request: enrolment_service_pb2.RenewCertificateRequest,
) -> x509.Certificate:
    """Sign for a host that has a good certificate.

    Raises:
        errors.Unauthenticated: CERTIFICATE_REVOKED.
        errors.InvalidArgument: BAD_CSR.
    """
    epoch_store.lock(store, caller.host_id)
    require_not_revoked(caller.fingerprint)
    certificate = authority.issue_host(request.csr, caller.host_id, request.underlay_ip)
    _record(caller.host_id, certificate)
    return certificate


def require_good(host_id: str, fingerprint: str) -> int:
    """Return a host's epoch; refuse a certificate that has been revoked.

    Raises:
        errors.Unauthenticated: CERTIFICATE_REVOKED.
    """
    ((epoch, is_revoked),) = _STANDING.run(Certificate._meta.database, [host_id], [fingerprint])
    if is_revoked:
        raise _revoked()
    return int(epoch or 0)


def _standing(host_ids: Sequence[str], fingerprints: Sequence[str]) -> Any:
    """Return the query for both at once: a revocation shows in both, or in neither."""
    epoch = Epoch.select(Epoch.value).where(Epoch.principal_id == host_ids[0])
    revoked = Certificate.select(Certificate.serial).where(_is_revoked(fingerprints[0]))
    return peewee.Select([], [epoch, peewee.fn.EXISTS(revoked)])


def _is_revoked(fingerprint: Any) -> Any:
    return (Certificate.fingerprint == fingerprint) & Certificate.revoke_time.is_null(False)


_STANDING = Kept(_standing)


def require_not_revoked(fingerprint: str) -> None:
    """Refuse a certificate that has been revoked.

    Raises:
        errors.Unauthenticated: CERTIFICATE_REVOKED.
    """
    if Certificate.select().where(_is_revoked(fingerprint)).exists():
        raise _revoked()


def _revoked() -> errors.Unauthenticated:
    return errors.Unauthenticated(
        "CERTIFICATE_REVOKED", "this certificate has been revoked; enrol again"
    )


def revoke(host_id: str) -> int:
    """Revoke a host's certificates and end what rests on them; return how many were good."""
    # First the epoch: its row keeps renewals out until the end.
    epoch_store.revoke(host_id)
    moment = database.now()
    # The machine's key must not get a certificate again with the token that it came with.
    JoinToken.update(expire_time=moment, version=JoinToken.version + 1).where(
        (JoinToken.host_id == host_id) & (JoinToken.expire_time > moment)
    ).execute()
    return int(
        Certificate.update(revoke_time=moment)
        .where((Certificate.host_id == host_id) & Certificate.revoke_time.is_null())
        .execute()
    )


def revoked_serials() -> list[str]:
    """Return the serials of certificates that are revoked and not expired."""
    query = Certificate.select(Certificate.serial).where(
        Certificate.revoke_time.is_null(False) & (Certificate.expire_time > database.now())
    )
    return [row.serial for row in query]


def forget_expired() -> None:
    """Delete certificates that have expired."""
    Certificate.delete().where(Certificate.expire_time < database.now()).execute()


def forget_join_tokens() -> None:
    """Delete join tokens that expired a day ago: they are good for nothing any more."""
    table = JoinToken
    old = table.expire_time < database.now() - _KEPT_US
    for row in list(table.select().where(old).order_by(table.expire_time).limit(_BATCH)):
        row.delete_instance()
        tables.changed("join_token", row.id, "", "DELETED")


def _record(host_id: str, certificate: x509.Certificate) -> None:
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    Certificate.create(
        serial=f"{certificate.serial_number:x}",
        host_id=host_id,
        fingerprint=tls.fingerprint(pem),
        create_time=database.now(),
        expire_time=int(certificate.not_valid_after_utc.timestamp()) * 1_000_000,
    )


def _key_hash(certificate: x509.Certificate) -> str:
    digest = hashes.Hash(hashes.SHA256())
    digest.update(
        certificate.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    return digest.finalize().hex()


def _bad_join_token() -> errors.Unauthenticated:
    return errors.Unauthenticated(
        "BAD_JOIN_TOKEN", "the join token is unknown, expired or used by another machine"
    )
