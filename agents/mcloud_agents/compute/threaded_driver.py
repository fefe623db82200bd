"""The Driver over a hypervisor's blocking library: the connection, deadlines, the order of things.

What is asked of the library is in `Hypervisor`: short units that run in threads. Everything that
takes long (a guest that shuts itself down) is waited for here, without a thread.
"""

from __future__ import annotations

import asyncio
import builtins
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ParamSpec, Protocol, TypeVar

import structlog

from mcloud.conductor.v1 import domain_pb2
from mcloud_agents.compute.driver import (
    CRASHED,
    Domain,
    Event,
    EventKind,
    HostFacts,
    Listener,
    ResolvedDomain,
    qemu_died,
)
from mcloud_agents.compute.threads import Threads
from mcloud_base.errors import Error, Unavailable

log = structlog.get_logger()

P = ParamSpec("P")
T = TypeVar("T")

LOOK_S = 5.0  # between looks at a connection that says nothing
BUTTON_S = 10.0  # an early guest misses the power button: it is pressed again


@dataclass(frozen=True)
class Settings:
    """Of the driver. Times in seconds."""

    instances_dir: Path
    uri: str = "qemu:///system"
    hypervisor_type: str = "auto"  # or "kvm", "qemu"
    machine: str = "pc"
    thread_count: int = 8
    call_deadline_s: float = 30.0
    start_deadline_s: float = 180.0  # of starting or stopping one guest on a busy host
    shutdown_deadline_s: float = 60.0  # that a guest has for shutting itself down
    unplug_deadline_s: float = 30.0


class Hypervisor(Protocol):
    """A blocking library. Each method runs in a thread and raises what Driver says."""

    def open(self, publish: Callable[[Event], None], lost: Callable[[], None]) -> None:
        """Connect; from now on call these, from any thread."""

    def is_alive(self) -> bool:
        """Whether the connection is good, as far as can be told without asking."""

    def events_alive(self) -> bool:
        """Whether events would arrive."""

    def close(self) -> None:
        """Give up the connection, if there is one."""

    def list(self) -> list[Domain]:
        """See Driver."""

    def find(self, domain_id: str) -> Domain | None:
        """See Driver."""

    def host_facts(self) -> HostFacts:
        """See Driver."""

    def define(self, wanted: ResolvedDomain) -> int | None:
        """Make the definition the wanted one; return the boot the domain runs in, if it runs."""

    def start(self, wanted: ResolvedDomain) -> None:
        """Start the domain unless it runs."""

    def press_power_button(self, wanted: ResolvedDomain) -> bool:
        """Ask the guest to shut down; False if it does not run."""

    def cut_power(self, wanted: ResolvedDomain) -> None:
        """Stop the domain if it runs."""

    def is_inactive(self, wanted: ResolvedDomain) -> bool:
        """Whether the domain does not run."""

    def unplug(self, wanted: ResolvedDomain) -> None:
        """Ask the guest to let go of disks and NICs that it should not have."""

    def is_unplugged(self, wanted: ResolvedDomain) -> bool:
        """Whether it has."""

    def plug(self, wanted: ResolvedDomain) -> None:
        """Give the running domain the disks and NICs that it lacks."""

    def conclude(self, wanted: ResolvedDomain) -> Domain:
        """Record in the running domain what it has reached; return how it is."""

    def remove(self, domain_id: str, epoch: str, generation: int) -> None:
        """See Driver.ensure_absent."""

    def resume(self, domain_id: str) -> Domain:
        """See Driver."""


