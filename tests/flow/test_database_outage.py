"""PostgreSQL is gone for a while: who asks is told to come back, and what was asked for goes on.

The outage is longer than the lease of an operation; a minute is longer than that of a session, too.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator

import pytest
import pytest_asyncio

import fixtures_postgresql
from flow.process_world import ProcessWorld
from mcloud_base import errors, ids, rpc

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.postgres]

_PATIENT_S = 180.0
_LENGTHS_S = [20, pytest.param(60, marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def server() -> Iterator[fixtures_postgresql.Running]:
    with fixtures_postgresql.running() as made:
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(
    server: fixtures_postgresql.Running, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[ProcessWorld]:
    made = ProcessWorld(tmp_path_factory.mktemp("outage"), server.server.url("{name}"))
    try:
        await made.start()
        yield made
        await made.stop()
    finally:
        made.daemon.kill()


async def goes_on(
    world: ProcessWorld, length_s: float, begin: Callable[[], None], end: Callable[[], None]
) -> set[str]:
    """Have an outage while things are done; return the reasons with which users were refused."""
    seen = set()
    volumes = []
    who = rpc.bearer(await world.cloud.token())
    async with world.creating() as operation:
        begin()
        over = time.monotonic() + length_s
        for number in range(5):
            fields = {"request_id": ids.request_id(), "name": f"{operation.id}-{number}"}
            stub, request = world.method(
                "volume.VolumeService/CreateVolume", **fields, spec={"size_gib": 1}
            )
            call = rpc.call(stub, request, timeout_s=_PATIENT_S, metadata=who)
            volumes.append(asyncio.ensure_future(call))
    # The host has started the guest by now or soon, and nobody can write it down.
    stub, request = world.method("compute.InstanceService/ListInstances")
    while time.monotonic() < over:
        try:
            with rpc.reraised():
                await stub(request, timeout=3, metadata=tuple(who))
            seen.add("")
        except errors.Error as error:
            seen.add(error.reason)
            if isinstance(error, errors.Unavailable):
                wait_s = rpc.asked_to_wait_s(error)
                if not wait_s:
                    raise
                await asyncio.sleep(wait_s)
    end()
    made = await asyncio.gather(*volumes)
    assert len({each.resource.id for each in made}) == len(made)
    for each in made:
        ended = await world.ended(each)
        assert ended.state == ended.STATE_SUCCEEDED, ended
    await world.ends_well(operation)
    for each in made:
        await world.ended(
            await world.mutate("volume.VolumeService/DeleteVolume", id=each.resource.id)
        )
    return seen


@pytest.mark.parametrize("length_s", _LENGTHS_S)
async def test_a_database_that_crashes_and_stays_away(
    world: ProcessWorld, server: fixtures_postgresql.Running, length_s: int
) -> None:
    seen = await goes_on(world, length_s, lambda: server.stop(immediately=True), server.start)
    assert seen == {"DATABASE_UNAVAILABLE"}


@pytest.mark.parametrize("length_s", _LENGTHS_S)
async def test_a_database_that_hangs(
    world: ProcessWorld, server: fixtures_postgresql.Running, length_s: int
) -> None:
    seen = await goes_on(world, length_s, server.freeze, lambda: server.freeze(frozen=False))
    assert seen <= {"DEADLINE_EXCEEDED", "DATABASE_UNAVAILABLE", "OVERLOADED"}
