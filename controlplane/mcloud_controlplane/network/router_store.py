"""Routers in the database: their gateways, their legs in subnets, the hosts that carry them."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import peewee
from google.protobuf.message import Message

from mcloud.network.v1 import router_pb2, router_service_pb2
from mcloud_base import errors, ids
from mcloud_controlplane.core import auth, convert, database, listing, tables
from mcloud_controlplane.core.mutation import Mutation
from mcloud_controlplane.network import (
    address_store,
    dataplane_store,
    network_store,
    port_store,
    quota_store,
    subnet_store,
)
from mcloud_controlplane.network.model import (
    Address,
    FloatingIp,
    HostDataplane,
    Network,
    Port,
    Router,
    Subnet,
    locked,
    shared,
)


def messages(rows: Sequence[Router]) -> list[router_pb2.Router]:
    """Return routers as messages, in one more statement."""
    legs: dict[str, list[tuple[str, Address]]] = {row.id: [] for row in rows}
    query: Any = (
        Address.select(Address, Port.owner_id)
        .join(Port, on=(Port.id == Address.port_id))
        .where((Port.owner_type == "router") & Port.owner_id.in_(list(legs)))
        .order_by(Port.id)
    )
    for address in query.objects():
        legs[address.owner_id].append((address.port_id, address))
    found = []
    for row in rows:
        status = router_pb2.RouterStatus(host_id=row.host_id)
        for port_id, address in legs[row.id]:
            if port_id == row.gateway_port_id:
                status.gateway_ip = address.ip_address
            else:
                status.interfaces.add(
                    subnet_id=address.subnet_id, port_id=port_id, ip_address=address.ip_address
                )
        found.append(
            router_pb2.Router(
                metadata=convert.metadata(row),
                spec=router_pb2.RouterSpec.FromString(bytes(row.spec)),
                status=status,
            )
        )
    return found


def message(row: Router) -> router_pb2.Router:
    """Return a router as its message."""
    return messages([row])[0]


def get(caller: auth.Caller, id_: str) -> Router:
    """Return a router.

    Raises:
        errors.NotFound: ROUTER_NOT_FOUND.
    """
    row = Router.find(id_)
    if row is None or not caller.sees(row.project_id):
        raise _not_found(id_)
    return row


def _get_locked(caller: auth.Caller, id_: str) -> Router:
    row = locked(Router.select().where(Router.id == id_)).get_or_none()
    if row is None or not caller.sees(row.project_id):
        raise _not_found(id_)
    return row


def external_network(caller: auth.Caller, id_: str) -> Network:
    """Return a network of the outside world, its row locked.

    Raises:
        errors.NotFound: NETWORK_NOT_FOUND.
        errors.InvalidArgument: NETWORK_NOT_EXTERNAL.
    """
    row = locked(Network.select().where(Network.id == id_)).get_or_none()
    if row is None or not (row.external or row.shared or caller.sees(row.project_id)):
        raise network_store.not_found(id_)
    if not row.external:
        raise errors.InvalidArgument(
            "NETWORK_NOT_EXTERNAL", f"network {id_} is not one of the outside world", id=id_
        )
    return row


def external_port(
    project_id: str, name: str, network_id: str, owner_type: str, owner_id: str, wanted: str = ""
) -> tuple[Port, Address]:
    """Make a port on an external network with one IPv4 address: the one wanted, or any.

    Raises:
        errors.Exhausted: NO_FREE_ADDRESS.
        errors.AlreadyExists: ADDRESS_IN_USE.
        errors.InvalidArgument: BAD_FIELD.
    """
    port = port_store.insert_for_service(
        _port_columns(name, project_id), network_id, owner_type, owner_id
    )
    if not wanted:
        return port, address_store.take_any(port, 4)
    query = Subnet.select().where((Subnet.network_id == network_id) & (Subnet.ip_version == 4))
    for subnet in locked(query.order_by(Subnet.id)):
        if ipaddress.ip_address(wanted) in ipaddress.ip_network(subnet.cidr):
            if wanted == subnet.gateway_ip:
                break
            return port, address_store.take(subnet, wanted, port.id)
    raise errors.bad_field(
        "spec.floating_ip_address", f"{wanted} is not an address of the external network"
    )


def _port_columns(name: str, project_id: str) -> dict[str, object]:
    moment = database.now()
    return {
        "id": ids.new("port"),
        "name": name,
        "project_id": project_id,
        "create_time": moment,
        "update_time": moment,
    }


def create(work: Mutation, request: router_service_pb2.CreateRouterRequest) -> router_pb2.Router:
    """Make a router, and place it on a host if one is there."""
    project_id = work.caller.project_id
    spec = request.spec
    if spec.external_network_id:
        external_network(work.caller, spec.external_network_id)
    quota_store.ensure_room(project_id, "router")
    row = Router.create(
        **convert.new_row("rtr", request, project_id), snat_enabled=not spec.snat_disabled
    )
    _set_gateway(row, spec.external_network_id)
    place(row, _choose_host())
    work.concerns("router", row.id, row.name)
    tables.changed("router", row.id, project_id, "ADDED")
    return message(row)


def _set_gateway(row: Router, network_id: str) -> set[str]:
    """Give a router its leg in an external network, or take it away.

    Returns:
        The hosts that have to know, beside the router's own.
    """
    concerned = set()
    if row.gateway_port_id:
        old = Port.get_by_id(row.gateway_port_id)
        concerned = dataplane_store.hosts_of_networks([old.network_id]) | port_store.remove(old)
        row.gateway_port_id = ""
    row.external_network_id = network_id
    if network_id:
        port, _ = external_port(
            row.project_id, f"gateway of {row.name}"[:255], network_id, "router", row.id
        )
        row.gateway_port_id = port.id
        concerned |= dataplane_store.hosts_of_networks([network_id])
    row.save()
    return concerned


def _choose_host() -> str:
    """Return the host with the fewest routers, among those with a living session.

    Those that say that they reach the outside world come first; empty if there is no host.
    """
    session = shared.host_session
    load = Router.select(peewee.fn.COUNT(Router.id)).where(Router.host_id == session.host_id)
    row = (
        session.select(session.host_id)
        .join(HostDataplane, on=(HostDataplane.host_id == session.host_id))
        .where(shared.connected())
        .order_by(HostDataplane.gateway.desc(), load, session.host_id)
        .limit(1)
        .tuples()
        .first()
    )
    return str(row[0]) if row else ""


def place(row: Router, host_id: str, also: Iterable[str] = ()) -> None:
    """Have a host carry a router; tell it and all who have ports on the router's networks.

    Args:
        also: further hosts to tell.
    """
    if host_id and not row.host_id:
        row.host_id = host_id
        row.save()
    legs = list(Port.select().where((Port.owner_type == "router") & (Port.owner_id == row.id)))
    networks = [port.network_id for port in legs]
    dataplane_store.lock_networks(networks)
    if row.host_id:
        fresh = [port for port in legs if port.host_id != row.host_id]
        Port.update(host_id=row.host_id, state="BUILD").where(
            Port.id.in_([port.id for port in fresh])
        ).execute()
        for port in fresh:
            tables.changed("port", port.id, port.project_id)
        hosts = {row.host_id, *dataplane_store.hosts_of_networks(networks), *also}
        generations = dataplane_store.bump(hosts)
        Port.update(bound_generation=generations[row.host_id]).where(
            Port.id.in_([port.id for port in fresh])
        ).execute()


def place_waiting(host_id: str) -> None:
    """Place the routers for which there was no host yet."""
    query = Router.select().where(Router.host_id == "").order_by(Router.id)
    for row in list(locked(query)):
        place(row, host_id)
        row.version += 1
        row.save()
        tables.changed("router", row.id, row.project_id)


def update(work: Mutation, request: router_service_pb2.UpdateRouterRequest) -> router_pb2.Router:
    """Change name, labels, description, gateway or SNAT."""
    row = _get_locked(work.caller, request.id)
    spec = convert.apply_mask(
        row,
        request,
        router_pb2.RouterSpec,
        (
            "name",
            "labels",
            "spec.description",
            "spec.external_network_id",
            "spec.snat_disabled",
        ),
    )
    row.snat_enabled = not spec.snat_disabled
    concerned: set[str] = set()
    if spec.external_network_id != row.external_network_id:
        leading = FloatingIp.get_or_none(FloatingIp.router_id == row.id)
        if leading is not None:
            raise errors.WrongState(
                "ROUTER_IN_USE",
                f"floating address {leading.floating_ip_address} leads through router {row.id}",
                floating_ip=leading.id,
            )
        if spec.external_network_id:
            external_network(work.caller, spec.external_network_id)
        concerned = _set_gateway(row, spec.external_network_id)
    row.save()
    place(row, row.host_id, concerned)
    work.concerns("router", row.id, row.name, row.project_id)
    tables.changed("router", row.id, row.project_id)
    return message(row)


def delete(work: Mutation, request: router_service_pb2.DeleteRouterRequest) -> router_pb2.Router:
    """Delete a router that joins no subnets."""
    row = _get_locked(work.caller, request.id)
    convert.require_version(row, request.resource_version)
    interfaces = list(_interfaces(row))
    if interfaces:
        names = ", ".join(address.subnet_id for address in interfaces)
        raise errors.WrongState(
            "ROUTER_IN_USE", f"router {row.id} has interfaces in {names}", subnets=names
        )
    row.delete_time = database.now()
    answer = message(row)
    concerned = _set_gateway(row, "") | {row.host_id}
    row.delete_instance()
    dataplane_store.bump(concerned)
    work.concerns("router", row.id, row.name, row.project_id)
    tables.changed("router", row.id, row.project_id, "DELETED")
    return answer


def _interfaces(row: Router) -> peewee.ModelSelect[Address]:
    """Return the addresses of a router's legs, but for its gateway."""
    return (
        Address.select()
        .join(Port, on=(Port.id == Address.port_id))
        .where(
            (Port.owner_type == "router")
            & (Port.owner_id == row.id)
            & (Port.id != row.gateway_port_id)
        )
        .order_by(Port.id)
    )


