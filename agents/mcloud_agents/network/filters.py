"""The packet filter of a host: anti-spoofing and security groups, as one nftables transaction.

Bridged packets pass two families of hooks. `bridge` sees the guests' devices but has no
connection tracking; `inet`, which br_netfilter feeds, has it but sees only the bridge. So the
bridge family writes into the packet's mark which device it came from (low 16 bits) and which it
goes to (high 16 bits), and the inet family judges by these numbers:

    bridge prerouting -300   number of the source device; anti-spoofing at the tap
    bridge forward    -300   number of the destination device; what never mixes
    inet   prerouting -300   the network's conntrack zone: tenants' addresses overlap
    inet   forward       0   flows that go on; the sender's rules out, the receiver's rules in
    bridge postrouting 300   no mark leaves the host inside a tunnel

Which device and which number is whose stands in named maps, so that another port is an addition,
which the kernel makes at once; what goes or changes it makes only after all its processors have
let go of the old (ruleset.py).

Devices are named, not looked up: rules stand before a guest's tap exists. A device that is on one
of mcloud's bridges but in no document has the number 0, and nothing from or to it passes.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence

from mcloud.network.v1 import dataplane_pb2 as pb
from mcloud_agents.network import expressions as x
from mcloud_agents.network import names, nft, rules
from mcloud_agents.network.state import Numbers

# Source numbers that are no filtered port's. Mirrored into the high half for destinations.
WIRE = 1  # to other hosts and routers: filtered elsewhere, or not to be
SERVICE = 2  # DHCP and metadata
OPEN_PORT = 3  # a guest's, with port security off

# In a flow's mark: admitted once, no longer. The flow stays in the table until it is silent,
# because a flow that the kernel has forgotten could be taken up again from its other end.
REVOKED = 0x40000000

_SOURCE = x.masked(x.meta("mark"), 0xFFFF)
_DESTINATION = x.masked(x.meta("mark"), 0xFFFF0000)
_ETHERTYPES = ("arp", "ip", "ip6")


def build(
    document: pb.HostDataplane, numbers: Numbers, physical: Mapping[str, str]
) -> list[x.Table]:
    """Return the host's tables as the document asks for them.

    Args:
        document: valid.
        numbers: of all its ports and networks.
        physical: bridge by the name of the outside network.
    """
    devices = _Devices(document, numbers, physical)
    return [_bridge_table(document, devices), _inet_table(document, numbers, devices)]


def is_of_port(chain: str) -> bool:
    """Tell whether a chain is one port's (or one kind of device's) and no other's."""
    return chain.startswith(("from-", "to-", "out-", "in-"))


def remove() -> list[nft.Command]:
    """Return the commands that remove the host's tables."""
    return [*nft.remove_table("bridge", names.TABLE), *nft.remove_table("inet", names.TABLE)]


class _Devices:
    """Every device that the document knows, by what it may do."""

    def __init__(
        self, document: pb.HostDataplane, numbers: Numbers, physical: Mapping[str, str]
    ) -> None:
        self.numbers: dict[str, int] = {}  # by name
        self.overlay: list[str] = []  # on mcloud's own bridges
        self.vxlans: list[str] = []
        self.filtered: dict[str, pb.PortBinding] = {}  # ports with security, by device
        self.physical_bridges: list[str] = []
        self.members: dict[str, list[str]] = {}  # devices by network, but for its service's
        networks = {network.network_id: network for network in document.networks}
        for network in document.networks:
            self.members[network.network_id] = []
            self._add(names.service_link(network.vni), SERVICE, network)
            if not network.physical_network:
                self.vxlans.append(names.vxlan(network.vni))
                self._add(self.vxlans[-1], WIRE, network)
                self.members[network.network_id].append(self.vxlans[-1])
            elif network.physical_network in physical:
                self.physical_bridges.append(physical[network.physical_network])
        for router in document.routers:
            for leg in router.interfaces:
                if leg.network_id in networks:
                    self._add(names.leg_link(leg.port_id), WIRE, networks[leg.network_id])
        for port in document.ports:
            if port.port_security_enabled:
                self._add(port.device_name, numbers.ports[port.port_id], networks[port.network_id])
                self.filtered[port.device_name] = port
            else:
                self._add(port.device_name, OPEN_PORT, networks[port.network_id])
                self.members[port.network_id].append(port.device_name)

    def _add(self, name: str, number: int, network: pb.NetworkSegment) -> None:
        self.numbers[name] = number
        if not network.physical_network:
            self.overlay.append(name)


