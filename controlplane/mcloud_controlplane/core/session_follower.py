"""Wakes the streams of a process whose hosts have something to do, however many there are.

Whoever desires something that somebody waits for names the host, whose stream is woken by the
commit (`tables.wake_host`). For the rest, and where the host is not known, there is one look at the
database for all streams: a change concerns few hosts, and if every stream looked whenever something
changes, each change would cost a statement a host.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import structlog

from mcloud_base import errors
from mcloud_controlplane.core import tables, wakeups
from mcloud_controlplane.core.database import Database

log = structlog.get_logger()

_POLL_S = 5.0  # the net under the wake-ups
# At least, between two times that streams are woken: what comes in a burst is read at once.
_PAUSE_S = 0.02
_PAUSE_OF_MANY_S = 0.1
_MANY = 2  # streams that were woken
_REST = 8.0  # the same, as a share of the time that the last one took
_LEISURE_S = 1.0  # at least, between two messages to a host of what nobody waits for,
_LONGEST_LEISURE_S = 10.0
_LEISURELY_A_SECOND = 50  # which are at most as many if all hosts have something new all the time
_NUMBERS_S = 5.0  # between two looks for newer streams of other processes


class Pending(NamedTuple):
    """An object that its host has not brought to its generation yet."""

    host_id: str
    id: str
    generation: int
    absent: bool
    urgent: bool = True  # somebody waits for it; others are told at leisure


@dataclass(eq=False)
class Stream:
    """A host's stream to this process.

    `wake` is set when there may be something to send, `urgent` if somebody waits for it.
    """

    host_id: str
    number: int
    sent: dict[str, tuple[int, bool]] = field(default_factory=dict)  # generation, absent; by id
    sent_time: float = 0.0  # of the last one; monotonic
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    urgent: bool = False


class Follower:
    """Wakes streams whose host has something to do, or has a newer stream.

    Args:
        pending: returns what hosts have not reached, of all hosts; called within a unit, with
            `urgent` when what somebody waits for is enough.
        types: whose changes may change that, beside those that name a host; none: all.
    """

    def __init__(
        self,
        store: Database,
        shared: tables.Tables,
        pending: Callable[..., Collection[Pending]],
        types: Collection[str],
    ) -> None:
        self._database = store
        self._tables = shared
        self._pending = pending
        self._types = types
        self._streams: dict[str, set[Stream]] = {}  # by host
        self._task: asyncio.Task[None] | None = None
        self._looked_at_all = self._looked_for_numbers = 0.0  # when; monotonic

    @contextmanager
    def following(self, stream: Stream) -> Iterator[None]:
        """Wake a stream from now on."""
        own = self._streams.setdefault(stream.host_id, set())
        for other in own:
            other.wake.set()  # to see that it is superseded
        own.add(stream)
        if self._task is None:
            self._task = asyncio.create_task(self._follow(), name="host streams")
        try:
            yield
        finally:
            own.discard(stream)
            if not own and self._streams.get(stream.host_id) is own:
                del self._streams[stream.host_id]
            if not self._streams and self._task is not None:
                self._task.cancel()
                self._task = None

    async def _follow(self) -> None:
        types = (tables.DESIRED, *self._types) if self._types else ()
        with self._database.gathering(*types) as gathered:
            gathered.add(())  # whatever was before
            while True:
                woken, others = self._wake_named(gathered.take())
                begin = time.monotonic()
                wait_s = self._looked_at_all + _LEISURE_S - begin
                if others or wait_s <= 0:
                    wait_s = await self._look_for_pending(urgent=wait_s > 0)
                # Of many processes each looks: of a database that is busy, less often.
                rest_s = _REST * (time.monotonic() - begin)
                pause_s = _PAUSE_S if woken < _MANY else _PAUSE_OF_MANY_S
                await asyncio.sleep(min(max(pause_s, rest_s), _LEISURE_S))
                with suppress(TimeoutError):
                    async with asyncio.timeout(wait_s):
                        await gathered.event.wait()

    async def _look_for_pending(self, *, urgent: bool) -> float:
        """Look which hosts have something to do; return for how long to wait for more.

        Args:
            urgent: what somebody waits for is enough: of the rest there may be as many as there
                are hosts.
        """
        now = time.monotonic()
        with_numbers = now - self._looked_for_numbers > _NUMBERS_S
        try:
            pending, numbers = await self._database.read(self._look, urgent, with_numbers)
        except errors.Error as error:
            log.warning("streams of hosts look again", reason=error.reason)
            return _POLL_S
        except Exception:  # the outermost loop: a fault must not silence every host
            log.exception("streams of hosts look again")
            return _POLL_S
        if with_numbers:
            self._looked_for_numbers = now
        if not urgent:
            self._looked_at_all = now
        return _LEISURE_S if self._wake(pending, numbers) or urgent else _POLL_S

    def _wake_named(self, changes: Collection[wakeups.Concern]) -> tuple[int, bool]:
        """Wake the streams of hosts that changes name.

        Returns:
            How many, and whether the changes may concern other hosts.
        """
        woken, others = 0, False
        for type_, id_ in changes:
            if type_ == tables.DESIRED and id_:
                for stream in self._streams.get(id_, ()):
                    stream.urgent = True
                    stream.wake.set()
                    woken += 1
            elif type_ in ("", tables.DESIRED):
                others = True
        return woken, others

    def _look(
        self, urgent: bool, with_numbers: bool
    ) -> tuple[Collection[Pending], dict[str, int] | None]:
        table: Any = self._tables.host_session
        numbers = None
        if with_numbers:
            numbers = dict(table.select(table.host_id, table.number).tuples())
        return self._pending(urgent=urgent), numbers

    def _leisure_s(self) -> float:
        wanted = len(self._streams) / _LEISURELY_A_SECOND
        return min(max(wanted, _LEISURE_S), _LONGEST_LEISURE_S)

    def _wake(self, pending: Collection[Pending], numbers: dict[str, int] | None) -> bool:
        """Wake streams that have something to send; tell whether any is to be woken later."""
        if numbers is not None:
            for host_id, streams in self._streams.items():
                for stream in streams:
                    if numbers.get(host_id) != stream.number:
                        stream.wake.set()
        later, leisure = False, time.monotonic() - self._leisure_s()
        for each in pending:
            for stream in self._streams.get(each.host_id, ()):
                if stream.sent.get(each.id) == (each.generation, each.absent):
                    continue
                if each.urgent or stream.sent_time < leisure:
                    stream.urgent |= each.urgent
                    stream.wake.set()
                else:
                    later = True
        return later