def add_interface(
    work: Mutation, request: router_service_pb2.AddRouterInterfaceRequest
) -> router_pb2.Router:
    """Join a subnet to a router, at the subnet's gateway address."""
    row = _get_locked(work.caller, request.id)
    _, subnet = subnet_store.get_own(work.caller, request.subnet_id)
    if subnet.ip_version != 4:
        raise errors.bad_field("subnet_id", "routers join IPv4 subnets only")
    if not subnet.gateway_ip:
        raise errors.WrongState(
            "SUBNET_WITHOUT_GATEWAY", f"subnet {subnet.id} has no gateway address for a router"
        )
    cidr = ipaddress.ip_network(subnet.cidr)
    query = Subnet.select().where(Subnet.id.in_([leg.subnet_id for leg in _interfaces(row)]))
    for other in query:
        if ipaddress.ip_network(other.cidr).overlaps(cidr):
            raise errors.WrongState(
                "SUBNET_OVERLAPS", f"{cidr} overlaps {other.cidr}, which the router has already"
            )
    port = port_store.insert_for_service(
        _port_columns(f"leg of {row.name}"[:255], row.project_id),
        subnet.network_id,
        "router",
        row.id,
    )
    address_store.take(subnet, subnet.gateway_ip, port.id)
    return _joined(work, row, set())


