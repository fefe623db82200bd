"""The Driver over libvirt; the only module that knows it.

Source: https://libvirt.org/html/libvirt-libvirt-domain.html
"""

from __future__ import annotations

import builtins
import functools
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ParamSpec, TypeVar

import libvirt
import structlog

from mcloud.conductor.v1 import domain_pb2
from mcloud_agents.compute import domain_xml, host
from mcloud_agents.compute.driver import (
    CRASHED,
    IO_ERROR,
    Domain,
    Event,
    EventKind,
    HostFacts,
    Identity,
    ResolvedDomain,
    State,
    check_generation,
    check_replacement,
    foreign_domain,
    libvirt_name,
    qemu_died,
)
from mcloud_agents.compute.threaded_driver import Settings, ThreadedDriver
from mcloud_base.errors import NotFound, Unavailable, WrongState

log = structlog.get_logger()

P = ParamSpec("P")
T = TypeVar("T")

KEEPALIVE_S = 5
KEEPALIVE_COUNT = 3  # a hung libvirtd frees the threads that wait for it within 20 s
CANARY_S = 1.0

_STATES: dict[int, State.ValueType] = {
    libvirt.VIR_DOMAIN_NOSTATE: State.STATE_RUNNING,
    libvirt.VIR_DOMAIN_RUNNING: State.STATE_RUNNING,
    libvirt.VIR_DOMAIN_BLOCKED: State.STATE_RUNNING,
    libvirt.VIR_DOMAIN_PAUSED: State.STATE_PAUSED,
    libvirt.VIR_DOMAIN_SHUTDOWN: State.STATE_RUNNING,  # still at it
    libvirt.VIR_DOMAIN_SHUTOFF: State.STATE_SHUTOFF,
    libvirt.VIR_DOMAIN_CRASHED: State.STATE_CRASHED,
    libvirt.VIR_DOMAIN_PMSUSPENDED: State.STATE_PAUSED,
}
_REASONS = {
    (libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_IOERROR): IO_ERROR,
    (libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_USER): "paused on the host",
    (libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_WATCHDOG): "watchdog",
    (libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_CRASHED): "guest crashed",
    (libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_STARTING_UP): "starting",
    (libvirt.VIR_DOMAIN_SHUTOFF, libvirt.VIR_DOMAIN_SHUTOFF_SHUTDOWN): "guest shut down",
    (libvirt.VIR_DOMAIN_SHUTOFF, libvirt.VIR_DOMAIN_SHUTOFF_DESTROYED): "powered off",
    (libvirt.VIR_DOMAIN_SHUTOFF, libvirt.VIR_DOMAIN_SHUTOFF_CRASHED): CRASHED,
    (libvirt.VIR_DOMAIN_SHUTOFF, libvirt.VIR_DOMAIN_SHUTOFF_FAILED): "failed to start",
    (libvirt.VIR_DOMAIN_SHUTOFF, libvirt.VIR_DOMAIN_SHUTOFF_DAEMON): "found gone by libvirtd",
}
_UNREACHED_CODES = {
    libvirt.VIR_ERR_RPC,
    libvirt.VIR_ERR_NO_CONNECT,
    libvirt.VIR_ERR_INVALID_CONN,
    libvirt.VIR_ERR_OPERATION_TIMEOUT,
}
_UNREACHED_DOMAINS = {libvirt.VIR_FROM_RPC, libvirt.VIR_FROM_REMOTE}
_ELEMENT = libvirt.VIR_DOMAIN_METADATA_ELEMENT
_LIVE = libvirt.VIR_DOMAIN_AFFECT_LIVE
_CONFIG = libvirt.VIR_DOMAIN_AFFECT_CONFIG
_CURRENT = libvirt.VIR_DOMAIN_AFFECT_CURRENT
# QEMU's words for a disk's server; libvirt has no code for it. Source: qemu, util/qemu-sockets.c.
_NOT_CONNECTED = "Failed to connect to '"
# libvirt's words for a QEMU that has ended while it was talked to, and then what QEMU itself wrote.
# It has no code for it either. Source: libvirt, src/qemu/qemu_process.c, qemu_monitor.c.
_DIED = re.compile(
    r"process exited while connecting to monitor|unexpectedly closed the monitor"
    r"|End of file from qemu monitor|guest unexpectedly quit|domain is no(t| longer) running"
)


class LibvirtDriver(ThreadedDriver):
    """The host's libvirtd."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(Libvirt(settings), settings)


def _translating(function: Callable[P, T]) -> Callable[P, T]:
    """Make libvirt's failures ours; see `translated`."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except libvirt.libvirtError as error:
            raise translated(error) from error

    return call


