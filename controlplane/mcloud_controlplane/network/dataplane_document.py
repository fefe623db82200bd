"""Hosts' dataplanes, computed from rows: whole, in as many statements for all hosts as for one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mcloud.network.v1 import dataplane_pb2, subnet_pb2
from mcloud_controlplane.core import contract
from mcloud_controlplane.core.model import Prepared
from mcloud_controlplane.network import address_store
from mcloud_controlplane.network.model import (
    Address,
    FloatingIp,
    HostDataplane,
    Network,
    Port,
    PortGroup,
    Router,
    SecurityGroupRule,
    Subnet,
)

_DEVICE_LETTERS = 11  # of the port's id; with "tap" they fill an interface's name but one


def documents(host_ids: Sequence[str]) -> dict[str, dataplane_pb2.HostDataplane]:
    """Return all that hosts are to have: the whole truth about mcloud's own on each."""
    ports = list(Port.select().where(Port.host_id.in_(list(host_ids))).order_by(Port.id))
    guests = [port for port in ports if port.owner_type != "router"]
    legs = [port for port in ports if port.owner_type == "router"]
    networks, subnets = _networks(sorted({port.network_id for port in ports}))
    elsewhere = _remote_ports([row.id for row in networks if not row.external])
    bound: dict[str, list[dataplane_pb2.PortBinding]] = {}
    for port, binding in zip(guests, bindings(guests), strict=True):
        bound.setdefault(port.host_id, []).append(binding)
    here: dict[str, set[str]] = {}
    for port in ports:
        here.setdefault(port.host_id, set()).add(port.network_id)
    routers = _routers(host_ids, legs, networks, subnets)
    return {
        host_id: dataplane_pb2.HostDataplane(
            networks=_segments(
                [row for row in networks if row.id in here.get(host_id, ())],
                subnets,
                {
                    network_id: [port for where, port in elsewhere[network_id] if where != host_id]
                    for network_id in here.get(host_id, ())
                    if network_id in elsewhere
                },
            ),
            ports=bound.get(host_id, []),
            routers=routers.get(host_id, []),
        )
        for host_id in host_ids
    }


def segment(network_id: str) -> dataplane_pb2.NetworkSegment:
    """Return one network as it is on every host, without its ports elsewhere."""
    return _segments(*_networks([network_id]), {})[0]


def device_name(port_id: str) -> str:
    """Return the name of a port's tap."""
    return "tap" + port_id[-_DEVICE_LETTERS:]


def service_mac(vni: int) -> str:
    """Return the Ethernet address of a network's service address: locally administered.

    Not 02:6d:63:…, which hosts give to their bridges.
    """
    return "06:6d:63:" + ":".join(f"{octet:02x}" for octet in vni.to_bytes(3, "big"))


def _networks(network_ids: Sequence[str]) -> tuple[list[Network], dict[str, list[Subnet]]]:
    subnets: dict[str, list[Subnet]] = {id_: [] for id_ in network_ids}
    networks = _NETWORKS.rows(network_ids)
    for subnet in _SUBNETS.rows(network_ids):
        subnets[subnet.network_id].append(subnet)
    return networks, subnets


_NETWORKS = Prepared(
    Network, lambda ids: Network.select().where(Network.id.in_(ids)).order_by(Network.id)
)
_SUBNETS = Prepared(
    Subnet, lambda ids: Subnet.select().where(Subnet.network_id.in_(ids)).order_by(Subnet.id)
)


def _segments(
    networks: Sequence[Network],
    subnets: dict[str, list[Subnet]],
    elsewhere: Mapping[str, Sequence[dataplane_pb2.RemotePort]],
) -> list[dataplane_pb2.NetworkSegment]:
    return [
        dataplane_pb2.NetworkSegment(
            network_id=row.id,
            vni=row.vni,
            mtu=row.mtu,
            subnets=[_subnet(subnet) for subnet in subnets[row.id]],
            service_mac=service_mac(row.vni),
            remote_ports=elsewhere.get(row.id, []),
            physical_network=row.physical_network,
        )
        for row in networks
    ]


