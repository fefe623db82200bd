"""Deletes what has been kept long enough, a bounded batch at a time.

Each database is pruned by one process at a time (leases.py). A tick looks at no more than so many
rows of each table, by an index or going round by the primary key (`Cursor`); so it costs the same
however much there is, and what a storm has left goes over the next ticks. Why nothing goes that
somebody needs:

change          Watches resume from a revision. Those older than the log are told so
                (REVISION_COMPACTED) and list again; schedulers read all hosts again; who follows
                revocations begins anew. Whole revisions go, oldest first, and the newest stay
                however old they are, so that a quiet database forgets nobody's place.
request         A repeat of a mutation finds the first for `keep_requests_s`: no client repeats one
                for a day. While the operation that it began runs, it stays.
operation       Once ended, a receipt. It stays while its request does, which answers with it, and
                (`still_needed`) while something works with its lease number or its id. Parts of
                another one stay while that does, which counts them.
operation_step  Goes with its operation, in the same transaction.
effect          Only retired ids: of others the highest lease number is still compared. A retired id
                keeps an effect that comes late from being done after its undo. Nothing comes so
                late: calls have deadlines of seconds, delegated tokens live 15 minutes, and a
                runner that was frozen for `EFFECTS_S` finds its lease gone before its next step.
                If one call of such a runner did get through, what it made would be of an instance
                that is deleted: garbage that the sweeper finds.
host_session    Numbers of sessions only grow while a host lives, so only those of deleted hosts go;
                compute, which knows of them, says which (`also`).

Rows of deleted resources are the services' own to judge (`also`): a function that deletes at most
so many and returns how many it did.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import peewee
import structlog

from mcloud_base import errors
from mcloud_controlplane.core import database, tables
from mcloud_controlplane.core.leases import Lease
from mcloud_controlplane.settings import Settings

log = structlog.get_logger()

EFFECTS_S = 7 * 86_400.0
_LEAST_LEASE_S = 120.0
_ENDED = ("SUCCEEDED", "FAILED", "CANCELLED")

Prune = Callable[[int], int]


class Cursor:
    """Goes round a table by its key, a page at a time.

    Where it is, is only remembered by this process: another begins anew, which does no harm.
    """

    def __init__(self, key: Any) -> None:
        self._key = key
        self._after = ""

    def page(self, limit: int) -> list[str]:
        """Return the next keys; after the last ones the first. Within a unit."""
        key = self._key
        query = key.model.select(key).where(key > self._after).order_by(key).limit(limit)
        found = [str(getattr(row, key.name)) for row in query]
        self._after = found[-1] if len(found) == limit else ""
        return found


class Pruner:
    """Prunes one database.

    Args:
        still_needed: returns the condition on operations that have ended and must stay; a unit's.
        also: by name, what else is pruned: a unit, given how many rows it may delete.
        batch: rows that a transaction looks at.
        rounds: transactions for each table in a tick, while there is more.
    """

    def __init__(
        self,
        store: database.Database,
        shared: tables.Tables,
        settings: Settings,
        *,
        still_needed: Callable[[], Any] | None = None,
        also: Mapping[str, Prune] | None = None,
        batch: int = 500,
        rounds: int = 10,
    ) -> None:
        self._database = store
        self._tables = shared
        self._settings = settings
        self._still_needed = still_needed
        self._also = dict(also or {})
        self._batch, self._rounds = batch, rounds
        self._operation_cursor = Cursor(shared.operation.id)
        self._effect_cursor = Cursor(shared.effect.id)
        self._interval_s = settings.prune_interval_s
        self._lease = Lease(shared, "pruner", max(self._interval_s * 3, _LEAST_LEASE_S))

    async def run(self) -> None:
        """Prune now and then, for ever."""
        try:
            while True:
                # Jitter: processes that were started together do not come together.
                await asyncio.sleep(self._interval_s * random.uniform(0.7, 1.3))  # noqa: S311
                try:
                    await self.prune()
                except errors.Error as error:
                    log.warning("pruning is tried again", reason=error.reason)
        finally:
            with suppress(errors.Error):  # it runs out all the same
                await self._database.write(self._lease.give_up)

    async def prune(self) -> dict[str, int]:
        """Delete what may go, if it is this process's turn; return how many rows of what."""
        if not await self._database.write(self._lease.take):
            return {}
        works: dict[str, Prune] = {
            "change": self._changes,
            "request": self._requests,
            "operation": self._operations,
            "effect": self._effects,
            **self._also,
        }
        pruned = dict.fromkeys(works, 0)
        for name, work in works.items():
            for _ in range(self._rounds):
                # A transaction each: writers wait for one batch at the longest.
                count = await self._database.write_long(work, self._batch)
                pruned[name] += count
                if not count:
                    break
        if any(pruned.values()):
            log.info("pruned", **{name: count for name, count in pruned.items() if count})
        return pruned

    def _changes(self, limit: int) -> int:
        table = self._tables.change
        newest = self._tables.revision() - self._settings.keep_revisions
        old = (table.revision <= newest) & (table.time < ago(self._settings.keep_changes_s))
        order = (table.revision, table.number)
        batch = [row.revision for row in table.select().where(old).order_by(*order).limit(limit)]
        if not batch:
            return 0
        # A revision that the batch may have cut in two goes whole, next time or (alone) at once.
        end = batch[-1] if len(batch) < limit or batch[0] == batch[-1] else batch[-1] - 1
        return int(table.delete().where(table.revision <= end).execute())

    def _requests(self, limit: int) -> int:
        table, operation = self._tables.request, self._tables.operation
        old = table.time < ago(self._settings.keep_requests_s)
        running = operation.select(operation.id).where(operation.state.not_in(_ENDED))
        batch = table.select().where(old & table.operation_id.not_in(running)).order_by(table.time)
        count = 0
        for row in batch.limit(limit):
            count += row.delete_instance()
        return count

    def _operations(self, limit: int) -> int:
        table, step = self._tables.operation, self._tables.operation_step
        request = self._tables.request
        repeated = request.select(request.operation_id)
        old = table.end_time < ago(self._settings.keep_operations_s)
        condition = table.state.in_(_ENDED) & old & table.id.not_in(repeated)
        if self._still_needed is not None:
            condition &= ~self._still_needed()
        parent = table.alias()
        whole = parent.select(parent.id).where(parent.id == table.parent_id)
        condition &= table.parent_id.is_null() | ~peewee.fn.EXISTS(whole)
        condition &= table.id.in_(self._operation_cursor.page(limit))
        found = [row.id for row in table.select(table.id).where(condition)]
        step.delete().where(step.operation_id.in_(found)).execute()
        return int(table.delete().where(table.id.in_(found)).execute())

    def _effects(self, limit: int) -> int:
        table = self._tables.effect
        old = table.retired & (table.time < ago(EFFECTS_S))
        page = self._effect_cursor.page(limit)
        return int(table.delete().where(table.id.in_(page) & old).execute())


def ago(seconds: float) -> int:
    """Return the time that was so long ago. Within a unit."""
    return database.now() - int(seconds * 1_000_000)
