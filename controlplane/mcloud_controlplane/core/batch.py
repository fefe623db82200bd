"""Many small writes of one kind as one: what comes within a moment is written in one transaction.

Hosts renew their leases and say that they are alive, each every few seconds; a transaction for
each of them would be most of what the database does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

from mcloud_base import errors

K = TypeVar("K", bound=Hashable)

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