def remove_interface(
    work: Mutation, request: router_service_pb2.RemoveRouterInterfaceRequest
) -> router_pb2.Router:
    """Take a subnet off a router; nothing happens if it is not joined to it."""
    row = _get_locked(work.caller, request.id)
    subnet = subnet_store.get(work.caller, request.subnet_id)
    network = ipaddress.ip_network(subnet.cidr)
    for address in _interfaces(row).where(Address.subnet_id == subnet.id):
        for leading in FloatingIp.select().where(FloatingIp.router_id == row.id):
            if ipaddress.ip_address(leading.fixed_ip_address) in network:
                raise errors.WrongState(
                    "INTERFACE_IN_USE",
                    f"floating address {leading.floating_ip_address} leads through it",
                    floating_ip=leading.id,
                )
        dataplane_store.lock_networks([subnet.network_id])
        concerned = dataplane_store.hosts_of_networks([subnet.network_id])
        port_store.remove(Port.get_by_id(address.port_id))
        return _joined(work, row, concerned)
    work.concerns("router", row.id, row.name, row.project_id)
    return message(row)


def _joined(work: Mutation, row: Router, concerned: set[str]) -> router_pb2.Router:
    row.version += 1
    row.update_time = database.now()
    row.save()
    place(row, row.host_id or _choose_host(), concerned)
    work.concerns("router", row.id, row.name, row.project_id)
    tables.changed("router", row.id, row.project_id)
    return message(row)


def list_page(
    caller: auth.Caller, request: router_service_pb2.ListRoutersRequest
) -> router_service_pb2.ListRoutersResponse:
    """Return a page of routers."""
    revision = shared.revision()
    page = listing.page(Router, request, caller, fields={"id": Router.id, "name": Router.name})
    return router_service_pb2.ListRoutersResponse(
        routers=messages(page.rows), next_page_token=page.next_page_token, revision=str(revision)
    )


def load(found: list[str]) -> Mapping[str, Message]:
    """Return the messages of these ids, for a watch."""
    return {m.metadata.id: m for m in messages(list(Router.select().where(Router.id.in_(found))))}


def _not_found(id_: str) -> errors.NotFound:
    return errors.NotFound("ROUTER_NOT_FOUND", f"there is no router {id_}", id=id_)
