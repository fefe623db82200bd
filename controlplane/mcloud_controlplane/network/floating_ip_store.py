"""Floating addresses in the database."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from google.protobuf.message import Message

from mcloud.network.v1 import floating_ip_pb2, floating_ip_service_pb2
from mcloud_base import errors
from mcloud_controlplane.core import auth, convert, database, listing, tables
from mcloud_controlplane.core.mutation import Mutation
from mcloud_controlplane.network import (
    dataplane_store,
    port_store,
    quota_store,
    router_store,
)
from mcloud_controlplane.network.model import Address, FloatingIp, Port, Router, locked, shared


def message(row: FloatingIp) -> floating_ip_pb2.FloatingIp:
    """Return a floating address as its message."""
    spec = floating_ip_pb2.FloatingIpSpec.FromString(bytes(row.spec))
    spec.port_id = row.port_id  # it leads nowhere once the port is deleted
    return floating_ip_pb2.FloatingIp(
        metadata=convert.metadata(row),
        spec=spec,
        status=floating_ip_pb2.FloatingIpStatus(
            floating_ip_address=row.floating_ip_address,
            fixed_ip_address=row.fixed_ip_address,
            router_id=row.router_id,
        ),
    )


def messages(rows: Sequence[FloatingIp]) -> list[floating_ip_pb2.FloatingIp]:
    """Return floating addresses as messages."""
    return [message(row) for row in rows]


def get(caller: auth.Caller, id_: str) -> FloatingIp:
    """Return a floating address.

    Raises:
        errors.NotFound: FLOATING_IP_NOT_FOUND.
    """
    row = FloatingIp.find(id_)
    if row is None or not caller.sees(row.project_id):
        raise _not_found(id_)
    return row


def _get_locked(caller: auth.Caller, id_: str) -> FloatingIp:
    row = locked(FloatingIp.select().where(FloatingIp.id == id_)).get_or_none()
    if row is None or not caller.sees(row.project_id):
        raise _not_found(id_)
    return row


def create(
    work: Mutation, request: floating_ip_service_pb2.CreateFloatingIpRequest
) -> floating_ip_pb2.FloatingIp:
    """Take an address of an external network, and lead it to a port if one is given."""
    project_id = work.caller.project_id
    spec = request.spec
    network = router_store.external_network(work.caller, spec.external_network_id)
    quota_store.ensure_room(project_id, "floating_ip")
    columns = convert.new_row("fip", request, project_id)
    port, address = router_store.external_port(
        project_id,
        request.name,
        network.id,
        "floating_ip",
        columns["id"],
        spec.floating_ip_address,
    )
    row = FloatingIp.create(
        **columns,
        external_network_id=network.id,
        address_port_id=port.id,
        floating_ip_address=address.ip_address,
    )
    concerned = _lead_to(work.caller, row, spec.port_id)
    row.save()
    dataplane_store.bump(concerned)
    work.concerns("floating_ip", row.id, row.name)
    tables.changed("floating_ip", row.id, project_id, "ADDED")
    return message(row)


def _lead_to(caller: auth.Caller, row: FloatingIp, port_id: str) -> set[str]:
    """Have a floating address lead to a port, or nowhere. The row is not saved.

    Returns:
        The hosts of the routers concerned.

    Raises:
        errors.NotFound: PORT_NOT_FOUND.
        errors.WrongState: NO_ROUTE_TO_PORT.
        errors.AlreadyExists: PORT_HAS_FLOATING_IP.
    """
    concerned = {router.host_id for router in Router.select().where(Router.id == row.router_id)}
    row.port_id = row.fixed_ip_address = row.router_id = ""
    if not port_id:
        return concerned
    port = port_store.get_locked(caller, port_id)
    other = FloatingIp.get_or_none((FloatingIp.port_id == port.id) & (FloatingIp.id != row.id))
    if other is not None:
        raise errors.AlreadyExists(
            "PORT_HAS_FLOATING_IP",
            f"{other.floating_ip_address} leads to port {port.id} already",
            floating_ip=other.id,
        )
    router, address = _route(row.external_network_id, port)
    row.port_id = port.id
    row.fixed_ip_address = address
    row.router_id = router.id
    return concerned | {router.host_id}


def _route(external_network_id: str, port: Port) -> tuple[Router, str]:
    """Return the router that joins a port's subnet with an external network, and the address.

    Its row is locked, so that the way stays while the floating address is written.
    """
    own = Address.select().where((Address.port_id == port.id) & (Address.ip_version == 4))
    for address in list(own.order_by(Address.number)):
        legs = (
            Port.select(Port.owner_id)
            .join(Address, on=(Address.port_id == Port.id))
            .where((Port.owner_type == "router") & (Address.subnet_id == address.subnet_id))
        )
        for router_id in [leg.owner_id for leg in legs.order_by(Port.id)]:
            router = locked(
                Router.select().where(
                    (Router.id == router_id) & (Router.external_network_id == external_network_id)
                )
            ).get_or_none()
            # Looked up again under the lock: the leg may have gone while it was waited for.
            if router is not None and legs.where(Port.owner_id == router.id).exists():
                return router, address.ip_address
    raise errors.WrongState(
        "NO_ROUTE_TO_PORT",
        f"no router joins a subnet of port {port.id} with network {external_network_id}; "
        "add the subnet to a router that has this network as its gateway",
        port=port.id,
        network=external_network_id,
    )


def update(
    work: Mutation, request: floating_ip_service_pb2.UpdateFloatingIpRequest
) -> floating_ip_pb2.FloatingIp:
    """Change name, labels, description, or where it leads."""
    row = _get_locked(work.caller, request.id)
    spec = convert.apply_mask(
        row,
        request,
        floating_ip_pb2.FloatingIpSpec,
        ("name", "labels", "spec.port_id", "spec.description"),
    )
    if "spec.port_id" in request.update_mask.paths:
        concerned = _lead_to(work.caller, row, spec.port_id)
        row.save()
        dataplane_store.bump(concerned)
    row.save()
    work.concerns("floating_ip", row.id, row.name, row.project_id)
    tables.changed("floating_ip", row.id, row.project_id)
    return message(row)


def delete(
    work: Mutation, request: floating_ip_service_pb2.DeleteFloatingIpRequest
) -> floating_ip_pb2.FloatingIp:
    """Delete a floating address; its address can be had by others."""
    row = _get_locked(work.caller, request.id)
    convert.require_version(row, request.resource_version)
    concerned = _lead_to(work.caller, row, "")
    row.delete_time = database.now()
    answer = message(row)
    port_store.remove(Port.get_by_id(row.address_port_id))
    row.delete_instance()
    dataplane_store.bump(concerned)
    work.concerns("floating_ip", row.id, row.name, row.project_id)
    tables.changed("floating_ip", row.id, row.project_id, "DELETED")
    return answer


def list_page(
    caller: auth.Caller, request: floating_ip_service_pb2.ListFloatingIpsRequest
) -> floating_ip_service_pb2.ListFloatingIpsResponse:
    """Return a page of floating addresses."""
    revision = shared.revision()
    page = listing.page(
        FloatingIp,
        request,
        caller,
        fields={
            "id": FloatingIp.id,
            "name": FloatingIp.name,
            "port_id": FloatingIp.port_id,
            "floating_ip_address": FloatingIp.floating_ip_address,
        },
    )
    return floating_ip_service_pb2.ListFloatingIpsResponse(
        floating_ips=messages(page.rows),
        next_page_token=page.next_page_token,
        revision=str(revision),
    )


def load(found: list[str]) -> Mapping[str, Message]:
    """Return the messages of these ids, for a watch."""
    rows = FloatingIp.select().where(FloatingIp.id.in_(found))
    return {row.id: message(row) for row in rows}


def _not_found(id_: str) -> errors.NotFound:
    return errors.NotFound("FLOATING_IP_NOT_FOUND", f"there is no floating address {id_}", id=id_)
