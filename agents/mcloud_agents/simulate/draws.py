"""Chance that is the same at every run: numbers by seed, host and event."""

from __future__ import annotations

import hashlib
import math
from collections import Counter


class Draws:
    """One host's draws. Those of an event do not depend on how often others happen.

    Nothing but counters is kept: a generator of Python's for each event would take 2.5 KiB.
    """

    def __init__(self, seed: int, host: int) -> None:
        self._prefix = f"{seed}/{host}"
        self._counts: Counter[str] = Counter()

    def number(self, event: str) -> float:
        """Return the event's next number, in [0, 1)."""
        self._counts[event] += 1
        text = f"{self._prefix}/{event}/{self._counts[event]}"
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") / (1 << 64)

    def between(self, event: str, low: float, high: float) -> float:
        """Return a number in [low, high), all as likely."""
        return low + (high - low) * self.number(event)

    def happens(self, event: str, probability: float) -> bool:
        """Tell whether something happens this time."""
        return self.number(event) < probability

    def wait_s(self, event: str, per_hour: float) -> float:
        """Return the time until something that happens so often, at random, happens next.

        Returns:
            Seconds, exponentially distributed; infinity if it never does.
        """
        if per_hour <= 0:
            return math.inf
        return -math.log(1 - self.number(event)) * 3600 / per_hour
