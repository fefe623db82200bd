"""Pauses between attempts: longer each time, never the same for two hosts."""

from __future__ import annotations

import random
import time


class Backoff:
    """Counts failed attempts.

    Args:
        first_s: the first pause.
        longest_s: no pause is longer; an attempt that lasted this long was a success.
    """

    def __init__(self, first_s: float, longest_s: float) -> None:
        self._first_s = first_s
        self._longest_s = longest_s
        self._next_s = first_s
        self._start = time.monotonic()

    def begin(self) -> None:
        """Note that an attempt begins."""
        self._start = time.monotonic()

    def pause_s(self) -> float:
        """Return how long to wait, now that the attempt has ended."""
        if time.monotonic() - self._start >= self._longest_s:
            self._next_s = self._first_s
        pause = self._next_s
        self._next_s = min(pause * 2, self._longest_s)
        return pause * random.uniform(0.5, 1.0)  # noqa: S311 (jitter, not a secret)
