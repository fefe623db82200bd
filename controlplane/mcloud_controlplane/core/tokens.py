"""Checks tokens inside each service (steps 3, 11, 13, 15), without asking identity.

A token is good if its signature is, it has not expired, and none of the epochs in it is older than
what identity's feed of revocations says. The feed sends a bookmark every second; once it has been
silent for two, tokens are checked by rpc, and where identity cannot be reached at all, unexpired
ones may still read.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Protocol

import jwt
import structlog
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from mcloud.common.v1 import options_pb2
from mcloud.identity.v1 import token_pb2, token_service_pb2
from mcloud_base import errors, rpc
from mcloud_controlplane.core import auth

log = structlog.get_logger()

Rule = options_pb2.Rule

ISSUER = "mcloud"
CLOCKS_DIFFER_S = 300  # at most; a token that was made later than now is of a clock since set back
# Of reading a token. The library would refuse one of a clock that is a second ahead (verify_iat).
OPTIONS: Any = {"require": ["exp", "iat", "iss", "sub", "jti"], "verify_iat": False}
_FEED_SILENT_S = 2.0
_UNREACHABLE_S = 1.0  # for which identity is not asked again
_CACHE_SIZE = 10_000
_KEYS_PAUSE_S = 2.0  # between two readings of identity's keys
_UNKNOWN_LIMIT = 256  # tokens of unknown keys that may wait for the next reading


class Identity(Protocol):
    """What a checker needs of identity's TokenService stub."""

    ListSigningKeys: Callable[..., Awaitable[token_service_pb2.ListSigningKeysResponse]]
    WatchRevocations: Callable[..., AsyncIterator[token_service_pb2.WatchRevocationsResponse]]
    CheckToken: Callable[..., Awaitable[token_pb2.TokenClaims]]


class TokenChecker:
    """Keeps identity's keys and revocations at hand. Run `follow` for as long as it is used."""

    def __init__(self, identity: Identity) -> None:
        self._identity = identity
        self._keys: dict[str, Ed25519PublicKey] = {}
        self._keys_time = -_KEYS_PAUSE_S  # monotonic time of reading them
        self._reading: asyncio.Task[None] | None = None
        self._unknown = 0  # tokens that wait for it
        self._unreachable_until = 0.0  # monotonic time
        self._revoked: dict[str, int] = {}
        self._heard = 0.0  # monotonic time of the feed's last message
        self._cache: OrderedDict[str, dict[str, Any]] = OrderedDict()

    async def follow(self) -> None:
        """Follow the feed of revocations, for ever."""
        revision, pause = "", 0.1
        while True:
            try:
                await self._read_keys()
                request = token_service_pb2.WatchRevocationsRequest(from_revision=revision)
                # From the beginning, the feed says all that matters: what is not in it does not,
                # or was undone by a restore of identity's database.
                fresh: dict[str, int] | None = None if revision else {}
                async for message in rpc.received(self._identity.WatchRevocations(request)):
                    known = self._revoked if fresh is None else fresh
                    for revocation in message.revocations:
                        known[revocation.principal_id] = revocation.epoch
                    if not message.revision:
                        continue  # the rest follows
                    self._revoked, fresh = known, None
                    revision, pause = message.revision, 0.1
                    self._heard = time.monotonic()
            except errors.OutOfRange:
                revision = ""
            except errors.Error as error:
                log.debug("feed of revocations broke", reason=error.reason)
            await asyncio.sleep(pause)
            pause = min(pause * 2, 2.0)

    async def check(self, token: str, *, mutates: bool) -> dict[str, Any]:
        """Return the token's claims.

        Raises:
            errors.Unauthenticated: TOKEN_INVALID, TOKEN_EXPIRED, TOKEN_REVOKED.
            errors.Unavailable: IDENTITY_UNAVAILABLE, for a call that changes something, or while no
                keys are known yet.
        """
        claims = self._cache.get(token)
        if claims is None:
            claims = await self._verify(token)
            self.learn(token, claims)
        try:
            check_time(claims)
        except errors.Unauthenticated:
            self._cache.pop(token, None)
            raise
        for principal, epoch in claims["epo"].items():
            if self._revoked.get(principal, 0) > epoch:
                raise _revoked()
        if time.monotonic() - self._heard > _FEED_SILENT_S:
            await self._check_by_rpc(token, mutates)
        return claims

    def learn(self, token: str, claims: dict[str, Any]) -> None:
        """Take a token whose signature was found good, or that this process has just signed."""
        self._cache[token] = claims
        if len(self._cache) > _CACHE_SIZE:
            self._cache.popitem(last=False)

    async def _verify(self, token: str) -> dict[str, Any]:
        try:
            key_id = _key_id(token.partition(".")[0])
            if key_id not in self._keys:
                await self._await_keys()
            if key_id not in self._keys:
                raise _invalid()
            claims: dict[str, Any] = jwt.decode(
                token,
                self._keys[key_id],
                algorithms=["EdDSA"],
                issuer=ISSUER,
                options=OPTIONS,
            )
        except jwt.ExpiredSignatureError as error:
            raise _expired() from error
        except jwt.InvalidTokenError as error:
            raise _invalid() from error
        return claims

    async def _await_keys(self) -> None:
        if self._unknown >= _UNKNOWN_LIMIT:
            raise errors.Unavailable(
                "OVERLOADED",
                "too many tokens are of keys not known yet; try again in a moment",
                details=(errors.retry_after(_KEYS_PAUSE_S),),
            )
        self._unknown += 1
        try:
            await self._read_keys(pause_s=_KEYS_PAUSE_S)
        except (errors.Unavailable, errors.DeadlineExceeded) as error:
            raise errors.Unavailable(
                "IDENTITY_UNAVAILABLE",
                "identity cannot be reached, so no token can be checked now; try again soon",
                details=(errors.retry_after(1),),
            ) from error
        finally:
            self._unknown -= 1

    async def _read_keys(self, *, pause_s: float = 0) -> None:
        """Ask identity for its keys, once for all who wait for them.

        With a pause since the last time: a key may have been made just after it, so whoever has
        a token of one waits; and tokens of keys that nobody knows cannot make a call each.
        """
        if self._reading is None or self._reading.done():
            self._reading = asyncio.create_task(self._load_keys(pause_s))
            # Whoever waited for it may have gone.
            self._reading.add_done_callback(lambda task: task.cancelled() or task.exception())
        await asyncio.shield(self._reading)

    async def _load_keys(self, pause_s: float) -> None:
        await asyncio.sleep(max(self._keys_time + pause_s - time.monotonic(), 0))
        answer = await rpc.call(
            self._identity.ListSigningKeys, token_service_pb2.ListSigningKeysRequest(), timeout_s=3
        )
        self._keys = {
            key.id: Ed25519PublicKey.from_public_bytes(key.public_key) for key in answer.keys
        }
        self._keys_time = time.monotonic()

    async def _check_by_rpc(self, token: str, mutates: bool) -> None:
        """Ask identity; once it could not be reached, calls do not each wait to learn it anew."""
        try:
            if time.monotonic() < self._unreachable_until:
                raise errors.Unavailable(
                    "IDENTITY_UNAVAILABLE", "identity was not reached just now"
                )
            await rpc.call(
                self._identity.CheckToken,
                token_service_pb2.CheckTokenRequest(token=token),
                timeout_s=2,
            )
        except (errors.Unavailable, errors.DeadlineExceeded) as error:
            if error.reason != "IDENTITY_UNAVAILABLE":
                self._unreachable_until = time.monotonic() + _UNREACHABLE_S
            if mutates:
                raise errors.Unavailable(
                    "IDENTITY_UNAVAILABLE",
                    "identity cannot be reached, so nothing can be changed now; try again soon",
                    details=(errors.retry_after(2),),
                ) from error


