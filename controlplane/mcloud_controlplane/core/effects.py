"""Refuses effects that come too late: from a runner that was overtaken, or for a retired id.

A workflow's lease number goes with every effect in another database; the highest seen for an id
is kept there, and lower ones are refused. An undo retires the id: a `do` that arrives after it,
delayed or repeated, is refused. Within the transaction of the effect.
"""

from __future__ import annotations

from typing import Any

from mcloud_base import errors
from mcloud_controlplane.core import database, tables


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


def _see(shared: tables.Tables, id_: str, lease_number: int) -> bool:
    table: Any = shared.effect
    moved = table.insert(id=id_, lease_number=lease_number, retired=False, time=database.now())
    moved = moved.on_conflict(
        conflict_target=[table.id],
        preserve=[table.lease_number, table.time],
        where=table.lease_number <= lease_number,
    )
    rows = list(moved.returning(table.retired).tuples().execute())
    if not rows:
        raise errors.Conflict(
            "STALE_LEASE", f"another runner has taken over the work on {id_}", id=id_
        )
    return bool(rows[0][0])
