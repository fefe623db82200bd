"""Epochs in the database: what ends the tokens of a principal, and the feed that tells of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import peewee

from mcloud.identity.v1 import token_pb2
from mcloud_base import errors
from mcloud_controlplane.core import database, tables
from mcloud_controlplane.core.model import Prepared
from mcloud_controlplane.identity.model import Epoch, shared

# Longer than any token lives, clocks that differ included: older revocations concern no token.
_MATTERS_US = 2 * 3600 * 1_000_000
_BATCH = 1000


def find(table: Any, condition: Any) -> Any | None:
    """Return the row of a principal with its `epoch`, or None.

    Both are read by one statement: a token that is made of the row is older than any revocation
    that the row does not show.
    """
    query = (
        table.select(table, peewee.fn.COALESCE(Epoch.value, 0).alias("epoch"))
        .join(Epoch, peewee.JOIN.LEFT_OUTER, on=(Epoch.principal_id == table.id))
        .where(condition)
    )
    return query.objects().first()


def read(principal_ids: Iterable[str]) -> dict[str, int]:
    """Return the epochs of these principals."""
    wanted = list(principal_ids)
    found = dict.fromkeys(wanted, 0)
    for row in _OF_PRINCIPALS.rows(wanted):
        found[row.principal_id] = row.value
    return found


_OF_PRINCIPALS = Prepared(Epoch, lambda ids: Epoch.select().where(Epoch.principal_id.in_(ids)))


def revoke(*principal_ids: str) -> None:
    """End every token that rests on these principals. Within a unit."""
    moment = database.now()
    for principal_id in sorted(principal_ids):  # in one order: no deadlock
        Epoch.insert(principal_id=principal_id, value=1, time=moment).on_conflict(
            conflict_target=[Epoch.principal_id],
            update={Epoch.value: Epoch.value + 1, Epoch.time: moment},
        ).execute()
        tables.changed("epoch", principal_id, "")


def lock(store: database.Database, principal_id: str) -> None:
    """Hold off the revocation of a principal until the end of the unit."""
    Epoch.insert(
        principal_id=principal_id, value=0, time=database.now()
    ).on_conflict_ignore().execute()
    list(store.locked(Epoch.select().where(Epoch.principal_id == principal_id)))


def feed(after: int | None) -> tuple[int, list[token_pb2.Revocation]]:
    """Return the revocations after a revision (None: those that still matter), and the next one.

    Raises:
        errors.OutOfRange: REVISION_COMPACTED.
    """
    head = shared.revision()
    if after is None:
        recent = Epoch.select().where(Epoch.time > database.now() - _MATTERS_US)
        return head, [_message(row) for row in recent]
    change = shared.change
    oldest = change.select(peewee.fn.MIN(change.revision)).scalar()
    if after > head or (oldest is not None and after + 1 < oldest and after < head):
        raise errors.OutOfRange(
            "REVISION_COMPACTED",
            f"revocations after revision {after} are no longer known; start from the empty one",
        )
    rows = list(
        change.select(change.revision, change.resource_id)
        .where((change.type == "epoch") & (change.revision > after))
        .order_by(change.revision, change.number)
        .limit(_BATCH)
    )
    # The last revision may be cut in two: it is read again next time, which does no harm.
    position = rows[-1].revision - 1 if len(rows) == _BATCH else head
    named = list({row.resource_id for row in rows})
    if not named:
        return position, []
    return position, [_message(row) for row in Epoch.select().where(Epoch.principal_id.in_(named))]


def _message(row: Epoch) -> token_pb2.Revocation:
    return token_pb2.Revocation(principal_id=row.principal_id, epoch=row.value)
