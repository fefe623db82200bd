"""The whole network state of one host, brought to the document that the control plane sends.

Implements mcloud.network.v1.HostDataplane. Level-triggered: each pass compares the kernel with
the document and changes what differs, filters first. What is there and is not in the document
goes, if it is mcloud's own (names.py); guests' devices are libvirt's, which puts them into the
bridge by the names that stand in the filter already.
"""

from __future__ import annotations

import asyncio
import functools
import os
from collections.abc import Awaitable, Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import structlog

from mcloud.common.v1 import session_pb2
from mcloud.network.v1 import dataplane_pb2 as pb
from mcloud_agents.network import bridges, listing, validation
from mcloud_agents.network.kernel import Kernel
from mcloud_agents.network.metadata import Documents, MetadataServer
from mcloud_agents.network.services import Service
from mcloud_agents.network.settings import Settings
from mcloud_agents.network.state import State
from mcloud_base.errors import DeadlineExceeded, Error, NotFound

_log = structlog.get_logger(__name__)
_Result = TypeVar("_Result")

InPlace = Callable[[Collection[str]], Awaitable[None]]

_RESTART_PAUSE_S = 1.0  # between two passes for services that end again and again


@dataclass(frozen=True)
class Tap:
    """What a hypervisor needs to plug a guest in.

    libvirt makes the device: <interface type='bridge'> with this bridge, target device and MTU.
    """

    port_id: str
    bridge: str
    device: str
    mac: str
    mtu: int


async def _nobody_waits(port_ids: Collection[str]) -> None:
    """Tell nobody."""


