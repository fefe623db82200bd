"""Hosts' dataplanes, computed from rows: whole, in as many statements for all hosts as for one.

Most of a document is what other hosts are told too: who else is on a network, who is in a group. It
is serialized once for all of them, and documents are put together of such parts: a message's bytes
are those of its fields, one after the other.
Source: https://protobuf.dev/programming-guides/encoding/.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import peewee

from mcloud.network.v1 import dataplane_pb2, subnet_pb2
from mcloud_controlplane.core import contract
from mcloud_controlplane.core.model import Prepared
from mcloud_controlplane.core.statements import Kept
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
from mcloud_controlplane.network.model import database as opened

_DEVICE_LETTERS = 11  # of the port's id; with "tap" they fill an interface's name but one
_REMOTE_PORTS = 10_000  # that are remembered serialized

# What a segment is made of, in the order in which `segments` takes it.
SEGMENT = (
    Network.id,
    Network.vni,
    Network.mtu,
    Network.physical_network,
    Subnet.id,
    Subnet.cidr,
    Subnet.gateway_ip,
    Subnet.service_ip,
    Subnet.dhcp_enabled,
    Subnet.spec,
)


class Document(NamedTuple):
    """A host's dataplane.

    Args:
        content: a HostDataplane, serialized.
    """

    generation: int
    content: bytes


@dataclass
class _Port:
    """A port on a host."""

    id: str
    network_id: str
    host_id: str
    mac: str
    owner_type: str
    owner_id: str
    hostname: str
    port_security_enabled: bool
    domain_id: str
    addresses: dict[int, dataplane_pb2.FixedIp] = field(default_factory=dict)  # by number
    groups: set[str] = field(default_factory=set)


def documents(host_ids: Sequence[str], *, behind: bool = False) -> dict[str, Document]:
    """Return all that hosts are to have: the whole truth about mcloud's own on each.

    Args:
        behind: of those only that have not reached their generation.
    """
    # With the generations: what is read after them may be newer, never older.
    rows = (_BEHIND if behind else _HERE).run(opened, host_ids)
    generations = {row[0]: row[1] for row in rows}
    carriers = sorted({row[0] for row in rows if row[2]})
    ports = _ports(rows)
    network_ids = sorted({port.network_id for port in ports})
    networks = segments(_SEGMENTS.rows(network_ids)) if network_ids else {}
    elsewhere = _elsewhere([id_ for id_, each in networks.items() if not each.physical_network])
    serialized = {id_: each.SerializeToString() for id_, each in networks.items()}
    rules = _rules({frozenset(port.groups) for port in ports if port.port_security_enabled})
    routers = _routers(carriers, [p for p in ports if p.owner_type == "router"], networks)
    here: dict[str, set[str]] = {}
    bound: dict[str, list[bytes]] = {}
    for port in ports:
        here.setdefault(port.host_id, set()).add(port.network_id)
        if port.owner_type != "router":
            allowed = rules[frozenset(port.groups)] if port.port_security_enabled else b""
            bound.setdefault(port.host_id, []).append(
                binding(port, port.addresses.values()).SerializeToString() + allowed
            )
    found = {}
    for host_id, generation in generations.items():
        present = [
            serialized[id_] + _but(host_id, elsewhere.get(id_, {}))
            for id_ in network_ids
            if id_ in serialized and id_ in here.get(host_id, ())
        ]
        content = (
            _field("networks", present)
            + _field("ports", bound.get(host_id, ()))
            + _field("routers", routers.get(host_id, ()))
        )
        found[host_id] = Document(generation, content)
    return found


def _but(host_id: str, elsewhere: Mapping[str, bytes]) -> bytes:
    """Return a network's ports but those of one host."""
    return b"".join([ports for where, ports in elsewhere.items() if where != host_id])


def _here(host_ids: Sequence[Any]) -> Any:
    """Return the query for hosts, their generations, whether they carry routers, their ports."""
    routers = Router.select(Router.id).where(Router.host_id == HostDataplane.host_id)
    return (
        HostDataplane.select(
            HostDataplane.host_id,
            HostDataplane.generation,
            peewee.fn.EXISTS(routers),
            Address.number,
            Address.subnet_id,
            Address.ip_address,
            Address.prefix_len,
            PortGroup.security_group_id,
            Port.id,
            Port.network_id,
            Port.host_id,
            Port.mac,
            Port.owner_type,
            Port.owner_id,
            Port.hostname,
            Port.port_security_enabled,
            Port.domain_id,
        )
        .join(Port, peewee.JOIN.LEFT_OUTER, on=(Port.host_id == HostDataplane.host_id))
        .join(Address, peewee.JOIN.LEFT_OUTER, on=(Address.port_id == Port.id))
        .join(PortGroup, peewee.JOIN.LEFT_OUTER, on=(PortGroup.port_id == Port.id))
        .where(HostDataplane.host_id.in_(host_ids))
        .order_by(Port.id, Address.number)
    )


