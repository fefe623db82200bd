"""Claims in the compute database: made many in one transaction, and the explanations with them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import peewee

from mcloud.scheduler.v1 import placement_pb2, placement_service_pb2
from mcloud_base import errors
from mcloud_controlplane.compute.model import (
    Claim,
    Domain,
    Host,
    Instance,
    Placement,
    locked,
    shared,
)
from mcloud_controlplane.core import convert, database, statements, tables
from mcloud_controlplane.core.database import Database
from mcloud_controlplane.core.statements import Kept
from mcloud_controlplane.scheduler import server_group_store, store
from mcloud_controlplane.scheduler.hosts import HostRecord, Resources
from mcloud_controlplane.settings import Settings

# The claim (an earlier one if the request is a repeat), why there is none, or in words why it was
# not to be had on this host any more.
Outcome = placement_pb2.Claim | Exception | str

TAKEN = "taken by another claim, or just disabled"
RULE_BROKEN = "by now, the rule of its server group does not allow it"


@dataclass(frozen=True)
class Wish:
    """A request, and the host that was chosen for it."""

    request: placement_service_pb2.SelectDestinationsRequest
    host_id: str
    explanation: placement_pb2.PlacementExplanation


@dataclass(frozen=True)
class Claimed:
    """What came of each wish, and what is recorded of the hosts that were looked at."""

    outcomes: list[Outcome]
    hosts: dict[str, HostRecord]


def _held(ids: Sequence[str]) -> Any:
    table: Any = shared.operation
    query = table.select(table.id, table.lease_number).where(table.id.in_(ids))
    return locked(query.order_by(table.id))


_LEASES = Kept(_held)
_DOMAINS = Kept(lambda ids: Domain.select(Domain.id).where(Domain.id.in_(ids)))
_ATTEMPTS = Kept(
    lambda ids: (
        Placement.select(Placement.domain_id, peewee.fn.MAX(Placement.attempt))
        .where(Placement.domain_id.in_(ids))
        .group_by(Placement.domain_id)
    )
)
_CLAIMS = Kept(
    lambda *rows: Claim.insert_many(
        rows,
        fields=[
            Claim.domain_id, Claim.instance_id, Claim.host_id, Claim.vcpu_count,
            Claim.memory_mib, Claim.disk_gib, Claim.create_time, Claim.server_group_id,
        ],
    )
)  # fmt: skip
_QUEUED = Kept(
    lambda *rows: (
        Domain.insert_many(
            rows,
            fields=[
                Domain.id, Domain.instance_id, Domain.project_id, Domain.host_id,
                Domain.operation_id, Domain.generation, Domain.create_time,
            ],
        )
        .on_conflict_ignore()
        .returning(Domain.id)
    )
)  # fmt: skip
_PLACED = Kept(
    lambda moment, ids: (
        Instance.update(
            host_id=Claim.host_id,
            domain_id=Claim.domain_id,
            version=Instance.version + 1,
            update_time=moment[0],
        )
        .from_(Claim)
        .where((Instance.id == Claim.instance_id) & Claim.domain_id.in_(ids))
    )
)
_EXPLAINED = Kept(
    lambda *rows: (
        Placement.insert_many(
            rows,
            fields=[
                Placement.domain_id, Placement.attempt, Placement.instance_id,
                Placement.explanation, Placement.time,
            ],
        )
        .on_conflict_ignore()
        .returning(Placement.domain_id)
    )
)  # fmt: skip


def claim(
    opened: Database, settings: Settings, wishes: Sequence[Wish], *, wait: bool = False
) -> Claimed:
    """Hold room on hosts and queue the domains there, in one transaction; each wish by itself.

    The operations' rows are locked and their lease numbers compared; the hosts' rows are locked,
    then their claims are added up, and what fits is claimed. Whoever adds a claim to a host holds
    its row until the commit, and a statement sees what was committed before it began: so no claim
    is missing from a sum (a conditional INSERT without the lock overcommitted on PostgreSQL: 33 of
    20). Before the hosts, server groups with a hard rule are locked and their members counted, just
    so. Rows of a kind are locked in the order of their ids.

    That a domain is there already, its claim with it or removed, is seen when it cannot be queued;
    or looked for where there is no room, which its own claim may have taken.

    Args:
        wishes: each for another domain.
        wait: for whoever has a host's row locked; otherwise that host counts as taken.

    Returns:
        Outcomes in the order of the wishes; the errors among them are
        errors.Conflict: STALE_LEASE.
        errors.WrongState: ID_RETIRED, the domain was removed already.
    """
    settled = _overtaken(opened, [wish.request for wish in wishes])
    open_ = [wish for wish in wishes if wish.request.domain_id not in settled]
    wanted = {wish.host_id for wish in open_}
    named = {wish.request.server_group_id for wish in open_} - {""}
    groups = server_group_store.lock(opened, named, wanted) if named else {}
    hosts = store.lock_hosts(opened, settings, wanted, wait=wait) if wanted else {}
    draft, fitting = dict(hosts), []
    for wish in open_:
        host, need = draft.get(wish.host_id), resources(wish.request.resources)
        group = groups.get(wish.request.server_group_id)
        if host is None or not host.has_room(need):
            settled[wish.request.domain_id] = TAKEN
        elif group is not None and not group.admits(host.id):
            settled[wish.request.domain_id] = RULE_BROKEN
        else:
            draft[host.id] = host.claiming(need)
            if group is not None:
                group.add(host.id)
            fitting.append(wish)
    moment = database.now()
    queued = _queue(opened, fitting, moment)
    settled |= _earlier(
        opened, [wish.request.domain_id for wish in open_ if wish.request.domain_id not in queued]
    )
    granted = [wish for wish in fitting if wish.request.domain_id in queued]
    for wish in granted:
        host = hosts[wish.host_id]
        hosts[host.id] = host.claiming(resources(wish.request.resources))
        settled[wish.request.domain_id] = placement_pb2.Claim(
            domain_id=wish.request.domain_id,
            host_id=host.id,
            host_name=host.name,
            resources=wish.request.resources,
            create_time=convert.timestamp(moment),
        )
        wish.explanation.chosen_host_id, wish.explanation.chosen_host_name = host.id, host.name
    if granted:
        _record(opened, granted, moment)
    # What does not fit beside another domain of its instance has to go elsewhere.
    return Claimed([settled.get(wish.request.domain_id, TAKEN) for wish in wishes], hosts)


def resources(found: placement_pb2.Resources) -> Resources:
    """Return (vCPUs, MiB, GiB)."""
    return float(found.vcpu_count), float(found.memory_mib), float(found.disk_gib)


def find_claims(domain_ids: Collection[str]) -> dict[str, placement_pb2.Claim]:
    """Return the claims that domains have, by domain."""
    rows = list(Claim.select().where(Claim.domain_id.in_(list(domain_ids))))
    query: Any = Host.select(Host.id, Host.name).where(Host.id.in_([row.host_id for row in rows]))
    names = dict(query.tuples()) if rows else {}
    return {
        row.domain_id: placement_pb2.Claim(
            domain_id=row.domain_id,
            host_id=row.host_id,
            host_name=names.get(row.host_id, ""),
            resources=placement_pb2.Resources(
                vcpu_count=row.vcpu_count, memory_mib=row.memory_mib, disk_gib=row.disk_gib
            ),
            create_time=convert.timestamp(row.create_time),
        )
        for row in rows
    }


def record_placements(
    opened: Database,
    attempts: Sequence[
        tuple[placement_service_pb2.SelectDestinationsRequest, placement_pb2.PlacementExplanation]
    ],
) -> None:
    """Store the explanations of attempts, successful or not; each for another domain.

    Most are the first of their domain: the number is looked for where that has one already.
    """
    moment = database.now()
    left, earlier = list(attempts), dict[str, int]()
    while left:
        rows = []
        for request, explanation in left:
            number = 1 + earlier.get(request.domain_id, 0)
            explanation.domain_id, explanation.attempt = request.domain_id, number
            explanation.time.CopyFrom(convert.timestamp(moment))
            text = explanation.SerializeToString()
            rows.append((request.domain_id, number, request.instance_id, text, moment))
        stored = _insert(opened, _EXPLAINED, rows)
        left = [each for each in left if each[0].domain_id not in stored]
        if left:
            ids = [request.domain_id for request, _ in left]
            earlier = dict(_ATTEMPTS.run(opened.peewee, ids))


def _overtaken(
    opened: Database, requests: Sequence[placement_service_pb2.SelectDestinationsRequest]
) -> dict[str, Outcome]:
    """Lock the operations; return, by domain, the refusals of runners that were overtaken."""
    operation_ids = {request.operation_id for request in requests} - {""}
    if not operation_ids:
        return {}
    leases = dict(_LEASES.run(opened.peewee, list(operation_ids)))
    return {
        request.domain_id: errors.Conflict(
            "STALE_LEASE",
            f"another runner works on {request.operation_id}",
            id=request.operation_id,
        )
        for request in requests
        if leases.get(request.operation_id, request.lease_number) != request.lease_number
    }


def _queue(opened: Database, wishes: Sequence[Wish], moment: int) -> set[str]:
    """Queue domains on their hosts; return those that were not there."""
    rows = [
        (
            wish.request.domain_id, wish.request.instance_id, wish.request.project_id,
            wish.host_id, wish.request.operation_id, 1, moment,
        )
        for wish in wishes
    ]  # fmt: skip
    return _insert(opened, _QUEUED, rows)


def _earlier(opened: Database, domain_ids: Sequence[str]) -> dict[str, Outcome]:
    """Return, of those of these domains that are there, the claim, or that it was removed."""
    if not domain_ids:
        return {}
    domains = {id_ for (id_,) in _DOMAINS.run(opened.peewee, domain_ids)}  # a claim has one
    claims = find_claims(domains) if domains else {}
    return {
        id_: claims.get(id_)
        or errors.WrongState("ID_RETIRED", f"domain {id_} has been removed", id=id_)
        for id_ in domains
    }


def _record(opened: Database, granted: Sequence[Wish], moment: int) -> None:
    """Write the claims of domains that are queued, and what goes with them."""
    claims = []
    for wish in granted:
        request, need = wish.request, wish.request.resources
        key = (request.domain_id, request.instance_id)
        room = (need.vcpu_count, need.memory_mib, need.disk_gib)
        claims.append((*key, wish.host_id, *room, moment, request.server_group_id or None))
        tables.changed("host", wish.host_id, "")
        tables.changed("domain", request.domain_id, request.project_id, "ADDED")
        tables.wake_host(wish.host_id)
        tables.changed("instance", request.instance_id, request.project_id)
    _insert(opened, _CLAIMS, claims)
    _PLACED.run(opened.peewee, [moment], [wish.request.domain_id for wish in granted])
    record_placements(opened, [(wish.request, wish.explanation) for wish in granted])


def _insert(opened: Database, kept: Kept, rows: Sequence[tuple[Any, ...]]) -> set[str]:
    """Write rows; return what the statement says of those that were written, if it does."""
    written: set[str] = set()
    for some in peewee.chunked(rows, statements.MOST_ROWS):
        written.update(id_ for (id_,) in kept.run(opened.peewee, *some))
    return written
