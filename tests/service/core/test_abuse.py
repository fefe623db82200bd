"""Connections and messages that no client of ours would send: the service stays usable."""

from __future__ import annotations

import asyncio
import base64
import os
import resource
import socket
import ssl
import time
from collections import Counter
from collections.abc import Awaitable, Iterator
from typing import Any

import grpc
import pytest

from fakes.secrecy import assert_no_cores
from mcloud.common.v1 import operation_pb2
from mcloud.compute.v1 import key_pair_service_pb2
from mcloud.identity.v1 import token_service_pb2, token_service_pb2_grpc
from mcloud_base import errors, rpc
from service.core import fuzz
from service.core import plane as planes
from service.core.cloud import Client, ControlPlane, Rule, refused
from service.core.keys import Keys, create_request, new_project

_AT_ONCE = 40
_WITHIN_S = 120.0
_CALL_S = 10.0  # that a user's program waits, unless it says otherwise
_IDLE_KIB = 49  # of memory that an idle connection costs: docs/deploy.md
# A client's first bytes of HTTP/2: the preface and empty settings.
# Source: https://www.rfc-editor.org/rfc/rfc9113#section-3.4
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"


@pytest.fixture(scope="module", params=["sqlite"])
def plane(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ControlPlane]:
    """Whatever the database is: none of this reaches it."""
    yield from planes.started(request, tmp_path_factory)


@pytest.fixture
async def keys(client: Client) -> Keys:
    project = new_project()
    return Keys(client.public, await client.make_user(project, Rule.ROLE_MEMBER, project))


class Idle(asyncio.Protocol):
    """A connection that makes no call, but answers pings.

    Source: https://www.rfc-editor.org/rfc/rfc9113#section-6.7
    """

    def __init__(self) -> None:
        self.open = False
        self._received = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport, self.open = transport, True
        transport.write(_PREFACE)

    def data_received(self, data: bytes) -> None:
        self._received += data
        while len(self._received) >= 9:
            end = 9 + int.from_bytes(self._received[:3])
            if len(self._received) < end:
                return
            if self._received[3:5] == b"\6\0":
                self.transport.write(b"\0\0\x08\6\1" + self._received[5:end])
            del self._received[:end]

    def connection_lost(self, exc: Exception | None) -> None:
        self.open = False


async def connect(plane: ControlPlane, context: ssl.SSLContext) -> Idle:
    host, _, port = plane.public.rpartition(":")
    loop = asyncio.get_running_loop()
    _, made = await loop.create_connection(Idle, host, int(port), ssl=context)
    return made


def tls_context(plane: ControlPlane) -> ssl.SSLContext:
    context = ssl.create_default_context(cadata=plane.authority().certificate.decode())
    context.set_alpn_protocols(["h2"])
    return context


@pytest.fixture(scope="module")
def silent(plane: ControlPlane) -> Iterator[list[socket.socket]]:
    """Connections made before all tests: one that speaks no TLS, one that answers no ping."""
    host, _, port = plane.public.rpartition(":")
    raw = [socket.create_connection((host, int(port))) for _ in range(2)]
    mute, spoken = raw[0], tls_context(plane).wrap_socket(raw[1], server_hostname=host)
    spoken.sendall(_PREFACE)
    yield [mute, spoken]
    for each in (mute, spoken):
        each.close()


def test_no_core_would_tell_secrets(plane: ControlPlane) -> None:
    assert_no_cores(plane.pids[-1])