def _subnet(row: Subnet) -> dataplane_pb2.SubnetBinding:
    spec = subnet_pb2.SubnetSpec.FromString(bytes(row.spec))
    return dataplane_pb2.SubnetBinding(
        subnet_id=row.id,
        cidr=row.cidr,
        gateway_ip=row.gateway_ip,
        service_ip=row.service_ip,
        dhcp_enabled=row.dhcp_enabled,
        dns_servers=spec.dns_servers,
        host_routes=[
            dataplane_pb2.HostRoute(
                destination_cidr=route.destination_cidr, next_hop_ip=route.next_hop_ip
            )
            for route in spec.host_routes
        ],
    )


def _remote_ports(
    network_ids: Sequence[str],
) -> dict[str, list[tuple[str, dataplane_pb2.RemotePort]]]:
    """Return the ports on networks as others see them, each with its host."""
    query: Any = (
        Port.select(Port.network_id, Port.host_id, Port.mac, HostDataplane.underlay_ip)
        .join(HostDataplane, on=(HostDataplane.host_id == Port.host_id))
        .where(Port.network_id.in_(network_ids) & (HostDataplane.underlay_ip != ""))
        .order_by(Port.mac)
        .tuples()
    )
    found: dict[str, list[tuple[str, dataplane_pb2.RemotePort]]] = {}
    for network_id, host_id, mac, underlay_ip in query:
        port = dataplane_pb2.RemotePort(mac=mac, underlay_ip=underlay_ip)
        found.setdefault(network_id, []).append((host_id, port))
    return found


def bindings(ports: Sequence[Port]) -> list[dataplane_pb2.PortBinding]:
    """Return guests' ports as their host is to have them, in four statements."""
    addresses = address_store.of_ports([port.id for port in ports])
    rules = _rules([port.id for port in ports if port.port_security_enabled])
    return [
        dataplane_pb2.PortBinding(
            port_id=port.id,
            network_id=port.network_id,
            instance_id=port.owner_id,
            domain_id=port.domain_id,
            mac=port.mac,
            fixed_ips=[fixed_ip(address) for address in addresses[port.id]],
            hostname=port.hostname,
            port_security_enabled=port.port_security_enabled,
            rules=rules.get(port.id, []),
            device_name=device_name(port.id),
        )
        for port in ports
    ]


def fixed_ip(row: Address) -> dataplane_pb2.FixedIp:
    """Return an address as its message."""
    return dataplane_pb2.FixedIp(
        subnet_id=row.subnet_id, ip_address=row.ip_address, prefix_len=row.prefix_len
    )


def _rules(port_ids: Sequence[str]) -> dict[str, list[dataplane_pb2.EffectiveRule]]:
    """Return what the groups of ports allow, each rule once a port.

    Most ports are in the same groups: what these allow is put together once.
    """
    groups: dict[str, list[str]] = {}
    for port_id, group_id in _GROUPS.rows(port_ids):
        groups.setdefault(port_id, []).append(group_id)
    sets = {port_id: frozenset(found) for port_id, found in groups.items()}
    rows = _RULES.rows(sorted(frozenset().union(*sets.values())))
    members = _members(sorted({row.remote_group_id for row in rows if row.remote_group_id}))
    rules = [
        (row, _rule(row, members.get((row.remote_group_id, row.ip_version), []))) for row in rows
    ]
    allowed: dict[frozenset[str], list[dataplane_pb2.EffectiveRule]] = {}
    for own in set(sets.values()):
        # Two groups of a port may allow the same.
        found: dict[str, dataplane_pb2.EffectiveRule] = {}
        for row, rule in rules:
            if row.security_group_id in own:
                found.setdefault(row.digest, rule)
        allowed[own] = list(found.values())
    return {port_id: allowed[own] for port_id, own in sets.items()}


_GROUPS = Prepared(
    PortGroup,
    lambda port_ids: (
        PortGroup.select(PortGroup.port_id, PortGroup.security_group_id)
        .where(PortGroup.port_id.in_(port_ids))
        .tuples()
    ),
)
_RULES = Prepared(
    SecurityGroupRule,
    lambda group_ids: (
        SecurityGroupRule.select()
        .where(SecurityGroupRule.security_group_id.in_(group_ids))
        .order_by(SecurityGroupRule.digest, SecurityGroupRule.id)
    ),
)