def translated(error: Any) -> Unavailable | WrongState:
    """Return what a libvirtError is to us.

    Unavailable: HYPERVISOR_UNAVAILABLE: libvirt could not be asked. VOLUME_UNREACHABLE: a volume's
    server was not there, which its host starts again. QEMU_DIED: it ended without a word.
    WrongState: HYPERVISOR_REFUSED: it said no, with its own words.
    """
    text = error.get_error_message() or str(error)
    if error.get_error_code() in _UNREACHED_CODES or error.get_error_domain() in _UNREACHED_DOMAINS:
        return Unavailable("HYPERVISOR_UNAVAILABLE", f"libvirt: {text}")
    if _NOT_CONNECTED in text:
        return Unavailable("VOLUME_UNREACHABLE", f"libvirt: {text}")
    if _died_silently(text):
        return qemu_died(f"libvirt: {text}")
    return WrongState("HYPERVISOR_REFUSED", f"libvirt: {text}")


def _died_silently(text: str) -> bool:
    """Tell whether QEMU was ended: one that refuses what it is given says why before it exits."""
    found = _DIED.search(text)
    if found is None:
        return False
    first, *others = text[found.end() :].splitlines() or [""]
    said = [first.partition(": ")[2], *others]  # what is before it says which domain it was
    own = (": warning: ", ": terminating on signal ")
    return all(any(words in line for words in own) for line in said if line.strip())


