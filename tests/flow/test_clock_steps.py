"""The control plane's clock is set while workflows run: all go on, nothing waits for the old time.

Over SQLite the machine's clock is that of the leases, too; over PostgreSQL the server's is, and the
machine's is for tokens only.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from flow.fault_cloud import Operation
from flow.process_world import SOON_S, ProcessWorld
from mcloud.compute.v1 import host_pb2
from mcloud_base import errors, rpc

pytestmark = pytest.mark.asyncio(loop_scope="module")

_HOUR_S = 3600
_PROGRAM = ("-m", "fakes.stepped_controlplane")


class SteppedWorld(ProcessWorld):
    """A world whose control plane has a clock that can be set."""

    def __init__(self, directory: Path, database: str) -> None:
        super().__init__(directory, database, _PROGRAM)
        self._clock = directory / "daemon" / "clock"
        self._clock.write_text("0")

    def set_clock(self, by_s: int) -> None:
        new = self._clock.with_suffix(".new")
        new.write_text(str(int(self._clock.read_text()) + by_s))
        new.rename(self._clock)
        self.cloud._tokens.clear()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(module_database: str) -> AsyncIterator[SteppedWorld]:
    directory = Path(tempfile.mkdtemp(prefix="mcloud-clock-"))
    made = SteppedWorld(directory, module_database)
    try:
        await made.start()
        yield made
        await made.stop()
    finally:
        made.daemon.kill()
        shutil.rmtree(directory)


@pytest.mark.parametrize("by_s", [_HOUR_S, -_HOUR_S])
async def test_a_workflow_goes_on_when_the_clock_is_set(world: SteppedWorld, by_s: int) -> None:
    async with world.creating() as operation:
        world.set_clock(by_s)
    await world.ends_well(operation)


async def test_an_operation_whose_time_is_over_ends(
    world: SteppedWorld, module_database: str
) -> None:
    """Its control plane is away while the clock is set: an hour has passed, for all it knows."""
    async with world.creating() as operation:
        world.daemon.kill()
        world.set_clock(_HOUR_S)
        world.daemon.start(world.program)
    if module_database != "sqlite":  # the server's clock says otherwise
        await world.ends_well(operation)
        return
    ended = await world.ended(operation)
    assert ended.state == Operation.STATE_FAILED
    await world.run("delete_instance")
    assert world.boots() == []
    await world.require_verified()


async def test_leases_of_who_died_before_the_clock_was_set_back_end(world: SteppedWorld) -> None:
    async with world.creating() as operation:
        world.daemon.kill()
        world.set_clock(-_HOUR_S)
        world.daemon.start(world.program)
    await world.ends_well(operation)


async def test_a_host_that_died_before_the_clock_was_set_back_is_down(world: SteppedWorld) -> None:
    await world.until(lambda: world.host_is(host_pb2.HostStatus.STATE_UP), SOON_S)
    await world.host._end()
    world.set_clock(-_HOUR_S)
    await world.until(lambda: world.host_is(host_pb2.HostStatus.STATE_DOWN), SOON_S)
    await world.host.__aenter__()
    world.set_clock(_HOUR_S)
    await world.until(lambda: world.host_is(host_pb2.HostStatus.STATE_UP), SOON_S)


async def test_tokens_end_when_the_clock_is_set_and_are_never_good_for_longer(
    world: SteppedWorld,
) -> None:
    world.cloud._tokens.clear()
    token = await world.cloud.token()
    stub, request = world.method("compute.InstanceService/ListInstances")

    async def answer(token: str) -> str:
        try:
            await rpc.call(stub, request, metadata=rpc.bearer(token))
        except errors.Unauthenticated as error:
            return error.reason
        return ""

    assert await answer(token) == ""
    world.set_clock(_HOUR_S)
    later = await world.cloud.token()
    assert [await answer(each) for each in (token, later)] == ["TOKEN_EXPIRED", ""]
    world.set_clock(-_HOUR_S)
    # Those of the time that has not come yet would be good for twice as long as any should be,
    # whether they have been seen before or not.
    assert [await answer(each) for each in (token, later)] == ["", "TOKEN_EXPIRED"]
    # That clocks differ a little is nothing.
    world.set_clock(-60)
    assert await answer(token) == ""
    world.set_clock(60)
