"""How far each host's dataplane is, and which hosts a change concerns.

A change that a host has to know increments the generation of its dataplane in the change's own
transaction; what the generation contains is computed from rows when it is sent
(dataplane_document.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import peewee

from mcloud.common.v1 import session_pb2
from mcloud_controlplane.core import sessions, tables
from mcloud_controlplane.core.model import Prepared
from mcloud_controlplane.core.session_follower import Pending
from mcloud_controlplane.core.statements import Kept
from mcloud_controlplane.network import dataplane_document
from mcloud_controlplane.network.model import (
    HostDataplane,
    Network,
    Port,
    PortGroup,
    SecurityGroup,
    SecurityGroupRule,
    lock,
    locked,
)
from mcloud_controlplane.network.model import database as opened

_AT_ONCE = 50  # rows in a statement
_BUMPED = Kept(
    lambda *rows: (
        HostDataplane.insert_many(rows, fields=[HostDataplane.host_id])
        .on_conflict(
            conflict_target=[HostDataplane.host_id],
            update={HostDataplane.generation: HostDataplane.generation + 1},
        )
        .returning(HostDataplane.host_id, HostDataplane.generation)
    )
)
_REPORTED = (
    HostDataplane.host_id,
    HostDataplane.observed_generation,
    HostDataplane.incarnation,
    HostDataplane.sequence,
    HostDataplane.error,
)
_RECORDED = Kept(
    lambda *rows: HostDataplane.insert_many(rows, fields=_REPORTED).on_conflict(
        conflict_target=[HostDataplane.host_id],
        update={field: getattr(peewee.EXCLUDED, field.name) for field in _REPORTED[1:]},
    )
)


def bump(host_ids: Iterable[str]) -> dict[str, int]:
    """Give hosts a new generation, and return it. Once in a unit, as one of its last writes."""
    # In one order, so that two units that bump the same hosts wait instead of deadlocking.
    found = sorted(set(host_ids) - {""})
    if not found:
        return {}
    generations: dict[str, int] = {}
    for some in peewee.chunked(found, _AT_ONCE):
        generations |= _BUMPED.run(opened, *[[id_] for id_ in some])
    # One line for all: it wakes the streams, which look for themselves. A line for each would be
    # most of the log where many hosts share a network.
    tables.changed("dataplane", found[0] if len(found) == 1 else "", "")
    return generations


def hosts_of_networks(network_ids: Sequence[str]) -> set[str]:
    """Return the hosts that have ports on these networks, routers' included."""
    return {host_id for (host_id,) in _HOSTS_OF_NETWORKS.rows(network_ids)}


_HOSTS_OF_NETWORKS = Prepared(
    Port,
    lambda network_ids: (
        Port.select(Port.host_id)
        .where(Port.network_id.in_(network_ids) & (Port.host_id != ""))
        .distinct()
        .tuples()
    ),
)


def _networks_of(host_id: str) -> set[str]:
    """Return the networks on which a host has ports."""
    query: Any = Port.select(Port.network_id).where(Port.host_id == host_id)
    return {network_id for (network_id,) in query.distinct().tuples()}


def hosts_of_groups(group_ids: Sequence[str]) -> set[str]:
    """Return the hosts that have ports in these security groups."""
    return {host_id for (host_id,) in _HOSTS_OF_GROUPS.rows(group_ids)}


_HOSTS_OF_GROUPS = Prepared(
    Port,
    lambda group_ids: (
        Port.select(Port.host_id)
        .join(PortGroup, on=(PortGroup.port_id == Port.id))
        .where(PortGroup.security_group_id.in_(group_ids) & (Port.host_id != ""))
        .distinct()
        .tuples()
    ),
)


def hosts_following(group_ids: Sequence[str]) -> set[str]:
    """Return the hosts whose ports have rules about the members of these security groups."""
    return hosts_of_groups(sorted(group_id for (group_id,) in _NAMING.rows(group_ids)))


