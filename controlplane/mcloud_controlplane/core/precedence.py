"""Who asks for something is answered before what was asked for just now is worked on.

To accept a request takes milliseconds, to do what it asks for ten times as long and more. If both
had their turns alike, each of many who ask at once would wait for the work of those before. So
while many ask, steps of operations begin one after the other, with a pause, and not as they come:
they go on, whoever asks for however long, and take an eighth of the time at most. The first of many
seems to be alone: so after each the steps wait for a moment, in which the next may come.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

_MANY = 4  # who ask within _SOON_S
_SOON_S = 0.1
# Without anybody who asks, after the last one, until all steps begin: of many the next one takes
# longer to come; one who asks alone waits for what was asked for.
_CALM_S = 0.01
_CALM_OF_FEW_S = 0.001
_CALM_TURNS = 3  # of the loop, after that: it may have had no time to hear of those who ask
_BITE = 16  # steps that begin in one turn
_STEP_S = 0.05  # between the beginnings of two steps, while many ask


class Precedence:
    """Watches requests that are being accepted, in one event loop."""

    def __init__(self) -> None:
        self._count = 0  # that are being accepted
        self._begun: deque[float] = deque(maxlen=_MANY)  # when the last ones came
        self._waiting: deque[asyncio.Future[None]] = deque()  # steps
        self._pacing: asyncio.TimerHandle | None = None  # while steps wait
        self._calm: asyncio.Handle | None = None  # until it ends, or while steps begin

    @contextmanager
    def accepting(self) -> Iterator[None]:
        """Accept a request within the block."""
        loop = asyncio.get_running_loop()
        self._count += 1
        if self._calm is not None:
            self._calm.cancel()
            self._calm = None
        # gRPC hands over a call a turn of the loop: they may come one by one.
        self._begun.append(loop.time())
        many = len(self._begun) == _MANY and loop.time() - self._begun[0] < _SOON_S
        if many:
            self._pace()
        try:
            yield
        finally:
            self._count -= 1
            if not self._count:
                self._pace()
                calm_s = _CALM_S if many else _CALM_OF_FEW_S
                self._calm = loop.call_later(calm_s, self._hear, _CALM_TURNS)

    async def turn(self) -> None:
        """Return when a step of an operation may begin."""
        if self._pacing is not None:
            turn = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            await turn

    def _pace(self) -> None:
        if self._pacing is None:
            self._pacing = asyncio.get_running_loop().call_later(_STEP_S, self._begin_next)

    def _begin_next(self) -> None:
        self._pacing = asyncio.get_running_loop().call_later(_STEP_S, self._begin_next)
        self._begin(1)

    def _hear(self, turns: int) -> None:
        """Let those who ask be heard, for so many turns; then begin what waits."""
        if turns:
            self._calm = asyncio.get_running_loop().call_soon(self._hear, turns - 1)
        else:
            self._begin_all()

    def _begin_all(self) -> None:
        """Begin what waits, bite by bite, until somebody asks again."""
        self._begin(_BITE)
        if self._waiting:
            self._calm = asyncio.get_running_loop().call_soon(self._begin_all)
            return
        assert self._pacing is not None
        self._pacing.cancel()
        self._pacing = self._calm = None

    def _begin(self, count: int) -> None:
        while self._waiting and count:
            turn = self._waiting.popleft()
            if not turn.done():  # else its runner has ended
                turn.set_result(None)
                count -= 1
