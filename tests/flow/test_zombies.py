"""Who was taken for dead and goes on, and what arrives too late: it changes nothing."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

import ports
from fakes.acts import ACTS, registered
from fakes.crash_plan import Blow, Plan
from flow.fault_cloud import Operation, Place
from flow.fault_world import World
from mcloud_base import errors

pytestmark = pytest.mark.asyncio(loop_scope="module")

CONDUCTS = ("conductor", "volume")  # the services that run workflows
_START_S = 120
_TAKEN_OVER = "operation taken over by another runner"


class Zombie:
    """A second control plane over the same databases, in a process that can be stopped."""

    def __init__(self, world: World, directory: Path) -> None:
        self.plan = Plan(directory / "plan")
        self._log = directory / "log"
        config = directory / "controlplane.toml"
        config.write_text("\n".join(_config(world)))
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "fakes.crashing_controlplane", config, directory / "plan"],
                stdout=log,
                stderr=log,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            )

    def log(self) -> str:
        return self._log.read_text()

    def taken_over(self) -> int:
        """Return of how many operations it has noticed that they are not its own any more."""
        return self.log().count(_TAKEN_OVER)

    async def says(self, text: str) -> bool:
        assert self._process.poll() is None, self.log()
        return text in self.log()

    def stop(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def release(self) -> None:
        """Let what stands go on, too."""
        self._process.send_signal(signal.SIGUSR1)
        self.go_on()

    def end(self) -> None:
        self.go_on()
        self._process.terminate()
        try:
            self._process.wait(60)
        finally:
            self._process.kill()
            self._process.wait()


def _config(world: World) -> Iterator[str]:
    public, internal = ports.free(), ports.free()
    values = {
        "state_dir": str(world.settings.state_dir),
        "services": CONDUCTS,
        "public_listen": f"127.0.0.1:{public}",
        "internal_listen": f"127.0.0.1:{internal}",
        "database": world.settings.database,
        # Longer than any test: it hears of the loss when it acts, not when it renews.
        "operation_lease_s": 600,
    }
    for key, value in values.items():
        yield f"{key} = {json.dumps(value)}"
    yield "[internal_endpoints]"
    for name in world.settings.services:
        if name not in CONDUCTS:
            yield f'{name} = "{world.settings.internal_listen}"'


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def zombie(world: World, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Zombie]:
    made = Zombie(world, tmp_path_factory.mktemp("zombie"))
    try:
        async with asyncio.timeout(_START_S):
            await world.until(lambda: made.says("control plane serves"), _START_S)
        yield made
    finally:
        made.end()


@contextlib.contextmanager
def resting(world: World) -> Iterator[None]:
    """The runners of this process take nothing: another has to."""
    before = {runner: runner.concurrency for runner in world.runtime.runners}
    for runner in before:
        runner.concurrency = 0
    try:
        yield
    finally:
        for runner, concurrency in before.items():
            runner.concurrency = concurrency


def places() -> Iterator[Place]:
    """Before each do and each undo: the zombie does late what has been done meanwhile."""
    for name, table in registered().items():
        for index, step in enumerate(table.steps):
            yield name, index, "do", "before"
            if step.undo is not None:
                yield name, index, "undo", "before"


@pytest.mark.parametrize("place", list(places()), ids=lambda place: "-".join(map(str, place)))
async def test_a_paused_conductor_changes_nothing(
    world: World, zombie: Zombie, place: Place
) -> None:
    name, act = place[0], ACTS[place[0]]
    blows = [Blow(tuple(map(str, place)), "stand")]
    last = len(world.tables[name].steps) - 1
    if place[2] == "undo":
        blows.append(Blow((name, str(last), "do", "after"), "fail"))
    before = zombie.taken_over()
    operation = await begin_there(world, zombie, name, blows)
    await stop_between_transactions(world, zombie, operation)
    ended = await world.ended(operation)
    succeeds = place[2] == "do"
    assert (ended.state == Operation.STATE_SUCCEEDED) == succeeds, ended
    states = act.ends if succeeds else act.fails
    assert await world.state(act) in states
    # Where it is possible, everything is gone before the zombie goes on.
    if act.makes:
        await world.prepare(name)
        await world.require_clean()
    left = await world.inventory()

    zombie.release()
    await world.until(lambda: asyncio.sleep(0, zombie.taken_over() > before))

    assert await world.inventory() == left
    await world.require_verified()
    again = await world.operation(operation.id)
    assert (again.state, again.end_time) == (ended.state, ended.end_time)


async def begin_there(world: World, zombie: Zombie, name: str, blows: list[Blow]) -> Operation:
    """Begin an operation, and return it when the zombie stands still with it."""
    while True:
        await world.prepare(name)
        zombie.plan.arm(*blows)
        with resting(world):
            operation = await world.begin(name)
            ending = asyncio.create_task(world.ended(operation))
            standing = asyncio.create_task(
                world.until(lambda: asyncio.sleep(0, zombie.plan.is_standing()))
            )
            await asyncio.wait({ending, standing}, return_when=asyncio.FIRST_COMPLETED)
            ending.cancel()
            standing.cancel()
            await asyncio.gather(ending, standing, return_exceptions=True)
            if standing.done() and not standing.cancelled():
                await standing
                return operation
        # A runner of this process was about to take something, and has taken this.


async def stop_between_transactions(world: World, zombie: Zombie, operation: Operation) -> None:
    """Stop it, and have its operation taken.

    A process that is stopped within a transaction on SQLite is in the way of everybody.
    """
    while True:
        zombie.stop()
        try:
            await world.expire_lease(operation.id)
        except errors.Unavailable:
            zombie.go_on()
            continue
        return
