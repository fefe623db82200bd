"""Server groups in the compute database, as decisions need them."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import peewee

from mcloud_controlplane.compute.model import Claim, ServerGroup, locked
from mcloud_controlplane.core.database import Database
from mcloud_controlplane.core.statements import Kept
from mcloud_controlplane.scheduler.server_group import HARD, Group

_KNOWN = (ServerGroup.id, ServerGroup.policy, ServerGroup.max_instances_per_host)
_COUNT: Any = peewee.fn.COUNT(Claim.domain_id)


def _members() -> Any:
    query = Claim.select(Claim.server_group_id, Claim.host_id, _COUNT)
    return query.group_by(Claim.server_group_id, Claim.host_id)


def _members_on(ids: Any, host_ids: Any) -> Any:
    host_id: Any = peewee.Case(None, [(Claim.host_id.in_(host_ids), Claim.host_id)], "")
    query = Claim.select(Claim.server_group_id, host_id.alias("place"), _COUNT)
    query = query.where(Claim.server_group_id.in_(ids))
    return query.group_by(Claim.server_group_id, peewee.SQL("place"))


_GROUPS = Kept(lambda ids: ServerGroup.select(*_KNOWN).where(ServerGroup.id.in_(ids)))
_MEMBERS = Kept(lambda ids: _members().where(Claim.server_group_id.in_(ids)))
_MEMBERS_ON = Kept(_members_on)
_LOCK = Kept(
    lambda ids: locked(
        ServerGroup.select(*_KNOWN)
        .where(ServerGroup.id.in_(ids) & ServerGroup.policy.in_(list(HARD)))
        .order_by(ServerGroup.id)
    )
)


def load(opened: Database, found: Collection[str]) -> dict[str, Group]:
    """Return server groups by id, in two statements; not those that are gone."""
    ids = list(found)
    return _groups(_GROUPS.run(opened.peewee, ids), _MEMBERS.run(opened.peewee, ids))


def lock(opened: Database, found: Collection[str], host_ids: Collection[str]) -> dict[str, Group]:
    """Lock the rows of those with a hard rule, and return them; not those that are gone.

    Of a thousand members those on other hosts than these are added up, as if on one without an id.
    """
    rows = _LOCK.run(opened.peewee, list(found))
    if not rows:
        return {}
    held = _padded(id_ for id_, _, _ in rows)
    # Not before they are locked.
    return _groups(rows, _MEMBERS_ON.run(opened.peewee, held, _padded(host_ids)))


def load_hard() -> dict[str, Group]:
    """Return every server group with a hard rule."""
    rows: Any = ServerGroup.select(*_KNOWN).where(ServerGroup.policy.in_(HARD)).tuples()
    members = _members().where(Claim.server_group_id.is_null(False)).tuples()
    return _groups(rows, members)


def _groups(rows: Iterable[Any], members: Iterable[Any]) -> dict[str, Group]:
    found = {id_: Group(id_, policy, most) for id_, policy, most in rows}
    for id_, host_id, count in members:
        if (group := found.get(id_)) is not None:
            group.members[host_id] = count
    return found


def _padded(values: Iterable[str]) -> list[str]:
    """Return them, the last one as often as it takes for a power of two: there are fewer texts."""
    found = list(values)
    return found + found[-1:] * ((1 << (len(found) - 1).bit_length()) - len(found))