def _bridge_table(document: pb.HostDataplane, devices: _Devices) -> x.Table:
    table = x.Table("bridge", names.TABLE)
    table.base_chain("prerouting", "filter", "prerouting", -300)
    table.base_chain("forward", "filter", "forward", -300)
    table.base_chain("postrouting", "filter", "postrouting", 300)
    table.map("numbers", ("ifname", "mark"), devices.numbers)
    table.map(
        "destinations",
        ("ifname", "verdict"),
        {name: x.jump(f"to-{_label(devices, name)}") for name in devices.numbers},
    )
    table.map(
        "guests", ("ifname", "verdict"), {name: x.goto(f"from-{name}") for name in devices.filtered}
    )
    table.set("overlay", "ifname", devices.overlay)
    source = x.value_map(x.meta("iifname"), x.named("numbers"))
    table.rule("prerouting", x.set_value(x.meta("mark"), source))
    table.rule("forward", x.verdict_map(x.meta("oifname"), x.named("destinations")))
    for network in document.networks:
        others = devices.members[network.network_id]
        if network.service_mac and others:
            # The service's address lives on every host: a frame that carries it from elsewhere
            # would move it in the bridge's table.
            table.rule(
                "prerouting",
                x.match(x.meta("iifname"), x.anonymous_set(others)),
                x.match(x.payload("ether", "saddr"), network.service_mac),
                *x.DROP,
            )
            table.rule(
                "forward",
                x.match(x.meta("oifname"), x.anonymous_set(others)),
                x.match(x.payload("ether", "daddr"), network.service_mac),
                *x.DROP,
            )
    table.rule("prerouting", x.verdict_map(x.meta("iifname"), x.named("guests")))
    for name, port in devices.filtered.items():
        _add_spoofing_chain(table, name, port)
    for label, number in sorted(
        {_label(devices, n): d for n, d in devices.numbers.items()}.items()
    ):
        table.chain(f"to-{label}")
        mark = {"|": [x.masked(x.meta("mark"), 0xFFFF), number << 16]}
        table.rule(f"to-{label}", x.set_value(x.meta("mark"), mark))
        if number > OPEN_PORT:
            # br_netfilter lets tagged and PPPoE frames by, so the rules would not see them.
            allowed = x.anonymous_set(_ETHERTYPES)
            table.rule(f"to-{label}", x.match(x.payload("ether", "type"), allowed, "!="), *x.DROP)
    # A service answers this host's guests only: not other hosts, not the outside, no stranger.
    strangers = [SERVICE, SERVICE << 16, SERVICE << 16 | WIRE, WIRE << 16 | SERVICE]
    table.rule("forward", x.match(x.meta("mark"), x.anonymous_set(strangers)), *x.DROP)
    overlay = x.named("overlay")
    table.rule("forward", x.match(x.meta("oifname"), overlay), x.match(_SOURCE, 0), *x.DROP)
    table.rule("forward", x.match(x.meta("iifname"), overlay), x.match(_DESTINATION, 0), *x.DROP)
    if devices.vxlans:
        vxlans = x.match(x.meta("oifname"), x.anonymous_set(devices.vxlans))
        table.rule("postrouting", vxlans, x.set_value(x.meta("mark"), 0))
    return table


def _label(devices: _Devices, name: str) -> str:
    number = devices.numbers[name]
    return {WIRE: "wire", SERVICE: "service", OPEN_PORT: "open-port"}.get(number, name)


