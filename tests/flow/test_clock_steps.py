"""The control plane's clock is set while workflows run: all go on, nothing waits for the old time.

Over SQLite the machine's clock is that of the leases, too; over PostgreSQL the server's is, and the
machine's is for tokens only.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import pytest_asyncio

import ports
from conftest import Cloud
from fakes.acts import ACTS
from fakes.daemon import Daemon
from flow import fault_cloud
from flow.fault_cloud import Operation
from flow.fault_world import World
from mcloud.compute.v1 import host_pb2
from mcloud_base import errors, ids, rpc, tls
from mcloud_controlplane.core import pki

pytestmark = pytest.mark.asyncio(loop_scope="module")

_HOUR_S = 3600
_SOON_S = 75.0  # the longest lease, and a look for what is free; much less than an hour
_PROGRAM = ("-m", "fakes.stepped_controlplane")


class SteppedWorld(World):
    """A world whose control plane is a process with a clock that can be set."""

    def __init__(self, directory: Path, database: str) -> None:
        settings = fault_cloud.settings(directory, [ports.free(), ports.free()], database)
        super().__init__(settings)
        addresses = (settings.public_listen, settings.internal_listen)
        numbers = [int(address.rpartition(":")[2]) for address in addresses]
        self.daemon = Daemon(directory / "daemon", settings.state_dir, numbers, database)
        self._clock = directory / "daemon" / "clock"
        self._clock.write_text("0")

    async def start(self) -> None:
        self.daemon.start(_PROGRAM)
        self.cloud = Cloud(self.settings.public_listen, self.settings.state_dir)
        self.host = self._make_host()
        await self.host.__aenter__()
        await self.until(self._host_is_up)
        await self._furnish()

    async def stop(self) -> None:
        await self.host.__aexit__()
        await self.cloud.channel.close()
        self.daemon.stop()

    def host_identity(self, host_id: str = "") -> tuple[tls.Identity, str]:
        authority, key = self.daemon.plane.authority(), tls.new_key()
        host_id = host_id or ids.new("h")
        signed = authority.issue_host(tls.signing_request(key, host_id), host_id, "127.0.0.1")
        return tls.Identity(key, pki._pem(signed), authority.certificate), host_id

    def set_clock(self, by_s: int) -> None:
        new = self._clock.with_suffix(".new")
        new.write_text(str(int(self._clock.read_text()) + by_s))
        new.rename(self._clock)
        self.cloud._tokens.clear()

    @asynccontextmanager
    async def creating(self) -> AsyncIterator[Operation]:
        """An instance whose host cannot start it until the end of the block."""
        await self.prepare("create_instance")
        await self.until(lambda: self.host_is(host_pb2.HostStatus.STATE_UP), _SOON_S)
        self.agent_saboteur.visited.clear()
        self.agent_saboteur.plan["16", "before"] = (errors.Unavailable("NOT_YET", "not yet"), -1)
        try:
            operation = await self.begin("create_instance")
            await self.until(self._is_waiting)
            yield operation
        finally:
            self.agent_saboteur.plan.clear()

    async def _is_waiting(self) -> bool:
        return ("16", "before") in self.agent_saboteur.visited

    async def host_is(self, state: host_pb2.HostStatus.State.ValueType) -> bool:
        (found,) = (await self.call("compute.HostService/ListHosts", system=True)).hosts
        return bool(found.status.state == state)

    async def has_come_to(self, name: str) -> bool:
        return await self.state(ACTS[name]) in ACTS[name].ends

    def boots(self) -> list[int]:
        return [guest.boot_count for guest in self.host.driver.guests.values()]


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


async def ends_soon(world: SteppedWorld, operation: Operation) -> Operation:
    begin = time.monotonic()
    ended = await world.ended(operation)
    assert time.monotonic() - begin < _SOON_S
    numbers = [(step.number, step.attempt) for step in ended.steps]
    assert len(set(numbers)) == len(numbers)
    return ended


async def ends_well(world: SteppedWorld, operation: Operation) -> None:
    ended = await ends_soon(world, operation)
    assert ended.state == Operation.STATE_SUCCEEDED, ended
    assert world.boots() == [1]
    # And whatever comes next is not held up.
    await world.until(lambda: world.host_is(host_pb2.HostStatus.STATE_UP), _SOON_S)
    for name in ("stop_instance", "start_instance", "delete_instance"):
        ended = await world.ended(await world.begin(name))
        assert ended.state == Operation.STATE_SUCCEEDED, ended
        # UNKNOWN until the host has renewed its lease by the new time.
        await world.until(lambda name=name: world.has_come_to(name), _SOON_S)  # type: ignore[misc]
    await world.require_verified()


@pytest.mark.parametrize("by_s", [_HOUR_S, -_HOUR_S])
async def test_a_workflow_goes_on_when_the_clock_is_set(world: SteppedWorld, by_s: int) -> None:
    async with world.creating() as operation:
        world.set_clock(by_s)
    await ends_well(world, operation)


async def test_an_operation_whose_time_is_over_ends(
    world: SteppedWorld, module_database: str
) -> None:
    """Its control plane is away while the clock is set: an hour has passed, for all it knows."""
    async with world.creating() as operation:
        world.daemon.kill()
        world.set_clock(_HOUR_S)
        world.daemon.start(_PROGRAM)
    if module_database != "sqlite":  # the server's clock says otherwise
        await ends_well(world, operation)
        return
    ended = await ends_soon(world, operation)
    assert ended.state == Operation.STATE_FAILED
    await world.run("delete_instance")
    assert world.boots() == []
    await world.require_verified()


async def test_leases_of_who_died_before_the_clock_was_set_back_end(world: SteppedWorld) -> None:
    async with world.creating() as operation:
        world.daemon.kill()
        world.set_clock(-_HOUR_S)
        world.daemon.start(_PROGRAM)
    await ends_well(world, operation)


async def test_a_host_that_died_before_the_clock_was_set_back_is_down(world: SteppedWorld) -> None:
    await world.until(lambda: world.host_is(host_pb2.HostStatus.STATE_UP), _SOON_S)
    await world.host._end()
    world.set_clock(-_HOUR_S)
    await world.until(lambda: world.host_is(host_pb2.HostStatus.STATE_DOWN), _SOON_S)
    await world.host.__aenter__()
    world.set_clock(_HOUR_S)
    await world.until(lambda: world.host_is(host_pb2.HostStatus.STATE_UP), _SOON_S)


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
