"""A hypervisor in memory. It passes the same tests as the real one."""

from __future__ import annotations

import asyncio
import builtins
from collections.abc import Callable
from dataclasses import dataclass, replace

from mcloud.conductor.v1 import domain_pb2
from mcloud_agents.compute.driver import (
    IO_ERROR,
    Domain,
    Event,
    EventKind,
    HostFacts,
    Identity,
    Listener,
    ResolvedDomain,
    State,
    check_generation,
    check_replacement,
    foreign_domain,
    libvirt_name,
)
from mcloud_base.errors import NotFound, Unavailable


@dataclass
class Guest:
    """A domain, and how often it was started."""

    domain: Domain
    wanted: ResolvedDomain | None = None
    boot_count: int = 0


class FakeDriver:
    """A Driver; see there. `reachable` and the guests are open to tests."""

    def __init__(self) -> None:
        self.guests: dict[str, Guest] = {}  # by uuid
        self.reachable = asyncio.Event()
        self.reachable.set()
        self._listeners: list[Listener] = []

    async def start(self) -> None:
        self._check()
        self._publish(Event(EventKind.CONNECTED))

    async def close(self) -> None:
        self._listeners.clear()

    async def ensure(self, domain: ResolvedDomain) -> Domain:
        self._check()
        spec = domain.spec
        guest = self._in_the_way(domain)
        if guest and (guest.domain.identity is None or guest.domain.uuid != spec.uuid):
            raise foreign_domain(guest.domain.name)
        if guest and guest.domain.identity:
            check_replacement(guest.domain.identity, spec)
        if guest is None:
            blank = Domain(libvirt_name(spec.instance_id), spec.uuid, State.STATE_SHUTOFF)
            guest = self.guests[spec.uuid] = Guest(blank)
        before = guest.domain
        running = before.state in (State.STATE_RUNNING, State.STATE_PAUSED)
        in_boot = before.identity.boot_number if before.identity else 0
        if spec.power_state == domain_pb2.POWER_STATE_SHUTOFF:
            state, reason = State.STATE_SHUTOFF, before.reason
            if running:
                reason = "powered off" if spec.hard_reboot else "guest shut down"
        else:
            state, reason = State.STATE_RUNNING, ""
            if not running or in_boot < spec.boot_number:
                guest.boot_count += 1
        boot = max(spec.boot_number, in_boot)
        identity = Identity(spec.domain_id, spec.instance_id, spec.epoch, spec.generation, boot)
        guest.wanted = domain
        guest.domain = replace(before, state=state, reason=reason, identity=identity)
        if guest.domain.state != before.state:
            self._tell(guest)
        return guest.domain

    async def ensure_absent(self, domain_id: str, epoch: str, generation: int) -> None:
        self._check()
        guest = self._find(domain_id)
        if guest and guest.domain.identity:
            check_generation(guest.domain.identity, epoch, generation)
            del self.guests[guest.domain.uuid]
            self._tell(guest)

    async def resume(self, domain_id: str) -> Domain:
        self._check()
        guest = self._find(domain_id)
        if guest is None:
            raise NotFound("DOMAIN_NOT_FOUND", f"{domain_id} is not on this host")
        if guest.domain.state == State.STATE_PAUSED:
            self.change(domain_id, State.STATE_RUNNING, "")
        return guest.domain

    async def list(self) -> builtins.list[Domain]:
        self._check()
        return [guest.domain for guest in self.guests.values()]

    async def find(self, domain_id: str) -> Domain | None:
        self._check()
        guest = self._find(domain_id)
        return guest.domain if guest else None

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    async def host_facts(self) -> HostFacts:
        self._check()
        return HostFacts(4, 8192, 100, "qemu", "7.2.22", "x86_64", ("HYPERVISOR_TCG",))

    # --- what happens behind the agent's back ---------------------------------------------------

    def change(self, domain_id: str, state: State.ValueType, reason: str) -> None:
        """A guest shuts down, crashes, is paused."""
        guest = self._find(domain_id)
        assert guest is not None
        guest.domain = replace(guest.domain, state=state, reason=reason)
        self._tell(guest, EventKind.IO_ERROR if reason == IO_ERROR else EventKind.CHANGED)

    def plant(self, name: str, uuid: str) -> None:
        """Somebody else's domain."""
        self.guests[uuid] = Guest(Domain(name, uuid, State.STATE_RUNNING))

    def _check(self) -> None:
        if not self.reachable.is_set():
            raise Unavailable("HYPERVISOR_UNAVAILABLE", "the fake is switched off")

    def _find(self, domain_id: str) -> Guest | None:
        for guest in self.guests.values():
            if guest.domain.identity and guest.domain.identity.domain_id == domain_id:
                return guest
        return None

    def _in_the_way(self, wanted: ResolvedDomain) -> Guest | None:
        name = libvirt_name(wanted.spec.instance_id)
        named = (guest for guest in self.guests.values() if guest.domain.name == name)
        return self.guests.get(wanted.spec.uuid) or next(named, None)

    def _tell(self, guest: Guest, kind: EventKind = EventKind.CHANGED) -> None:
        self._publish(Event(kind, guest.domain.uuid, guest.domain.name))

    def _publish(self, event: Event) -> None:
        for listener in tuple(self._listeners):
            listener(event)
