"""Ports in the database, as users make and see them."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import peewee
from google.protobuf.message import Message

from mcloud.common.v1 import options_pb2
from mcloud.network.v1 import port_pb2, port_service_pb2
from mcloud_base import errors
from mcloud_controlplane.core import auth, contract, convert, database, listing, tables
from mcloud_controlplane.core.model import Prepared
from mcloud_controlplane.core.mutation import Mutation
from mcloud_controlplane.network import (
    address_store,
    dataplane_document,
    dataplane_store,
    network_store,
    quota_store,
    security_group_store,
)
from mcloud_controlplane.network.model import (
    Address,
    FloatingIp,
    Network,
    Port,
    PortGroup,
    Quota,
    Router,
    SecurityGroup,
    lock,
    locked,
    shared,
)
from mcloud_controlplane.network.model import database as opened

_MAC_PREFIX = "fa:16:3e"  # locally administered; OpenStack's habit


_GROUPS = Prepared(
    PortGroup,
    lambda port_ids: (
        PortGroup.select(PortGroup.port_id, PortGroup.security_group_id)
        .where(PortGroup.port_id.in_(port_ids))
        .order_by(PortGroup.security_group_id)
        .tuples()
    ),
)


def messages(rows: Sequence[Port]) -> list[port_pb2.Port]:
    """Return ports as messages, in two more statements."""
    found = [row.id for row in rows]
    addresses = address_store.of_ports(found)
    groups: dict[str, list[str]] = {id_: [] for id_ in found}
    for port_id, group_id in _GROUPS.rows(found):
        groups[port_id].append(group_id)
    return [_message(row, addresses[row.id], groups[row.id]) for row in rows]


def _message(row: Port, addresses: Sequence[Address], group_ids: Sequence[str]) -> port_pb2.Port:
    return port_pb2.Port(
        metadata=convert.metadata(row),
        spec=port_pb2.PortSpec.FromString(bytes(row.spec)),
        status=port_pb2.PortStatus(
            state=contract.enum_value(row.state, port_pb2.PortStatus.State),
            mac=row.mac,
            fixed_ips=[dataplane_document.fixed_ip(address) for address in addresses],
            security_group_ids=group_ids,
            owner_type=row.owner_type,
            owner_id=row.owner_id,
            delete_with_owner=row.delete_with_owner,
            host_id=row.host_id,
            domain_id=row.domain_id,
        ),
    )


def message(row: Port) -> port_pb2.Port:
    """Return a port as its message."""
    return messages([row])[0]


def get(caller: auth.Caller, id_: str) -> Port:
    """Return a port.

    Raises:
        errors.NotFound: PORT_NOT_FOUND.
    """
    row = Port.find(id_)
    if row is None or not caller.sees(row.project_id):
        raise not_found(id_)
    return row


def find_locked(id_: str) -> Port | None:
    """Return a port, its row locked; None if there is none."""
    return Port.find_locked(id_)


def get_locked(caller: auth.Caller, id_: str) -> Port:
    """Return a port that the caller may change, its row locked.

    Raises:
        errors.NotFound: PORT_NOT_FOUND.
    """
    row = find_locked(id_)
    if row is None or not caller.sees(row.project_id):
        raise not_found(id_)
    return row


def not_found(id_: str) -> errors.NotFound:
    """Return the error for a port that is not there, or not for the caller."""
    return errors.NotFound("PORT_NOT_FOUND", f"there is no port {id_}", id=id_)


def create(work: Mutation, request: port_service_pb2.CreatePortRequest) -> port_pb2.Port:
    """Make a port of a user's own."""
    if request.spec.port_security_disabled and (work.caller.role < options_pb2.Rule.ROLE_MANAGER):
        raise errors.PermissionDenied(
            "ROLE_REQUIRED", "a port without port security needs the role manager"
        )
    columns = convert.new_row("port", request, work.caller.project_id)
    room = get_room(columns["project_id"], request.spec.network_id, columns["id"])
    made = insert(room, columns, request.spec)
    work.concerns("port", made.metadata.id, made.metadata.name)
    return made