_NAMING = Prepared(
    SecurityGroupRule,
    lambda group_ids: (
        SecurityGroupRule.select(SecurityGroupRule.security_group_id)
        .where(SecurityGroupRule.remote_group_id.in_(group_ids))
        .distinct()
        .tuples()
    ),
)


def groups_of(port_id: str) -> list[str]:
    """Return the security groups that a port is in."""
    return [id_ for (id_,) in _GROUPS.rows([port_id])]


_GROUPS = Prepared(
    PortGroup,
    lambda port_ids: (
        PortGroup.select(PortGroup.security_group_id)
        .where(PortGroup.port_id == port_ids[0])
        .order_by(PortGroup.security_group_id)
        .tuples()
    ),
)


def hosts_of_port(port: Port) -> set[str]:
    """Return the hosts that have to know of a port's binding or its end, in one statement.

    Those on its network, and those whose ports have rules about the members of its groups.
    """
    found = _AROUND.run(opened, [port.network_id], [port.id])
    return {port.host_id, *(host_id for (host_id,) in found)}


def _around(network_ids: Sequence[Any], port_ids: Sequence[Any]) -> Any:
    own = PortGroup.alias()
    groups = own.select(own.security_group_id).where(own.port_id == port_ids[0])
    following = (
        Port.select(Port.host_id)
        .join(PortGroup, on=(PortGroup.port_id == Port.id))
        .join(
            SecurityGroupRule,
            on=(SecurityGroupRule.security_group_id == PortGroup.security_group_id),
        )
        .where(SecurityGroupRule.remote_group_id.in_(groups) & (Port.host_id != ""))
    )
    here = Port.select(Port.host_id).where(
        (Port.network_id == network_ids[0]) & (Port.host_id != "")
    )
    return here | following  # UNION: each once


_AROUND = Kept(_around)


def lock_around(port: Port) -> None:
    """Lock what decides whom a port's binding concerns, until the commit.

    Two ports that are bound at the same time would else miss each other: neither transaction sees
    the other's host, and no later one tells it.
    """
    if not opened.for_update:
        return  # SQLite's transaction has locked everything
    own = groups_of(port.id)
    naming = SecurityGroupRule.select(SecurityGroupRule.remote_group_id).where(
        SecurityGroupRule.security_group_id.in_(own) & (SecurityGroupRule.remote_group_id != "")
    )
    groups = {*own, *(row.remote_group_id for row in naming)}
    lock_networks([port.network_id])
    query = SecurityGroup.select(SecurityGroup.id).where(SecurityGroup.id.in_(sorted(groups)))
    lock(query.order_by(SecurityGroup.id))


def lock_networks(network_ids: Sequence[str]) -> None:
    """Lock the rows of networks, until the commit: their ports' hosts stay as they are."""
    query = Network.select(Network.id).where(Network.id.in_(list(network_ids)))
    lock(query.order_by(Network.id))


def _lock_dataplanes(host_ids: Iterable[str]) -> dict[str, HostDataplane]:
    query = HostDataplane.select().where(HostDataplane.host_id.in_(sorted(host_ids)))
    return {row.host_id: row for row in locked(query.order_by(HostDataplane.host_id))}


