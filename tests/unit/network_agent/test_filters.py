"""The packet filter as a function of the document."""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Callable
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from mcloud.network.v1 import dataplane_pb2 as pb
from mcloud_agents.network import expressions as x
from mcloud_agents.network import filters, nft, routers, rules
from mcloud_agents.network.rules import Flow
from mcloud_agents.network.state import Numbers

RULE = pb.EffectiveRule
NETWORK = pb.NetworkSegment(
    network_id="net-0",
    vni=100,
    mtu=1450,
    service_mac="fa:16:3e:ff:00:02",
    subnets=[pb.SubnetBinding(subnet_id="sub-0", cidr="10.0.0.0/24", service_ip="10.0.0.2")],
)


def port(letter: str, *group: pb.EffectiveRule, secure: bool = True) -> pb.PortBinding:
    number = ord(letter)
    return pb.PortBinding(
        port_id=f"port-{letter}",
        network_id="net-0",
        mac=f"fa:16:3e:00:00:{number:02x}",
        fixed_ips=[pb.FixedIp(ip_address=f"10.0.0.{number}")],
        port_security_enabled=secure,
        device_name=f"tap{letter * 11}",
        rules=group,
    )


def build(document: pb.HostDataplane) -> list[nft.Command]:
    numbers = Numbers().give_out(
        [p.port_id for p in document.ports], [n.network_id for n in document.networks]
    )
    tables = filters.build(document, numbers, {"external": "br-ex"})
    return [command for table in tables for command in table.commands()]


def lines(commands: list[nft.Command]) -> str:
    return "".join(json.dumps(command) + "\n" for command in commands)


def chain(commands: list[nft.Command], name: str) -> list[Any]:
    added = [command["add"] for command in commands if "rule" in command.get("add", {})]
    return [rule["rule"]["expr"] for rule in added if rule["rule"]["chain"] == name]


def test_the_ruleset_of_a_host(golden: Callable[[str, str], None]) -> None:
    group = [
        RULE(direction=RULE.DIRECTION_EGRESS, ip_version=4),
        RULE(
            direction=RULE.DIRECTION_INGRESS,
            ip_version=4,
            protocol="tcp",
            port_min=22,
            port_max=22,
            remote_cidrs=["10.0.0.97/32", "10.0.0.0/24", "192.0.2.7/32"],
        ),
        RULE(
            direction=RULE.DIRECTION_INGRESS, ip_version=4, protocol="icmp", port_min=8, port_max=0
        ),
        RULE(direction=RULE.DIRECTION_INGRESS, ip_version=4, remote_is_group=True),
        RULE(
            direction=RULE.DIRECTION_INGRESS,
            ip_version=6,
            protocol="udp",
            port_min=5000,
            port_max=5010,
        ),
    ]
    outside = pb.NetworkSegment(network_id="net-1", vni=101, mtu=1500, physical_network="external")
    secure = port("a", *group)
    secure.fixed_ips.add(ip_address="fd00::61")
    document = pb.HostDataplane(
        networks=[NETWORK, outside], ports=[secure, port("b", secure=False)]
    )
    golden("host_filter.jsonl", lines(build(document)))


def test_the_ruleset_of_a_router(golden: Callable[[str, str], None]) -> None:
    router = pb.RouterBinding(
        router_id="rtr-0",
        interfaces=[
            pb.RouterInterfaceBinding(
                port_id="port-00000000000", ip_address="10.0.0.1", prefix_len=24
            )
        ],
        gateway=pb.ExternalGateway(
            port_id="port-11111111111",
            ip_address="203.0.113.10",
            prefix_len=24,
            snat_enabled=True,
        ),
        floating_ips=[
            pb.FloatingIpBinding(floating_ip_address="203.0.113.20", fixed_ip_address="10.0.0.11")
        ],
    )
    golden("router_filter.jsonl", lines(routers.build_table(router)))


def test_a_router_without_interfaces_has_no_empty_set() -> None:
    gateway = pb.ExternalGateway(
        port_id="port-11111111111", ip_address="203.0.113.10", prefix_len=24, snat_enabled=True
    )
    router = pb.RouterBinding(router_id="rtr-0", gateway=gateway)
    assert '"set": []' not in lines(routers.build_table(router))  # nftables refuses one


def test_a_port_without_rules_admits_nothing() -> None:
    commands = build(pb.HostDataplane(networks=[NETWORK], ports=[port("a")]))
    for direction in ("in", "out"):
        last = chain(commands, f"{direction}-tapaaaaaaaaaaa")[-1]
        assert last == [{"counter": None}, {"drop": None}]


def test_a_rule_for_a_group_without_members_admits_nobody() -> None:
    rule = RULE(direction=RULE.DIRECTION_INGRESS, ip_version=4, remote_is_group=True)
    flow = Flow(4, rules.TCP, "10.0.0.9", "10.0.0.97", 22)
    assert rules.statements(rule, x.ACCEPT) is None
    assert not rules.admits([rule], RULE.DIRECTION_INGRESS, flow)


