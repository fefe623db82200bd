"""More than a process can do: whoever asks too much is told so, and nobody else notices."""

from __future__ import annotations

import asyncio
import sqlite3
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import psycopg
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from mcloud.common.v1 import metadata_pb2, operation_pb2
from mcloud.compute.v1 import (
    flavor_service_pb2,
    flavor_service_pb2_grpc,
    key_pair_service_pb2,
    key_pair_service_pb2_grpc,
    operation_service_pb2_grpc,
)
from mcloud_base import errors, ids, rpc
from service.core import plane as planes
from service.core.cloud import Client, ControlPlane, Rule, refused
from service.core.keys import Keys, create_request, new_project

_AT_ONCE = 8
_STREAMS = 5
_WITHIN_S = 90.0
_WRITERS = 3  # threads of a database, at most


@pytest.fixture(scope="module", params=["sqlite", pytest.param("pg", marks=pytest.mark.postgres)])
def plane(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ControlPlane]:
    """One with little room."""
    yield from planes.started(
        request,
        tmp_path_factory,
        requests_at_once=_AT_ONCE,
        streams_at_once=2 * _STREAMS,
        streams_per_caller=_STREAMS,
        default_deadline_s=1.5,
        slow_reader_s=1.0,
    )


@pytest.fixture
async def keys(client: Client) -> Keys:
    return await project_of(client)


async def project_of(client: Client) -> Keys:
    project = new_project()
    return Keys(client.public, await client.make_user(project, Rule.ROLE_MEMBER, project))


@asynccontextmanager
async def locked(plane: ControlPlane) -> AsyncIterator[None]:
    """Keep compute's database from writing, as a slow disk or a long transaction does."""
    if plane.database == "sqlite":
        connection = sqlite3.connect(plane.state_dir / "compute.db", isolation_level=None)
        connection.execute("PRAGMA busy_timeout = 60000")
        connection.execute("BEGIN IMMEDIATE")
        yield
        connection.execute("ROLLBACK")
        connection.close()
        return
    url = plane.database.replace("{name}", "compute")
    async with await psycopg.AsyncConnection.connect(url) as other:
        await other.execute("LOCK TABLE keypair, request IN EXCLUSIVE MODE")
        yield
        await other.rollback()


