"""Who asks for something is answered before what was asked for just now is worked on.

To accept a request takes milliseconds, to do what it asks for ten times as long and more. If both
had their turns alike, each of many who ask at once would wait for the work of those before. So
while many ask, no step of an operation begins; but not for long: where many always ask, that is the
load, and no rush.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

_MANY = 4  # who ask at once
_CALM_S = 0.01  # without anybody who asks: gRPC hands over a call a turn of the event loop
_LONGEST_S = 2.0


class Precedence:
    """Counts requests that are being accepted, in one event loop."""

    def __init__(self) -> None:
        self._count = 0
        self._rush: asyncio.Event | None = None  # set at its end; none: there is none
        self._calm: asyncio.TimerHandle | None = None

    @contextmanager
    def accepting(self) -> Iterator[None]:
        """Accept a request within the block."""
        self._count += 1
        if self._calm is not None:
            self._calm.cancel()
            self._calm = None
        if self._count >= _MANY and self._rush is None:
            self._rush = asyncio.Event()
            asyncio.get_running_loop().call_later(_LONGEST_S, self._rush.set)
        try:
            yield
        finally:
            self._count -= 1
            if self._rush is not None and not self._count:
                self._calm = asyncio.get_running_loop().call_later(_CALM_S, self._end)

    def _end(self) -> None:
        assert self._rush is not None
        self._rush.set()
        self._rush = self._calm = None

    async def turn(self) -> None:
        """Return when a step of an operation may begin."""
        if self._rush is not None:
            await self._rush.wait()
