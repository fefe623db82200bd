"""What the agent asks of a hypervisor, and the values that go both ways.

Every operation is an *ensure*: repeatable, and true of the host when it returns.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from mcloud.conductor.v1 import domain_pb2
from mcloud.network.v1 import dataplane_pb2
from mcloud.volume.v1 import attachment_pb2
from mcloud_base.errors import Unavailable, WrongState

State = domain_pb2.DomainStatus.State

IO_ERROR = "io error"  # a paused domain's reason: a disk does not answer
CRASHED = "crashed"  # a shut-off domain's reason: its process has ended by itself


@dataclass(frozen=True)
class ResolvedNic:
    """A NIC with everything that BindPort has told about it."""

    binding: dataplane_pb2.PortBinding
    bridge: str
    mtu: int


@dataclass(frozen=True)
class ResolvedDisk:
    """A volume's disk and where it is served."""

    device: str
    volume_id: str
    nbd: attachment_pb2.NbdConnection


@dataclass(frozen=True)
class RootDisk:
    """A qcow2 overlay and the image below it, neither of which is ever probed."""

    overlay: Path
    base: Path
    base_format: str


@dataclass(frozen=True)
class ResolvedDomain:
    """A desired domain with all that it needs in place on this host.

    `spec` carries no delegated token: nothing that outlives an attempt does.
    """

    spec: domain_pb2.DomainSpec
    root_disk: RootDisk
    console_log: Path
    config_drive: Path | None = None
    nics: tuple[ResolvedNic, ...] = ()
    disks: tuple[ResolvedDisk, ...] = ()


@dataclass(frozen=True)
class Identity:
    """What stands in a domain's metadata: by this, and nothing else, a domain is mcloud's."""

    domain_id: str
    instance_id: str
    epoch: str
    generation: int
    boot_number: int


@dataclass(frozen=True)
class Domain:
    """A domain as the hypervisor has it."""

    name: str
    uuid: str
    state: State.ValueType
    reason: str = ""  # for people: "io error", "guest shut down"
    identity: Identity | None = None  # None: somebody else's
    # By device, the volume that each is of; the root disk, and what is no volume's, has "".
    disks: tuple[tuple[str, str], ...] = field(default=(), compare=False)


class EventKind(enum.Enum):
    """What an event is about."""

    CHANGED = "changed"  # a domain was defined, started, stopped, paused, removed, …
    IO_ERROR = "io error"  # the guest is paused: a disk does not answer
    CONNECTED = "connected"  # anything may have happened unseen: list everything


@dataclass(frozen=True)
class Event:
    """A hint that something has happened; the truth is in `list`."""

    kind: EventKind
    uuid: str = ""
    name: str = ""
    detail: str = ""


@dataclass(frozen=True)
class HostFacts:
    """What the host is and has, claims not subtracted."""

    vcpu_count: int
    memory_mib: int
    disk_gib: int
    hypervisor_type: str  # "kvm", "qemu"
    hypervisor_version: str
    cpu_arch: str
    traits: tuple[str, ...] = field(default=())


Listener = Callable[[Event], None]


class Driver(Protocol):
    """A hypervisor.

    Every operation raises Unavailable (HYPERVISOR_UNAVAILABLE) when the hypervisor does not
    answer in time, and WrongState (HYPERVISOR_REFUSED) when it answers no. A guest's process that
    is ended under its hands is Unavailable (QEMU_DIED): it may well start the next time.
    """

    async def start(self) -> None:
        """Connect, and stay connected until `close`. Returns at the first connection.

        Raises:
            Unavailable: HYPERVISOR_UNAVAILABLE; it goes on trying all the same.
        """

    async def close(self) -> None:
        """Let go of the hypervisor; guests are not touched."""

    async def ensure(self, domain: ResolvedDomain) -> Domain:
        """Bring the domain to its desired state: definition, disks, NICs, power, boot number.

        Raises:
            WrongState: INSTANCE_HAS_DOMAIN: another incarnation is still here; FOREIGN_DOMAIN:
                the name or UUID is somebody else's; STALE_GENERATION: a later one is here.
        """

    async def ensure_absent(self, domain_id: str, epoch: str, generation: int) -> None:
        """Destroy and undefine the domain; nothing happens if it is not there.

        Raises:
            WrongState: STALE_GENERATION: what is here is of a later generation of the epoch.
        """

    async def resume(self, domain_id: str) -> Domain:
        """Let a paused domain run on; others are left as they are.

        Raises:
            NotFound: DOMAIN_NOT_FOUND.
        """

    async def list(self) -> list[Domain]:
        """Everything that is here, also what is not mcloud's."""

    async def find(self, domain_id: str) -> Domain | None:
        """One of mcloud's domains."""

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        """Call `listener` in the event loop at each event; the returned function ends it."""

    async def host_facts(self) -> HostFacts:
        """Look at the host."""


def libvirt_name(instance_id: str) -> str:
    """Return the hypervisor's name of an instance's domain; the same in each incarnation."""
    return "instance-" + instance_id.partition("-")[2]


def check_replacement(identity: Identity, domain: domain_pb2.DomainSpec) -> None:
    """Refuse to put a desired domain over one that is here and is not it, or is newer.

    Raises:
        WrongState: INSTANCE_HAS_DOMAIN, STALE_GENERATION.
    """
    if identity.domain_id != domain.domain_id:
        raise WrongState(
            "INSTANCE_HAS_DOMAIN",
            f"instance {domain.instance_id} still has the domain {identity.domain_id} here",
            instance_id=domain.instance_id,
            domain_id=identity.domain_id,
        )
    check_generation(identity, domain.epoch, domain.generation)


def check_generation(identity: Identity, epoch: str, generation: int) -> None:
    """Refuse an order that is older than what has been done; epochs are not compared.

    Raises:
        WrongState: STALE_GENERATION.
    """
    if identity.epoch == epoch and identity.generation > generation:
        raise WrongState(
            "STALE_GENERATION",
            f"{identity.domain_id} is at generation {identity.generation}, asked for {generation}",
            domain_id=identity.domain_id,
            generation=identity.generation,
        )


def foreign_domain(name: str) -> WrongState:
    """Return the error for a name or UUID of mcloud's that somebody else's domain has."""
    return WrongState(
        "FOREIGN_DOMAIN",
        f"{name} on this host is not mcloud's, and has a name or UUID that is",
        name=name,
    )


def qemu_died(message: str) -> Unavailable:
    """Return the error for a guest's process that was ended while something was done with it."""
    return Unavailable("QEMU_DIED", message)
