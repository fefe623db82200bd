"""Machines become hosts with a join token, call over mTLS, and cease to be hosts."""

from __future__ import annotations

import asyncio

import jwt
import pytest
from cryptography import x509
from google.protobuf import duration_pb2

from mcloud.identity.v1 import (
    enrolment_pb2,
    enrolment_service_pb2,
    token_service_pb2,
)
from mcloud_base import errors, ids, rpc, tls
from mcloud_controlplane.core import auth
from mcloud_controlplane.core.tokens import TokenChecker, delegate_from_claims
from mcloud_controlplane.identity import model
from service.identity.cloud import Cloud, refused


async def join_token(
    cloud: Cloud, ttl_s: int = 60
) -> enrolment_service_pb2.CreateJoinTokenResponse:
    return await rpc.call(
        cloud.public.enrolment.CreateJoinToken,
        enrolment_service_pb2.CreateJoinTokenRequest(
            request_id=ids.request_id(), name="rack 1", ttl=duration_pb2.Duration(seconds=ttl_s)
        ),
        metadata=await cloud.admin(),
    )


async def enrol(cloud: Cloud, secret: str, key: bytes) -> enrolment_pb2.IssuedCertificate:
    return await rpc.call(
        cloud.public.enrolment.Enrol,
        enrolment_service_pb2.EnrolRequest(
            secret=secret,
            csr=tls.signing_request(key, "anything"),
            host_name="host1",
            underlay_ip="10.0.0.1",
        ),
    )


async def test_a_machine_becomes_a_host_and_calls_over_mtls(cloud: Cloud) -> None:
    made = await join_token(cloud)
    random, _, fingerprint = made.secret.partition(".")
    assert fingerprint == tls.fingerprint(cloud.runtime.authority.certificate)
    assert made.join_token.metadata.name == "rack 1"
    key = tls.new_key()
    issued = await enrol(cloud, made.secret, key)
    assert ids.is_id(issued.host_id, "h")
    assert issued.internal_endpoint == cloud.settings.internal_listen
    assert issued.authority == cloud.runtime.authority.certificate
    seen = auth.read_certificate(issued.certificate)
    assert (seen.host_id, seen.service) == (issued.host_id, "")

    host = cloud.internal(tls.Identity(key, issued.certificate, issued.authority))
    renewed = await rpc.call(
        host.enrolment.RenewCertificate,
        enrolment_service_pb2.RenewCertificateRequest(
            csr=tls.signing_request(tls.new_key(), "new key")
        ),
    )
    assert renewed.host_id == issued.host_id
    assert renewed.certificate != issued.certificate
    error = await refused(
        rpc.call(
            host.enrolment.ListRevokedCertificates,
            enrolment_service_pb2.ListRevokedCertificatesRequest(),
        )
    )
    assert error.reason == "WRONG_CALLER"
    await host.channel.close(None)

    page = await rpc.call(
        cloud.public.enrolment.ListJoinTokens,
        enrolment_service_pb2.ListJoinTokensRequest(filter=f'host_id="{issued.host_id}"'),
        metadata=await cloud.admin(),
    )
    (token,) = page.join_tokens
    assert token.host_id == issued.host_id
    stored = model.JoinToken.select(model.JoinToken.secret_hash)
    database = cloud.runtime.database("identity", model.open_database)
    (row,) = await database.read(lambda: list(stored))
    assert row.secret_hash not in (random, made.secret)


async def test_a_repeat_with_the_same_key_is_for_the_same_host(cloud: Cloud) -> None:
    secret = (await join_token(cloud)).secret
    key = tls.new_key()
    first = await enrol(cloud, secret, key)
    again = await enrol(cloud, secret, key)
    assert first.host_id == again.host_id
    assert first.certificate != again.certificate


async def test_another_key_cannot_use_the_token(cloud: Cloud) -> None:
    secret = (await join_token(cloud)).secret
    await enrol(cloud, secret, tls.new_key())
    error = await refused(enrol(cloud, secret, tls.new_key()))
    assert isinstance(error, errors.Unauthenticated)
    assert error.reason == "BAD_JOIN_TOKEN"
    unknown = await refused(enrol(cloud, "x" + secret, tls.new_key()))
    assert unknown.message == error.message


async def test_an_expired_token_is_refused(cloud: Cloud) -> None:
    made = await join_token(cloud)
    database = cloud.runtime.database("identity", model.open_database)
    await database.write(lambda: model.JoinToken.update(expire_time=0).execute())
    error = await refused(enrol(cloud, made.secret, tls.new_key()))
    assert error.reason == "BAD_JOIN_TOKEN"
    for ttl_s in (-1, 8 * 86_400):
        assert (await refused(join_token(cloud, ttl_s))).reason == "BAD_FIELD"


async def test_a_deleted_token_is_refused(cloud: Cloud) -> None:
    made = await join_token(cloud)
    request = enrolment_service_pb2.DeleteJoinTokenRequest(
        request_id=ids.request_id(), id=made.join_token.metadata.id
    )
    admin = await cloud.admin()
    first = await rpc.call(cloud.public.enrolment.DeleteJoinToken, request, metadata=admin)
    again = await rpc.call(cloud.public.enrolment.DeleteJoinToken, request, metadata=admin)
    assert first == again
    assert (await refused(enrol(cloud, made.secret, tls.new_key()))).reason == "BAD_JOIN_TOKEN"
    request.request_id = ids.request_id()
    error = await refused(rpc.call(cloud.public.enrolment.DeleteJoinToken, request, metadata=admin))
    assert error.reason == "JOIN_TOKEN_NOT_FOUND"


