"""Addresses: which are free, and who has which.

An address stands in its subnet as a position: its distance from the network's address (from the
middle of a /64, so that every position fits a signed 64-bit column). The next address is the one
after a pool's highest; where that is at the pool's end, the lowest gap. Both are index look-ups,
so a /8 costs what a /24 costs. The subnet's row is locked meanwhile, and the table's key makes
it impossible to hand an address out twice.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from typing import Any, NamedTuple

import peewee

from mcloud.network.v1 import port_pb2
from mcloud_base import errors
from mcloud_controlplane.core.model import Prepared
from mcloud_controlplane.core.statements import Kept
from mcloud_controlplane.network.model import Address, AllocationPool, Port, Subnet, lock
from mcloud_controlplane.network.model import database as opened

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
IpNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network


class _Range(NamedTuple):
    """A subnet from which addresses are handed out.

    Args:
        pools: of each the first and the last position, and the lowest and the highest taken.
    """

    id: str
    project_id: str
    ip_version: int
    cidr: str
    gateway_ip: str
    service_ip: str
    pools: list[tuple[int, int, int | None, int | None]]


def position(network: IpNetwork, address: IpAddress) -> int:
    """Return where an address stands in its network."""
    return int(address) - _origin(network)


def at(network: IpNetwork, where: int) -> IpAddress:
    """Return the address at a position; the inverse of `position`."""
    number = _origin(network) + where
    if isinstance(network, ipaddress.IPv4Network):
        return ipaddress.IPv4Address(number)
    return ipaddress.IPv6Address(number)


def usable(network: IpNetwork) -> tuple[int, int]:
    """Return the first and last position that a port may have.

    Not the network's own address (in IPv6 the routers' anycast address), nor IPv4's broadcast.
    """
    first = position(network, network.network_address) + 1
    last = position(network, network.broadcast_address)
    return first, last - 1 if network.version == 4 else last


def _origin(network: IpNetwork) -> int:
    middle = 1 << 63 if network.num_addresses > 1 << 63 else 0
    return int(network.network_address) + middle


def assign(port: Port, wanted: Sequence[port_pb2.FixedIpRequest]) -> list[Address]:
    """Give a port the addresses that it asks for; if none, one of each version of its network.

    Raises:
        errors.Exhausted: NO_FREE_ADDRESS.
        errors.AlreadyExists: ADDRESS_IN_USE.
        errors.NotFound: SUBNET_NOT_FOUND.
        errors.InvalidArgument: BAD_FIELD, an address that is not of the network.
    """
    subnets = _ranges(port.network_id)
    if not wanted:
        versions = sorted({subnet.ip_version for subnet in subnets})
        choices = [[s for s in subnets if s.ip_version == version] for version in versions]
        return [_take_free(some, port.id, number) for number, some in enumerate(choices)]
    taken = []
    for number, request in enumerate(wanted):
        field = f"spec.fixed_ips[{number}]"
        some = [s for s in subnets if not request.subnet_id or s.id == request.subnet_id]
        if request.subnet_id and not some:
            raise errors.NotFound(
                "SUBNET_NOT_FOUND",
                f"network {port.network_id} has no subnet {request.subnet_id}",
                id=request.subnet_id,
            )
        if request.ip_address:
            taken.append(_take_wanted(some, request.ip_address, port, number, field))
        elif some:
            if taken:  # maybe one of these subnets'
                now = {each.id: each for each in _ranges(port.network_id)}
                some = [now[each.id] for each in some]
            taken.append(_take_free(some, port.id, number))
        else:
            raise errors.bad_field(field, "the network has no subnet")
    return taken


def take_any(port: Port, ip_version: int) -> Address:
    """Give a port the next free address of a version on its network.

    Raises:
        errors.Exhausted: NO_FREE_ADDRESS.
    """
    subnets = _ranges(port.network_id)
    return _take_free([each for each in subnets if each.ip_version == ip_version], port.id)


def _take_free(subnets: Sequence[_Range], port_id: str, number: int = 0) -> Address:
    """Give a port the next free address of the first of these subnets that has one."""
    for subnet in subnets:
        found = _free_position(subnet)
        if found is not None:
            return _insert(subnet, found, port_id, number)
    names = ", ".join(subnet.cidr for subnet in subnets) or "a network without a subnet"
    raise errors.Exhausted("NO_FREE_ADDRESS", f"no address is free in {names}")


def take(subnet: Subnet | _Range, text: str, port_id: str, number: int = 0) -> Address:
    """Give a port a certain address of a subnet, whose row must be locked.

    Raises:
        errors.AlreadyExists: ADDRESS_IN_USE.
    """
    where = position(ipaddress.ip_network(subnet.cidr), ipaddress.ip_address(text))
    if Address.get_or_none((Address.subnet_id == subnet.id) & (Address.position == where)):
        raise _in_use(text)
    return _insert(subnet, where, port_id, number)


def give_back(port_id: str) -> None:
    """Free a port's addresses."""
    Address.delete().where(Address.port_id == port_id).execute()