@pytest.mark.parametrize("count", [1000, pytest.param(5000, marks=pytest.mark.slow)])
async def test_thousands_of_idle_connections(
    plane: ControlPlane, silent: list[socket.socket], keys: Keys, count: int
) -> None:
    """Others are served while they last, they cost what docs/deploy.md says, and they leave."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most < count + 1000:
        pytest.skip(f"{most} open files are too few: raise nofile")
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    limit, context, pid = asyncio.Semaphore(_AT_ONCE), tls_context(plane), plane.pids[-1]

    async def one() -> Idle:
        async with limit:
            return await connect(plane, context)

    await keys.create("before")
    files, memory, begin = open_files(pid), fuzz.rss_kib(pid), time.monotonic()
    idle = await asyncio.gather(*(one() for _ in range(count)))
    took = time.monotonic() - begin
    each = (fuzz.rss_kib(pid) - memory) / count
    longest = 0.0
    for number in range(20):
        begin = time.monotonic()
        await keys.create(f"k{number}")
        longest = max(longest, time.monotonic() - begin)
    print(  # noqa: T201
        f"idle: {count} connections in {took:.1f} s, {each:.1f} KiB each, "
        f"calls within {longest:.2f} s"
    )
    assert all(peer.open for peer in idle)
    some = count // 100  # files come and go with what else is done
    assert open_files(pid) > files + count - some
    assert longest < _CALL_S
    assert each < 2 * _IDLE_KIB
    for peer in idle:
        peer.transport.abort()
    async with asyncio.timeout(_WITHIN_S):
        while open_files(pid) > files + some:
            await asyncio.sleep(0.05)  # only the process's files tell
    await keys.create("after")


def open_files(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


async def test_a_giant_message_is_refused_and_said_to_be(keys: Keys) -> None:
    request = create_request("giant")
    request.spec.public_key = "x" * (5 << 20)
    error = await refused(rpc.call(keys.stub.CreateKeyPair, request, metadata=keys.who))
    assert isinstance(error, errors.Exhausted)
    assert "larger than max" in error.message
    request.spec.public_key = "x" * (3 << 20)
    error = await refused(rpc.call(keys.stub.CreateKeyPair, request, metadata=keys.who))
    assert error.reason == "BAD_REQUEST"
    request = create_request("labels", labels={f"l{n}": "x" * 4000 for n in range(64)})
    error = await refused(rpc.call(keys.stub.CreateKeyPair, request, metadata=keys.who))
    assert (error.reason, error.metadata["field"]) == ("BAD_REQUEST", "labels")
    await keys.create("small")


async def test_giant_headers_are_refused(keys: Keys) -> None:
    who = (*keys.who, ("x-request-id", "x" * 40_000))
    error = await refused(rpc.call(keys.stub.CreateKeyPair, create_request("x"), metadata=who))
    assert isinstance(error, errors.Exhausted)
    await keys.create("small")


async def test_what_the_contract_does_not_know_is_not_kept(keys: Keys) -> None:
    """It could hold what ought to be masked."""
    raw = create_request("one").SerializeToString() + b"\xfa\x7f\x06secret"
    send = keys.channel.unary_unary(
        "/mcloud.compute.v1.KeyPairService/CreateKeyPair",
        response_deserializer=operation_pb2.Operation.FromString,
    )
    operation = await send(raw, metadata=tuple(keys.who), timeout=30)
    assert b"secret" not in operation.SerializeToString()


async def test_what_is_no_message_is_refused(keys: Keys) -> None:
    for method in ("CreateKeyPair", "ListKeyPairs"):
        send = keys.channel.unary_unary(f"/mcloud.compute.v1.KeyPairService/{method}")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await send(b"\xff\xff\xff", metadata=tuple(keys.who), timeout=30)
        assert rpc.from_rpc_error(caught.value).reason == "BAD_MESSAGE"


async def test_a_client_that_opens_streams_and_reads_none(keys: Keys) -> None:
    await keys.create("before")
    calls = [keys.watch(from_revision="1") for _ in range(900)]
    await asyncio.gather(*(call.initial_metadata() for call in calls[:3]))
    await keys.create("meanwhile")
    assert await keys.names() == ["before", "meanwhile"]
    # Which of them are refused is the server's to say: they come to it in any order.
    ends = {asyncio.ensure_future(call.code()): call for call in calls}
    refused = []
    async with asyncio.timeout(_WITHIN_S):
        for end in asyncio.as_completed(ends):
            refused.append(await end)
            if len(refused) == 400:
                break
    assert set(refused) == {grpc.StatusCode.RESOURCE_EXHAUSTED}
    call = next(call for end, call in ends.items() if end.done())
    assert rpc.from_rpc_error(await _error(call)).reason == "TOO_MANY_STREAMS"
    for call in calls:
        call.cancel()


async def test_many_passwords_at_once_leave_the_rest_alone(plane: ControlPlane, keys: Keys) -> None:
    """Hashing is dear; whoever has a token does not wait for those who guess."""
    channel = rpc.channel(plane.public, grpc.ssl_channel_credentials(plane.authority().certificate))
    stub = token_service_pb2_grpc.TokenServiceStub(channel)
    guesses = [
        asyncio.ensure_future(_reason(stub.CreateToken(_guess(number), timeout=60)))
        for number in range(300)
    ]
    await keys.create("meanwhile")
    seen = Counter(await asyncio.gather(*guesses))
    assert set(seen) <= {"BAD_CREDENTIALS", "TOO_MANY_REQUESTS", "OVERLOADED", "TOO_MANY_ATTEMPTS"}
    assert seen["TOO_MANY_REQUESTS"]
    await channel.close()


async def test_forged_tokens_do_not_queue(plane: ControlPlane, keys: Keys) -> None:
    """Of keys that nobody knows: each would wait until identity's keys have been read again."""
    forged = ".".join(_base64(part) for part in (b'{"alg":"EdDSA","kid":"x"}', b"{}", b"x" * 64))
    who = Keys(keys.channel, rpc.bearer(forged))
    request = key_pair_service_pb2.ListKeyPairsRequest()
    calls = [
        asyncio.ensure_future(_reason(who.stub.ListKeyPairs(request, metadata=who.who, timeout=30)))
        for _ in range(300)
    ]
    await keys.create("meanwhile")
    assert set(await asyncio.gather(*calls)) <= {"TOKEN_INVALID", "OVERLOADED"}


@pytest.mark.slow
async def test_who_does_not_answer_is_disconnected(silent: list[socket.socket]) -> None:
    """Last: by now most of the time that they have has passed."""
    for each in silent:
        await asyncio.to_thread(_await_end, each)


def _await_end(connection: socket.socket) -> None:
    connection.settimeout(_WITHIN_S)
    try:
        while connection.recv(65_536):
            continue
    except ConnectionError:
        return


def _guess(number: int) -> token_service_pb2.CreateTokenRequest:
    credential = token_service_pb2.PasswordCredential(user_name=f"u{number}", password="guess")
    return token_service_pb2.CreateTokenRequest(password=credential, system=True)


def _base64(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


async def _reason(call: Awaitable[object]) -> str:
    try:
        with rpc.reraised():
            await call
    except errors.Error as error:
        return error.reason
    return "OK"


async def _error(call: Any) -> grpc.RpcError:
    try:
        async for _ in call:
            continue
    except grpc.RpcError as error:
        return error
    raise AssertionError("it ended well")