class Libvirt:
    """A Hypervisor; see there."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._platform = domain_xml.Platform("qemu")
        self._opened: Any = None
        self._callbacks: list[int] = []

    # --- the connection -------------------------------------------------------------------------

    @_translating
    def open(self, publish: Callable[[Event], None], lost: Callable[[], None]) -> None:
        """Connect and register everything; what a lost connection had registered is gone."""
        _event_loop()
        connection = libvirt.open(self._settings.uri)
        if connection.getType() == "TEST":
            self._platform = domain_xml.Platform("test", arch="i686", machine="")
        else:
            kind = host.choose_hypervisor_type(self._settings.hypervisor_type)
            self._platform = domain_xml.Platform(kind, machine=self._settings.machine)
            connection.setKeepAlive(KEEPALIVE_S, KEEPALIVE_COUNT)
        connection.registerCloseCallback(lambda *_: lost(), None)

        def tell(kind: EventKind, domain: Any, detail: str) -> None:
            # Both are in the object: nothing may be asked in libvirt's event thread.
            publish(Event(kind, domain.UUIDString(), domain.name(), detail))

        def on_lifecycle(_c: Any, domain: Any, event: int, detail: int, _o: Any) -> None:
            tell(EventKind.CHANGED, domain, f"lifecycle {event}/{detail}")

        def on_reboot(_c: Any, domain: Any, _o: Any) -> None:
            tell(EventKind.CHANGED, domain, "reboot")

        def on_io_error(_c: Any, domain: Any, _source: str, alias: str, *_rest: Any) -> None:
            tell(EventKind.IO_ERROR, domain, alias)

        self._callbacks = [
            connection.domainEventRegisterAny(None, kind, callback, None)
            for kind, callback in (
                (libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, on_lifecycle),
                (libvirt.VIR_DOMAIN_EVENT_ID_REBOOT, on_reboot),
                (libvirt.VIR_DOMAIN_EVENT_ID_IO_ERROR_REASON, on_io_error),
            )
        ]
        self._opened = connection

    def is_alive(self) -> bool:
        """See Hypervisor."""
        return self._opened is not None and bool(self._opened.isAlive())

    def events_alive(self) -> bool:
        """See Hypervisor."""
        return _event_loop().age() < 10 * CANARY_S

    def close(self) -> None:
        """See Hypervisor."""
        connection, self._opened = self._opened, None
        if connection is None:
            return
        try:
            for callback in self._callbacks:
                connection.domainEventDeregisterAny(callback)
            connection.unregisterCloseCallback()
            connection.close()
        except libvirt.libvirtError as error:  # what cannot be taken back is gone with it
            log.debug("libvirt connection was gone", error=str(error))

    @property
    def _connection(self) -> Any:
        connection = self._opened
        if connection is None:
            raise Unavailable("HYPERVISOR_UNAVAILABLE", "libvirt: the connection was lost")
        return connection

    # --- looking --------------------------------------------------------------------------------

    @_translating
    def list(self) -> builtins.list[Domain]:
        """See Hypervisor."""
        found = [self._look(domain) for domain in self._connection.listAllDomains()]
        return [domain for domain in found if domain is not None]

    @_translating
    def find(self, domain_id: str) -> Domain | None:
        """See Hypervisor."""
        domain = self._find(domain_id)
        return None if domain is None else self._look(domain)

    @_translating
    def host_facts(self) -> HostFacts:
        """See Hypervisor."""
        arch, memory_mib, cpu_count, *_ = self._connection.getInfo()
        version = self._connection.getVersion()
        return HostFacts(
            vcpu_count=cpu_count,
            memory_mib=memory_mib,
            disk_gib=host.disk_gib(self._settings.instances_dir),
            hypervisor_type=self._platform.hypervisor_type,
            hypervisor_version=f"{version // 1000000}.{version // 1000 % 1000}.{version % 1000}",
            cpu_arch=arch,
            traits=host.traits(self._platform.hypervisor_type),
        )

    def _look(self, domain: Any) -> Domain | None:
        """Describe a domain; None if it has just gone."""
        try:
            state, reason = domain.state()
            description = domain.XMLDesc(_CURRENT)
        except libvirt.libvirtError as error:
            if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                return None
            raise
        metadata = _read_metadata(domain, _CURRENT)
        return Domain(
            name=domain.name(),
            uuid=domain.UUIDString(),
            state=_STATES[state],
            reason=_REASONS.get((state, reason), ""),
            identity=metadata[0] if metadata else None,
            disks=domain_xml.disks(description),
        )

    def _find(self, domain_id: str) -> Any:
        for domain in self._connection.listAllDomains():
            metadata = _read_metadata(domain, _CURRENT)
            if metadata and metadata[0].domain_id == domain_id:
                return domain
        return None

    def _named(self, wanted: ResolvedDomain) -> Any:
        """Return the domain with the wanted UUID or, for it would be in the way, with the name."""
        lookups = (
            (self._connection.lookupByUUIDString, wanted.spec.uuid),
            (self._connection.lookupByName, libvirt_name(wanted.spec.instance_id)),
        )
        for lookup, value in lookups:
            try:
                return lookup(value)
            except libvirt.libvirtError as error:
                if error.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:
                    raise
        return None

    def _wanted(self, wanted: ResolvedDomain) -> Any:
        return self._connection.lookupByUUIDString(wanted.spec.uuid)

    # --- definition -----------------------------------------------------------------------------

    @_translating
    def define(self, wanted: ResolvedDomain) -> int | None:
        """See Hypervisor."""
        text = domain_xml.build(wanted, self._platform)
        written = domain_xml.read_metadata(text)
        assert written is not None, "build writes what read_metadata reads"  # noqa: S101
        identity, digest = written
        domain = self._named(wanted)
        found = None if domain is None else _read_metadata(domain, _config_of(domain))
        if domain is not None and (found is None or domain.UUIDString() != wanted.spec.uuid):
            raise foreign_domain(domain.name())
        if found is not None:
            check_replacement(found[0], wanted.spec)
            # A control plane that was restored has forgotten boots: counting goes on from the last.
            identity = replace(
                identity, boot_number=max(identity.boot_number, found[0].boot_number)
            )
        if found is None or found[1] != digest:
            domain = self._connection.defineXML(text)
            found = written
        if found[0] != identity:
            _write_metadata(domain, identity, digest, _CONFIG)
        if not domain.isActive():
            return None
        live = _read_metadata(domain, _LIVE)
        return live[0].boot_number if live else 0

    @_translating
    def conclude(self, wanted: ResolvedDomain) -> Domain:
        """See Hypervisor."""
        domain = self._wanted(wanted)
        metadata = _read_metadata(domain, _CONFIG)
        if metadata and domain.isActive():
            if _read_metadata(domain, _LIVE) != metadata:
                _write_metadata(domain, *metadata, _LIVE)
            running = wanted.spec.power_state == domain_pb2.POWER_STATE_RUNNING
            if running and domain.state()[0] == libvirt.VIR_DOMAIN_PAUSED:
                domain.resume()
        found = self._look(domain)
        if found is None:
            raise NotFound("DOMAIN_NOT_FOUND", f"{wanted.spec.domain_id} has just gone")
        return found

    @_translating
    def remove(self, domain_id: str, epoch: str, generation: int) -> None:
        """See Hypervisor."""
        domain = self._find(domain_id)
        if domain is None:
            return
        # A later order may so far be in the definition only.
        for flags in (_CURRENT, _config_of(domain)):
            if metadata := _read_metadata(domain, flags):
                check_generation(metadata[0], epoch, generation)
        persistent = domain.isPersistent()
        if domain.isActive():
            with _unless(lambda: not domain.isActive()):
                domain.destroy()
        if persistent:
            domain.undefineFlags(
                libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
                | libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
            )

    # --- power ----------------------------------------------------------------------------------

    @_translating
    def start(self, wanted: ResolvedDomain) -> None:
        """See Hypervisor."""
        domain = self._wanted(wanted)
        if not domain.isActive():  # create() of a running one is an error
            with _unless(domain.isActive):
                domain.create()

    @_translating
    def press_power_button(self, wanted: ResolvedDomain) -> bool:
        """See Hypervisor."""
        domain = self._wanted(wanted)
        if not domain.isActive():
            return False
        if domain.state()[0] == libvirt.VIR_DOMAIN_RUNNING:
            with _unless(lambda: not domain.isActive()):
                domain.shutdown()
        return True

    @_translating
    def cut_power(self, wanted: ResolvedDomain) -> None:
        """See Hypervisor."""
        domain = self._wanted(wanted)
        if domain.isActive():
            with _unless(lambda: not domain.isActive()):
                domain.destroy()

    @_translating
    def is_inactive(self, wanted: ResolvedDomain) -> bool:
        """See Hypervisor."""
        return not self._wanted(wanted).isActive()

    @_translating
    def resume(self, domain_id: str) -> Domain:
        """See Hypervisor."""
        domain = self._find(domain_id)
        if domain is not None:
            if domain.state()[0] == libvirt.VIR_DOMAIN_PAUSED:
                domain.resume()
            if found := self._look(domain):
                return found
        raise NotFound("DOMAIN_NOT_FOUND", f"{domain_id} is not on this host")

    # --- devices of a running domain ------------------------------------------------------------

    @_translating
    def unplug(self, wanted: ResolvedDomain) -> None:
        """See Hypervisor."""
        domain = self._wanted(wanted)
        for text in domain_xml.surplus_devices(domain.XMLDesc(), wanted):
            domain.detachDeviceFlags(text, _LIVE)

    @_translating
    def is_unplugged(self, wanted: ResolvedDomain) -> bool:
        """See Hypervisor."""
        return not domain_xml.surplus_devices(self._wanted(wanted).XMLDesc(), wanted)

    @_translating
    def plug(self, wanted: ResolvedDomain) -> None:
        """See Hypervisor."""
        domain = self._wanted(wanted)
        for text in domain_xml.missing_devices(domain.XMLDesc(), wanted):
            domain.attachDeviceFlags(text, _LIVE)


def _read_metadata(domain: Any, flags: int) -> tuple[Identity, str] | None:
    """Read mcloud's part: of the boot that runs (_LIVE), of the next one (_CONFIG)."""
    try:
        text = domain.metadata(_ELEMENT, domain_xml.NAMESPACE, flags)
    except libvirt.libvirtError as error:
        if error.get_error_code() in (
            libvirt.VIR_ERR_NO_DOMAIN_METADATA,
            libvirt.VIR_ERR_NO_DOMAIN,
        ):
            return None
        raise
    return domain_xml.read_metadata(text)