class Room(NamedTuple):
    """What a port that is to be made depends on.

    Args:
        project_id: the network's.
        limit: of the project's ports; None: it has no row yet.
        default_group_id: the project's; None: it has none yet.
        port_id: the port's own, if it is there already.
    """

    network_id: str
    project_id: str
    shared: bool
    external: bool
    limit: int | None
    default_group_id: str | None
    port_id: str | None


def get_room(project_id: str, network_id: str, port_id: str) -> Room:
    """Return what a project's port on a network depends on, in one statement. Locked.

    Raises:
        errors.NotFound: NETWORK_NOT_FOUND.
    """
    if opened.for_update:
        lock(Network.select(Network.id).where(Network.id == network_id))
        lock(Quota.select(Quota.project_id).where(Quota.project_id == project_id))
    for columns in _ROOM.rows([network_id], [project_id], [port_id]):
        return Room(*columns)
    raise network_store.not_found(network_id)


_ROOM = Prepared(
    Network,
    lambda network_ids, project_ids, port_ids: (
        Network.select(
            Network.id,
            Network.project_id,
            Network.shared,
            Network.external,
            Quota.port_count,
            SecurityGroup.id,
            Port.id,
        )
        .join(Quota, peewee.JOIN.LEFT_OUTER, on=(Quota.project_id == project_ids[0]))
        .join(
            SecurityGroup,
            peewee.JOIN.LEFT_OUTER,
            on=(SecurityGroup.project_id == project_ids[0])
            & (SecurityGroup.name == security_group_store.DEFAULT),
        )
        .join(Port, peewee.JOIN.LEFT_OUTER, on=(Port.id == port_ids[0]))
        .where(Network.id == network_ids[0])
        .tuples()
    ),
)


def insert(
    room: Room, columns: dict[str, Any], spec: port_pb2.PortSpec, **more: Any
) -> port_pb2.Port:
    """Make a port for a guest: quota, Ethernet address, addresses, groups.

    Args:
        columns: those of every resource (convert.new_row).
        more: further columns.
    """
    project_id = columns["project_id"]
    network_store.ensure_usable(
        room.network_id,
        project_id,
        room.project_id,
        shared=room.shared,
        external=room.external,
    )
    if spec.port_security_disabled and room.project_id != project_id:
        raise errors.PermissionDenied(
            "NOT_OWNER", "a port without port security needs a network of its project's own"
        )
    if room.limit is None:
        quota_store.ensure_room(project_id, "port")
    else:
        quota_store.ensure_within(room.limit, project_id, "port")
    groups = (
        []
        if spec.port_security_disabled
        else security_group_store.resolve(
            project_id, spec.security_group_ids, room.default_group_id
        )
    )
    row = Port.create(
        **columns,
        network_id=room.network_id,
        mac=_mac(spec.mac),
        port_security_enabled=not spec.port_security_disabled,
        **more,
    )
    addresses = address_store.assign(row, spec.fixed_ips)
    _join_groups(row, groups)
    tables.changed("port", row.id, project_id, "ADDED")
    return _message(row, addresses, sorted(groups))


def insert_for_service(
    columns: dict[str, Any], network_id: str, owner_type: str, owner_id: str
) -> Port:
    """Make the port of a router or a floating address; its addresses are up to the caller."""
    row = Port.create(
        **columns,
        network_id=network_id,
        mac=_mac(""),
        port_security_enabled=False,
        owner_type=owner_type,
        owner_id=owner_id,
        delete_with_owner=True,
    )
    tables.changed("port", row.id, row.project_id, "ADDED")
    return row


def _mac(wanted: str) -> str:
    """Return an Ethernet address: the one wanted, if it is free, or any.

    Any is as good as free: there are 16 million, and if it is not, the unit is run again.

    Raises:
        errors.AlreadyExists: MAC_IN_USE.
        errors.InvalidArgument: BAD_FIELD, it is a group's.
    """
    if not wanted:
        return ":".join([_MAC_PREFIX, *(f"{octet:02x}" for octet in secrets.token_bytes(3))])
    if int(wanted[:2], 16) & 1:
        raise errors.bad_field("spec.mac", "must be an address of one interface, not of a group")
    if Port.select().where(Port.mac == wanted).exists():
        raise errors.AlreadyExists("MAC_IN_USE", f"another port has {wanted}", mac=wanted)
    return wanted