def _take_wanted(
    subnets: Sequence[_Range], text: str, port: Port, number: int, field: str
) -> Address:
    address = ipaddress.ip_address(text)
    for subnet in subnets:
        network = ipaddress.ip_network(subnet.cidr)
        if address.version != network.version or address not in network:
            continue
        first, last = usable(network)
        if not first <= position(network, address) <= last:
            raise errors.bad_field(f"{field}.ip_address", f"{text} is not a host's in {network}")
        # On a network that is shared with it, a project could else pose as the gateway.
        foreign = subnet.project_id != port.project_id
        if str(address) == subnet.service_ip or (foreign and str(address) == subnet.gateway_ip):
            raise _in_use(text)
        return take(subnet, str(address), port.id, number)
    raise errors.bad_field(f"{field}.ip_address", f"{text} is in none of the network's subnets")


def _insert(subnet: Subnet | _Range, where: int, port_id: str, number: int) -> Address:
    network = ipaddress.ip_network(subnet.cidr)
    return Address.create(
        subnet_id=subnet.id,
        position=where,
        ip_address=str(at(network, where)),
        prefix_len=network.prefixlen,
        ip_version=network.version,
        port_id=port_id,
        number=number,
    )


def _ranges(network_id: str) -> list[_Range]:
    """Return a network's subnets and what is taken of them, their rows locked."""
    if opened.for_update:
        lock(Subnet.select(Subnet.id).where(Subnet.network_id == network_id).order_by(Subnet.id))
    found: dict[str, _Range] = {}
    for id_, *columns, first, last, lowest, highest in _RANGES.run(opened, [network_id]):
        subnet = found.get(id_)
        if subnet is None:
            subnet = found[id_] = _Range._make((id_, *columns, []))
        if first is not None:
            subnet.pools.append((first, last, lowest, highest))
    return list(found.values())


def _with_pools(network_ids: Sequence[Any]) -> Any:
    inside = (
        (Address.subnet_id == AllocationPool.subnet_id)
        & (Address.position >= AllocationPool.first)
        & (Address.position <= AllocationPool.last)
    )
    return (
        Subnet.select(
            Subnet.id,
            Subnet.project_id,
            Subnet.ip_version,
            Subnet.cidr,
            Subnet.gateway_ip,
            Subnet.service_ip,
            AllocationPool.first,
            AllocationPool.last,
            Address.select(peewee.fn.MIN(Address.position)).where(inside),
            Address.select(peewee.fn.MAX(Address.position)).where(inside),
        )
        .join(
            AllocationPool,
            peewee.JOIN.LEFT_OUTER,
            on=(AllocationPool.subnet_id == Subnet.id),
        )
        .where(Subnet.network_id == network_ids[0])
        .order_by(Subnet.id, AllocationPool.first)
    )


_RANGES = Kept(_with_pools)


def _free_position(subnet: _Range) -> int | None:
    """Return a free position of the subnet's pools; statements only once they fill up."""
    for first, last, _, highest in subnet.pools:
        if highest is None:
            return first
        if highest < last:
            return highest + 1
    for first, last, lowest, _ in subnet.pools:
        if lowest is not None and lowest > first:
            return first
        following = Address.alias()
        gap = (
            Address.select(Address.position + 1)
            .where(
                (Address.subnet_id == subnet.id)
                & (Address.position >= first)
                & (Address.position < last)
                & ~peewee.fn.EXISTS(
                    following.select(following.position).where(
                        (following.subnet_id == subnet.id)
                        & (following.position == Address.position + 1)
                    )
                )
            )
            .order_by(Address.position)
            .limit(1)
            .scalar()
        )
        if gap is not None:
            return int(gap)
    return None


def _in_use(text: str) -> errors.AlreadyExists:
    return errors.AlreadyExists("ADDRESS_IN_USE", f"{text} is in use; choose another", ip=text)


def of_ports(port_ids: Sequence[str]) -> dict[str, list[Address]]:
    """Return the addresses of ports, in one statement."""
    found: dict[str, list[Address]] = {id_: [] for id_ in port_ids}
    for row in _OF_PORTS.rows(port_ids):
        found[row.port_id].append(row)
    return found


_OF_PORTS = Prepared(
    Address,
    lambda port_ids: Address.select().where(Address.port_id.in_(port_ids)).order_by(Address.number),
)


def holders(subnet_id: str, limit: int = 5) -> list[Port]:
    """Return some of the ports that have an address of a subnet."""
    query = Port.select().join(Address, on=(Address.port_id == Port.id))
    return list(query.where(Address.subnet_id == subnet_id).order_by(Port.id).limit(limit))