@contextmanager
def _unless(reached: Callable[[], object]) -> Iterator[None]:
    """Let an order be refused when what it was for has come true since libvirt was asked.

    A guest ends by itself; or an earlier order, of which nobody awaits the answer any more, is only
    now done.
    """
    try:
        yield
    except libvirt.libvirtError:
        if not reached():
            raise


def _config_of(domain: Any) -> int:
    """Return where a domain's definition is; a transient one has only what runs."""
    persistent: bool = domain.isPersistent()
    return int(_CONFIG if persistent else _LIVE)


def _write_metadata(domain: Any, identity: Identity, digest: str, flags: int) -> None:
    text = domain_xml.metadata_xml(identity, digest)
    domain.setMetadata(_ELEMENT, text, domain_xml.PREFIX, domain_xml.NAMESPACE, flags)


class _EventLoop:
    """Libvirt's event loop in a thread, with a timer in it that shows that it turns."""

    def __init__(self) -> None:
        # Everything is raised as well; printed it would be a second, unstructured log.
        libvirt.registerErrorHandler(lambda _context, _error: None, None)
        libvirt.virEventRegisterDefaultImpl()
        self._beat = time.monotonic()
        libvirt.virEventAddTimeout(int(CANARY_S * 1000), self._on_timer, None)
        threading.Thread(target=self._turn, name="libvirt-events", daemon=True).start()

    def age(self) -> float:
        """Seconds since it last turned."""
        return time.monotonic() - self._beat

    def _on_timer(self, _timer: int, _opaque: Any) -> None:
        self._beat = time.monotonic()

    def _turn(self) -> None:
        pause = threading.Event()
        while True:
            try:
                libvirt.virEventRunDefaultImpl()
            except libvirt.libvirtError as error:
                log.error("libvirt event loop failed", error=str(error))
                pause.wait(CANARY_S)  # it may fail again at once


_event_loop_lock = threading.Lock()


def _event_loop() -> _EventLoop:
    """Return the one of this process, which libvirt wants before the first connection."""
    with _event_loop_lock:
        return _make_event_loop()


@functools.cache
def _make_event_loop() -> _EventLoop:
    return _EventLoop()
