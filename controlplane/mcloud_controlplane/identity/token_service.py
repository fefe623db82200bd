"""Serves mcloud.identity.v1.TokenService: step 1 of the sixteen, and what checks its tokens."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from mcloud.identity.v1 import token_pb2, token_service_pb2, token_service_pb2_grpc
from mcloud_base import errors
from mcloud_controlplane.core import convert
from mcloud_controlplane.core import database as core_database
from mcloud_controlplane.core.auth import Context
from mcloud_controlplane.core.database import Database
from mcloud_controlplane.identity import enrolment_store, epoch_store, login_store, signing
from mcloud_controlplane.identity.authentication import Authenticator
from mcloud_controlplane.identity.login_store import Grant
from mcloud_controlplane.identity.model import SigningKey

_BOOKMARK_S = 1.0
_KEY_S = 60.0  # for which a key is not read again: a newer one is not signed with at once


class TokenServicer(token_service_pb2_grpc.TokenServiceServicer):
    """Tokens.

    Args:
        signed: told of each, so that this process need not verify its own signatures.
    """

    def __init__(
        self,
        database: Database,
        authenticator: Authenticator,
        ttl_s: int,
        signed: Callable[[str, dict[str, Any]], None],
    ) -> None:
        self._database = database
        self._signed = signed
        self._authenticator = authenticator
        self._ttl_s = ttl_s
        self._key: SigningKey | None = None
        self._key_time = 0.0

    async def CreateToken(
        self, request: token_service_pb2.CreateTokenRequest, context: Context
    ) -> token_service_pb2.CreateTokenResponse:
        """1. Check who it is, decide what for, sign."""
        start = core_database.now()
        if request.WhichOneof("credential") is None:
            raise errors.bad_field("credential", "must be a password or an application credential")
        if request.HasField("password"):
            grant, key = await self._grant_user(request)
        else:
            secret = request.application_credential
            grant, key = await self._database.read_few(
                self._with_key,
                lambda: login_store.grant_credential(
                    secret.id, secret.secret, request.project, request.system
                ),
            )
        claims = signing.user_claims(grant, start, self._ttl_s)
        return token_service_pb2.CreateTokenResponse(
            token=self._sign(key, claims),
            claims=signing.claims_message(claims),
            start_time=convert.timestamp(claims["lgs"]),
            end_time=convert.timestamp(claims["lge"]),
        )

    async def _grant_user(
        self, request: token_service_pb2.CreateTokenRequest
    ) -> tuple[Grant, SigningKey]:
        user = await self._authenticator.find(request.password.user_name, request.password.password)
        if user is None or user.disabled:
            raise login_store.bad_credentials()
        return await self._database.read_few(
            self._with_key, lambda: login_store.grant_user(user, request.project, request.system)
        )

    def _with_key(self, decide: Callable[[], Grant]) -> tuple[Grant, SigningKey]:
        return decide(), self._signing_key()

    def _signing_key(self) -> SigningKey:
        """Return the key to sign with. Within a unit."""
        if self._key is None or time.monotonic() > self._key_time + _KEY_S:
            self._key, self._key_time = signing.current_key(), time.monotonic()
        if self._key is None:
            raise errors.Unavailable("NO_SIGNING_KEY", "identity has no signing key yet; try again")
        return self._key

    async def CreateDelegatedToken(
        self, request: token_service_pb2.CreateDelegatedTokenRequest, context: Context
    ) -> token_service_pb2.CreateDelegatedTokenResponse:
        """Sign what a host may ask for one domain."""

        def read() -> tuple[int, SigningKey]:
            epoch = enrolment_store.require_good(request.host_id, request.certificate_sha256)
            return epoch, self._signing_key()

        epoch, key = await self._database.read_few(read)
        claims = signing.delegated_claims(request, epoch)
        return token_service_pb2.CreateDelegatedTokenResponse(
            token=self._sign(key, claims),
            expire_time=convert.timestamp(claims["exp"] * 1_000_000),
        )

    def _sign(self, key: SigningKey, claims: dict[str, Any]) -> str:
        token = signing.sign(key, claims)
        self._signed(token, claims)
        return token

    async def CheckToken(
        self, request: token_service_pb2.CheckTokenRequest, context: Context
    ) -> token_pb2.TokenClaims:
        """Check signature, expiry and epochs against the database itself."""

        def read() -> token_pb2.TokenClaims:
            claims = signing.read(request.token, signing.keys())
            now = epoch_store.read(claims["epo"])
            if any(now[principal] > epoch for principal, epoch in claims["epo"].items()):
                raise errors.Unauthenticated(
                    "TOKEN_REVOKED", "the token has been revoked; log in again"
                )
            return signing.claims_message(claims)

        return await self._database.read_few(read)

    async def ListSigningKeys(
        self, request: token_service_pb2.ListSigningKeysRequest, context: Context
    ) -> token_service_pb2.ListSigningKeysResponse:
        """Return the public halves."""
        return token_service_pb2.ListSigningKeysResponse(
            keys=[
                token_pb2.SigningKey(
                    id=key.id,
                    public_key=bytes(key.public_key),
                    create_time=convert.timestamp(key.create_time),
                )
                for key in await self._database.read(signing.keys)
            ]
        )

    async def WatchRevocations(
        self, request: token_service_pb2.WatchRevocationsRequest, context: Context
    ) -> AsyncIterator[token_service_pb2.WatchRevocationsResponse]:
        """Stream revocations as they are committed, and a bookmark every second."""
        position = _revision(request.from_revision)
        sent = 0.0
        with self._database.listening() as event:
            while True:
                event.clear()
                position, found = await self._database.read(epoch_store.feed, position)
                while len(found) > 1000:
                    # Without a revision: whoever is cut off here starts again.
                    part, found = found[:1000], found[1000:]
                    yield token_service_pb2.WatchRevocationsResponse(revocations=part)
                if found or time.monotonic() - sent >= _BOOKMARK_S:
                    yield token_service_pb2.WatchRevocationsResponse(
                        revocations=found, revision=str(position)
                    )
                    sent = time.monotonic()
                try:
                    async with asyncio.timeout(sent + _BOOKMARK_S - time.monotonic()):
                        await event.wait()
                except TimeoutError:
                    continue


def _revision(text: str) -> int | None:
    if not text:
        return None
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise errors.InvalidArgument("BAD_REVISION", "from_revision must be one that a watch gave")
    return int(text)