def _join_groups(row: Port, group_ids: Sequence[str]) -> None:
    for id_ in group_ids:
        PortGroup.create(port_id=row.id, security_group_id=id_)


def update(work: Mutation, request: port_service_pb2.UpdatePortRequest) -> port_pb2.Port:
    """Change name, labels or security groups."""
    row = get_locked(work.caller, request.id)
    spec = convert.apply_mask(
        row, request, port_pb2.PortSpec, ("name", "labels", "spec.security_group_ids")
    )
    concerned: set[str] = set()
    if "spec.security_group_ids" in request.update_mask.paths:
        if not row.port_security_enabled:
            raise errors.bad_field(
                "spec.security_group_ids", "a port without port security has no groups"
            )
        dataplane_store.lock_around(row)
        concerned = dataplane_store.hosts_following(dataplane_store.groups_of(row.id))
        PortGroup.delete().where(PortGroup.port_id == row.id).execute()
        _join_groups(row, security_group_store.resolve(row.project_id, spec.security_group_ids))
        dataplane_store.lock_around(row)
        concerned |= dataplane_store.hosts_following(dataplane_store.groups_of(row.id))
    row.save()
    work.concerns("port", row.id, row.name, row.project_id)
    tables.changed("port", row.id, row.project_id)
    if row.host_id:
        dataplane_store.bump(concerned | {row.host_id})
    return message(row)


def delete(work: Mutation, request: port_service_pb2.DeletePortRequest) -> port_pb2.Port:
    """Delete a port that nobody uses."""
    row = get_locked(work.caller, request.id)
    convert.require_version(row, request.resource_version)
    if row.owner_type:
        raise errors.WrongState(
            "PORT_IN_USE",
            f"port {row.id} is used by {row.owner_type} {row.owner_id}",
            owner=row.owner_id,
        )
    row.delete_time = database.now()
    answer = message(row)
    dataplane_store.bump(remove(row))
    work.concerns("port", row.id, row.name, row.project_id)
    return answer


def remove(row: Port) -> set[str]:
    """Delete a port with all that it has; floating addresses that led to it lead nowhere then.

    Returns:
        The hosts that have to know.
    """
    leading = list(locked(FloatingIp.select().where(FloatingIp.port_id == row.id)))
    routers = Router.select(Router.host_id).where(Router.id.in_([f.router_id for f in leading]))
    concerned = {router.host_id for router in routers}
    for address in leading:
        address.port_id = address.fixed_ip_address = address.router_id = ""
        address.version += 1
        address.save()
        tables.changed("floating_ip", address.id, address.project_id)
    address_store.give_back(row.id)
    PortGroup.delete().where(PortGroup.port_id == row.id).execute()
    row.delete_instance()
    tables.changed("port", row.id, row.project_id, "DELETED")
    return concerned


def list_page(
    caller: auth.Caller, request: port_service_pb2.ListPortsRequest
) -> port_service_pb2.ListPortsResponse:
    """Return a page of ports."""
    revision = shared.revision()

    def has_address(text: str) -> Any:
        return Port.id.in_(Address.select(Address.port_id).where(Address.ip_address == text))

    page = listing.page(
        Port,
        request,
        caller,
        fields={
            "id": Port.id,
            "name": Port.name,
            "network_id": Port.network_id,
            "owner_id": Port.owner_id,
            "host_id": Port.host_id,
            "mac": Port.mac,
            "ip_address": has_address,
        },
    )
    return port_service_pb2.ListPortsResponse(
        ports=messages(page.rows), next_page_token=page.next_page_token, revision=str(revision)
    )


def load(found: list[str]) -> Mapping[str, Message]:
    """Return the messages of these ids, for a watch."""
    return {m.metadata.id: m for m in messages(list(Port.select().where(Port.id.in_(found))))}