def _add_spoofing_chain(table: x.Table, name: str, port: pb.PortBinding) -> None:
    """Let a guest send as itself only."""
    chain = f"from-{name}"
    table.chain(chain)
    addresses = [ipaddress.ip_address(fixed.ip_address) for fixed in port.fixed_ips]
    v4 = [str(address) for address in addresses if address.version == 4]
    v6 = [str(address) for address in addresses if address.version == 6]
    arp, ip, ip6 = (x.match(x.payload("ether", "type"), kind) for kind in _ETHERTYPES)
    table.rule(chain, x.match(x.payload("ether", "saddr"), port.mac, "!="), *x.DROP)
    table.rule(chain, arp, x.match(x.payload("arp", "saddr ether"), port.mac, "!="), *x.DROP)
    own = x.anonymous_set([*v4, "0.0.0.0"])  # noqa: S104 - the sender of an ARP probe
    table.rule(chain, arp, x.match(x.payload("arp", "saddr ip"), own, "!="), *x.DROP)
    table.rule(chain, arp, x.ACCEPT)
    table.rule(
        chain,
        ip,
        x.match(x.payload("ip", "saddr"), "0.0.0.0"),  # noqa: S104 - a client without address
        x.match(x.payload("udp", "sport"), 68),
        x.match(x.payload("udp", "dport"), 67),
        x.ACCEPT,
    )
    table.rule(chain, ip, x.match(x.payload("udp", "sport"), 67), *x.DROP)  # no DHCP server
    if v4:
        table.rule(chain, ip, x.match(x.payload("ip", "saddr"), x.anonymous_set(v4)), x.ACCEPT)
    if v6:
        # Routers' advertisements and redirects, DHCPv6 servers: a guest is none of these.
        table.rule(chain, ip6, x.match(x.payload("icmpv6", "type"), {"set": [134, 137]}), *x.DROP)
        table.rule(chain, ip6, x.match(x.payload("udp", "sport"), 547), *x.DROP)
        # Duplicate address detection and its multicast report have no source yet.
        table.rule(
            chain,
            ip6,
            x.match(x.payload("ip6", "saddr"), "::"),
            x.match(x.payload("icmpv6", "type"), {"set": [135, 143]}),
            x.ACCEPT,
        )
        own6 = x.anonymous_set([*v6, link_local(port.mac)])
        table.rule(chain, ip6, x.match(x.payload("ip6", "saddr"), own6), x.ACCEPT)
    table.rule(chain, *x.DROP)


def link_local(mac: str) -> str:
    """Return the IPv6 address that a device makes from its Ethernet address (RFC 4291, EUI-64)."""
    octets = bytes.fromhex(mac.replace(":", ""))
    identifier = bytes([octets[0] ^ 2]) + octets[1:3] + b"\xff\xfe" + octets[3:]
    return str(ipaddress.IPv6Address(b"\xfe\x80" + bytes(6) + identifier))


def _inet_table(document: pb.HostDataplane, numbers: Numbers, devices: _Devices) -> x.Table:
    table = x.Table("inet", names.TABLE)
    table.base_chain("prerouting", "filter", "prerouting", -300)
    table.base_chain("input", "filter", "input", 0)
    table.base_chain("forward", "filter", "forward", 0)
    table.base_chain("output", "filter", "output", 0)
    for chain in ("overlay", "judge", "to-service", "from-service"):
        table.chain(chain)
    for network in document.networks:
        if not network.physical_network:
            table.rule(
                "prerouting",
                x.match(x.meta("iifname"), names.bridge(network.vni)),
                x.set_value(x.conntrack("zone"), numbers.zones[network.network_id]),
            )
    # The host is nobody's neighbour on a tenant's network, and no router of one.
    overlay = names.bridge(0)[:-1] + "*"
    table.rule("input", x.match(x.meta("iifname"), overlay), *x.DROP)
    table.rule("output", x.match(x.meta("oifname"), overlay), *x.DROP)
    table.rule("forward", x.match(x.meta("iifname"), overlay), x.goto("overlay"))
    table.rule("forward", x.match(x.meta("oifname"), overlay), *x.DROP)
    if devices.physical_bridges:
        physical = x.anonymous_set(set(devices.physical_bridges))
        table.rule("forward", x.match(x.meta("iifname"), physical), x.goto("judge"))
    table.rule("overlay", x.match(_SOURCE, 0), *x.DROP)
    table.rule("overlay", x.match(_DESTINATION, 0), *x.DROP)
    table.rule("overlay", x.goto("judge"))
    _add_judgement(table, numbers, devices)
    _add_service_chains(table)
    for name, port in devices.filtered.items():
        _add_group_chains(table, name, port.rules)
    return table