_HERE = Kept(_here)
_BEHIND = Kept(
    lambda host_ids: _here(host_ids).where(
        HostDataplane.observed_generation < HostDataplane.generation
    )
)


def _ports(rows: Iterable[Sequence[Any]]) -> list[_Port]:
    """Return the ports of `_here`, which has a row for each address in each group."""
    found: dict[str, _Port] = {}
    for _, _, _, number, subnet_id, ip_address, prefix_len, group_id, id_, *columns in rows:
        if id_ is None:
            continue
        port = found.get(id_)
        if port is None:
            port = found[id_] = _Port(id_, *columns)
        if number is not None and number not in port.addresses:
            port.addresses[number] = dataplane_pb2.FixedIp(
                subnet_id=subnet_id, ip_address=ip_address, prefix_len=prefix_len
            )
        if group_id is not None:
            port.groups.add(group_id)
    return list(found.values())


def _field(name: str, contents: Iterable[bytes]) -> bytes:
    """Return messages, serialized, as a field of HostDataplane."""
    tag = _TAGS[name]
    return b"".join([part for each in contents for part in (tag, _varint(len(each)), each)])


def _varint(number: int) -> bytes:
    found = bytearray()
    while number > 0x7F:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    found.append(number)
    return bytes(found)


_LENGTH_DELIMITED = 2
_TAGS = {
    each.name: _varint(each.number << 3 | _LENGTH_DELIMITED)
    for each in dataplane_pb2.HostDataplane.DESCRIPTOR.fields
}


def device_name(port_id: str) -> str:
    """Return the name of a port's tap."""
    return "tap" + port_id[-_DEVICE_LETTERS:]


def service_mac(vni: int) -> str:
    """Return the Ethernet address of a network's service address: locally administered.

    Not 02:6d:63:…, which hosts give to their bridges.
    """
    return "06:6d:63:" + ":".join(f"{octet:02x}" for octet in vni.to_bytes(3, "big"))


def segments(rows: Iterable[Sequence[Any]]) -> dict[str, dataplane_pb2.NetworkSegment]:
    """Return networks as they are on every host, without their ports elsewhere; by id.

    Args:
        rows: SEGMENT, of each subnet; in the order of both. What follows is no matter.
    """
    found: dict[str, dataplane_pb2.NetworkSegment] = {}
    last = ""
    for id_, vni, mtu, physical_network, subnet_id, *columns in rows:
        segment = found.get(id_)
        if segment is None:
            segment = found[id_] = dataplane_pb2.NetworkSegment(
                network_id=id_,
                vni=vni,
                mtu=mtu,
                service_mac=service_mac(vni),
                physical_network=physical_network,
            )
        if subnet_id is not None and subnet_id != last:
            segment.subnets.append(_subnet(subnet_id, *columns[:5]))
            last = subnet_id
    return found


_SEGMENTS = Prepared(
    Network,
    lambda ids: (
        Network.select(*SEGMENT)
        .join(Subnet, peewee.JOIN.LEFT_OUTER, on=(Subnet.network_id == Network.id))
        .where(Network.id.in_(ids))
        .order_by(Network.id, Subnet.id)
        .tuples()
    ),
)


def _subnet(
    id_: str, cidr: str, gateway_ip: str, service_ip: str, dhcp_enabled: bool, written: Any
) -> dataplane_pb2.SubnetBinding:
    spec = subnet_pb2.SubnetSpec.FromString(bytes(written))
    return dataplane_pb2.SubnetBinding(
        subnet_id=id_,
        cidr=cidr,
        gateway_ip=gateway_ip,
        service_ip=service_ip,
        dhcp_enabled=dhcp_enabled,
        dns_servers=spec.dns_servers,
        host_routes=[
            dataplane_pb2.HostRoute(
                destination_cidr=route.destination_cidr, next_hop_ip=route.next_hop_ip
            )
            for route in spec.host_routes
        ],
    )


def _elsewhere(network_ids: Sequence[str]) -> dict[str, dict[str, bytes]]:
    """Return the ports on networks as other hosts see them: by network and host, serialized."""
    found: dict[str, dict[str, bytes]] = {}
    rows = _REMOTE.run(opened, network_ids) if network_ids else []
    for network_id, host_id, underlay_ip, macs in sorted(rows):
        parts = [_remote_port(mac, underlay_ip) for mac in sorted(macs.split(","))]
        found.setdefault(network_id, {})[host_id] = b"".join(parts)
    return found


def _joined(column: Any) -> Any:
    """Return the values of a column as one text: rows take longer to hand over than to read."""
    name = "STRING_AGG" if opened.for_update else "GROUP_CONCAT"  # of PostgreSQL, of SQLite
    return peewee.Function(name, (column, ","))


