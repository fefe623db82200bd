"""Works that one process at a time is to do, over one database: a row says which does it.

The row is taken by compare-and-set and renewed each time. It keeps work from being done twice for
nothing; that no harm is done when it is (a process that was frozen goes on) is up to the work.
"""

from __future__ import annotations

import secrets

from mcloud_controlplane.core import database, tables


class Lease:
    """A process's part in one work.

    Args:
        name: of the work.
        ttl_s: for how long the work is left to a process that has fallen silent.
    """

    def __init__(self, shared: tables.Tables, name: str, ttl_s: float) -> None:
        self._table = shared.lease
        self._name = name
        self._ttl_us = int(ttl_s * 1_000_000)
        self._owner = secrets.token_hex(6)

    def take(self) -> bool:
        """Take or keep the lease; tell whether it is this process's. Within a writing unit."""
        table, moment = self._table, database.now()
        table.insert(name=self._name, owner="", expire_time=0).on_conflict_ignore().execute()
        # One that ends later than any that is given now was given before the clock was set back.
        latest = moment + 2 * self._ttl_us
        free = (table.expire_time < moment) | (table.expire_time > latest)
        taken = (
            table.update(owner=self._owner, expire_time=moment + self._ttl_us)
            .where((table.name == self._name) & ((table.owner == self._owner) | free))
            .execute()
        )
        return bool(taken)

    def give_up(self) -> None:
        """Let another process have it at once. Within a writing unit."""
        table = self._table
        mine = (table.name == self._name) & (table.owner == self._owner)
        table.update(expire_time=0).where(mine).execute()
