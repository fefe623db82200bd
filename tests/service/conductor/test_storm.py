"""Verify has nothing to say of a cloud in which instances come and go all the time."""

from __future__ import annotations

import asyncio
import itertools
import random

import pytest

from mcloud.common.v1 import operation_pb2
from service.conductor.world import World, keys

pytestmark = pytest.mark.asyncio(loop_scope="module")

SETTINGS: dict[str, object] = {}  # as operators have it

_WORKERS = 6
_ROUNDS = 4  # at least, and until there have been as many looks
_LOOKS = 2


async def come_and_go(world: World, worker: int, enough: asyncio.Event) -> None:
    """Create and delete, now and then while it is still being made, or stopped."""
    chosen = random.Random(worker)
    for number in itertools.count():
        if number >= _ROUNDS and enough.is_set():
            return
        begun = await world.instances.create(f"{worker}-{number}")
        way = chosen.choice(("at once", "built", "stopped"))
        if way != "at once":
            ended = await world.instances.wait(begun)
            assert ended.state == operation_pb2.Operation.STATE_SUCCEEDED, ended.error
        if way == "stopped":
            await world.instances.change("Stop", begun.resource.id)
        await world.instances.wait(await world.instances.change("Delete", begun.resource.id))


async def test_what_is_in_flight_is_no_finding(world: World) -> None:
    enough = asyncio.Event()
    storm = asyncio.gather(*(come_and_go(world, worker, enough) for worker in range(_WORKERS)))
    looked = 0
    try:
        while not storm.done():
            findings, summary = await world.verify_all()
            assert keys(findings) == set()
            assert not summary.silent_host_ids
            assert summary.checked_count
            looked += 1
            if looked == _LOOKS:
                enough.set()
    finally:
        enough.set()
    await storm
    assert looked >= _LOOKS
    assert keys(await world.verify()) == set()
