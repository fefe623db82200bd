"""Refuses effects that come too late: from a runner that was overtaken, or for a retired id.

A workflow's lease number goes with every effect in another database; the highest seen for an id
is kept there, and lower ones are refused. An undo retires the id: a `do` that arrives after it,
delayed or repeated, is refused. Within the transaction of the effect.
"""

from __future__ import annotations

from typing import Any

from mcloud_base import errors
from mcloud_controlplane.core import database, tables
from mcloud_controlplane.core.statements import Kept


def ensure_may(shared: tables.Tables, id_: str, lease_number: int) -> None:
    """Let an effect through.

    Raises:
        errors.WrongState: ID_RETIRED.
        errors.Conflict: STALE_LEASE.
    """
    if _see(shared, id_, lease_number):
        raise errors.WrongState(
            "ID_RETIRED", f"{id_} has been undone; it cannot be done again", id=id_
        )


def retire(shared: tables.Tables, id_: str, lease_number: int) -> None:
    """Let an undo through, and nothing after it.

    Raises:
        errors.Conflict: STALE_LEASE.
    """
    _see(shared, id_, lease_number)
    shared.effect.update(retired=True).where(shared.effect.id == id_).execute()


def see(shared: tables.Tables, id_: str, lease_number: int) -> None:
    """Let through what is neither: repeatable also for a retired id.

    Raises:
        errors.Conflict: STALE_LEASE.
    """
    _see(shared, id_, lease_number)


_MOVES: dict[type, Kept] = {}  # by table


def _moving(table: Any) -> Kept:
    """Return the statement that takes a lease number over, if it is not lower than what is seen."""
    fields = [table.id, table.lease_number, table.retired, table.time]
    return Kept(
        lambda row, numbers: (
            table.insert_many([row], fields=fields)
            .on_conflict(
                conflict_target=[table.id],
                preserve=[table.lease_number, table.time],
                where=table.lease_number <= numbers[0],
            )
            .returning(table.retired)
        )
    )


def _see(shared: tables.Tables, id_: str, lease_number: int) -> bool:
    table = shared.effect
    move = _MOVES.get(table) or _MOVES.setdefault(table, _moving(table))
    moment = database.now()
    rows = move.run(table._meta.database, [id_, lease_number, False, moment], [lease_number])
    if not rows:
        raise errors.Conflict(
            "STALE_LEASE", f"another runner has taken over the work on {id_}", id=id_
        )
    return bool(rows[0][0])