class Source:
    """What the network service desires of hosts (core/sessions.py): one dataplane of each."""

    def desired(self, host_ids: Sequence[str]) -> Mapping[str, Sequence[session_pb2.Desired]]:
        """Return the dataplanes of hosts that have not reached their generation."""
        return _documents(
            HostDataplane.host_id.in_(list(host_ids))
            & (HostDataplane.observed_generation < HostDataplane.generation)
        )

    def pending(self, *, urgent: bool) -> Sequence[Pending]:
        """Return the dataplanes whose generation their hosts have not reached."""
        ports: Any = Port.select(Port.host_id).where((Port.state == "BUILD") & (Port.host_id != ""))
        waiting = {host_id for (host_id,) in ports.tuples()}
        if urgent and not waiting:
            return []
        query: Any = HostDataplane.select(HostDataplane.host_id, HostDataplane.generation)
        behind = query.where(HostDataplane.observed_generation < HostDataplane.generation)
        if urgent:
            behind = behind.where(HostDataplane.host_id.in_(sorted(waiting)))
        # A guest waits for its port. The others learn where it is, and may learn of many at once.
        return [
            Pending(host_id, host_id, number, absent=False, urgent=host_id in waiting)
            for host_id, number in behind.tuples()
        ]

    def everything(self, host_id: str) -> Sequence[session_pb2.Desired]:
        """Return the dataplane."""
        return _documents(HostDataplane.host_id == host_id).get(host_id, [])

    def observed(self, reports: Sequence[sessions.HostReport], epoch: str) -> None:
        """Record how far hosts are; their ports that are in place become ACTIVE.

        Ports are locked before dataplanes, as whoever binds a port does.
        """
        told = [report for report in reports if report.observed.id == report.host_id]
        hosts = [report.host_id for report in told]
        in_the_making = Port.host_id.in_(hosts) & (Port.state == "BUILD")
        ports = list(locked(Port.select().where(in_the_making).order_by(Port.id)))
        dataplanes = _lock_dataplanes(hosts)
        newer: dict[str, HostDataplane] = {}
        for report in told:
            row = dataplanes[report.host_id]
            if _takes(row, report.incarnation, report.observed, epoch):
                newer[row.host_id] = row
        for some in peewee.chunked(newer.values(), _AT_ONCE):
            values = [[getattr(row, field.name) for field in _REPORTED] for row in some]
            _RECORDED.run(opened, *values)
        for row in newer.values():
            _activate(row, ports)


def _takes(row: HostDataplane, incarnation: int, report: session_pb2.Observed, epoch: str) -> bool:
    """Have a row say what is reported; False: what it says is as new."""
    if (incarnation, report.sequence) <= (row.incarnation, row.sequence):
        return False
    # A number of another epoch says nothing about this one's.
    row.observed_generation = report.generation if report.epoch == epoch else 0
    row.incarnation, row.sequence = incarnation, report.sequence
    row.error = report.error.SerializeToString() if report.HasField("error") else None
    return True


def _documents(condition: Any) -> dict[str, list[session_pb2.Desired]]:
    """Return the dataplanes of hosts, by host.

    The generations are read first: what is read after them may be newer, never older.
    """
    query: Any = HostDataplane.select(HostDataplane.host_id, HostDataplane.generation)
    numbers = dict(query.where(condition).tuples())
    if not numbers:
        return {}
    documents = dataplane_document.documents(list(numbers))
    return {
        host_id: [sessions.desired(host_id, numbers[host_id], document)]
        for host_id, document in documents.items()
    }


def _activate(row: HostDataplane, ports: Sequence[Port]) -> None:
    """Those of these ports, which are locked, that are in place on the host become ACTIVE."""
    found = [
        port
        for port in ports
        if (port.host_id, port.state) == (row.host_id, "BUILD")
        and port.bound_generation <= row.observed_generation
    ]
    if not found:
        return
    Port.update(state="ACTIVE", version=Port.version + 1).where(
        Port.id.in_([port.id for port in found])
    ).execute()
    for port in found:
        port.state = "ACTIVE"
        tables.changed("port", port.id, port.project_id)


def join(host_id: str, hello: session_pb2.Hello) -> None:
    """Note a host whose session begins; others learn where its ports are now.

    Within the unit that takes the session, so one at a time for a host. Locks as a binding does.
    """
    row = HostDataplane.get_or_none(HostDataplane.host_id == host_id)
    if row is None:
        HostDataplane.insert(host_id=host_id).on_conflict_ignore().execute()
    if row is None or row.underlay_ip != hello.underlay_ip:
        told: set[str] = set()
        while True:
            networks = sorted(_networks_of(host_id) - told)
            if told and not networks:
                break
            lock_networks(networks)
            hosts = hosts_of_networks(networks)
            # Until this, ports could be bound there.
            _lock_dataplanes({host_id, *hosts})
            bump(hosts)
            told.update(networks, [""])
    HostDataplane.update(
        underlay_ip=hello.underlay_ip, gateway="gateway" in hello.capabilities
    ).where(HostDataplane.host_id == host_id).execute()
