"""Ports of instances: reserved by the conductor, bound by hosts, and given back.

The reservation is keyed by the port's id (for a user's port: with the instance's), the binding by
port and domain. Both are retired when they end, so that what comes late can change nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import peewee

from mcloud.network.v1 import dataplane_pb2, port_pb2, port_service_pb2
from mcloud_base import errors
from mcloud_controlplane.core import auth, database, effects, tables
from mcloud_controlplane.core.model import Prepared
from mcloud_controlplane.core.statements import Kept
from mcloud_controlplane.network import dataplane_document, dataplane_store, port_store
from mcloud_controlplane.network.model import (
    Address,
    HostDataplane,
    Network,
    Port,
    Subnet,
    shared,
)
from mcloud_controlplane.network.model import database as opened

_PAGE = 1000


def ensure(request: port_service_pb2.EnsurePortRequest) -> port_pb2.Port:
    """Reserve a port for an instance (step 4): made under the id given, or a user's."""
    key = f"{request.port_id}/{request.instance_id}" if request.existing else request.port_id
    effects.ensure_may(shared, key, request.lease_number)
    if not request.existing:
        # Whoever makes it or deletes it has to let its effect through first, one at a time.
        room = port_store.get_room(request.project_id, request.spec.network_id, request.port_id)
        if room.port_id is None:
            return _make(room, request)
    row = port_store.find_locked(request.port_id)
    if row is None or (request.existing and row.project_id != request.project_id):
        raise port_store.not_found(request.port_id)
    if row.owner_id not in ("", request.instance_id):
        raise errors.WrongState(
            "PORT_IN_USE",
            f"port {row.id} is used by {row.owner_type} {row.owner_id}",
            owner=row.owner_id,
        )
    if not row.owner_id:
        row.owner_type, row.owner_id = "instance", request.instance_id
        row.hostname = request.hostname
        _save(row, _OWNER)
    return port_store.message(row)


def _make(room: port_store.Room, request: port_service_pb2.EnsurePortRequest) -> port_pb2.Port:
    moment = database.now()
    columns = {
        "id": request.port_id,
        "project_id": request.project_id,
        "create_time": moment,
        "update_time": moment,
        "spec": request.spec.SerializeToString(),
    }
    return port_store.insert(
        room,
        columns,
        request.spec,
        owner_type="instance",
        owner_id=request.instance_id,
        hostname=request.hostname,
        delete_with_owner=True,
    )


def bind(
    caller: auth.Caller, request: port_service_pb2.BindPortRequest
) -> port_service_pb2.BindPortResponse:
    """Bind a port to the calling host for a domain (step 12); a repeat changes nothing."""
    delegation = caller.delegation
    if (
        delegation is None
        or request.port_id not in delegation.port_ids
        or request.domain_id != delegation.domain_id
    ):
        raise errors.PermissionDenied(
            "NOT_DELEGATED",
            f"the token does not name port {request.port_id} and domain {request.domain_id}",
        )
    row = port_store.find_locked(request.port_id)
    if row is None and not _retired(request.port_id):
        raise port_store.not_found(request.port_id)
    around = [] if row is None else _around(row, request.domain_id, caller.host_id)
    if row is None or row.owner_type != "instance" or around[0][_RETIRED]:
        raise errors.WrongState(
            "ID_RETIRED",
            f"port {request.port_id} is no longer reserved for domain {request.domain_id}",
            id=request.port_id,
        )
    wanted = (caller.host_id, request.domain_id)
    if row.host_id and (row.host_id, row.domain_id) != wanted:
        raise errors.WrongState(
            "PORT_BOUND_ELSEWHERE",
            f"port {row.id} is bound to host {row.host_id} for domain {row.domain_id}",
            host=row.host_id,
            domain=row.domain_id,
        )
    if not row.host_id:
        row.host_id, row.domain_id = wanted
        row.state = "BUILD"
        if around[0][_KNOWN] is None:  # it has not said hello yet
            dataplane_store.bump([row.host_id])
        dataplane_store.lock_around(row)
        dataplane_store.bump_around(row)
        _save_bound(row)
        tables.wake_host(row.host_id)
    return _answer(row, around)


def _around(row: Port, domain_id: str, host_id: str) -> list[Any]:
    """Return what is around a port, in one statement: a row for each subnet and each address."""
    return _AROUND.rows([row.network_id], [row.id], [_use(row.id, domain_id)], [host_id])


_AROUND = Prepared(
    Network,
    lambda network_ids, port_ids, uses, host_ids: (
        Network.select(
            *dataplane_document.SEGMENT,
            Address.number,
            Address.subnet_id,
            Address.ip_address,
            Address.prefix_len,
            shared.effect.retired,
            HostDataplane.host_id,
        )
        .join(Subnet, peewee.JOIN.LEFT_OUTER, on=(Subnet.network_id == Network.id))
        .join(Address, peewee.JOIN.LEFT_OUTER, on=(Address.port_id == port_ids[0]))
        .join(shared.effect, peewee.JOIN.LEFT_OUTER, on=(shared.effect.id == uses[0]))
        .join(HostDataplane, peewee.JOIN.LEFT_OUTER, on=(HostDataplane.host_id == host_ids[0]))
        .where(Network.id == network_ids[0])
        .order_by(Subnet.id, Address.number)
        .tuples()
    ),
)
_RETIRED, _KNOWN = -2, -1


