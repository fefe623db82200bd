"""One pass over the host: compare what the kernel has with the document, change what differs.

Everything here blocks, and moves its thread between namespaces; see dataplane.py.
"""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import structlog
from pyroute2.netlink.exceptions import NetlinkError

from mcloud.network.v1 import dataplane_pb2 as pb
from mcloud_agents.network import (
    bridges,
    conntrack,
    dhcp,
    filters,
    links,
    names,
    routers,
    services,
)
from mcloud_agents.network.links import Link, Links
from mcloud_agents.network.ruleset import Ruleset
from mcloud_agents.network.services import Service
from mcloud_agents.network.settings import Settings
from mcloud_agents.network.state import Numbers, State
from mcloud_base.errors import Error, Unavailable

_log = structlog.get_logger(__name__)


@dataclass
class Outcome:
    """What a pass has reached."""

    services: list[Service] = field(default_factory=list)
    dhcp_servers: list[int] = field(default_factory=list)  # process ids
    ports: list[str] = field(default_factory=list)  # ids of those in place
    errors: list[Error] = field(default_factory=list)
    filtered: bool = False  # there is something for a packet filter to do
    left: Numbers = field(default_factory=Numbers)  # of the pass before
    numbers: Numbers = field(default_factory=Numbers)


@dataclass(frozen=True)
class _Done:
    """What a network had when it was last brought to its document."""

    segment: bytes
    ports: Mapping[str, bytes]  # by id
    service: Service | None
    dhcp_server: int | None


