"""Callers that each make one call after the other."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from benchmarks import report


@dataclass
class Load:
    """What came of it. Times in seconds."""

    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Calls a second."""
        return len(self.latencies) / self.seconds

    def at_ms(self, percent: int) -> float:
        """Return a percentile of the latencies, in milliseconds."""
        return 1000 * report.percentile(self.latencies, percent)

    @property
    def median_ms(self) -> float:
        """Of the latencies, in milliseconds."""
        return 1000 * statistics.median(self.latencies)


async def calls(work: Callable[[], Awaitable[object]], callers: int, count: int) -> Load:
    """Make so many calls in all."""
    left = iter(range(count))
    return await _run(work, callers, lambda: next(left, None) is not None)


async def for_seconds(work: Callable[[], Awaitable[object]], callers: int, seconds: float) -> Load:
    """Make calls for so long."""
    end = time.perf_counter() + seconds
    return await _run(work, callers, lambda: time.perf_counter() < end)


async def _run(
    work: Callable[[], Awaitable[object]], callers: int, goes_on: Callable[[], bool]
) -> Load:
    found = Load()

    async def caller() -> None:
        while goes_on():
            begin = time.perf_counter()
            await work()
            found.latencies.append(time.perf_counter() - begin)

    begin = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(callers)))
    found.seconds = time.perf_counter() - begin
    return found