def _rule(row: SecurityGroupRule, members: Sequence[str]) -> dataplane_pb2.EffectiveRule:
    rule = dataplane_pb2.EffectiveRule(
        direction=contract.enum_value(row.direction, dataplane_pb2.EffectiveRule.Direction),
        ip_version=row.ip_version,
        protocol=row.protocol,
        port_min=row.port_min,
        port_max=row.port_max,
        remote_is_group=bool(row.remote_group_id),
        remote_cidrs=members if row.remote_group_id else [],
    )
    if row.remote_cidr:
        rule.remote_cidrs.append(row.remote_cidr)
    return rule


def _members(group_ids: Sequence[str]) -> dict[tuple[str, int], list[str]]:
    """Return the addresses of each group's ports that are on some host, by IP version."""
    found: dict[tuple[str, int], list[str]] = {}
    for group_id, version, address in _MEMBERS.rows(group_ids):
        length = 32 if version == 4 else 128
        found.setdefault((group_id, version), []).append(f"{address}/{length}")
    return found


_MEMBERS = Prepared(
    Address,
    lambda group_ids: (
        Address.select(PortGroup.security_group_id, Address.ip_version, Address.ip_address)
        .join(PortGroup, on=(PortGroup.port_id == Address.port_id))
        .join(Port, on=(Port.id == Address.port_id))
        .where(PortGroup.security_group_id.in_(group_ids) & (Port.host_id != ""))
        .order_by(Address.subnet_id, Address.position)
        .tuples()
    ),
)


def _routers(
    host_ids: Sequence[str],
    legs: Sequence[Port],
    networks: Sequence[Network],
    subnets: dict[str, list[Subnet]],
) -> dict[str, list[dataplane_pb2.RouterBinding]]:
    """Return the routers that hosts carry, by host."""
    rows = list(Router.select().where(Router.host_id.in_(list(host_ids))).order_by(Router.id))
    if not rows:
        return {}
    addresses = address_store.of_ports([port.id for port in legs])
    floating: dict[str, list[dataplane_pb2.FloatingIpBinding]] = {row.id: [] for row in rows}
    query = FloatingIp.select().where(FloatingIp.router_id.in_(list(floating)))
    for address in query.order_by(FloatingIp.id):
        floating[address.router_id].append(
            dataplane_pb2.FloatingIpBinding(
                floating_ip_id=address.id,
                floating_ip_address=address.floating_ip_address,
                fixed_ip_address=address.fixed_ip_address,
            )
        )
    by_id = {row.id: row for row in networks}
    found: dict[str, list[dataplane_pb2.RouterBinding]] = {}
    for row in rows:
        own = [port for port in legs if port.owner_id == row.id and port.host_id == row.host_id]
        router = dataplane_pb2.RouterBinding(
            router_id=row.id,
            interfaces=[
                dataplane_pb2.RouterInterfaceBinding(
                    port_id=port.id,
                    network_id=port.network_id,
                    mac=port.mac,
                    ip_address=address.ip_address,
                    prefix_len=address.prefix_len,
                )
                for port in own
                if port.id != row.gateway_port_id
                for address in addresses[port.id]
            ],
            floating_ips=floating[row.id],
        )
        for port in own:
            # What is deleted while this reads has a newer generation already.
            network = by_id.get(port.network_id)
            if port.id == row.gateway_port_id and network and addresses[port.id]:
                router.gateway.CopyFrom(
                    _gateway(row, port, addresses[port.id][0], network, subnets[network.id])
                )
        found.setdefault(row.host_id, []).append(router)
    return found


def _gateway(
    row: Router, port: Port, address: Address, network: Network, subnets: Sequence[Subnet]
) -> dataplane_pb2.ExternalGateway:
    hops = [subnet.gateway_ip for subnet in subnets if subnet.id == address.subnet_id]
    return dataplane_pb2.ExternalGateway(
        port_id=port.id,
        network_id=port.network_id,
        physical_network=network.physical_network,
        mac=port.mac,
        ip_address=address.ip_address,
        prefix_len=address.prefix_len,
        next_hop_ip=hops[0] if hops else "",
        snat_enabled=row.snat_enabled,
    )
