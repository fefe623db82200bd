"""The life of one simulated host: it is enrolled, its agent runs, loses connections and crashes."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable

import structlog

from mcloud_agents import enrolment
from mcloud_agents.agent import Agent, Parts
from mcloud_agents.simulate.draws import Draws
from mcloud_agents.simulate.hypervisor import Hypervisor
from mcloud_agents.simulate.keep import Keep, Records, State
from mcloud_agents.simulate.parts import Dataplane, Disks, Volumes
from mcloud_agents.simulate.settings import Settings
from mcloud_agents.simulate.state_file import StateFile
from mcloud_agents.simulate.tally import Tally
from mcloud_base import errors

log = structlog.get_logger()

_OPEN_TIMEOUT_S = 60.0  # after which others may connect, too
_DOWN_S = (0.5, 5.0)  # for how long an agent that has crashed is away

# Returns the secret of a join token for the host of a name.
MakeToken = Callable[[str], Awaitable[str]]


class Host:
    """One host, counted from 1; `run` it once it is enrolled."""

    def __init__(self, settings: Settings, file: StateFile, number: int, tally: Tally) -> None:
        self._settings = settings
        self._file = file
        self._number = number
        self._tally = tally
        self._draws = Draws(settings.seed, number)
        self._own = settings.of_host(number)
        self._keep = Keep(file, number)
        self._hypervisor = Hypervisor(settings, file, number)

    @property
    def hypervisor(self) -> Hypervisor:
        """What it runs."""
        return self._hypervisor

    async def enrol(self, make_token: MakeToken) -> None:
        """Make it a host, if it is none yet.

        Raises:
            errors.Error: as enrolment.enrol and the making of a token raise.
        """
        if self._keep.load() is None:
            await enrolment.enrol(
                self._keep,
                self._settings.control_plane,
                await make_token(self._own.name),
                name=self._own.name,
                underlay_ip=self._own.underlay_ip,
            )

    async def run(self, connecting: asyncio.Semaphore, opened: Callable[[], object]) -> None:
        """Be a host until cancelled.

        Args:
            connecting: held while sessions are being opened.
            opened: called when all of them are, for the first time.
        """
        once = [opened]
        while True:
            await self._run_agent(connecting, lambda: once and once.pop()())
            self._tally.crashes += 1
            log.info("agent crashed", host=self._own.name)
            await asyncio.sleep(self._draws.between("down", *_DOWN_S))

    async def _run_agent(self, connecting: asyncio.Semaphore, opened: Callable[[], object]) -> None:
        """Run an agent until it crashes. Nobody is told, and nothing is tidied up."""
        crash_s = self._draws.wait_s("crash", self._settings.crashes_per_hour)
        agent = self._make_agent()
        tasks: list[asyncio.Task[None]] = []
        try:
            async with connecting:
                await agent.start()
                # Its end is a fault of the agent's code; it is raised.
                working = asyncio.create_task(agent.work(asyncio.Event()))
                opening = asyncio.create_task(_then(agent.opened, opened))
                tasks = [working, opening, asyncio.create_task(self._break_connections(agent))]
                await asyncio.wait({opening}, timeout=_OPEN_TIMEOUT_S)
            await asyncio.wait({working}, timeout=None if math.isinf(crash_s) else crash_s)
            if working.done():
                working.result()
        finally:
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks)
            await agent.close()

    async def _break_connections(self, agent: Agent) -> None:
        while True:
            wait_s = self._draws.wait_s("disconnect", self._settings.disconnects_per_hour)
            if math.isinf(wait_s):
                return
            await asyncio.sleep(wait_s)
            self._tally.disconnects += 1
            agent.reconnect()

    def _make_agent(self) -> Agent:
        known = self._keep.load()
        if known is None:
            raise errors.WrongState("NOT_ENROLLED", f"{self._own.name} is not a host yet")
        records = Records(self._file, self._number)
        storage = self._own.storage_enabled
        address = self._own.underlay_ip
        parts = Parts(
            self._hypervisor,
            lambda documents: Dataplane(),
            Volumes(self._file, self._number, address) if storage else None,
            disks=Disks(records.load(), download=self._settings.download),
            records=records,
            probe=self._take_time,
            told=self._tally.told,
        )
        return Agent(self._own, self._keep, State(self._file, self._number), *known, parts)

    async def _take_time(self, step: str, moment: str) -> None:
        """Be slow, and refuse now and then (workflow.Probe).

        Raises:
            WrongState: SIMULATED_REFUSAL.
        """
        if moment != "before":
            return
        settings = self._settings
        if settings.latency_ms != (0, 0):
            latency_ms = self._draws.between(f"latency {step}", *settings.latency_ms)
            await asyncio.sleep(latency_ms / 1000)
        probability = settings.refusal_probability
        if probability and step.isdecimal() and self._draws.happens(f"refusal {step}", probability):
            self._tally.refusals += 1
            raise errors.WrongState(
                "SIMULATED_REFUSAL",
                f"the simulated host {self._own.name} refuses step {step}, as it was told to",
                host=self._own.name,
                step=step,
            )


async def _then(wait: Callable[[], Awaitable[None]], tell: Callable[[], object]) -> None:
    await wait()
    tell()


def _nothing() -> None:
    """Do nothing."""
