"""Security group rules: as packet filter, and as judgement of a flow that is already there."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass

from mcloud.network.v1 import dataplane_pb2 as pb
from mcloud_agents.network import expressions as x

INGRESS = pb.EffectiveRule.DIRECTION_INGRESS
EGRESS = pb.EffectiveRule.DIRECTION_EGRESS

ICMP, TCP, UDP, ICMPV6 = 1, 6, 17, 58
_NUMBERS = {
    "icmp": ICMP,
    "tcp": TCP,
    "udp": UDP,
    "dccp": 33,
    "gre": 47,
    "esp": 50,
    "ah": 51,
    "ipv6-icmp": ICMPV6,
    "icmpv6": ICMPV6,
    "ospf": 89,
    "vrrp": 112,
    "sctp": 132,
    "udplite": 136,
}
_WITH_PORTS = {TCP, UDP, 33, 132, 136}


@dataclass(frozen=True)
class Flow:
    """The first packet of a flow, as the filter saw it."""

    ip_version: int
    protocol: int
    source: str
    destination: str
    port: int = 0  # of the destination; ICMP: type
    code: int = 0  # ICMP only


def protocol_number(rule: pb.EffectiveRule) -> int | None:
    """Return the rule's protocol as in the IP header; None for any.

    Raises:
        ValueError: it has none of the known names and is no number.
    """
    name = rule.protocol.lower()
    if not name or name == "any":
        return None
    if name == "icmp" and rule.ip_version == 6:
        return ICMPV6
    number = _NUMBERS[name] if name in _NUMBERS else int(name)
    if not 0 <= number <= 255:
        raise ValueError(f"protocol {name} is not between 0 and 255")
    return number


def statements(rule: pb.EffectiveRule, verdict: x.Statement) -> list[x.Statement] | None:
    """Return a rule's filter; None if it lets nobody through."""
    if rule.remote_is_group and not rule.remote_cidrs:
        return None
    found: list[x.Statement] = [
        x.match(x.meta("nfproto"), "ipv6" if rule.ip_version == 6 else "ipv4")
    ]
    if rule.remote_cidrs and (remote := x.networks(rule.remote_cidrs)) is not None:
        field = "saddr" if rule.direction == INGRESS else "daddr"
        found.append(x.match(x.payload("ip6" if rule.ip_version == 6 else "ip", field), remote))
    protocol = protocol_number(rule)
    if protocol is not None:
        found.append(x.match(x.meta("l4proto"), protocol))
        found += _details(rule, protocol)
    return [*found, verdict]


def _details(rule: pb.EffectiveRule, protocol: int) -> list[x.Statement]:
    if protocol in (ICMP, ICMPV6):
        name = "icmp" if protocol == ICMP else "icmpv6"
        details = []
        if rule.HasField("port_min"):
            details.append(x.match(x.payload(name, "type"), rule.port_min))
        if rule.HasField("port_max"):
            details.append(x.match(x.payload(name, "code"), rule.port_max))
        return details
    if protocol not in _WITH_PORTS:
        return []
    low, high = _port_range(rule)
    if (low, high) == (0, 65535):
        return []
    return [x.match(x.payload("th", "dport"), low if low == high else {"range": [low, high]})]


def _port_range(rule: pb.EffectiveRule) -> tuple[int, int]:
    low = rule.port_min if rule.HasField("port_min") else 0
    return low, rule.port_max if rule.HasField("port_max") else 65535


def admits(
    rules: Iterable[pb.EffectiveRule], direction: pb.EffectiveRule.Direction.ValueType, flow: Flow
) -> bool:
    """Tell whether the rules would let a flow begin now; decides as `statements` does."""
    return any(rule.direction == direction and _admits(rule, flow) for rule in rules)


def _admits(rule: pb.EffectiveRule, flow: Flow) -> bool:
    if rule.ip_version != flow.ip_version or (rule.remote_is_group and not rule.remote_cidrs):
        return False
    remote = ipaddress.ip_address(flow.source if rule.direction == INGRESS else flow.destination)
    if rule.remote_cidrs and not any(
        remote in ipaddress.ip_network(cidr, strict=False) for cidr in rule.remote_cidrs
    ):
        return False
    protocol = protocol_number(rule)
    if protocol is None:
        return True
    if protocol != flow.protocol:
        return False
    if protocol in (ICMP, ICMPV6):
        return (not rule.HasField("port_min") or rule.port_min == flow.port) and (
            not rule.HasField("port_max") or rule.port_max == flow.code
        )
    low, high = _port_range(rule)
    return protocol not in _WITH_PORTS or low <= flow.port <= high
