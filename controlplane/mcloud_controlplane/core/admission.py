"""Which calls a process works on: each goes on at once, waits its turn, or is told when to return.

It comes after authentication and before any work for the call, so a refusal costs next to nothing.
Projects, operators, hosts, services and callers without credentials have places of their own, and
none takes another's. Within a lane those who wait are served by turns of their owners (a project,
a host, an address), so whoever sends more waits longer, and nobody else does.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass, field

from mcloud.common.v1 import options_pb2
from mcloud_base import errors
from mcloud_controlplane.core import auth

Rule = options_pb2.Rule

_WAIT_S = 5.0  # after which a client had better try elsewhere
_RETRY_S = 1.0
_OWNER_WAITING = 128  # calls of one owner that may wait
_LANE_WAITING = 2000  # of all owners
_HOST_STREAMS = 64  # four sessions, those they replace, and downloads
_ADDRESS_STREAMS = 8  # of callers without credentials
_OPEN_STREAMS = 64  # of all of these


@dataclass
class _Owner:
    active: int = 0
    waiting: deque[asyncio.Future[None]] = field(default_factory=deque)


class Lane:
    """Places for calls of one kind.

    Args:
        limit: calls at once.
        share: of them one owner's, at most.
        owner_waiting: calls of one owner that may wait; 0: what finds no place is refused.
        lane_waiting: of all owners together.
    """

    def __init__(
        self,
        limit: int,
        share: int,
        *,
        owner_waiting: int = _OWNER_WAITING,
        lane_waiting: int = _LANE_WAITING,
    ) -> None:
        self._limit = limit
        self._share = share
        self._owner_waiting = owner_waiting
        self._lane_waiting = lane_waiting
        self._active = 0
        self._waiting = 0
        self._owners: dict[str, _Owner] = {}
        self._turns: deque[str] = deque()  # owners who have a call waiting, each once

    def place(self, owner: str) -> AbstractAsyncContextManager[None]:
        """Hold a place.

        Raises:
            errors.Exhausted: TOO_MANY_REQUESTS, too many of this owner's wait.
            errors.Unavailable: OVERLOADED, too many wait, or this one has waited too long.
        """
        return _Place(self, owner)

    async def take(self, owner: str) -> None:
        """Take a place; `leave` gives it back."""
        entry = self._owners.setdefault(owner, _Owner())
        if self._active < self._limit and entry.active < self._share:
            self._active += 1
            entry.active += 1
            return
        if not self._owner_waiting or self._waiting >= self._lane_waiting:
            self._forget(owner)
            raise overloaded()
        if len(entry.waiting) >= self._owner_waiting:
            raise errors.Exhausted(
                "TOO_MANY_REQUESTS",
                f"{len(entry.waiting)} requests wait before this one; send fewer at once",
                details=(errors.retry_after(_RETRY_S),),
            )
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if not entry.waiting:
            self._turns.append(owner)
        entry.waiting.append(turn)
        self._waiting += 1
        try:
            async with asyncio.timeout(_WAIT_S):
                await turn
        except (TimeoutError, asyncio.CancelledError) as error:
            if turn.done() and not turn.cancelled():
                self.leave(owner)  # its turn came as it gave up
            elif turn in entry.waiting:
                self._waiting -= 1
                entry.waiting.remove(turn)
                if not entry.waiting:
                    self._turns.remove(owner)
                self._forget(owner)
            if isinstance(error, TimeoutError):
                raise overloaded() from error
            raise

    def leave(self, owner: str) -> None:
        """Give a place back."""
        self._active -= 1
        self._owners[owner].active -= 1
        self._call_next()
        self._forget(owner)

    def _call_next(self) -> None:
        """Give free places to those who wait: one to each owner in turn."""
        for _ in range(len(self._turns)):
            if self._active >= self._limit:
                return
            owner = self._turns.popleft()
            entry = self._owners[owner]
            if entry.active < self._share:
                turn = entry.waiting.popleft()
                self._waiting -= 1
                if not turn.done():  # else it is giving up
                    self._active += 1
                    entry.active += 1
                    turn.set_result(None)
            if entry.waiting:
                self._turns.append(owner)
            else:
                self._forget(owner)

    def _forget(self, owner: str) -> None:
        entry = self._owners.get(owner)
        if entry is not None and not entry.active and not entry.waiting:
            del self._owners[owner]


class _Place:
    """A place in a lane: every call takes one, and a generator would take it four times as long."""

    __slots__ = ("_lane", "_owner")

    def __init__(self, lane: Lane, owner: str) -> None:
        self._lane = lane
        self._owner = owner

    async def __aenter__(self) -> None:
        await self._lane.take(self._owner)

    async def __aexit__(self, *_: object) -> None:
        self._lane.leave(self._owner)


class Streams:
    """Counts what stays open: watches, waits, uploads, downloads, sessions.

    Args:
        limit: of all owners together.
        share: of one owner.
    """

    def __init__(self, limit: int, share: int) -> None:
        self._limit = limit
        self._share = share
        self._open: Counter[str] = Counter()

    @contextmanager
    def place(self, owner: str) -> Iterator[None]:
        """Hold a place.

        Raises:
            errors.Exhausted: TOO_MANY_STREAMS, this owner has its share.
            errors.Unavailable: OVERLOADED, this process has all it can.
        """
        if self._open[owner] >= self._share:
            raise errors.Exhausted(
                "TOO_MANY_STREAMS",
                f"{self._share} streams of yours are open here; close some",
                limit=self._share,
            )
        if self._open.total() >= self._limit:
            raise overloaded()
        self._open[owner] += 1
        try:
            yield
        finally:
            self._open[owner] -= 1
            if not self._open[owner]:
                del self._open[owner]


class Admission:
    """The lanes of a process, for both its ports.

    Args:
        requests: calls of projects that are worked on at once; the other lanes follow from it.
        streams: that clients may hold open, all together.
        streams_per_caller: the same of one user or application credential.
    """

    def __init__(self, *, requests: int, streams: int, streams_per_caller: int) -> None:
        quarter = max(requests // 4, 1)
        # A place is always left that one project alone cannot have.
        self._projects = Lane(requests, max(requests - quarter, 1))
        self._operators = Lane(quarter, quarter)
        self._anyone = Lane(quarter, max(quarter // 2, 1), owner_waiting=32, lane_waiting=256)
        self._hosts = Lane(requests, max(quarter // 2, 1), lane_waiting=10_000)
        # Services call each other within calls: if these waited, they could wait for each other.
        self._services = Lane(requests * 4, requests * 4, owner_waiting=0)
        self._client_streams = Streams(streams, streams_per_caller)
        self._host_streams = Streams(100_000, _HOST_STREAMS)
        self._open_streams = Streams(_OPEN_STREAMS, _ADDRESS_STREAMS)
        self._service_streams = Streams(10_000, 10_000)

    def place(
        self, caller: auth.Caller, peer: Callable[[], str], *, stays: bool
    ) -> AbstractAsyncContextManager[None]:
        """Hold a place for a call.

        Args:
            peer: tells it as gRPC names it: "ipv4:192.0.2.1:40000".
            stays: it is a stream, or waits for something to happen.

        Raises:
            errors.Exhausted: TOO_MANY_REQUESTS, TOO_MANY_STREAMS.
            errors.Unavailable: OVERLOADED.
        """
        if stays:
            return self._stream(caller, peer)
        lane, owner = self._lane(caller, peer)
        return lane.place(owner)

    @asynccontextmanager
    async def _stream(self, caller: auth.Caller, peer: Callable[[], str]) -> AsyncIterator[None]:
        streams, owner = self._streams(caller, peer)
        with streams.place(owner):
            yield

    def _lane(self, caller: auth.Caller, peer: Callable[[], str]) -> tuple[Lane, str]:
        if caller.kind == Rule.CALLER_SERVICE:
            return self._services, caller.principal_id
        if caller.kind in (Rule.CALLER_HOST, Rule.CALLER_DELEGATE):
            return self._hosts, caller.host_id
        if caller.kind == Rule.CALLER_USER:
            if caller.system:
                return self._operators, caller.principal_id
            return self._projects, caller.project_id
        return self._anyone, address(peer())

    def _streams(self, caller: auth.Caller, peer: Callable[[], str]) -> tuple[Streams, str]:
        if caller.kind == Rule.CALLER_SERVICE:
            return self._service_streams, caller.principal_id
        if caller.kind in (Rule.CALLER_HOST, Rule.CALLER_DELEGATE):
            return self._host_streams, caller.host_id
        if caller.kind == Rule.CALLER_USER:
            return self._client_streams, caller.principal_id
        return self._open_streams, address(peer())


def overloaded() -> errors.Unavailable:
    """Return the error for whoever finds no place."""
    return errors.Unavailable(
        "OVERLOADED",
        "too many requests are being worked on; try again in a moment",
        details=(errors.retry_after(_RETRY_S),),
    )


def address(peer: str) -> str:
    """Return a peer's address without its port."""
    return peer.rpartition(":")[0]