class ThreadedDriver:
    """A Driver; see there."""

    def __init__(self, hypervisor: Hypervisor, settings: Settings) -> None:
        self._hypervisor = hypervisor
        self._settings = settings
        self._connected = asyncio.Event()
        self._lost = asyncio.Event()
        self._changed = asyncio.Event()
        self._listeners: list[Listener] = []
        self._keeper: asyncio.Task[None] | None = None
        self._threads = Threads("hypervisor", settings.thread_count, "HYPERVISOR_UNAVAILABLE")
        # On its own: an open() that hangs must not take a thread more with each attempt.
        self._opener = Threads("hypervisor-open", 1, "HYPERVISOR_UNAVAILABLE")

    # --- the connection -------------------------------------------------------------------------

    async def start(self) -> None:
        """See Driver."""
        self._loop = asyncio.get_running_loop()
        self._keeper = asyncio.create_task(self._stay_connected(), name="hypervisor connection")
        await self._ready(LOOK_S)

    async def close(self) -> None:
        """See Driver."""
        if self._keeper:
            self._keeper.cancel()
            await asyncio.wait({self._keeper})
        self._threads.close()
        self._opener.close()

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        """See Driver."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    async def _stay_connected(self) -> None:
        pause = 0.1
        try:
            while True:
                self._lost.clear()
                failure = ""
                try:
                    await self._opener.run(
                        self._settings.call_deadline_s,
                        "",
                        self._hypervisor.open,
                        self._threadsafe(self._publish),
                        self._threadsafe(self._lost.set),
                    )
                except Error as error:
                    failure = str(error)
                    log.warning("hypervisor not reached", uri=self._settings.uri, error=failure)
                except Exception:  # the outermost loop: without it nothing would ever connect
                    failure = "internal error"
                    log.exception("hypervisor not reached", uri=self._settings.uri)
                if failure:
                    await asyncio.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311 (jitter)
                    pause = min(pause * 2, 10.0)
                    continue
                pause = 0.1
                log.info("hypervisor connected", uri=self._settings.uri)
                self._connected.set()
                self._publish(Event(EventKind.CONNECTED))
                await self._until_lost()
                log.warning("hypervisor lost", uri=self._settings.uri)
                self._connected.clear()
                await self._let_go()
        finally:
            self._connected.clear()
            await self._let_go()

    async def _until_lost(self) -> None:
        """Return when the connection is no good any more: told so, or found so."""
        deaf = False
        while True:
            try:
                async with asyncio.timeout(LOOK_S):
                    await self._lost.wait()
                return
            except TimeoutError:
                if not self._hypervisor.is_alive():
                    return
            if deaf == self._hypervisor.events_alive():
                deaf = not deaf
                if deaf:
                    log.error("hypervisor events stuck")
                else:
                    log.info("hypervisor events flow again")

    async def _let_go(self) -> None:
        try:
            await self._opener.run(LOOK_S, "", self._hypervisor.close)
        except Error as error:
            log.info("hypervisor connection not closed", error=str(error))

    def _publish(self, event: Event) -> None:
        self._changed.set()
        for listener in tuple(self._listeners):
            listener(event)

    def _threadsafe(self, function: Callable[P, object]) -> Callable[P, None]:
        def call(*args: P.args, **kwargs: P.kwargs) -> None:
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(lambda: function(*args, **kwargs))

        return call

    async def _ready(self, deadline_s: float) -> None:
        try:
            async with asyncio.timeout(deadline_s):
                await self._connected.wait()
        except TimeoutError as error:
            raise Unavailable(
                "HYPERVISOR_UNAVAILABLE", f"no connection to {self._settings.uri}"
            ) from error

    async def _ask(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a unit that changes nothing."""
        await self._ready(LOOK_S)
        deadline_s = self._settings.call_deadline_s
        return await self._threads.run(deadline_s, "", function, *args, **kwargs)

    async def _do(
        self, key: str, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Run a unit that changes the domain `key`, which the caller holds."""
        await self._ready(LOOK_S)
        deadline_s = self._settings.start_deadline_s
        return await self._threads.run(deadline_s, key, function, *args, **kwargs)

    # --- looking --------------------------------------------------------------------------------

    async def list(self) -> builtins.list[Domain]:
        """See Driver."""
        return await self._ask(self._hypervisor.list)

    async def find(self, domain_id: str) -> Domain | None:
        """See Driver."""
        return await self._ask(self._hypervisor.find, domain_id)

    async def host_facts(self) -> HostFacts:
        """See Driver."""
        return await self._ask(self._hypervisor.host_facts)

    # --- ensuring -------------------------------------------------------------------------------

    async def ensure(self, domain: ResolvedDomain) -> Domain:
        """See Driver."""
        spec, hypervisor = domain.spec, self._hypervisor
        key = spec.domain_id
        async with self._threads.exclusive(key, self._settings.start_deadline_s):
            running_boot = await self._do(key, hypervisor.define, domain)
            if spec.power_state == domain_pb2.POWER_STATE_SHUTOFF:
                await self._stop(domain)
            elif running_boot is not None and running_boot >= spec.boot_number:
                await self._plug(domain)
            else:
                if running_boot is not None:
                    # A new process, so that whatever only a boot can change is taken up with it.
                    await self._stop(domain)
                await self._do(key, hypervisor.start, domain)
                found = await self._do(key, hypervisor.conclude, domain)
                if found.reason == CRASHED:
                    raise qemu_died(f"the process of {key} has ended right after its start")
                return found
            return await self._do(key, hypervisor.conclude, domain)

    async def ensure_absent(self, domain_id: str, epoch: str, generation: int) -> None:
        """See Driver."""
        async with self._threads.exclusive(domain_id, self._settings.start_deadline_s):
            await self._do(domain_id, self._hypervisor.remove, domain_id, epoch, generation)

    async def resume(self, domain_id: str) -> Domain:
        """See Driver."""
        async with self._threads.exclusive(domain_id, self._settings.start_deadline_s):
            return await self._do(domain_id, self._hypervisor.resume, domain_id)

    async def _stop(self, wanted: ResolvedDomain) -> None:
        """Let the guest shut itself down, for a while; then cut its power."""
        spec, hypervisor = wanted.spec, self._hypervisor
        end = time.monotonic() + (0 if spec.hard_reboot else self._settings.shutdown_deadline_s)
        while (left := end - time.monotonic()) > 0:
            if not await self._do(spec.domain_id, hypervisor.press_power_button, wanted):
                return
            if await self._until(hypervisor.is_inactive, wanted, min(left, BUTTON_S)):
                return
        await self._do(spec.domain_id, hypervisor.cut_power, wanted)

    async def _plug(self, wanted: ResolvedDomain) -> None:
        """Give a running domain the disks and NICs that it should have, and no others."""
        key, hypervisor = wanted.spec.domain_id, self._hypervisor
        await self._do(key, hypervisor.unplug, wanted)
        # The guest has to let go of a device; the library answers before it has.
        deadline_s = self._settings.unplug_deadline_s
        if not await self._until(hypervisor.is_unplugged, wanted, deadline_s):
            raise Unavailable("DEVICE_IN_USE", f"the guest of {key} does not let go of a device")
        await self._do(key, hypervisor.plug, wanted)

    async def _until(
        self,
        condition: Callable[[ResolvedDomain], bool],
        wanted: ResolvedDomain,
        deadline_s: float,
    ) -> bool:
        """Wait for a condition, looked at after each event and every second; False if in vain."""
        end = time.monotonic() + deadline_s
        while True:
            self._changed.clear()
            if await self._ask(condition, wanted):
                return True
            left = end - time.monotonic()
            if left <= 0:
                return False
            try:
                async with asyncio.timeout(min(left, 1.0)):
                    await self._changed.wait()
            except TimeoutError:
                continue
