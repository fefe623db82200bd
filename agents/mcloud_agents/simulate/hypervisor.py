"""A hypervisor (compute.driver.Driver) that runs nothing: it remembers what would run."""

from __future__ import annotations

import builtins
import json
from collections.abc import Callable
from dataclasses import replace

from mcloud.conductor.v1 import domain_pb2
from mcloud_agents.compute.driver import (
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
    libvirt_name,
)
from mcloud_agents.simulate.settings import Settings
from mcloud_agents.simulate.state_file import StateFile
from mcloud_base.errors import NotFound

GUEST = "guest"


class Hypervisor:
    """One host's guests. They outlive its agent and, in the file, the simulator."""

    def __init__(self, settings: Settings, file: StateFile, host: int) -> None:
        self._settings = settings
        self._file = file
        self._host = host
        bodies = file.read(host, GUEST)
        self._guests = {id_: _decode(body) for id_, body in bodies.items()}  # by domain id
        self._listeners: list[Listener] = []
        self.started_count = 0
        self.removed_count = 0

    @property
    def guest_count(self) -> int:
        """How many domains there are."""
        return len(self._guests)

    async def start(self) -> None:
        """See Driver."""

    async def close(self) -> None:
        """See Driver."""
        self._listeners.clear()

    async def ensure(self, domain: ResolvedDomain) -> Domain:
        """See Driver."""
        spec = domain.spec
        for known in self._guests.values():
            if known.uuid == spec.uuid and known.identity:
                check_replacement(known.identity, spec)
        before = self._guests.get(spec.domain_id)
        boot_number = max(
            spec.boot_number, before.identity.boot_number if before and before.identity else 0
        )
        off = spec.power_state == domain_pb2.POWER_STATE_SHUTOFF
        after = Domain(
            name=libvirt_name(spec.instance_id),
            uuid=spec.uuid,
            state=State.STATE_SHUTOFF if off else State.STATE_RUNNING,
            reason=_reason(before, spec) if off else "",
            identity=Identity(
                spec.domain_id, spec.instance_id, spec.epoch, spec.generation, boot_number
            ),
        )
        if before is None:
            self.started_count += 1
        if after != before:
            self._put(spec.domain_id, after)
        return after

    async def ensure_absent(self, domain_id: str, epoch: str, generation: int) -> None:
        """See Driver."""
        known = self._guests.get(domain_id)
        if known is None:
            return
        if known.identity:
            check_generation(known.identity, epoch, generation)
        self._file.remove(self._host, GUEST, domain_id)
        del self._guests[domain_id]
        self.removed_count += 1
        self._tell(known)

    async def resume(self, domain_id: str) -> Domain:
        """See Driver."""
        known = self._guests.get(domain_id)
        if known is None:
            raise NotFound("DOMAIN_NOT_FOUND", f"{domain_id} is not on this host")
        if known.state == State.STATE_PAUSED:
            known = replace(known, state=State.STATE_RUNNING, reason="")
            self._put(domain_id, known)
        return known

    async def list(self) -> builtins.list[Domain]:
        """See Driver."""
        return [*self._guests.values()]

    async def find(self, domain_id: str) -> Domain | None:
        """See Driver."""
        return self._guests.get(domain_id)

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        """See Driver."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener) if listener in self._listeners else None

    async def host_facts(self) -> HostFacts:
        """See Driver."""
        size = self._settings
        return HostFacts(
            size.vcpu_count, size.memory_mib, size.disk_gib, "simulated", "1", "x86_64"
        )

    def _put(self, domain_id: str, domain: Domain) -> None:
        self._file.write(self._host, GUEST, domain_id, _encode(domain))
        self._guests[domain_id] = domain
        self._tell(domain)

    def _tell(self, domain: Domain) -> None:
        for listener in tuple(self._listeners):
            listener(Event(EventKind.CHANGED, domain.uuid, domain.name))


def _reason(before: Domain | None, spec: domain_pb2.DomainSpec) -> str:
    """Return why a domain is off that is to be."""
    if before is None or before.state == State.STATE_SHUTOFF:
        return before.reason if before else ""
    return "powered off" if spec.hard_reboot else "guest shut down"


def _encode(domain: Domain) -> bytes:
    identity = vars(domain.identity) if domain.identity else None
    return json.dumps({**vars(domain), "identity": identity}).encode()


def _decode(body: bytes) -> Domain:
    values = json.loads(body)
    identity = values.pop("identity")
    return Domain(**values, identity=Identity(**identity) if identity else None)
