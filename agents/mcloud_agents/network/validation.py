"""What a document must fulfil before anything of it reaches the kernel or a configuration file."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator

from mcloud.network.v1 import dataplane_pb2 as pb
from mcloud_agents.network import rules
from mcloud_base import ids
from mcloud_base.errors import InvalidArgument

_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")
_DEVICE = re.compile(r"tap[0-9a-z]{1,12}")
_HOSTNAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_MAX_VNI = (1 << 24) - 1


def check(document: pb.HostDataplane) -> None:
    """Check a whole document.

    Raises:
        InvalidArgument: DATAPLANE_INVALID, naming the first thing that is wrong.
    """
    for problem in _problems(document):
        raise InvalidArgument("DATAPLANE_INVALID", problem)


def _problems(document: pb.HostDataplane) -> Iterator[str]:
    networks = {network.network_id for network in document.networks}
    yield from _repeated("network", [network.network_id for network in document.networks])
    yield from _repeated("VNI", [network.vni for network in document.networks])
    yield from _repeated("port", [port.port_id for port in document.ports])
    yield from _repeated("device", [port.device_name for port in document.ports])
    yield from _repeated("router", [router.router_id for router in document.routers])
    for network in document.networks:
        for problem in _network_problems(network):
            yield f"network {network.network_id}: {problem}"
    for port in document.ports:
        for problem in _port_problems(port, networks):
            yield f"port {port.port_id}: {problem}"
    for router in document.routers:
        for problem in _router_problems(router, networks):
            yield f"router {router.router_id}: {problem}"


def _repeated(what: str, values: list[str] | list[int]) -> Iterator[str]:
    seen: set[str | int] = set()
    for value in values:
        if value in seen:
            yield f"{what} {value} stands there twice"
        seen.add(value)


def _network_problems(network: pb.NetworkSegment) -> Iterator[str]:
    if not ids.is_id(network.network_id, "net"):
        yield "the id is malformed"
    if not 1 <= network.vni <= _MAX_VNI:
        yield f"VNI {network.vni} is not between 1 and {_MAX_VNI}"
    if not 1280 <= network.mtu <= 65535:
        yield f"MTU {network.mtu} is not between 1280 and 65535"
    if network.service_mac and not _MAC.fullmatch(network.service_mac):
        yield f"{network.service_mac!r} is no MAC address in lower case"
    for remote in network.remote_ports:
        if not _MAC.fullmatch(remote.mac):
            yield f"{remote.mac!r} is no MAC address in lower case"
    # There are many more ports than hosts, and an address takes longer to read than the rest.
    for address in dict.fromkeys(remote.underlay_ip for remote in network.remote_ports):
        yield from _address_problems(address)
    for subnet in network.subnets:
        if not ids.is_id(subnet.subnet_id, "sub"):
            yield f"subnet {subnet.subnet_id!r} has a malformed id"
        yield from _cidr_problems(subnet.cidr)
        for address in (subnet.gateway_ip, subnet.service_ip, *subnet.dns_servers):
            if address:
                yield from _address_problems(address)
        if subnet.service_ip and not network.service_mac:
            yield f"subnet {subnet.subnet_id} has a service address, but the network no service MAC"
        for route in subnet.host_routes:
            yield from _cidr_problems(route.destination_cidr)
            yield from _address_problems(route.next_hop_ip)


def _port_problems(port: pb.PortBinding, networks: set[str]) -> Iterator[str]:
    if not ids.is_id(port.port_id, "port"):
        yield "the id is malformed"
    if port.network_id not in networks:
        yield f"its network {port.network_id} is not in the document"
    if not _MAC.fullmatch(port.mac):
        yield f"{port.mac!r} is no MAC address in lower case"
    if not _DEVICE.fullmatch(port.device_name):
        yield f"{port.device_name!r} is no device name: tap and up to 12 characters"
    if port.hostname and not _HOSTNAME.fullmatch(port.hostname):
        yield f"{port.hostname!r} is no host name"
    for fixed in port.fixed_ips:
        yield from _address_problems(fixed.ip_address)
    for rule in port.rules:
        yield from _rule_problems(rule)


def _rule_problems(rule: pb.EffectiveRule) -> Iterator[str]:
    if rule.direction not in (rules.INGRESS, rules.EGRESS):
        yield "a rule has no direction"
    if rule.ip_version not in (4, 6):
        yield f"a rule has IP version {rule.ip_version}, not 4 or 6"
    try:
        protocol = rules.protocol_number(rule)
    except ValueError:
        yield f"a rule has the unknown protocol {rule.protocol!r}"
        return
    limit = 255 if protocol in (rules.ICMP, rules.ICMPV6) else 65535
    for bound in ("port_min", "port_max"):
        if rule.HasField(bound) and not 0 <= getattr(rule, bound) <= limit:
            yield f"a rule's {bound} is not between 0 and {limit}"
    if limit == 65535 and rule.HasField("port_max") and rule.port_min > rule.port_max:
        yield f"a rule has the empty port range {rule.port_min} to {rule.port_max}"
    for cidr in rule.remote_cidrs:
        yield from _cidr_problems(cidr, rule.ip_version)


def _router_problems(router: pb.RouterBinding, networks: set[str]) -> Iterator[str]:
    if not ids.is_id(router.router_id, "rtr"):
        yield "the id is malformed"
    for leg in router.interfaces:
        if leg.network_id not in networks:
            yield f"its network {leg.network_id} is not in the document"
        yield from _leg_problems(leg)
    if router.HasField("gateway"):
        yield from _leg_problems(router.gateway)
        if router.gateway.next_hop_ip:
            yield from _address_problems(router.gateway.next_hop_ip)
    elif router.floating_ips:
        yield "it has floating addresses and no gateway"
    for floating in router.floating_ips:
        yield from _address_problems(floating.floating_ip_address)
        yield from _address_problems(floating.fixed_ip_address)


def _leg_problems(leg: pb.RouterInterfaceBinding | pb.ExternalGateway) -> Iterator[str]:
    if not ids.is_id(leg.port_id, "port"):
        yield f"port {leg.port_id!r} has a malformed id"
    if not _MAC.fullmatch(leg.mac):
        yield f"{leg.mac!r} is no MAC address in lower case"
    yield from _cidr_problems(f"{leg.ip_address}/{leg.prefix_len}", 4)


def _address_problems(text: str) -> Iterator[str]:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        yield f"{text!r} is no IP address"


def _cidr_problems(text: str, ip_version: int = 0) -> Iterator[str]:
    try:
        network = ipaddress.ip_network(text, strict=False)
    except ValueError:
        yield f"{text!r} is no address range"
        return
    if ip_version and network.version != ip_version:
        yield f"{text!r} is not of IP version {ip_version}"
