"""Many small works of one kind as one: what comes within a moment is done in one transaction.

Hosts renew their leases and say that they are alive, each every few seconds; a transaction for
each of them would be most of what the database does.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Hashable, Mapping
from typing import Generic, TypeVar

from mcloud_base import errors

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

LIMIT = 500  # keys in one statement


class Batch(Generic[K]):
    """Gathers keys for a moment, then writes them.

    Args:
        write: writes at most LIMIT keys; returns those for which it did.
        window_s: for how long keys are gathered after the first.
    """

    def __init__(
        self, write: Callable[[list[K]], Awaitable[set[K]]], *, window_s: float = 1.0
    ) -> None:
        self._write = write
        self._window_s = window_s
        self._waiting: dict[K, asyncio.Future[bool]] = {}
        self._flush: asyncio.Task[None] | None = None

    async def add(self, key: K) -> bool:
        """Wait until the key is written; tell whether it was.

        Raises:
            errors.Error: what the writing raised.
        """
        future = self._waiting.get(key)
        if future is None:
            future = self._waiting[key] = asyncio.get_running_loop().create_future()
        if self._flush is None:
            self._flush = asyncio.create_task(self._after_window())
        return await asyncio.shield(future)  # others may wait for the same

    async def _after_window(self) -> None:
        await asyncio.sleep(self._window_s)
        waiting, self._waiting, self._flush = self._waiting, {}, None
        keys = list(waiting)
        for start in range(0, len(keys), LIMIT):
            part = keys[start : start + LIMIT]
            try:
                written = await self._write(part)
            except errors.Error as error:
                for key in part:
                    waiting[key].set_exception(error)
                    waiting[key].exception()  # whoever waited may have left
            else:
                for key in part:
                    waiting[key].set_result(key in written)


class Gathered(Generic[K, V]):
    """Does at once what is asked for while the last was being done; the first is done at once.

    Args:
        work: does it for at most `limit` keys; returns what came of each.
        rest: for how long it then rests, as a share of the time that the work took.
    """

    def __init__(
        self,
        work: Callable[[list[K]], Awaitable[Mapping[K, V]]],
        *,
        limit: int = 50,
        rest: float = 0.0,
    ) -> None:
        self._work = work
        self._limit = limit
        self._rest = rest
        self._waiting: dict[K, asyncio.Future[V]] = {}
        self._running: asyncio.Task[None] | None = None

    async def get(self, key: K) -> V:
        """Wait until it is done for a key.

        Raises:
            Exception: what the work raised for this key alone.
        """
        future = self._waiting.get(key)
        if future is None:
            future = self._waiting[key] = asyncio.get_running_loop().create_future()
        if self._running is None:
            self._running = asyncio.create_task(self._run())
        return await asyncio.shield(future)  # others may wait for the same

    async def _run(self) -> None:
        while self._waiting:
            keys = list(self._waiting)[: self._limit]
            futures = {key: self._waiting.pop(key) for key in keys}
            begin = time.monotonic()
            await self._do(futures)
            if self._rest:
                await asyncio.sleep(self._rest * (time.monotonic() - begin))
        self._running = None

    async def _do(self, futures: dict[K, asyncio.Future[V]]) -> None:
        try:
            done = await self._work(list(futures))
        except Exception as error:
            # Of an error that is nobody's own all are told.
            if len(futures) > 1 and not isinstance(error, errors.Unavailable | errors.Exhausted):
                for key, future in futures.items():  # one's fault is not that of the others
                    await self._do({key: future})
                return
            for future in futures.values():
                future.set_exception(error)
                future.exception()  # whoever waited may have left
        else:
            for key, future in futures.items():
                future.set_result(done[key])