def _remote(network_ids: Sequence[Any]) -> Any:
    place = (Port.network_id, Port.host_id)
    there = (
        Port.select(*place, _joined(Port.mac).alias("macs"))
        .where(Port.network_id.in_(network_ids))
        .group_by(*place)
    )
    return (
        HostDataplane.select(
            there.c.network_id, HostDataplane.host_id, HostDataplane.underlay_ip, there.c.macs
        )
        .join(there, on=(HostDataplane.host_id == there.c.host_id))
        .where(HostDataplane.underlay_ip != "")
    )


_REMOTE = Kept(_remote)


@functools.lru_cache(_REMOTE_PORTS)
def _remote_port(mac: str, underlay_ip: str) -> bytes:
    """Return a port as other hosts see it: a part of a serialized NetworkSegment."""
    port = dataplane_pb2.RemotePort(mac=mac, underlay_ip=underlay_ip)
    return dataplane_pb2.NetworkSegment(remote_ports=[port]).SerializeToString()


def binding(
    port: Port | _Port, addresses: Iterable[dataplane_pb2.FixedIp]
) -> dataplane_pb2.PortBinding:
    """Return a guest's port as its host is to have it, without its rules."""
    return dataplane_pb2.PortBinding(
        port_id=port.id,
        network_id=port.network_id,
        instance_id=port.owner_id,
        domain_id=port.domain_id,
        mac=port.mac,
        fixed_ips=addresses,
        hostname=port.hostname,
        port_security_enabled=bool(port.port_security_enabled),
        device_name=device_name(port.id),
    )


def fixed_ip(row: Address) -> dataplane_pb2.FixedIp:
    """Return an address as its message."""
    return dataplane_pb2.FixedIp(
        subnet_id=row.subnet_id, ip_address=row.ip_address, prefix_len=row.prefix_len
    )


def _rules(sets: Collection[frozenset[str]]) -> dict[frozenset[str], bytes]:
    """Return what each of these sets of groups allows: a part of a serialized PortBinding."""
    groups = sorted(frozenset().union(*sets))
    rows = _RULES.rows(groups) if groups else []
    members = _members(sorted({row.remote_group_id for row in rows if row.remote_group_id}))
    rules = [
        (row, _rule(row, members.get((row.remote_group_id, row.ip_version), []))) for row in rows
    ]
    allowed: dict[frozenset[str], bytes] = {}
    for own in sets:
        # Two groups of a port may allow the same.
        found: dict[str, dataplane_pb2.EffectiveRule] = {}
        for row, rule in rules:
            if row.security_group_id in own:
                found.setdefault(row.digest, rule)
        allowed[own] = dataplane_pb2.PortBinding(rules=found.values()).SerializeToString()
    return allowed


_RULES = Prepared(
    SecurityGroupRule,
    lambda group_ids: (
        SecurityGroupRule.select(
            SecurityGroupRule.security_group_id,
            SecurityGroupRule.direction,
            SecurityGroupRule.ip_version,
            SecurityGroupRule.protocol,
            SecurityGroupRule.port_min,
            SecurityGroupRule.port_max,
            SecurityGroupRule.remote_cidr,
            SecurityGroupRule.remote_group_id,
            SecurityGroupRule.digest,
        )
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
    rows = _MEMBERS.run(opened, group_ids) if group_ids else []
    return {
        (group_id, version): [
            f"{address}/{32 if version == 4 else 128}" for address in sorted(addresses.split(","))
        ]
        for group_id, version, addresses in rows
    }


def _in_groups(group_ids: Sequence[Any]) -> Any:
    kind = (PortGroup.security_group_id, Address.ip_version)
    return (
        Address.select(*kind, _joined(Address.ip_address))
        .join(PortGroup, on=(PortGroup.port_id == Address.port_id))
        .join(Port, on=(Port.id == Address.port_id))
        .where(PortGroup.security_group_id.in_(group_ids) & (Port.host_id != ""))
        .group_by(*kind)
    )


_MEMBERS = Kept(_in_groups)


def _routers(
    host_ids: Sequence[str],
    legs: Sequence[_Port],
    networks: Mapping[str, dataplane_pb2.NetworkSegment],
) -> dict[str, list[bytes]]:
    """Return the routers that hosts carry: by host, serialized."""
    if not host_ids:
        return {}
    rows = list(Router.select().where(Router.host_id.in_(list(host_ids))).order_by(Router.id))
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
    found: dict[str, list[bytes]] = {}
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
                for address in port.addresses.values()
            ],
            floating_ips=floating[row.id],
        )
        for port in own:
            # What is deleted while this reads has a newer generation already.
            network = networks.get(port.network_id)
            if port.id == row.gateway_port_id and network and port.addresses:
                router.gateway.CopyFrom(_gateway(row, port, network))
        found.setdefault(row.host_id, []).append(router.SerializeToString())
    return found


def _gateway(
    row: Router, port: _Port, network: dataplane_pb2.NetworkSegment
) -> dataplane_pb2.ExternalGateway:
    address = next(iter(port.addresses.values()))
    hops = [each.gateway_ip for each in network.subnets if each.subnet_id == address.subnet_id]
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
