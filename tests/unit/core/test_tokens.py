"""The checker of tokens against an identity that can be silent, restored, or asked too often."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from google.rpc import status_pb2

from mcloud.identity.v1 import token_pb2, token_service_pb2, token_service_pb2_grpc
from mcloud_base import errors, rpc
from mcloud_controlplane.core import database, gate, tokens

Response = token_service_pb2.WatchRevocationsResponse


class Identity(token_service_pb2_grpc.TokenServiceServicer):
    """Serves keys, and a feed that sends what the test puts into it."""

    def __init__(self) -> None:
        self.keys = {"k1": Ed25519PrivateKey.generate()}
        self.feed: asyncio.Queue[Response | errors.Error] = asyncio.Queue()
        self.asked_from: list[str] = []
        self.keys_read = 0
        self.checks = 0
        self.reachable = True
        self.answers = asyncio.Event()
        self.answers.set()

    async def ListSigningKeys(self, request: Any, context: Any) -> Any:  # noqa: N802
        self.keys_read += 1
        await self.answers.wait()
        return token_service_pb2.ListSigningKeysResponse(
            keys=[
                token_pb2.SigningKey(id=id_, public_key=key.public_key().public_bytes_raw())
                for id_, key in self.keys.items()
            ]
        )

    async def WatchRevocations(self, request: Any, context: Any) -> AsyncIterator[Response]:  # noqa: N802
        self.asked_from.append(request.from_revision)
        while True:
            found = await self.feed.get()
            if isinstance(found, errors.Error):
                status = errors.to_status(found).SerializeToString()
                await context.abort(found.code, found.message, ((rpc.STATUS_KEY, status),))
            yield found

    async def CheckToken(self, request: Any, context: Any) -> token_pb2.TokenClaims:  # noqa: N802
        self.checks += 1
        if not self.reachable:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "away")
        return token_pb2.TokenClaims()

    def token(self, key: str = "k1", *, epoch: int = 1, ttl_s: float = 60, **claims: Any) -> str:
        now = int(time.time())
        body = {
            "iss": tokens.ISSUER, "sub": "u-1", "jti": "j", "iat": now, "exp": now + ttl_s,
            "epo": {"u-1": epoch}, **claims,
        }  # fmt: skip
        signer = self.keys.get(key) or Ed25519PrivateKey.generate()
        return jwt.encode(body, signer, algorithm="EdDSA", headers={"kid": key})

    def tell(self, revision: str, **epochs: int) -> None:
        """Send revocations; "u_1" stands for u-1."""
        revocations = [
            token_pb2.Revocation(principal_id=name.replace("_", "-"), epoch=epoch)
            for name, epoch in epochs.items()
        ]
        self.feed.put_nowait(Response(revocations=revocations, revision=revision))


@pytest.fixture
async def identity(tmp_path: Any) -> AsyncIterator[tuple[Identity, tokens.TokenChecker]]:
    server, servicer = grpc.aio.server(), Identity()
    token_service_pb2_grpc.add_TokenServiceServicer_to_server(servicer, server)
    address = f"unix:{tmp_path}/identity"
    server.add_insecure_port(address)
    await server.start()
    channel = grpc.aio.insecure_channel(address)
    checker = tokens.TokenChecker(token_service_pb2_grpc.TokenServiceStub(channel))  # type: ignore[arg-type]
    following = asyncio.create_task(checker.follow())
    yield servicer, checker
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)
    await channel.close()
    await server.stop(0)


async def becomes(checker: tokens.TokenChecker, token: str, reason: str) -> None:
    """Wait until a token is refused for a reason; "" for accepted."""
    async with asyncio.timeout(20):
        while True:
            try:
                await checker.check(token, mutates=True)
                found = ""
            except errors.Error as error:
                found = error.reason
            if found == reason:
                return
            await asyncio.sleep(0.01)  # the feed is another task's


async def refusal(checker: tokens.TokenChecker, token: str, *, mutates: bool = False) -> str:
    with pytest.raises(errors.Error) as caught:
        await checker.check(token, mutates=mutates)
    return caught.value.reason


async def test_a_revocation_ends_older_tokens(identity: Any) -> None:
    servicer, checker = identity
    old, new = servicer.token(epoch=1), servicer.token(epoch=2)
    servicer.tell("5")
    await becomes(checker, old, "")
    servicer.tell("6", u_1=2)
    await becomes(checker, old, "TOKEN_REVOKED")
    await checker.check(new, mutates=True)


async def test_what_was_signed_here_needs_no_key_and_is_revoked_like_any(identity: Any) -> None:
    servicer, checker = identity
    token = servicer.token("a key that identity does not give out", epoch=1)
    claims = jwt.decode(token, options={"verify_signature": False})
    checker.learn(token, claims)
    servicer.tell("5")
    await becomes(checker, token, "")
    servicer.tell("6", u_1=2)
    await becomes(checker, token, "TOKEN_REVOKED")
    expired = servicer.token(ttl_s=-1)
    checker.learn(expired, jwt.decode(expired, options={"verify_signature": False}))
    assert await refusal(checker, expired) == "TOKEN_EXPIRED"


async def test_after_out_of_range_the_feed_begins_anew(identity: Any) -> None:
    """A restore may have taken a revocation back; what the feed then says is all that holds."""
    servicer, checker = identity
    token = servicer.token(epoch=1)
    servicer.tell("9", u_1=4, u_2=7)
    await becomes(checker, token, "TOKEN_REVOKED")
    servicer.feed.put_nowait(errors.OutOfRange("REVISION_COMPACTED", "start again"))
    servicer.tell("", u_2=8)  # a part without a revision: more follows
    servicer.tell("3", u_3=1)
    await becomes(checker, token, "")
    assert servicer.asked_from[:2] == ["", ""]
    await becomes(checker, servicer.token(epoch=7, epo={"u-2": 7}), "TOKEN_REVOKED")


async def test_a_feed_that_broke_goes_on_from_where_it_was(identity: Any) -> None:
    servicer, checker = identity
    token = servicer.token(epoch=1)
    servicer.tell("9", u_1=4)
    await becomes(checker, token, "TOKEN_REVOKED")
    servicer.feed.put_nowait(errors.Unavailable("AWAY", "try again"))
    servicer.tell("10", u_2=1)
    await becomes(checker, servicer.token(epoch=0, epo={"u-2": 0}), "TOKEN_REVOKED")
    assert servicer.asked_from == ["", "9"]
    assert await refusal(checker, token) == "TOKEN_REVOKED"


async def test_unknown_keys_cost_identity_one_call(identity: Any) -> None:
    servicer, checker = identity
    servicer.tell("1")
    await becomes(checker, servicer.token(), "")
    before = servicer.keys_read
    forged = [servicer.token(f"forged-{number}") for number in range(200)]
    found = await asyncio.gather(*(refusal(checker, token) for token in forged))
    assert set(found) == {"TOKEN_INVALID"}
    assert servicer.keys_read - before <= 1


async def test_a_new_key_is_found(identity: Any) -> None:
    servicer, checker = identity
    servicer.tell("1")
    await becomes(checker, servicer.token(), "")
    servicer.keys["k2"] = Ed25519PrivateKey.generate()
    await becomes(checker, servicer.token("k2"), "")


async def test_while_the_feed_is_silent_identity_is_asked(identity: Any) -> None:
    servicer, checker = identity
    token = servicer.token()
    await becomes(checker, token, "")  # the feed has said nothing yet
    assert servicer.checks
    servicer.reachable = False
    assert await refusal(checker, token, mutates=True) == "IDENTITY_UNAVAILABLE"
    await checker.check(token, mutates=False)
    servicer.tell("1")
    await becomes(checker, token, "")


@pytest.mark.parametrize(
    "claims", [{"iss": "another"}, {"sub": None}, {"jti": None}, {"iat": "x"}], ids=str
)
async def test_claims_that_cannot_be(identity: Any, claims: dict[str, Any]) -> None:
    servicer, checker = identity
    assert await refusal(checker, servicer.token(**claims)) == "TOKEN_INVALID"


async def test_expired_tokens(identity: Any) -> None:
    servicer, checker = identity
    assert await refusal(checker, servicer.token(ttl_s=-1)) == "TOKEN_EXPIRED"
    servicer.tell("1")
    short = servicer.token(ttl_s=2)
    await becomes(checker, short, "")
    await becomes(checker, short, "TOKEN_EXPIRED")  # also from the cache


async def test_other_algorithms_are_refused(identity: Any) -> None:
    servicer, checker = identity
    servicer.tell("1")
    await becomes(checker, servicer.token(), "")
    body = {"iss": tokens.ISSUER, "sub": "u-1", "jti": "j", "iat": 0, "exp": 1 << 40, "epo": {}}
    unsigned = jwt.encode(body, None, algorithm="none", headers={"kid": "k1"})
    shared = jwt.encode(body, b"k" * 32, algorithm="HS256", headers={"kid": "k1"})
    for token in (unsigned, shared, "", "a.b", "a.b.c", "…"):
        assert await refusal(checker, token) == "TOKEN_INVALID"


async def test_while_identity_is_silent_callers_are_told_to_come_back(identity: Any) -> None:
    """Its call's deadline is not theirs, which has not passed."""
    servicer, checker = identity
    await becomes(checker, servicer.token(), "")
    servicer.answers.clear()
    servicer.keys["k2"] = Ed25519PrivateKey.generate()
    with pytest.raises(errors.Unavailable) as caught:
        await checker.check(servicer.token("k2"), mutates=False)
    assert caught.value.reason == "IDENTITY_UNAVAILABLE"
    assert rpc.asked_to_wait_s(caught.value)
    servicer.answers.set()
    await becomes(checker, servicer.token("k2"), "")


@pytest.mark.parametrize(
    ("left_s", "reason"),
    [(None, "SERVICE_SILENT"), (5, "SERVICE_SILENT"), (-1, "DEADLINE_EXCEEDED")],
)
def test_only_its_own_deadline_is_told_a_caller(left_s: float | None, reason: str) -> None:
    error = errors.from_status(status_pb2.Status(code=4, message="Deadline Exceeded"))
    end = database.deadline.set(None if left_s is None else time.monotonic() + left_s)
    try:
        assert gate.for_caller(error).reason == reason
        silent = errors.DeadlineExceeded("HOST_SILENT", "the host does not answer")
        assert gate.for_caller(silent) is silent
    finally:
        database.deadline.reset(end)