class Kernel:
    """The host's kernel and the servers beside it."""

    def __init__(self, settings: Settings, state: State) -> None:
        self._settings = settings
        self._state = state
        self._ruleset = Ruleset(state)
        self._document: pb.HostDataplane | None = None  # of the last pass that was finished
        self._networks: dict[str, _Done] = {}
        self._routers: dict[str, bytes] = {}

    def apply(self, document: pb.HostDataplane) -> Outcome:
        """Put everything in place that a document names; what fails is told in the outcome.

        Only what differs from the document of the last pass is looked at, unless nothing does:
        then everything is. `finish` does what no guest waits for.

        Raises:
            Error: the filter could not be brought to the document; nothing else was tried.
        """
        if document == self._document:
            self._networks.clear()
            self._routers.clear()
        outcome = Outcome()
        try:
            bridges.ensure_sysctls()
            self._state.save_document(document)
            outcome.left = self._state.load_numbers()
            outcome.numbers = outcome.left.give_out(
                [port.port_id for port in document.ports],
                [n.network_id for n in document.networks if not n.physical_network],
            )
            self._state.save_numbers(outcome.numbers)
            with links.opened() as host:
                outcome.filtered = bool(document.networks or bridges.list_ours(host))
                if outcome.filtered:
                    physical = self._settings.physical_networks
                    tables = filters.build(document, outcome.numbers, physical)
                    self._ruleset.begin(tables)
                self._ensure_all(host, document, outcome)
        except (NetlinkError, OSError, subprocess.SubprocessError) as error:
            raise _refused("the host's dataplane", error) from error
        return outcome

    def finish(self, document: pb.HostDataplane, outcome: Outcome) -> None:
        """Remove what the document does not name, and end the flows that it does not admit.

        Args:
            document: of the pass.
            outcome: what `apply` returned.

        Raises:
            Error: something could not be removed.
        """
        try:
            if outcome.filtered:
                self._ruleset.finish()
            with links.opened() as host:
                self._remove_unnamed(host, document)
            self._end_flows(document, outcome.left, outcome.numbers)
        except (NetlinkError, OSError, subprocess.SubprocessError) as error:
            raise _refused("the host's dataplane", error) from error
        self._document = pb.HostDataplane.FromString(document.SerializeToString())

    def metadata_socket(self, service: Service) -> socket.socket:
        """Open the listener of a network's metadata."""
        try:
            return services.metadata_socket(service)
        except OSError as error:
            raise _refused(f"metadata of network {service.network_id}", error) from error

    # --- flows ----------------------------------------------------------------------------------

    def _end_flows(self, document: pb.HostDataplane, old: Numbers, new: Numbers) -> None:
        """Forget the flows of ports and networks that left; end those that no rule admits now."""
        left = {zone for id_, zone in old.zones.items() if id_ not in new.zones}
        before = self._document
        if not left and before is not None and _rules(before) == _rules(document):
            return
        departed = _departed(before, document, old) if before is not None else set()
        kept: list[conntrack.Entry] = []
        gone: list[conntrack.Entry] = []
        for entry in conntrack.list_entries():
            ends = {(entry.zone, entry.flow.source), (entry.zone, entry.flow.destination)}
            (gone if entry.zone in left or ends & departed else kept).append(entry)
        conntrack.forget(gone)
        exempt = {s.service_ip for n in document.networks for s in n.subnets}
        ended = conntrack.judge(kept, document.ports, new.zones, {*exempt, names.METADATA_IP})
        if ended:
            _log.info("flows judged anew", changed=ended)

    # --- networks and routers -------------------------------------------------------------------

    def _ensure_all(self, host: Links, document: pb.HostDataplane, outcome: Outcome) -> None:
        bridge_of: dict[str, Link] = {}
        for segment in document.networks:
            ports = [port for port in document.ports if port.network_id == segment.network_id]

            def ensure_network(
                segment: pb.NetworkSegment = segment, ports: list[pb.PortBinding] = ports
            ) -> None:
                bridge_of[segment.network_id] = self._ensure_network(host, segment, ports, outcome)
                outcome.ports += [port.port_id for port in ports]

            self._attempt(f"network {segment.network_id}", ensure_network, outcome)
        for router in document.routers:

            def ensure_router(router: pb.RouterBinding = router) -> None:
                content = router.SerializeToString(deterministic=True)
                if self._routers.get(router.router_id) == content:
                    return
                self._routers.pop(router.router_id, None)
                routers.ensure(host, router, bridge_of, self._settings, self._state)
                self._routers[router.router_id] = content
                _log.info("router in place", router=router.router_id)

            if all(leg.network_id in bridge_of for leg in router.interfaces):
                self._attempt(f"router {router.router_id}", ensure_router, outcome)

    def _ensure_network(
        self,
        host: Links,
        segment: pb.NetworkSegment,
        ports: list[pb.PortBinding],
        outcome: Outcome,
    ) -> Link:
        content = segment.SerializeToString(deterministic=True)
        contents = {port.port_id: port.SerializeToString(deterministic=True) for port in ports}
        done = self._networks.pop(segment.network_id, None)
        bridge = host.find(bridges.bridge_name(segment, self._settings)) if done else None
        if done is None or bridge is None or done.segment != content:
            bridge, done = bridges.ensure(host, segment, self._settings), None
        if done is None or done.ports != contents:
            for port in ports:
                if done is None or done.ports.get(port.port_id) != contents[port.port_id]:
                    bridges.ensure_membership(host, bridge, port.device_name, segment.mtu)
            service, server = done.service if done else None, None
            if services.served_subnets(segment):
                service = service or services.ensure(host, segment, bridge)
                server = dhcp.ensure(segment, ports, service, self._settings)
            done = _Done(content, contents, service, server)
            _log.info("network in place", network=segment.network_id, ports=len(ports))
        self._networks[segment.network_id] = done
        if done.service is not None:
            outcome.services.append(done.service)
        if done.dhcp_server is not None:
            outcome.dhcp_servers.append(done.dhcp_server)
        return bridge

    def _attempt(self, what: str, ensure: Callable[[], None], outcome: Outcome) -> None:
        try:
            ensure()
        except Error as error:
            outcome.errors.append(error)
        except (NetlinkError, OSError, subprocess.SubprocessError) as error:
            outcome.errors.append(_refused(what, error))

    def _remove_unnamed(self, host: Links, document: pb.HostDataplane) -> None:
        vnis = {network.vni for network in document.networks}
        served = {n.vni for n in document.networks if services.served_subnets(n)}
        for gone in set(self._networks) - {network.network_id for network in document.networks}:
            del self._networks[gone]
        router_ids = {router.router_id for router in document.routers}
        for gone in set(self._routers) - router_ids:
            del self._routers[gone]
        routers.remove_unnamed(host, router_ids, self._state)
        dhcp.remove_unnamed(self._settings, served)
        services.remove_unnamed(host, served)
        bridges.remove_unnamed(host, vnis)
        if document.networks:
            return
        if bridges.list_ours(host):
            _log.warning("bridges kept for guests nobody names", bridges=bridges.list_ours(host))
        else:
            self._ruleset.remove()


def _refused(what: str, error: Exception) -> Unavailable:
    return Unavailable("NETWORK_REFUSED", f"{what}: the kernel refused: {error}")


def _rules(document: pb.HostDataplane) -> list[tuple[object, ...]]:
    """Return what decides on flows."""
    return [
        (
            port.port_id,
            port.port_security_enabled,
            [fixed.ip_address for fixed in port.fixed_ips],
            [rule.SerializeToString(deterministic=True) for rule in port.rules],
        )
        for port in document.ports
    ]


def _departed(
    before: pb.HostDataplane, document: pb.HostDataplane, numbers: Numbers
) -> set[tuple[int, str]]:
    """Return (zone, address) of the ports that left; the address may be another's by now.

    Args:
        before: the document that named them.
        document: the one of now.
        numbers: of the former.
    """
    present = {port.port_id for port in document.ports}
    return {
        (numbers.zones.get(port.network_id, 0), fixed.ip_address)
        for port in before.ports
        if port.port_id not in present
        for fixed in port.fixed_ips
    }
