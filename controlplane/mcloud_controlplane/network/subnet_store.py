"""Subnets in the database."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence
from typing import Any

import peewee
from google.protobuf.message import Message

from mcloud.network.v1 import subnet_pb2, subnet_service_pb2
from mcloud_base import errors
from mcloud_controlplane.core import auth, convert, database, listing, tables
from mcloud_controlplane.core.mutation import Mutation
from mcloud_controlplane.network import (
    address_store,
    dataplane_store,
    network_store,
    quota_store,
)
from mcloud_controlplane.network.address_store import IpNetwork
from mcloud_controlplane.network.model import (
    Address,
    AllocationPool,
    Network,
    Subnet,
    locked,
    shared,
)

Pools = list[tuple[int, int]]

_MOST = (1 << 63) - 1  # that the field can say: a /64 has more


def messages(rows: Sequence[Subnet]) -> list[subnet_pb2.Subnet]:
    """Return subnets as messages, in two more statements."""
    found = [row.id for row in rows]
    sizes = dict.fromkeys(found, 0)
    for pool in AllocationPool.select().where(AllocationPool.subnet_id.in_(found)):
        sizes[pool.subnet_id] += pool.last - pool.first + 1
    inside = (
        (Address.subnet_id == AllocationPool.subnet_id)
        & (Address.position >= AllocationPool.first)
        & (Address.position <= AllocationPool.last)
    )
    taken_rows: Any = (
        Address.select(Address.subnet_id, peewee.fn.COUNT(Address.position))
        .join(AllocationPool, on=inside)
        .where(Address.subnet_id.in_(found))
        .group_by(Address.subnet_id)
        .tuples()
    )
    taken: dict[str, int] = dict(taken_rows)
    return [
        subnet_pb2.Subnet(
            metadata=convert.metadata(row),
            spec=subnet_pb2.SubnetSpec.FromString(bytes(row.spec)),
            status=subnet_pb2.SubnetStatus(
                gateway_ip=row.gateway_ip,
                service_ip=row.service_ip,
                free_address_count=min(sizes[row.id] - taken.get(row.id, 0), _MOST),
            ),
        )
        for row in rows
    ]


def message(row: Subnet) -> subnet_pb2.Subnet:
    """Return a subnet as its message."""
    return messages([row])[0]


def visible(project_id: str) -> Any:
    """Return the condition for subnets that a project sees: those of networks that it sees."""
    networks = Network.select(Network.id).where(network_store.visible(project_id))
    return Subnet.network_id.in_(networks)


def get(caller: auth.Caller, id_: str) -> Subnet:
    """Return a subnet that the caller sees.

    Raises:
        errors.NotFound: SUBNET_NOT_FOUND.
    """
    condition = Subnet.id == id_
    if not caller.system:
        condition &= visible(caller.project_id)
    row = Subnet.get_or_none(condition)
    if row is None:
        raise not_found(id_)
    return row


def get_own(caller: auth.Caller, id_: str) -> tuple[Network, Subnet]:
    """Return a subnet that the caller may change, and its network; both rows locked.

    Raises:
        errors.NotFound: SUBNET_NOT_FOUND.
        errors.PermissionDenied: NOT_OWNER.
    """
    network = network_store.get_own(caller, get(caller, id_).network_id)
    row = locked(Subnet.select().where(Subnet.id == id_)).get_or_none()
    if row is None:
        raise not_found(id_)
    return network, row


def not_found(id_: str) -> errors.NotFound:
    """Return the error for a subnet that is not there, or not for the caller."""
    return errors.NotFound("SUBNET_NOT_FOUND", f"there is no subnet {id_}", id=id_)


def create(work: Mutation, request: subnet_service_pb2.CreateSubnetRequest) -> subnet_pb2.Subnet:
    """Make a subnet: its gateway, its service address, its pools."""
    spec = request.spec
    owner = network_store.get_own(work.caller, spec.network_id)
    network = ipaddress.ip_network(spec.cidr)
    if network.version == 6 and network.prefixlen < 64:
        raise errors.bad_field("spec.cidr", "an IPv6 subnet is a /64 or smaller")
    for other in Subnet.select(Subnet.cidr).where(Subnet.network_id == owner.id):
        if ipaddress.ip_network(other.cidr).overlaps(network):
            raise errors.InvalidArgument(
                "SUBNET_OVERLAPS", f"{network} overlaps {other.cidr} of the same network"
            )
    gateway = _gateway(network, spec)
    pools, service = _lay_out(network, spec, gateway, with_service=not owner.external)
    project_id = owner.project_id
    quota_store.ensure_room(project_id, "subnet")
    row = Subnet.create(
        **convert.new_row("sub", request, project_id),
        network_id=owner.id,
        ip_version=network.version,
        cidr=str(network),
        gateway_ip="" if gateway is None else str(address_store.at(network, gateway)),
        service_ip="" if service is None else str(address_store.at(network, service)),
        dhcp_enabled=not spec.dhcp_disabled and not owner.external,
    )
    AllocationPool.insert_many(
        [{"subnet_id": row.id, "first": first, "last": last} for first, last in pools]
    ).execute()
    work.concerns("subnet", row.id, row.name, project_id)
    _log_changes(owner, row, "ADDED")
    dataplane_store.bump(dataplane_store.hosts_of_networks([owner.id]))
    return message(row)


def _gateway(network: IpNetwork, spec: subnet_pb2.SubnetSpec) -> int | None:
    """Return the gateway's position: the one asked for, or the first; None if there is none."""
    if spec.gateway_disabled:
        if spec.gateway_ip:
            raise _bad_gateway("gateway_ip and gateway_disabled exclude each other")
        return None
    first, last = address_store.usable(network)
    if not spec.gateway_ip:
        return first
    address = ipaddress.ip_address(spec.gateway_ip)
    if address.version != network.version:
        raise _bad_gateway(f"{address} is not in {network}")
    where = address_store.position(network, address)
    if not first <= where <= last:
        raise _bad_gateway(f"{address} is not a host's address in {network}")
    return where