@functools.lru_cache(maxsize=64)  # keys are few, and strangers may send any
def _key_id(header: str) -> str:
    """Return which key signed the tokens that begin with this; all of a key's do.

    Raises:
        jwt.InvalidTokenError: it is no header of a token.
    """
    return str(jwt.get_unverified_header(f"{header}..").get("kid", ""))


def check_time(claims: dict[str, Any]) -> None:
    """Refuse a token that has expired, or would be good for longer than it was made for.

    Raises:
        errors.Unauthenticated: TOKEN_EXPIRED, TOKEN_INVALID.
    """
    moment = time.time_ns() / 1e9
    if not all(isinstance(claims[name], int) for name in ("exp", "iat")):
        raise _invalid()
    if claims["exp"] <= moment or claims["iat"] > moment + CLOCKS_DIFFER_S:
        raise _expired()


def caller_from_claims(claims: dict[str, Any]) -> auth.Caller:
    """Return the user that a token stands for."""
    return auth.Caller(
        kind=Rule.CALLER_USER,
        principal_id=claims["sub"],
        user_id=claims["uid"],
        user_name=claims["unm"],
        project_id=claims["prj"],
        role=claims["rol"],
        system=claims["sys"],
        login=(claims["lgs"], claims["lge"]),
        login_host=claims.get("lgh", ""),
    )


def delegate_from_claims(claims: dict[str, Any], certificate: auth.Certificate) -> auth.Caller:
    """Return the host's delegate that a token stands for, if the certificate is the token's.

    Source of the binding: RFC 8705, section 3.1 ("x5t#S256"; hexadecimal here).

    Raises:
        errors.Unauthenticated: TOKEN_INVALID, it is another host's.
    """
    if claims["cnf"]["x5t#S256"] != certificate.fingerprint or claims["sub"] != certificate.host_id:
        raise _invalid()
    return auth.Caller(
        kind=Rule.CALLER_DELEGATE,
        principal_id=claims["sub"],
        project_id=claims["prj"],
        certificate=certificate,
        delegation=auth.Delegation(
            host_id=claims["sub"],
            domain_id=claims["dom"],
            generation=claims["gen"],
            image_ids=frozenset(claims["img"]),
            port_ids=frozenset(claims["prt"]),
            attachment_ids=frozenset(claims["att"]),
        ),
    )


def _invalid() -> errors.Unauthenticated:
    return errors.Unauthenticated(
        "TOKEN_INVALID", "the token is not one of this cloud's; log in again"
    )


def _expired() -> errors.Unauthenticated:
    return errors.Unauthenticated("TOKEN_EXPIRED", "the token has expired; log in again")


def _revoked() -> errors.Unauthenticated:
    return errors.Unauthenticated("TOKEN_REVOKED", "the token has been revoked; log in again")
