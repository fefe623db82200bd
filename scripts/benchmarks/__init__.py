"""Benchmarks: a module each, and the list of them. A new one is a module and a line below.

report.py   figures, their table and their JSON
cloud.py    a control plane and a host of a benchmark's own, and a client of them
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks import boot, start
from benchmarks.report import Figure


@dataclass(frozen=True)
class Benchmark:
    """What `scripts/bench NAME` runs."""

    summary: str
    run: Callable[[int], list[Figure]]  # takes the number of repeats
    repeats: int
    quick: int


ALL = {
    "boot": Benchmark(boot.__doc__.splitlines()[0].rstrip("."), boot.run, repeats=12, quick=3),
    "start": Benchmark(start.__doc__.splitlines()[0].rstrip("."), start.run, repeats=7, quick=2),
}