def _lay_out(
    network: IpNetwork, spec: subnet_pb2.SubnetSpec, gateway: int | None, *, with_service: bool
) -> tuple[Pools, int | None]:
    """Return the pools, and the position of the address where hosts serve DHCP and metadata.

    That is the lowest address that is neither the gateway's nor in a pool that was asked for (the
    second of a subnet, usually); where pools leave none, the lowest of the first pool. On every
    host it is the same. A network of the outside world has none.
    """
    first, last = address_store.usable(network)
    asked = _asked_pools(network, spec, gateway)
    pools = asked or _without([(first, last)], gateway)
    service = None
    if with_service and pools:
        free = [(first, last)] if not asked else _complement(asked, first, last)
        free = _without(free, gateway)
        service = free[0][0] if free else pools[0][0]
        pools = _without(pools, service)
    if not pools:
        raise errors.bad_field("spec.cidr", f"{network} has no address left for ports")
    return pools, service


def _asked_pools(network: IpNetwork, spec: subnet_pb2.SubnetSpec, gateway: int | None) -> Pools:
    first, last = address_store.usable(network)
    pools: Pools = []
    for pool in spec.allocation_pools:
        ends = [ipaddress.ip_address(text) for text in (pool.first_ip, pool.last_ip)]
        text = f"{pool.first_ip} to {pool.last_ip}"
        if any(address.version != network.version for address in ends):
            raise _bad_pool(f"{text} is not in {network}")
        low, high = (address_store.position(network, address) for address in ends)
        if not first <= low <= high <= last:
            raise _bad_pool(f"{text} is not a range of hosts' addresses in {network}")
        if gateway is not None and low <= gateway <= high:
            raise _bad_pool(f"{text} contains the gateway")
        pools.append((low, high))
    pools.sort()
    for (_, end), (start, _) in zip(pools, pools[1:], strict=False):
        if start <= end:
            raise _bad_pool("allocation_pools overlap")
    return pools


def _without(pools: Pools, where: int | None) -> Pools:
    """Return ranges without one position."""
    if where is None:
        return pools
    cut: Pools = []
    for low, high in pools:
        if low <= where <= high:
            cut += [(low, where - 1), (where + 1, high)]
        else:
            cut.append((low, high))
    return [(low, high) for low, high in cut if low <= high]


def _complement(pools: Pools, first: int, last: int) -> Pools:
    """Return the ranges from first to last that sorted pools leave out."""
    gaps: Pools = []
    start = first
    for low, high in pools:
        gaps.append((start, low - 1))
        start = high + 1
    gaps.append((start, last))
    return [(low, high) for low, high in gaps if low <= high]


def update(work: Mutation, request: subnet_service_pb2.UpdateSubnetRequest) -> subnet_pb2.Subnet:
    """Change name, labels or DNS servers."""
    network, row = get_own(work.caller, request.id)
    convert.apply_mask(row, request, subnet_pb2.SubnetSpec, ("name", "labels", "spec.dns_servers"))
    row.save()
    work.concerns("subnet", row.id, row.name, row.project_id)
    _log_changes(network, row, "MODIFIED")
    dataplane_store.bump(dataplane_store.hosts_of_networks([row.network_id]))
    return message(row)


def delete(work: Mutation, request: subnet_service_pb2.DeleteSubnetRequest) -> subnet_pb2.Subnet:
    """Delete a subnet of which no port has an address."""
    network, row = get_own(work.caller, request.id)
    convert.require_version(row, request.resource_version)
    ports = address_store.holders(row.id)
    if ports:
        names = ", ".join(port.id for port in ports)
        raise errors.WrongState(
            "SUBNET_IN_USE", f"ports have addresses of {row.cidr}: {names}", ports=names
        )
    row.delete_time = database.now()
    answer = message(row)
    AllocationPool.delete().where(AllocationPool.subnet_id == row.id).execute()
    row.delete_instance()
    work.concerns("subnet", row.id, row.name, row.project_id)
    _log_changes(network, row, "DELETED")
    dataplane_store.bump(dataplane_store.hosts_of_networks([row.network_id]))
    return answer


def _log_changes(network: Network, row: Subnet, change: str) -> None:
    everybody = network.shared or network.external
    tables.changed("subnet", row.id, "" if everybody else row.project_id, change)
    if change != "MODIFIED":
        network_store.log_change(network)


def list_page(
    caller: auth.Caller, request: subnet_service_pb2.ListSubnetsRequest
) -> subnet_service_pb2.ListSubnetsResponse:
    """Return a page of the subnets that the caller sees."""
    revision = shared.revision()
    page = listing.page(
        Subnet,
        request,
        caller,
        fields={"id": Subnet.id, "name": Subnet.name, "network_id": Subnet.network_id},
        visible=visible(caller.project_id),
    )
    return subnet_service_pb2.ListSubnetsResponse(
        subnets=messages(page.rows), next_page_token=page.next_page_token, revision=str(revision)
    )


def load(found: list[str]) -> Mapping[str, Message]:
    """Return the messages of these ids, for a watch."""
    return {m.metadata.id: m for m in messages(list(Subnet.select().where(Subnet.id.in_(found))))}


def _bad_gateway(text: str) -> errors.InvalidArgument:
    return errors.InvalidArgument("BAD_GATEWAY", text)


def _bad_pool(text: str) -> errors.InvalidArgument:
    return errors.InvalidArgument("BAD_POOL", text)
