"""The hosts in memory, following the database's change log."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection

import structlog

from mcloud_base import errors
from mcloud_controlplane.core.database import Database
from mcloud_controlplane.scheduler import store
from mcloud_controlplane.scheduler.hosts import Hosts
from mcloud_controlplane.settings import Settings

log = structlog.get_logger()

_FOLLOW_S = 5.0  # the net under the wake-ups
_REST_S = 0.1  # between two looks: this process's own claims are in the view without one
_HEARD_S = 2.0  # how old the times of the last reports may be


class View:
    """The hosts in memory, following the database's change log.

    That a host lives is no change: when each has reported last, whichever process it reports to,
    is read again at intervals.

    Whoever changes it holds `changing` from before the database is looked at until what was found
    is in: one after the other, so that what was read later stays.
    """

    def __init__(self, opened: Database, settings: Settings) -> None:
        self._database = opened
        self._settings = settings
        self.hosts = Hosts()
        self.loaded = asyncio.Event()
        self.revision: int | None = None  # up to which the view is complete
        self.changing = asyncio.Lock()

    async def follow(self) -> None:
        """Load all hosts, then what changes, for ever."""
        heard = 0.0
        with self._database.listening("host") as event:
            while True:
                event.clear()
                try:
                    async with self.changing:
                        await self.catch_up()
                    if time.monotonic() - heard > _HEARD_S:
                        self.hosts.heard(await self._database.read(store.report_times))
                        heard = time.monotonic()
                    self.loaded.set()
                except errors.Error as error:
                    log.warning("view of hosts is not refreshed", reason=error.reason)
                await asyncio.sleep(_REST_S)
                try:
                    async with asyncio.timeout(_FOLLOW_S):
                        await event.wait()
                except TimeoutError:
                    continue

    async def catch_up(self) -> None:
        """Read all hosts, or those that have changed since the last time. Within `changing`."""
        head, changed = await self._database.read(store.changed_hosts, self.revision)
        if changed is None or changed:
            await self.read(changed)
        self.revision = head  # not before: reading may fail

    async def read(self, host_ids: Collection[str] | None) -> None:
        """Read hosts again; None: all. Within `changing`."""
        records = await self._database.read(store.load_hosts, self._settings, host_ids)
        self.hosts = self.hosts.update(records)

    async def compare(self) -> tuple[int, list[str]]:
        """Return how many hosts are known, and of which it is not known what is recorded.

        Those that changed after the view's revision are on their way here.
        """
        async with self.changing:
            records, changed = await self._database.read(
                store.load_and_changed, self._settings, self.revision or 0
            )
            return len(records), [
                id_
                for id_ in {**records, **self.hosts.index}
                if changed is not None
                and id_ not in changed
                and not self.hosts.shows(id_, records.get(id_))
            ]
