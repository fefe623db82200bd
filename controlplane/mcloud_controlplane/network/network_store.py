"""Networks in the database."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import peewee
from google.protobuf.message import Message

from mcloud.common.v1 import options_pb2
from mcloud.network.v1 import network_pb2, network_service_pb2
from mcloud_base import errors
from mcloud_controlplane.core import auth, convert, database, listing, tables
from mcloud_controlplane.core.mutation import Mutation
from mcloud_controlplane.network import dataplane_store, quota_store
from mcloud_controlplane.network.model import (
    AllocationPool,
    Network,
    Port,
    Subnet,
    locked,
    shared,
)

# The overlay's header: 14 Ethernet, 20 IPv4, 8 UDP, 8 VXLAN. Source: RFC 7348, section 5.
OVERLAY_BYTES = 50
_FIRST_VNI = 4097  # above the VLAN ids, so that nobody takes one for the other
_LAST_VNI = (1 << 24) - 1
_LEAST_MTU = 1280  # of IPv6; RFC 8200, section 5


def messages(rows: Sequence[Network]) -> list[network_pb2.Network]:
    """Return networks as messages, in one more statement."""
    subnets: dict[str, list[str]] = {row.id: [] for row in rows}
    query = Subnet.select(Subnet.id, Subnet.network_id).where(Subnet.network_id.in_(list(subnets)))
    for subnet in query.order_by(Subnet.id):
        subnets[subnet.network_id].append(subnet.id)
    return [
        network_pb2.Network(
            metadata=convert.metadata(row),
            spec=network_pb2.NetworkSpec.FromString(bytes(row.spec)),
            status=network_pb2.NetworkStatus(vni=row.vni, mtu=row.mtu, subnet_ids=subnets[row.id]),
        )
        for row in rows
    ]


def message(row: Network) -> network_pb2.Network:
    """Return a network as its message."""
    return messages([row])[0]


def visible(project_id: str) -> Any:
    """Return the condition for networks that a project sees."""
    return (Network.project_id == project_id) | Network.shared | Network.external


def get(caller: auth.Caller, id_: str) -> Network:
    """Return a network that the caller sees.

    Raises:
        errors.NotFound: NETWORK_NOT_FOUND.
    """
    row = Network.find(id_)
    if row is None or not (row.shared or row.external or caller.sees(row.project_id)):
        raise not_found(id_)
    return row


def get_own(caller: auth.Caller, id_: str) -> Network:
    """Return a network that the caller may change, its row locked.

    Raises:
        errors.NotFound: NETWORK_NOT_FOUND.
        errors.PermissionDenied: NOT_OWNER, it is only shared with the caller.
    """
    row = locked(Network.select().where(Network.id == id_)).get_or_none()
    if row is None or not (row.shared or row.external or caller.sees(row.project_id)):
        raise not_found(id_)
    if not caller.sees(row.project_id):
        raise errors.PermissionDenied(
            "NOT_OWNER", f"network {id_} is shared by another project; only that may change it"
        )
    return row


def ensure_usable(
    id_: str, project_id: str, owner_id: str, *, shared: bool, external: bool
) -> None:
    """Refuse a network on which a project may not have ports for its guests.

    Args:
        owner_id: the network's project.

    Raises:
        errors.NotFound: NETWORK_NOT_FOUND.
        errors.PermissionDenied: NETWORK_NOT_SHARED, only routers may use it.
    """
    if not (owner_id == project_id or shared or external):
        raise not_found(id_)
    if not shared and owner_id != project_id:
        raise errors.PermissionDenied(
            "NETWORK_NOT_SHARED",
            f"network {id_} is for routers and floating addresses; use one of your own",
        )


def not_found(id_: str) -> errors.NotFound:
    """Return the error for a network that is not there, or not for the caller."""
    return errors.NotFound("NETWORK_NOT_FOUND", f"there is no network {id_}", id=id_)


def log_change(row: Network, change: str = "MODIFIED") -> None:
    """Log a change; without a project where everybody sees the network."""
    everybody = row.shared or row.external
    tables.changed("network", row.id, "" if everybody else row.project_id, change)


def create(
    work: Mutation, request: network_service_pb2.CreateNetworkRequest, *, underlay_mtu: int
) -> network_pb2.Network:
    """Make a network."""
    spec = request.spec
    if spec.shared or spec.external:
        work.caller.require_system(options_pb2.Rule.ROLE_ADMIN, "a shared or external network")
    if spec.external != bool(spec.physical_network):
        raise errors.bad_field(
            "spec.physical_network",
            "must be the name under which hosts know an external network, and is for those only",
        )
    limit = underlay_mtu if spec.external else underlay_mtu - OVERLAY_BYTES
    if spec.mtu and not _LEAST_MTU <= spec.mtu <= limit:
        raise errors.bad_field("spec.mtu", f"must be from {_LEAST_MTU} to {limit}, or 0")
    project_id = work.caller.project_id
    quota_store.ensure_room(project_id, "network")
    row = Network.create(
        **convert.new_row("net", request, project_id),
        vni=_free_vni(),
        mtu=spec.mtu or limit,
        shared=spec.shared,
        external=spec.external,
        physical_network=spec.physical_network,
    )
    work.concerns("network", row.id, row.name)
    log_change(row, "ADDED")
    return message(row)


def _free_vni() -> int:
    """Return a VNI that is free: after the highest, or the lowest gap.

    Two who find the same are told apart by the unique index; the second looks again.
    """
    highest = Network.select(peewee.fn.MAX(Network.vni)).scalar()
    if highest is None:
        return _FIRST_VNI
    if highest < _LAST_VNI:
        return int(highest) + 1
    if not Network.select().where(Network.vni == _FIRST_VNI).exists():
        return _FIRST_VNI
    following = Network.alias()
    gap = (
        Network.select(Network.vni + 1)
        .where(
            (Network.vni < _LAST_VNI)
            & ~peewee.fn.EXISTS(
                following.select(following.vni).where(following.vni == Network.vni + 1)
            )
        )
        .order_by(Network.vni)
        .limit(1)
        .scalar()
    )
    if gap is None:
        raise errors.Exhausted("NO_FREE_VNI", "every network identifier of the overlay is in use")
    return int(gap)


def update(
    work: Mutation, request: network_service_pb2.UpdateNetworkRequest
) -> network_pb2.Network:
    """Change name, labels or description."""
    row = get_own(work.caller, request.id)
    convert.apply_mask(
        row, request, network_pb2.NetworkSpec, ("name", "labels", "spec.description")
    )
    row.save()
    work.concerns("network", row.id, row.name, row.project_id)
    log_change(row)
    return message(row)


def delete(
    work: Mutation, request: network_service_pb2.DeleteNetworkRequest
) -> network_pb2.Network:
    """Delete a network without ports, and its subnets with it."""
    row = get_own(work.caller, request.id)
    convert.require_version(row, request.resource_version)
    ports = list(Port.select(Port.id).where(Port.network_id == row.id).order_by(Port.id).limit(5))
    if ports:
        names = ", ".join(port.id for port in ports)
        raise errors.WrongState(
            "NETWORK_IN_USE", f"network {row.id} has ports: {names}; delete them first", ports=names
        )
    row.delete_time = database.now()
    answer = message(row)
    dataplane_store.bump(dataplane_store.hosts_of_networks([row.id]))
    subnets = list(Subnet.select().where(Subnet.network_id == row.id))
    found = [subnet.id for subnet in subnets]
    AllocationPool.delete().where(AllocationPool.subnet_id.in_(found)).execute()
    Subnet.delete().where(Subnet.network_id == row.id).execute()
    row.delete_instance()
    for subnet in subnets:
        everybody = row.shared or row.external
        tables.changed("subnet", subnet.id, "" if everybody else subnet.project_id, "DELETED")
    work.concerns("network", row.id, row.name, row.project_id)
    log_change(row, "DELETED")
    return answer


def list_page(
    caller: auth.Caller, request: network_service_pb2.ListNetworksRequest
) -> network_service_pb2.ListNetworksResponse:
    """Return a page of the networks that the caller sees."""
    revision = shared.revision()
    page = listing.page(
        Network,
        request,
        caller,
        fields={"id": Network.id, "name": Network.name, "external": Network.external},
        visible=visible(caller.project_id),
    )
    return network_service_pb2.ListNetworksResponse(
        networks=messages(page.rows),
        next_page_token=page.next_page_token,
        revision=str(revision),
    )


def load(found: list[str]) -> Mapping[str, Message]:
    """Return the messages of these ids, for a watch."""
    return {m.metadata.id: m for m in messages(list(Network.select().where(Network.id.in_(found))))}
