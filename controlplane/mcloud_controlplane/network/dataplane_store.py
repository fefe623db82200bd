"""How far each host's dataplane is, and which hosts a change concerns.

A change that a host has to know increments the generation of its dataplane in the change's own
transaction; what the generation contains is computed from rows when it is sent
(dataplane_document.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import peewee
from google.protobuf import any_pb2

from mcloud.common.v1 import session_pb2
from mcloud.network.v1 import dataplane_pb2
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
    lambda *rows: (
        HostDataplane.insert_many(rows, fields=_REPORTED)
        .on_conflict(
            conflict_target=[HostDataplane.host_id],
            update={field: getattr(peewee.EXCLUDED, field.name) for field in _REPORTED[1:]},
            where=(HostDataplane.incarnation < peewee.EXCLUDED.incarnation)
            | (
                (HostDataplane.incarnation == peewee.EXCLUDED.incarnation)
                & (HostDataplane.sequence < peewee.EXCLUDED.sequence)
            ),
        )
        .returning(HostDataplane.host_id)
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


def bump_around(port: Port) -> None:
    """Give the hosts that a port's binding or its end concerns a new generation.

    Its own host, those on its network, and those whose ports have rules about the members of its
    groups; in one statement. Once in a unit, as one of its last writes, while it names its host.
    """
    _BUMPED_AROUND.run(opened, [port.network_id], [port.id], [port.host_id])
    tables.changed("dataplane", "", "")


def _bumping_around(
    network_ids: Sequence[Any], port_ids: Sequence[Any], host_ids: Sequence[Any]
) -> Any:
    here = Port.select(Port.host_id).where(Port.network_id == network_ids[0])
    membership = PortGroup.alias()
    groups = membership.select(membership.security_group_id).where(
        membership.port_id == port_ids[0]
    )
    naming = SecurityGroupRule.select(SecurityGroupRule.security_group_id).where(
        SecurityGroupRule.remote_group_id.in_(groups)
    )
    following = (
        Port.select(Port.host_id)
        .join(PortGroup, on=(PortGroup.port_id == Port.id))
        .where(PortGroup.security_group_id.in_(naming) & (Port.network_id != network_ids[0]))
    )
    itself = HostDataplane.alias()
    own = itself.select(itself.host_id).where(itself.host_id == host_ids[0])
    # UNION ALL: what comes more than once is looked up once all the same.
    concerned = HostDataplane.host_id.in_(here + following + own)
    if opened.for_update:
        # An update locks in any order; two units that bump the same hosts are to wait in one.
        rows = HostDataplane.select(HostDataplane.host_id).where(concerned)
        concerned = HostDataplane.host_id.in_(locked(rows.order_by(HostDataplane.host_id)))
    return HostDataplane.update({HostDataplane.generation: HostDataplane.generation + 1}).where(
        concerned
    )


_BUMPED_AROUND = Kept(_bumping_around)


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
        found = dataplane_document.documents(host_ids, behind=True)
        return {host_id: [_desired(host_id, document)] for host_id, document in found.items()}

    def pending(self, *, urgent: bool) -> Sequence[Pending]:
        """Return the dataplanes whose generation their hosts have not reached.

        A guest waits for its port. The others learn where it is, and may learn of many at once.
        """
        rows = (_WAITED_FOR if urgent else _BEHIND).run(opened)
        return [
            Pending(host_id, host_id, number, absent=False, urgent=bool(waits))
            for host_id, number, waits in rows
        ]

    def everything(self, host_id: str) -> Sequence[session_pb2.Desired]:
        """Return the dataplane."""
        found = dataplane_document.documents([host_id])
        return [_desired(host_id, document) for document in found.values()]

    def observed(self, reports: Sequence[sessions.HostReport], epoch: str) -> None:
        """Record how far hosts are; their ports that are in place become ACTIVE.

        Ports are locked before dataplanes, as whoever binds a port does.
        """
        newest: dict[str, sessions.HostReport] = {}
        for report in sorted(reports, key=_age):
            if report.observed.id == report.host_id:
                newest[report.host_id] = report
        if opened.for_update:
            in_the_making = Port.host_id.in_(list(newest)) & (Port.state == "BUILD")
            lock(Port.select(Port.id).where(in_the_making).order_by(Port.id))
        values = [_recorded(newest[host_id], epoch) for host_id in sorted(newest)]
        for some in peewee.chunked(values, _AT_ONCE):
            hosts = [host_id for (host_id,) in _RECORDED.run(opened, *some)]
            if hosts:
                for port_id, project_id in _ACTIVATED.run(opened, hosts):
                    tables.changed("port", port_id, project_id)


def _being_bound() -> Any:
    """Return the query for the ports of a host that a guest waits for."""
    here = Port.host_id == HostDataplane.host_id
    return peewee.fn.EXISTS(Port.select(Port.id).where(here & (Port.state == "BUILD")))


def _behind() -> Any:
    fields = (HostDataplane.host_id, HostDataplane.generation, _being_bound())
    return HostDataplane.select(*fields).where(
        HostDataplane.observed_generation < HostDataplane.generation
    )


_BEHIND = Kept(_behind)
_WAITED_FOR = Kept(lambda: _behind().where(_being_bound()))


def _desired(host_id: str, document: dataplane_document.Document) -> session_pb2.Desired:
    spec = any_pb2.Any(type_url=_TYPE_URL, value=document.content)
    return session_pb2.Desired(id=host_id, generation=document.generation, spec=spec)


_TYPE_URL = f"type.googleapis.com/{dataplane_pb2.HostDataplane.DESCRIPTOR.full_name}"


def _age(report: sessions.HostReport) -> tuple[int, int]:
    return report.incarnation, report.observed.sequence


def _recorded(report: sessions.HostReport, epoch: str) -> list[Any]:
    """Return what a report makes of a row, in the order of _REPORTED."""
    told = report.observed
    return [
        report.host_id,
        # A number of another epoch says nothing about this one's.
        told.generation if told.epoch == epoch else 0,
        report.incarnation,
        told.sequence,
        told.error.SerializeToString() if told.HasField("error") else None,
    ]


def _activating(host_ids: Sequence[Any]) -> Any:
    """Return the statement that makes ports of hosts ACTIVE that are in place there."""
    reached = HostDataplane.select(HostDataplane.observed_generation).where(
        HostDataplane.host_id == Port.host_id
    )
    return (
        Port.update({Port.state: "ACTIVE", Port.version: Port.version + 1})
        .where(
            Port.host_id.in_(host_ids)
            & (Port.state == "BUILD")
            & (Port.bound_generation <= reached)
        )
        .returning(Port.id, Port.project_id)
    )


_ACTIVATED = Kept(_activating)


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
