"""Bounded threads for a library that blocks, with a deadline for every call.

A call that passes its deadline cannot be stopped; it can only be left behind. What it was about
stays closed to others until it has ended: it might still do what it was once asked.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, ParamSpec, TypeVar
from weakref import WeakValueDictionary

from mcloud_base.errors import Unavailable

P = ParamSpec("P")
T = TypeVar("T")


class Threads:
    """A pool of threads for one library.

    Args:
        name: of the threads, and in messages: "libvirt".
        count: calls at a time; the others wait, and their deadlines run meanwhile.
        reason: of the Unavailable that a missed deadline raises.
    """

    def __init__(self, name: str, count: int, reason: str) -> None:
        self._name = name
        self._reason = reason
        self._executor = ThreadPoolExecutor(count, thread_name_prefix=name)
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._left: dict[str, set[asyncio.Future[Any]]] = {}

    async def run(
        self,
        deadline_s: float,
        key: str,
        function: Callable[P, T],
        /,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """Call `function` in a thread.

        `key` is what the call is about (see `exclusive`); empty if it changes nothing.

        Raises:
            Unavailable: it has not ended in time.
        """
        call: Future[T] = self._executor.submit(function, *args, **kwargs)
        waiter = asyncio.wrap_future(call)
        try:
            async with asyncio.timeout(deadline_s):
                return await asyncio.shield(waiter)
        except TimeoutError as error:
            raise self._late(deadline_s) from error
        finally:
            if not call.done() and not call.cancel():
                self._leave(key, waiter)

    @asynccontextmanager
    async def exclusive(self, key: str, deadline_s: float) -> AsyncIterator[None]:
        """Hold `key` alone, once every call about it that was left behind has ended.

        Raises:
            Unavailable: it is not to be had in time.
        """
        lock = self._locks.setdefault(key, asyncio.Lock())
        end = time.monotonic() + deadline_s
        try:
            async with asyncio.timeout(deadline_s):
                await lock.acquire()
        except TimeoutError as error:
            raise self._late(deadline_s) from error
        try:
            if left := self._left.get(key):
                _, late = await asyncio.wait(set(left), timeout=max(end - time.monotonic(), 0))
                if late:
                    raise self._late(deadline_s)
            yield
        finally:
            lock.release()

    def close(self) -> None:
        """Start no more calls; those that run are not waited for."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _leave(self, key: str, waiter: asyncio.Future[T]) -> None:
        calls = self._left.setdefault(key, set())
        calls.add(waiter)

        def forget(done: asyncio.Future[T]) -> None:
            if not done.cancelled():
                done.exception()  # nobody asks for it any more
            calls.discard(done)
            if not calls:
                self._left.pop(key, None)

        waiter.add_done_callback(forget)

    def _late(self, deadline_s: float) -> Unavailable:
        return Unavailable(
            self._reason,
            f"{self._name} has not answered within {deadline_s:g} s",
            deadline_s=deadline_s,
        )