async def outcome(call: Awaitable[Any]) -> str:
    try:
        with rpc.reraised():
            await call
    except errors.Error as error:
        return error.reason
    return "OK"


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what only a log or a counter of another process tells."""
    async with asyncio.timeout(_WITHIN_S):
        while not condition():
            await asyncio.sleep(0.05)


async def test_a_flood_of_one_project_is_its_own_trouble(
    plane: ControlPlane, client: Client, keys: Keys
) -> None:
    other = await project_of(client)
    system = await client.login()
    flavors = flavor_service_pb2_grpc.FlavorServiceStub(client.public)
    async with locked(plane):
        flood = [asyncio.ensure_future(outcome(_create(keys, f"k{n}"))) for n in range(300)]
        done, _ = await asyncio.wait(flood, return_when=asyncio.FIRST_COMPLETED, timeout=_WITHIN_S)
        assert {each.result() for each in done} <= {"TOO_MANY_REQUESTS"}
        # Its places are taken, and those who wait are as many as may.
        error = await refused(_raised(_create(keys, "one more")))
        assert error.reason == "TOO_MANY_REQUESTS"
        assert rpc.asked_to_wait_s(error) > 0
        # Others have theirs: another project, an operator, who logs in, who asks for health.
        assert await other.names() == []
        await rpc.call(
            flavors.ListFlavors, flavor_service_pb2.ListFlavorsRequest(), metadata=system
        )
        await client.make_user(new_project(), Rule.ROLE_READER)
        health = health_pb2_grpc.HealthStub(client.public)
        await rpc.call(health.Check, health_pb2.HealthCheckRequest())
    seen = Counter(await asyncio.gather(*flood))
    assert set(seen) <= {
        "OK", "TOO_MANY_REQUESTS", "OVERLOADED", "DATABASE_UNAVAILABLE", "QUOTA_EXCEEDED",
    }  # fmt: skip
    assert seen["TOO_MANY_REQUESTS"] >= 300 - 128 - _AT_ONCE
    # What was accepted was done, once; what was refused was not.
    assert len(await keys.names(page_size=1000)) == seen["OK"]


async def test_a_client_that_waits_as_it_is_told_gets_everything_done(
    plane: ControlPlane, keys: Keys
) -> None:
    """300 at once is more than may wait; `rpc.call` honours RetryInfo."""
    requests = (create_request(f"k{n}", validate_only=True) for n in range(300))
    await asyncio.gather(
        *(
            rpc.call(keys.stub.CreateKeyPair, request, metadata=keys.who, timeout_s=_WITHIN_S)
            for request in requests
        )
    )


async def test_what_nobody_waits_for_any_more_is_not_begun(plane: ControlPlane, keys: Keys) -> None:
    async with locked(plane):
        calls = [
            outcome(keys.stub.CreateKeyPair(create_request(f"k{n}"), metadata=keys.who, timeout=t))
            for n, t in enumerate([1.0] * 10 + [None] * 10)  # None: the default applies
        ]
        seen = Counter(await asyncio.gather(*calls))
    assert seen == {"DEADLINE_EXCEEDED": 20}
    await keys.create("after")  # in the queue it is behind all of these
    assert len(await keys.names()) <= 1 + _WRITERS


async def test_streams_are_counted(keys: Keys, client: Client) -> None:
    await keys.create("one")
    held = [keys.watch(from_revision="1") for _ in range(_STREAMS - 1)]
    for stream in held:
        await stream.read()
    # One that waits for an operation is one, too.
    operations = operation_service_pb2_grpc.OperationServiceStub(client.public)
    last = keys.watch(from_revision="1")
    await last.read()
    request = operation_pb2.WaitOperationRequest(id=ids.new("cop"))
    error = await refused(rpc.call(operations.WaitOperation, request, metadata=keys.who))
    assert (type(error), error.reason) == (errors.Exhausted, "TOO_MANY_STREAMS")
    # They are those of one caller; and requests are not streams.
    other = await project_of(client)
    await other.create("two")
    await other.watch(from_revision="1").read()
    assert await keys.names() == ["one"]
    last.cancel()
    async with asyncio.timeout(_WITHIN_S):
        while await outcome(rpc.call(operations.WaitOperation, request, metadata=keys.who)) == (
            "TOO_MANY_STREAMS"
        ):
            await asyncio.sleep(0.05)  # the server has not heard of the cancel yet
    for stream in held:
        stream.cancel()


async def test_who_does_not_read_is_told_where_to_go_on(plane: ControlPlane, keys: Keys) -> None:
    """The window of its connection is full; nothing piles up behind it."""
    authority = plane.authority().certificate
    channel = grpc.aio.secure_channel(
        plane.public,
        grpc.ssl_channel_credentials(authority),
        options=(("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65_536)),
    )
    stub = key_pair_service_pb2_grpc.KeyPairServiceStub(channel)
    before = (await keys.list()).revision
    request = key_pair_service_pb2.WatchKeyPairsRequest(from_revision=before)
    stream = stub.WatchKeyPairs(request, metadata=tuple(keys.who))
    told = _count(plane.log, "slow reader disconnected")
    labels = {f"l{n}": "x" * 3900 for n in range(4)}
    made = await asyncio.gather(*(keys.create(f"k{n}", labels=labels) for n in range(60)))
    await until(lambda: _count(plane.log, "slow reader disconnected") > told)
    seen: list[str] = []

    async def read() -> None:
        async for event in rpc.received(aiter(stream)):
            seen.append(event.key_pair.metadata.id)

    error = await refused(read())
    assert (type(error), error.reason) == (errors.Exhausted, "SLOW_WATCHER")
    assert 0 < len(seen) < 60
    # From there on it misses nothing.
    rest = keys.watch(from_revision=error.metadata["revision"])
    async with asyncio.timeout(_WITHIN_S):
        while len(seen) < 60:
            event = await rest.read()
            if event.type != metadata_pb2.CHANGE_TYPE_BOOKMARK:
                seen.append(event.key_pair.metadata.id)
    assert sorted(seen) == sorted(operation.resource.id for operation in made)
    rest.cancel()
    await channel.close()
    # A page of such resources is cut so that it fits.
    page = await keys.list(page_size=1000)
    found = [key.metadata.id for key in page.key_pairs]
    while page.next_page_token:
        assert page.ByteSize() < 4 << 20
        page = await keys.list(page_size=1000, page_token=page.next_page_token)
        found += [key.metadata.id for key in page.key_pairs]
    assert found == sorted(seen)


def _create(keys: Keys, name: str) -> Awaitable[Any]:
    made: Awaitable[Any] = keys.stub.CreateKeyPair(
        create_request(name), metadata=keys.who, timeout=60
    )
    return made


async def _raised(call: Awaitable[Any]) -> Any:
    with rpc.reraised():
        return await call


def _count(log: Path, text: str) -> int:
    return log.read_text().count(text)