async def test_a_bad_signing_request_uses_nothing_up(cloud: Cloud) -> None:
    secret = (await join_token(cloud)).secret
    request = enrolment_service_pb2.EnrolRequest(secret=secret, csr=b"x", host_name="host1")
    error = await refused(rpc.call(cloud.public.enrolment.Enrol, request))
    assert error.reason == "BAD_CSR"
    await enrol(cloud, secret, tls.new_key())


async def test_a_repeated_request_does_not_show_the_secret_again(cloud: Cloud) -> None:
    request = enrolment_service_pb2.CreateJoinTokenRequest(
        request_id=ids.request_id(), name="rack 1"
    )
    admin = await cloud.admin()
    made = await rpc.call(cloud.public.enrolment.CreateJoinToken, request, metadata=admin)
    error = await refused(rpc.call(cloud.public.enrolment.CreateJoinToken, request, metadata=admin))
    assert isinstance(error, errors.AlreadyExists)
    assert error.reason == "ALREADY_ISSUED"
    assert error.metadata["id"] == made.join_token.metadata.id


async def test_a_revoked_host_neither_renews_nor_enrols_again(cloud: Cloud) -> None:
    secret = (await join_token(cloud)).secret
    key = tls.new_key()
    issued = await enrol(cloud, secret, key)
    revoke = enrolment_service_pb2.RevokeHostCertificatesRequest(host_id=issued.host_id)
    call = cloud.service.enrolment.RevokeHostCertificates
    assert (await rpc.call(call, revoke)).revoked_count == 1
    assert (await rpc.call(call, revoke)).revoked_count == 0
    listed = await rpc.call(
        cloud.service.enrolment.ListRevokedCertificates,
        enrolment_service_pb2.ListRevokedCertificatesRequest(),
    )
    serial = x509.load_pem_x509_certificate(issued.certificate).serial_number
    assert list(listed.serials) == [f"{serial:x}"]
    host = cloud.internal(tls.Identity(key, issued.certificate, issued.authority))
    error = await refused(
        rpc.call(
            host.enrolment.RenewCertificate,
            enrolment_service_pb2.RenewCertificateRequest(csr=tls.signing_request(key, "x")),
        )
    )
    await host.channel.close(None)
    assert error.reason == "CERTIFICATE_REVOKED"
    assert (await refused(enrol(cloud, secret, key))).reason == "BAD_JOIN_TOKEN"


def delegated(
    issued: enrolment_pb2.IssuedCertificate,
) -> token_service_pb2.CreateDelegatedTokenRequest:
    return token_service_pb2.CreateDelegatedTokenRequest(
        host_id=issued.host_id,
        certificate_sha256=tls.fingerprint(issued.certificate),
        project_id=ids.new("p"),
        domain_id=ids.new("d"),
        generation=3,
        image_ids=[ids.new("img")],
        port_ids=[ids.new("port"), ids.new("port")],
    )


async def test_a_delegated_token_is_one_hosts_and_names_what_it_may_ask_for(cloud: Cloud) -> None:
    issued = await enrol(cloud, (await join_token(cloud)).secret, tls.new_key())
    request = delegated(issued)
    answer = await rpc.call(cloud.service.token.CreateDelegatedToken, request)
    checker = TokenChecker(cloud.service.token)  # type: ignore[arg-type]
    claims = await checker.check(answer.token, mutates=True)
    assert claims["exp"] == answer.expire_time.seconds
    assert 0 < claims["exp"] - claims["iat"] <= 900
    caller = delegate_from_claims(claims, auth.read_certificate(issued.certificate))
    assert caller.delegation is not None
    assert caller.delegation.generation == 3
    assert caller.delegation.port_ids == frozenset(request.port_ids)
    assert caller.project_id == request.project_id

    other = await enrol(cloud, (await join_token(cloud)).secret, tls.new_key())
    with pytest.raises(errors.Unauthenticated, match="TOKEN_INVALID"):
        delegate_from_claims(claims, auth.read_certificate(other.certificate))
    # On the public port it is worth nothing.
    error = await refused(
        rpc.call(
            cloud.public.enrolment.ListJoinTokens,
            enrolment_service_pb2.ListJoinTokensRequest(),
            metadata=rpc.bearer(answer.token),
        )
    )
    assert error.reason == "TOKEN_INVALID"


async def test_revoking_a_host_ends_its_delegated_tokens(cloud: Cloud) -> None:
    issued = await enrol(cloud, (await join_token(cloud)).secret, tls.new_key())
    token = (await rpc.call(cloud.service.token.CreateDelegatedToken, delegated(issued))).token
    await rpc.call(
        cloud.service.enrolment.RevokeHostCertificates,
        enrolment_service_pb2.RevokeHostCertificatesRequest(host_id=issued.host_id),
    )
    assert jwt.decode(token, options={"verify_signature": False})["epo"] == {issued.host_id: 0}
    error = await refused(
        rpc.call(cloud.service.token.CheckToken, token_service_pb2.CheckTokenRequest(token=token))
    )
    assert error.reason == "TOKEN_REVOKED"
    error = await refused(rpc.call(cloud.service.token.CreateDelegatedToken, delegated(issued)))
    assert error.reason == "CERTIFICATE_REVOKED"


async def test_of_two_machines_at_once_one_uses_the_token(cloud: Cloud) -> None:
    secret = (await join_token(cloud)).secret
    answers = await asyncio.gather(
        *(enrol(cloud, secret, tls.new_key()) for _ in range(4)), return_exceptions=True
    )
    failed = [answer for answer in answers if isinstance(answer, errors.Error)]
    assert [error.reason for error in failed] == ["BAD_JOIN_TOKEN"] * 3