def _answer(row: Port, around: Sequence[Any]) -> port_service_pb2.BindPortResponse:
    """Return what a host is told at once; what changes with others' ports is in its dataplane."""
    addresses = {}
    for *_, number, subnet_id, ip_address, prefix_len, _, _ in around:
        if number is not None:
            addresses[number] = dataplane_pb2.FixedIp(
                subnet_id=subnet_id, ip_address=ip_address, prefix_len=prefix_len
            )
    return port_service_pb2.BindPortResponse(
        binding=dataplane_document.binding(row, addresses.values()),
        network=dataplane_document.segments(around)[row.network_id],
        dataplane_generation=row.bound_generation,
    )


def unbind(request: port_service_pb2.UnbindPortRequest) -> port_pb2.Port:
    """Take a port off a domain that is gone; nothing happens if it is bound to another."""
    row = port_store.find_locked(request.port_id)
    effects.retire(shared, _use(request.port_id, request.domain_id), request.lease_number)
    if row is None:
        raise port_store.not_found(request.port_id)
    if row.domain_id == request.domain_id:
        dataplane_store.lock_around(row)
        dataplane_store.bump_around(row)
        row.host_id = row.domain_id = ""
        row.state = "DOWN"
        row.bound_generation = 0
        _save(row, _BINDING)
    return port_store.message(row)


def release(request: port_service_pb2.ReleasePortRequest) -> port_service_pb2.ReleasePortResponse:
    """End a reservation for good: a made port is deleted, a user's given back."""
    effects.retire(shared, f"{request.port_id}/{request.instance_id}", request.lease_number)
    row = Port.find(request.port_id)
    if row is None or row.delete_with_owner:
        # Made, or to be made; a reservation that is under way is waited for here.
        effects.retire(shared, request.port_id, request.lease_number)
    row = port_store.find_locked(request.port_id)
    if row is None or row.owner_id != request.instance_id:
        return port_service_pb2.ReleasePortResponse()
    if row.host_id:
        raise errors.WrongState(
            "PORT_BOUND",
            f"port {row.id} is bound to host {row.host_id}; unbind it first",
            host=row.host_id,
        )
    if row.delete_with_owner:
        dataplane_store.bump(port_store.remove(row))
    else:
        row.owner_type = row.owner_id = row.hostname = ""
        _save(row, _OWNER)
    return port_service_pb2.ReleasePortResponse()


def list_owned(
    request: port_service_pb2.ListOwnedPortsRequest,
) -> port_service_pb2.ListOwnedPortsResponse:
    """Return the ports that instances own, by id."""
    owned = (Port.owner_type == "instance") & (Port.id > request.after_id)
    rows = list(Port.select().where(owned).order_by(Port.id).limit(_PAGE))
    return port_service_pb2.ListOwnedPortsResponse(ports=port_store.messages(rows))


def _use(port_id: str, domain_id: str) -> str:
    return f"{port_id}/{domain_id}"


def _retired(key: str) -> bool:
    row = shared.effect.find(key)
    return row is not None and bool(row.retired)


def _save(row: Port, columns: tuple[str, ...]) -> None:
    """Write what has changed of a port."""
    _SAVES[columns].run(opened, _values(row, columns), [row.id])
    tables.changed("port", row.id, row.project_id)


def _save_bound(row: Port) -> None:
    """Write a port's binding; the generation that its host is to have now has it."""
    ((row.bound_generation,),) = _BOUND.run(opened, _values(row, _PLACE), [row.id], [row.host_id])
    tables.changed("port", row.id, row.project_id)


def _values(row: Port, columns: tuple[str, ...]) -> list[Any]:
    row.version += 1
    row.update_time = database.now()
    return [getattr(row, name) for name in (*columns, *_STAMPS)]


def _update(values: Sequence[Any], columns: tuple[str, ...], **more: Any) -> Any:
    return Port.update(**dict(zip((*columns, *_STAMPS), values, strict=True)), **more)


_STAMPS = ("version", "update_time")
_OWNER = ("owner_type", "owner_id", "hostname")
_PLACE = ("state", "host_id", "domain_id")
_BINDING = (*_PLACE, "bound_generation")


def _saving(columns: tuple[str, ...]) -> Kept:
    return Kept(lambda values, ids: _update(values, columns).where(Port.id == ids[0]))


def _binding(values: Sequence[Any], ids: Sequence[Any], host_ids: Sequence[Any]) -> Any:
    generation = HostDataplane.select(HostDataplane.generation).where(
        HostDataplane.host_id == host_ids[0]
    )
    query = _update(values, _PLACE, bound_generation=generation)
    return query.where(Port.id == ids[0]).returning(Port.bound_generation)


_SAVES: dict[tuple[str, ...], Kept] = {each: _saving(each) for each in (_OWNER, _BINDING)}
_BOUND = Kept(_binding)
