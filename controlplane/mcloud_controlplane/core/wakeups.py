"""Who waits for changes of a database's resources, and is woken after the commits that made them.

Wake-ups are hints: whoever waits looks for itself, and waits with a timeout.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

Concern = tuple[str, str]  # type and id of a resource; "" is any


@dataclass(frozen=True, eq=False)
class _Listener:
    loop: asyncio.AbstractEventLoop
    wakes: Callable[[Collection[Concern]], None]  # in that loop

    def wake(self, changes: Collection[Concern], running: asyncio.AbstractEventLoop | None) -> None:
        """Tell it of the changes; `running` is the loop of this thread, if there is one."""
        if self.loop is running:
            self.wakes(changes)
        elif not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.wakes, changes)


class Gathering:
    """What has changed since it was last asked; `event` is set while there is something."""

    def __init__(self) -> None:
        self.event = asyncio.Event()
        self._changes: set[Concern] = set()

    def add(self, changes: Collection[Concern]) -> None:
        """Take the changes of a commit; none: anything may have changed."""
        self._changes.update(changes or {ANYTHING})
        self.event.set()

    def take(self) -> set[Concern]:
        """Return what has changed, of whatever type; ANYTHING among it: nobody knows what."""
        taken, self._changes = self._changes, set()
        self.event.clear()
        return taken


ANYTHING = ("", "")


class Wakeups:
    """Those who wait, by what they wait for. They come and go in their loops, all in one thread."""

    def __init__(self) -> None:
        self._listeners: dict[Concern, set[_Listener]] = defaultdict(set)

    @contextmanager
    def listening(self, types: Collection[str], id_: str) -> Iterator[asyncio.Event]:
        """Give an event that is set after each commit with a change of concern.

        Args:
            types: of the resources; none: all.
            id_: of the one resource of one of the types; empty: all.
        """
        event = asyncio.Event()
        with self._told(types, id_, lambda changes: event.set()):
            yield event

    @contextmanager
    def gathering(self, types: Collection[str]) -> Iterator[Gathering]:
        """Give what tells the changes of commits with a change of these types; none: all."""
        gathered = Gathering()
        with self._told(types, "", gathered.add):
            yield gathered

    @contextmanager
    def _told(
        self, types: Collection[str], id_: str, wakes: Callable[[Collection[Concern]], None]
    ) -> Iterator[None]:
        listener = _Listener(asyncio.get_running_loop(), wakes)
        concerns = [(type_, id_) for type_ in types or ("",)]
        for concern in concerns:
            self._listeners[concern].add(listener)
        try:
            yield
        finally:
            for concern in concerns:
                found = self._listeners[concern]
                found.discard(listener)
                if not found:
                    del self._listeners[concern]

    def wake(self, changes: Collection[Concern] = ()) -> None:
        """Wake who waits for one of these changes; none: everybody. From any thread."""
        woken: set[_Listener] = set()
        for concern in self._met(changes):
            woken |= self._listeners.get(concern, frozenset())
        running = asyncio._get_running_loop()
        for listener in woken:
            listener.wake(changes, running)

    def _met(self, changes: Collection[Concern]) -> set[Concern]:
        """Return the concerns that the changes meet; a change without an id may be of any."""
        if not changes:
            return set(self._listeners)
        met = {("", "")}
        for type_, id_ in changes:
            met |= {(type_, id_), (type_, "")}
        some = {type_ for type_, id_ in changes if not id_}
        if some:
            met |= {concern for concern in tuple(self._listeners) if concern[0] in some}
        return met