class Dataplane:
    """A host's network. One task at a time changes it; anyone may ask.

    Args:
        settings: of this host.
        documents: the metadata of the guest with a port id.
    """

    def __init__(self, settings: Settings, documents: Documents) -> None:
        self._settings = settings
        self._state = State(settings.state_dir)
        self._kernel = Kernel(settings, self._state)
        self._metadata = MetadataServer(documents)
        # One thread: it moves between namespaces, and the kernel is changed in order.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="dataplane")
        self._lock = asyncio.Lock()
        self._changed = asyncio.Condition()
        self._desired: pb.HostDataplane | None = None  # none known is not the same as empty
        self._ready: frozenset[str] = frozenset()  # ports that a guest may be plugged into
        self._watched: dict[int, int] = {}  # pidfd by pid of DHCP servers
        self._ended = asyncio.Event()
        self._watcher: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Take over what is on the host, as the last document has it, and keep it so.

        An error in it is logged: the control plane's next document may well be the cure.
        """
        document = await self._call(self._state.load_document)
        if document is not None:
            try:
                await self.apply(document)
            except Error as error:
                _log.warning("last dataplane not restored", reason=error.reason, error=str(error))
        self._watcher = asyncio.create_task(self._watch(), name="dataplane watch")

    async def close(self) -> None:
        """Stop watching and answering; all the rest stays as it is."""
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)
        await self._metadata.close()
        self._watch_processes(())
        self._thread.shutdown(wait=True)

    # --- what the compute part asks -------------------------------------------------------------

    def binding(self, port_id: str) -> pb.PortBinding | None:
        """Return a port of the document, or None."""
        ports = self._desired.ports if self._desired else ()
        return next((port for port in ports if port.port_id == port_id), None)

    def segment(self, network_id: str) -> pb.NetworkSegment | None:
        """Return a network of the document, or None."""
        networks = self._desired.networks if self._desired else ()
        return next((n for n in networks if n.network_id == network_id), None)

    async def ensure_tap(self, port_id: str, timeout_s: float = 30.0) -> Tap:
        """Wait until a guest may be plugged into a port: its filter and bridge are in place.

        Raises:
            NotFound: PORT_NOT_ON_HOST, no document has named the port in time.
        """
        try:
            async with asyncio.timeout(timeout_s), self._changed:
                await self._changed.wait_for(
                    lambda: port_id in self._ready and self.binding(port_id) is not None
                )
                port = self.binding(port_id)
                segment = self.segment(port.network_id) if port else None
                assert port is not None
                assert segment is not None  # the document is valid
        except TimeoutError as error:
            raise NotFound(
                "PORT_NOT_ON_HOST",
                f"port {port_id} was not set up on this host within {timeout_s:.0f} s",
                port=port_id,
            ) from error
        bridge = bridges.bridge_name(segment, self._settings)
        return Tap(port_id, bridge, port.device_name, port.mac, segment.mtu)

    async def artifacts(self) -> list[session_pb2.Artifact]:
        """Return everything of mcloud's network that is on the host, named by a document or not."""
        async with self._lock:
            document = self._desired or pb.HostDataplane()
            return await self._call(listing.artifacts, document, self._settings)

    # --- what the control plane wants -----------------------------------------------------------

    async def apply(
        self, desired: pb.HostDataplane, in_place: InPlace = _nobody_waits
    ) -> pb.HostDataplaneStatus:
        """Bring the host to a document. A repeat checks, and repairs, everything.

        Args:
            desired: the document.
            in_place: told the ids of the ports that guests may be plugged into, as soon as they
                may; what is to go may still be there.

        Returns:
            What is in place.

        Raises:
            InvalidArgument: DATAPLANE_INVALID; nothing was changed.
            Error: of the first thing that could not be made; the others were.
        """
        validation.check(desired)
        async with self._lock:
            return await self._apply(desired, in_place)

    async def _apply(self, desired: pb.HostDataplane, in_place: InPlace) -> pb.HostDataplaneStatus:
        self._desired = pb.HostDataplane.FromString(desired.SerializeToString())
        outcome = await self._call(self._kernel.apply, self._desired)
        await self._serve_metadata(outcome.services)
        self._watch_processes(outcome.dhcp_servers)
        async with self._changed:
            self._ready = frozenset(outcome.ports)
            self._changed.notify_all()
        await in_place(outcome.ports)
        await self._call(self._kernel.finish, self._desired, outcome)
        if outcome.errors:
            raise outcome.errors[0]
        return pb.HostDataplaneStatus(
            network_count=len(desired.networks),
            port_count=len(desired.ports),
            router_count=len(desired.routers),
        )

    async def _serve_metadata(self, services: Iterable[Service]) -> None:
        wanted = {service.network_id: service for service in services}
        for network_id in self._metadata.networks() - set(wanted):
            await self._metadata.stop(network_id)
        for network_id, service in wanted.items():
            if self._metadata.serves(network_id, service.identity):
                continue
            await self._metadata.stop(network_id)
            listener = await self._call(self._kernel.metadata_socket, service)
            find = functools.partial(self._find_port, network_id)
            await self._metadata.serve(network_id, service.identity, listener, find)

    def _find_port(self, network_id: str, address: str) -> str | None:
        for port in self._desired.ports if self._desired else ():
            if (
                port.network_id == network_id
                and port.port_security_enabled
                and any(fixed.ip_address == address for fixed in port.fixed_ips)
            ):
                return port.port_id
        return None

    # --- keeping it so --------------------------------------------------------------------------

    def _watch_processes(self, pids: Iterable[int]) -> None:
        """Have the loop told when a DHCP server ends, whoever its parent is."""
        loop = asyncio.get_running_loop()
        wanted = set(pids)
        for pid in set(self._watched) - wanted:
            loop.remove_reader(self._watched[pid])
            os.close(self._watched.pop(pid))
        for pid in wanted - set(self._watched):
            try:
                descriptor = os.pidfd_open(pid)
            except ProcessLookupError:
                self._ended.set()
                continue
            self._watched[pid] = descriptor
            loop.add_reader(descriptor, self._notice_end, pid)

    def _notice_end(self, pid: int) -> None:
        asyncio.get_running_loop().remove_reader(self._watched[pid])
        os.close(self._watched.pop(pid))
        _log.warning("dhcp server ended", pid=pid)
        self._ended.set()

    async def _watch(self) -> None:
        """Repair what changed without being asked: at once for a server, else now and then."""
        while True:
            try:
                async with asyncio.timeout(self._settings.reconcile_interval_s):
                    await self._ended.wait()
            except TimeoutError:
                pass
            self._ended.clear()
            try:
                async with self._lock:
                    if self._desired is not None:
                        await self._apply(self._desired, _nobody_waits)
            except Error as error:
                _log.warning("dataplane not as desired", reason=error.reason, error=str(error))
            await asyncio.sleep(_RESTART_PAUSE_S)

    async def _call(self, function: Callable[..., _Result], *arguments: object) -> _Result:
        """Run something that blocks in the dataplane's thread.

        Raises:
            DeadlineExceeded: DATAPLANE_TIMEOUT; the thread is still at it, and is not given more.
        """
        loop = asyncio.get_running_loop()
        timeout_s = self._settings.apply_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                return await loop.run_in_executor(self._thread, function, *arguments)
        except TimeoutError as error:
            raise DeadlineExceeded(
                "DATAPLANE_TIMEOUT", f"the kernel took longer than {timeout_s:.0f} s"
            ) from error