def test_order_of_addresses_in_a_rule_does_not_change_the_ruleset() -> None:
    def with_cidrs(*cidrs: str) -> list[nft.Command]:
        rule = RULE(direction=RULE.DIRECTION_INGRESS, ip_version=4, remote_cidrs=cidrs)
        return build(pb.HostDataplane(networks=[NETWORK], ports=[port("a", rule)]))

    one = with_cidrs("10.0.0.5/32", "10.0.0.4/32", "10.9.0.0/16")
    assert nft.digest(one) == nft.digest(with_cidrs("10.9.0.0/16", "10.0.0.4/31"))


# --- the filter and the judgement of established flows agree -------------------------------------

ADDRESSES = ["10.0.0.97", "10.0.0.98", "192.0.2.1", "192.0.3.255"]
ADDRESSES6 = ["fd00::1", "fd00::2", "2001:db8::1"]
CIDRS = ["0.0.0.0/0", "10.0.0.0/24", "10.0.0.97/32", "192.0.2.0/23", "192.0.2.1/24"]
CIDRS6 = ["::/0", "fd00::/64", "2001:db8::1/128"]


@st.composite
def effective_rules(draw: st.DrawFn) -> pb.EffectiveRule:
    version = draw(st.sampled_from([4, 6]))
    protocol = draw(st.sampled_from(["", "tcp", "UDP", "icmp", "ipv6-icmp", "47", "132"]))
    rule = RULE(
        direction=draw(st.sampled_from([RULE.DIRECTION_INGRESS, RULE.DIRECTION_EGRESS])),
        ip_version=version,
        protocol=protocol,
        remote_cidrs=draw(st.lists(st.sampled_from(CIDRS if version == 4 else CIDRS6), max_size=3)),
        remote_is_group=draw(st.booleans()),
    )
    numbers = st.integers(0, 20)
    if draw(st.booleans()):
        rule.port_min = draw(numbers)
    if draw(st.booleans()):
        rule.port_max = draw(st.integers(rule.port_min, 20))
    return rule


@st.composite
def flows(draw: st.DrawFn) -> Flow:
    version = draw(st.sampled_from([4, 6]))
    address = st.sampled_from(ADDRESSES if version == 4 else ADDRESSES6)
    return Flow(
        version,
        draw(st.sampled_from([rules.TCP, rules.UDP, rules.ICMP, rules.ICMPV6, 47, 132])),
        draw(address),
        draw(address),
        draw(st.integers(0, 20)),
        draw(st.integers(0, 20)),
    )


def holds(statement: Any, flow: Flow) -> bool:
    """Do what nftables does with a match; a header that is not there does not match."""
    left, right = statement["match"]["left"], statement["match"]["right"]
    assert statement["match"]["op"] == "=="
    if left == x.meta("nfproto"):
        return bool(right == f"ipv{flow.ip_version}")
    if left == x.meta("l4proto"):
        return bool(right == flow.protocol)
    protocol, field = left["payload"]["protocol"], left["payload"]["field"]
    if protocol in ("ip", "ip6"):
        text = flow.source if field == "saddr" else flow.destination
        address = ipaddress.ip_address(text)
        return address.version == (4 if protocol == "ip" else 6) and any(
            address in network(member) for member in right["set"]
        )
    if protocol == "th":
        low, high = right["range"] if isinstance(right, dict) else (right, right)
        return bool(low <= flow.port <= high)
    assert protocol in ("icmp", "icmpv6")
    assert flow.protocol == (rules.ICMP if protocol == "icmp" else rules.ICMPV6)
    return bool(right == (flow.port if field == "type" else flow.code))


def network(member: Any) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    if isinstance(member, str):
        return ipaddress.ip_network(member)
    return ipaddress.ip_network(f"{member['prefix']['addr']}/{member['prefix']['len']}")


@given(effective_rules(), flows())
def test_what_the_filter_lets_begin_is_what_goes_on(rule: pb.EffectiveRule, flow: Flow) -> None:
    statements = rules.statements(rule, x.ACCEPT)
    passes = statements is not None and all(holds(s, flow) for s in statements[:-1])
    assert rules.admits([rule], rule.direction, flow) == passes


@given(st.lists(effective_rules(), max_size=6))
def test_every_rule_set_gives_a_filter_that_drops_in_the_end(group: list[pb.EffectiveRule]) -> None:
    commands = build(pb.HostDataplane(networks=[NETWORK], ports=[port("a", *group)]))
    chains = {c["add"]["chain"]["name"] for c in commands if "chain" in c.get("add", {})}
    for name in ("in-tapaaaaaaaaaaa", "out-tapaaaaaaaaaaa", "from-tapaaaaaaaaaaa"):
        assert name in chains
        assert chain(commands, name)[-1] == [{"counter": None}, {"drop": None}]
    json.dumps(commands)
