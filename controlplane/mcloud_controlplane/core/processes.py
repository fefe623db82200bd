"""The register of processes: each database has a row for every process that uses it.

It says which release runs where, so that nothing is taken from under a process that needs it. A
row is written in the transaction that checks the schema, refreshed while the process lives, and
deleted when it ends; one that was killed is taken for dead after `ALIVE_S`.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import structlog

from mcloud_base import errors
from mcloud_controlplane.core import database, tables

if TYPE_CHECKING:
    from mcloud_controlplane.core.migrations import Release

log = structlog.get_logger()

ALIVE_S = 30.0
_HEARTBEAT_S = 5.0
_FORGET_US = 86_400_000_000


@dataclass(frozen=True)
class _Use:
    database: database.Database
    tables: tables.Tables
    schema_number: int
    check: Callable[[], None]


@dataclass(frozen=True)
class Life:
    """A process by its id, and the one whose place it has taken: that is dead for certain."""

    id: str
    predecessor: str = ""

    @staticmethod
    def first() -> Life:
        """Return that of a process in a new place."""
        return Life(secrets.token_hex(8))

    def next(self) -> Life:
        """Return that of the process that takes this one's place."""
        return Life(secrets.token_hex(8), self.id)


class Process:
    """The process that runs this, as the databases know it.

    `unfit` is set when a database has been changed in a way that this release does not survive,
    as may happen to a process that was frozen until it was taken for dead: it has to end.

    Args:
        life: which process it is; none: one that follows no other.
    """

    def __init__(self, release: Release, services: Sequence[str], life: Life | None = None) -> None:
        self.life = life or Life.first()
        self.id = self.life.id
        self.release = release
        self.unfit = asyncio.Event()
        self._services = ",".join(services)
        self._start_time = database.now()
        self._uses: list[_Use] = []

    def register(self, shared: tables.Tables, schema_number: int) -> None:
        """Write the row. Within a unit.

        Args:
            schema_number: the newest that this release knows.
        """
        table = shared.process
        moment = database.now()
        dead = (table.heartbeat_time < moment - _FORGET_US) | (table.id == self.life.predecessor)
        table.delete().where(dead).execute()
        values = {"heartbeat_time": moment, "schema_number": schema_number}
        table.insert(
            id=self.id, release=self.release.version, host=socket.gethostname(), pid=os.getpid(),
            services=self._services, start_time=self._start_time, **values,
        ).on_conflict(conflict_target=[table.id], update=values).execute()  # fmt: skip

    def uses(
        self,
        opened: database.Database,
        shared: tables.Tables,
        schema_number: int,
        check: Callable[[], None],
    ) -> None:
        """Keep the row in a database that has been opened.

        Args:
            check: raises SCHEMA_UNKNOWN, within a unit.
        """
        self._uses.append(_Use(opened, shared, schema_number, check))

    async def keep(self) -> None:
        """Refresh the rows for the life of the process."""
        while True:
            await asyncio.sleep(_HEARTBEAT_S)
            for use in tuple(self._uses):
                try:
                    await use.database.write_at_once(self._refresh, use)
                except errors.WrongState:
                    self.unfit.set()
                    raise
                except errors.Error as error:
                    log.warning("heartbeat is tried again", reason=error.reason)

    def _refresh(self, use: _Use) -> None:
        use.check()
        self.register(use.tables, use.schema_number)

    async def leave(self) -> None:
        """Delete the rows."""
        for use in self._uses:
            try:
                await use.database.write(self._delete, use.tables)
            except errors.Error as error:
                log.warning("process is still registered", reason=error.reason)

    def _delete(self, shared: tables.Tables) -> None:
        shared.process.delete().where(shared.process.id == self.id).execute()


def living(shared: tables.Tables) -> list[Any]:
    """Return the rows of living processes, oldest first. Within a unit."""
    table = shared.process
    oldest = database.now() - int(ALIVE_S * 1_000_000)
    return list(table.select().where(table.heartbeat_time >= oldest).order_by(table.start_time))


def text(row: Any) -> str:
    """Return how a process is named to people."""
    return f"release {row.release} on {row.host}, process {row.pid}"