def _add_judgement(table: x.Table, numbers: Numbers, devices: _Devices) -> None:
    unfiltered = [
        source | destination << 16
        for source in (0, WIRE, OPEN_PORT)
        for destination in (0, WIRE, OPEN_PORT)
    ]
    table.rule("judge", x.match(x.meta("mark"), x.anonymous_set(unfiltered)), x.ACCEPT)
    table.rule("judge", x.match(_DESTINATION, SERVICE << 16), x.goto("to-service"))
    table.rule("judge", x.match(_SOURCE, SERVICE), x.goto("from-service"))
    revoked = x.masked(x.conntrack("mark"), REVOKED)
    table.rule("judge", x.match(revoked, REVOKED), *x.DROP)
    table.rule("judge", _state("established", "related"), x.ACCEPT)
    table.rule("judge", _state("invalid"), *x.DROP)
    number = {name: numbers.ports[port.port_id] for name, port in devices.filtered.items()}
    leave = {number[name]: x.jump(f"out-{name}") for name in devices.filtered}
    enter = {number[name] << 16: x.goto(f"in-{name}") for name in devices.filtered}
    table.map("senders", ("mark", "verdict"), leave)
    table.map("receivers", ("mark", "verdict"), enter)
    table.rule("judge", x.verdict_map(_SOURCE, x.named("senders")))
    table.rule("judge", x.verdict_map(_DESTINATION, x.named("receivers")))
    table.rule("judge", x.ACCEPT)


def _state(state: str, *others: str) -> x.Statement:
    return x.match(x.conntrack("state"), [state, *others] if others else state, "in")


def _add_service_chains(table: x.Table) -> None:
    """Let guests ask this of the host's services, whatever their groups say."""
    table.rule("to-service", x.match(x.payload("udp", "dport"), {"set": [53, 67]}), x.ACCEPT)
    table.rule("to-service", x.match(x.payload("tcp", "dport"), 53), x.ACCEPT)
    table.rule(
        "to-service",
        x.match(x.payload("ip", "daddr"), names.METADATA_IP),
        x.match(x.payload("tcp", "dport"), 80),
        x.ACCEPT,
    )
    table.rule("to-service", x.match(x.payload("icmp", "type"), "echo-request"), x.ACCEPT)
    table.rule("to-service", *x.DROP)
    table.rule("from-service", _state("established", "related"), x.ACCEPT)
    table.rule(
        "from-service",
        x.match(x.payload("udp", "sport"), 67),
        x.match(x.payload("udp", "dport"), 68),
        x.ACCEPT,
    )
    table.rule("from-service", *x.DROP)


def _add_group_chains(table: x.Table, name: str, group: Sequence[pb.EffectiveRule]) -> None:
    """Add a port's rules: what they admit returns from `out-` and is accepted by `in-`."""
    table.chain(f"out-{name}")
    table.chain(f"in-{name}")
    table.rule(  # a client looking for a server of the tenant's own
        f"out-{name}",
        x.match(x.payload("udp", "sport"), 68),
        x.match(x.payload("udp", "dport"), 67),
        x.RETURN,
    )
    # Finding neighbours and routers is to IPv6 what ARP is to IPv4, which no rule judges.
    neighbours = [133, 135, 136, 131, 132, 143]
    table.rule(
        f"out-{name}", x.match(x.payload("icmpv6", "type"), x.anonymous_set(neighbours)), x.RETURN
    )
    table.rule(
        f"in-{name}",
        x.match(x.payload("icmpv6", "type"), x.anonymous_set([130, 134, 135, 136])),
        x.ACCEPT,
    )
    seen = set()
    for rule in group:
        key = rule.SerializeToString(deterministic=True)
        egress = rule.direction == rules.EGRESS
        filter_ = rules.statements(rule, x.RETURN if egress else x.ACCEPT)
        if filter_ is not None and key not in seen:
            seen.add(key)
            table.rule(f"{'out' if egress else 'in'}-{name}", *filter_)
    table.rule(f"out-{name}", *x.DROP)
    table.rule(f"in-{name}", *x.DROP)
