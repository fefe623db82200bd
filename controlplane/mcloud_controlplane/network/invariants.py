"""What the network's records always are (core/invariants.py), and how far hosts are with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import peewee
from google.rpc import status_pb2

from mcloud.network.v1 import invariant_service_pb2 as pb
from mcloud.network.v1 import invariant_service_pb2_grpc
from mcloud_controlplane.core import database, invariants, tables
from mcloud_controlplane.core.auth import Context
from mcloud_controlplane.core.invariants import Invariant, Violation
from mcloud_controlplane.network import address_store, dataplane_store, port_store, router_store
from mcloud_controlplane.network.model import (
    Address,
    FloatingIp,
    HostDataplane,
    Port,
    PortGroup,
    Router,
    SecurityGroup,
    locked,
    shared,
)

_PAGE = 1000
_exists: Callable[[Any], Any] = peewee.fn.EXISTS


def _addresses() -> Iterator[Violation]:
    query = Address.select().where(~_exists(Port.select(Port.id).where(Port.id == Address.port_id)))
    for row in query.order_by(Address.ip_address):
        yield Violation(
            subject=row.port_id,
            owner_id=row.subnet_id,
            detail=f"address {row.ip_address} is held for a port that is not there",
        )


def _free_address(violation: Violation) -> bool:
    if port_store.find_locked(violation.subject) is not None:
        return False
    found = Address.select().where(Address.port_id == violation.subject).exists()
    address_store.give_back(violation.subject)
    return found


def _unowned() -> Any:
    router = Router.select(Router.id).where(Router.id == Port.owner_id)
    floating = FloatingIp.select(FloatingIp.id).where(FloatingIp.id == Port.owner_id)
    return ((Port.owner_type == "router") & ~_exists(router)) | (
        (Port.owner_type == "floating_ip") & ~_exists(floating)
    )


def _ports() -> Iterator[Violation]:
    for row in Port.select().where(_unowned()).order_by(Port.id):
        what = row.owner_type.replace("_", " ")
        yield Violation(
            subject=row.id,
            owner_id=row.owner_id,
            host_id=row.host_id,
            detail=f"it is the port of a {what} that is not there",
        )


def _remove_port(violation: Violation) -> bool:
    row = locked(Port.select().where((Port.id == violation.subject) & _unowned())).first()
    if row is None:
        return False
    concerned = {row.host_id} | dataplane_store.hosts_of_networks([row.network_id])
    dataplane_store.bump(concerned | port_store.remove(row))
    return True


def _leads_nowhere() -> Any:
    target = Port.select(Port.id).where(Port.id == FloatingIp.port_id)
    return (FloatingIp.port_id != "") & ~_exists(target)


def _floating_ips() -> Iterator[Violation]:
    held = Port.select(Port.id).where(Port.id == FloatingIp.address_port_id)
    for row in FloatingIp.select().where(_leads_nowhere()).order_by(FloatingIp.id):
        yield Violation(
            subject=row.id,
            owner_id=row.port_id,
            detail=f"{row.floating_ip_address} leads to a port that is not there",
            repair="have it lead nowhere",
        )
    for row in FloatingIp.select().where(~_exists(held)).order_by(FloatingIp.id):
        yield Violation(
            subject=row.id,
            owner_id=row.address_port_id,
            detail=f"no port holds {row.floating_ip_address}",
            repair="hold the address again, with a port of its own",
        )


def _mend_floating_ip(violation: Violation) -> bool:
    row = locked(FloatingIp.select().where(FloatingIp.id == violation.subject)).first()
    if row is None:
        return False
    if violation.owner_id == row.address_port_id:
        return _hold_again(row)
    if not row.port_id or port_store.find_locked(row.port_id) is not None:
        return False
    router = Router.find(row.router_id)
    row.port_id = row.fixed_ip_address = row.router_id = ""
    _save(row)
    dataplane_store.bump({router.host_id} if router else ())
    return True


def _hold_again(row: FloatingIp) -> bool:
    if port_store.find_locked(row.address_port_id) is not None:
        return False
    address_store.give_back(row.address_port_id)
    wanted = (row.external_network_id, "floating_ip", row.id, row.floating_ip_address)
    port, _ = router_store.external_port(row.project_id, row.name, *wanted)
    row.address_port_id = port.id
    _save(row)
    return True


def _save(row: FloatingIp) -> None:
    row.version += 1
    row.update_time = database.now()
    row.save()
    tables.changed("floating_ip", row.id, row.project_id)


def _no_member() -> Any:
    port = Port.select(Port.id).where(Port.id == PortGroup.port_id)
    group = SecurityGroup.select(SecurityGroup.id).where(
        SecurityGroup.id == PortGroup.security_group_id
    )
    return ~_exists(port) | ~_exists(group)


def _members() -> Iterator[Violation]:
    for row in PortGroup.select().where(_no_member()).order_by(PortGroup.port_id):
        yield Violation(
            subject=row.port_id,
            owner_id=row.security_group_id,
            detail="the port or the security group of a membership is not there",
        )


def _end_membership(violation: Violation) -> bool:
    this = (PortGroup.port_id == violation.subject) & (
        PortGroup.security_group_id == violation.owner_id
    )
    return bool(PortGroup.delete().where(this & _no_member()).execute())


def _macs() -> Iterator[Violation]:
    # The table's key forbids it; this proves that the key is there.
    twice = Port.select(Port.mac).group_by(Port.mac).having(peewee.fn.COUNT(Port.id) > 1)
    for row in Port.select().where(Port.mac.in_(twice)).order_by(Port.id):
        yield Violation(
            subject=row.id,
            owner_id=row.owner_id,
            detail=f"another port has {row.mac}, too; delete the one that can be spared",
        )


INVARIANTS = (
    Invariant("ADDRESS_WITHOUT_PORT", _addresses, _free_address, "free the address"),
    Invariant("PORT_WITHOUT_OWNER", _ports, _remove_port, "delete the port, free its address"),
    Invariant("FLOATING_IP_WITHOUT_PORT", _floating_ips, _mend_floating_ip),
    Invariant("GROUP_MEMBER_WITHOUT_PORT", _members, _end_membership, "end the membership"),
    Invariant("MAC_TWICE", _macs),
    invariants.of_operations(shared, ()),
)
count = invariants.count_rows(Address, Port, FloatingIp, PortGroup)


class InvariantServicer(
    invariants.InvariantServicer, invariant_service_pb2_grpc.InvariantServiceServicer
):
    """Serves mcloud.network.v1.InvariantService."""

    async def ListHostDataplanes(
        self, request: pb.ListHostDataplanesRequest, context: Context
    ) -> pb.ListHostDataplanesResponse:
        """Return how far hosts are."""
        return await self._database.read(_progress, request.after_host_id)

    async def RefreshHostDataplane(
        self, request: pb.RefreshHostDataplaneRequest, context: Context
    ) -> pb.RefreshHostDataplaneResponse:
        """Have a host go over its dataplane."""
        await self._database.write(_refresh, request)
        return pb.RefreshHostDataplaneResponse()


def _progress(after: str) -> pb.ListHostDataplanesResponse:
    session = shared.host_session
    connected = {row.host_id for row in session.select(session.host_id).where(shared.connected())}
    query = HostDataplane.select().where(HostDataplane.host_id > after)
    return pb.ListHostDataplanesResponse(
        dataplanes=[
            pb.HostDataplaneProgress(
                host_id=row.host_id,
                generation=row.generation,
                observed_generation=row.observed_generation,
                connected=row.host_id in connected,
                error=status_pb2.Status.FromString(bytes(row.error)).message if row.error else "",
            )
            for row in query.order_by(HostDataplane.host_id).limit(_PAGE)
        ]
    )


def _refresh(request: pb.RefreshHostDataplaneRequest) -> None:
    this = HostDataplane.host_id == request.host_id
    row = locked(HostDataplane.select().where(this)).first()
    if row is not None and row.generation == request.generation:
        dataplane_store.bump([request.host_id])
