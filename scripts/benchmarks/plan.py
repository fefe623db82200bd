"""What a benchmark is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    """How much to measure, and with which database."""

    repeats: int
    quick: bool = False
    database: str = "sqlite"  # or "postgresql"

    def size(self, full: T, quick: T) -> T:
        """Return a size: that of the figure, or a small one that only shows that it works."""
        return quick if self.quick else full
