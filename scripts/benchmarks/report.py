"""Figures, how they are shown to people, and how they are written for machines."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Figure:
    """One result.

    `spread` is the distance between the quartiles, in `unit`. `yardstick` is what the machine
    does without mcloud, in `unit`, and `ratio` is value / yardstick.
    """

    name: str
    value: float
    unit: str
    spread: float = 0.0
    yardstick: float | None = None
    ratio: float | None = None
    target: float | None = None  # at most this
    met: bool | None = None


def figure(
    name: str,
    samples: Sequence[float],
    unit: str,
    *,
    yardstick: Sequence[float] = (),
    target: float | None = None,
) -> Figure:
    """Return the figure that samples make: their median, beside that of the yardstick's."""
    value = statistics.median(samples)
    beside = statistics.median(yardstick) if yardstick else None
    return Figure(
        name,
        _rounded(value),
        unit,
        _rounded(spread(samples)),
        None if beside is None else _rounded(beside),
        None if beside is None else _rounded(value / beside),
        target,
        None if target is None else value <= target,
    )


def spread(samples: Sequence[float]) -> float:
    """Return the distance between the quartiles."""
    if len(samples) < 2:
        return 0.0
    first, _, third = statistics.quantiles(samples, n=4, method="inclusive")
    return third - first


@dataclass(frozen=True)
class Machine:
    """Where it was measured, and what else the machine was doing."""

    cpu: str
    cores: int
    memory_mib: int
    kernel: str
    python: str
    load: tuple[float, float, float]  # of the last 1, 5 and 15 minutes, before the first figure

    @classmethod
    def look(cls) -> Machine:
        """Return this one."""
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if "model name" in line), "?")
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20
        load = (round(one, 1) for one in os.getloadavg())
        return cls(
            model,
            len(os.sched_getaffinity(0)),
            memory,
            platform.release(),
            platform.python_version(),
            (next(load), next(load), next(load)),
        )

    def __str__(self) -> str:
        busy = "" if self.load[0] < self.cores / 2 else "; it is busy, and the figures show that"
        return (
            f"{self.cores} cores {self.cpu}, {self.memory_mib} MiB, Linux {self.kernel}, "
            f"Python {self.python}, load {self.load[0]}{busy}"
        )


@dataclass
class Report:
    """Everything that a run has found."""

    machine: Machine
    figures: list[Figure] = field(default_factory=list)

    def json(self) -> str:
        """Return it for machines."""
        content = {
            "machine": asdict(self.machine),
            "figures": [asdict(figure) for figure in self.figures],
        }
        return json.dumps(content, indent=1) + "\n"

    def table(self, figures: Sequence[Figure]) -> str:
        """Return figures for people."""
        rows = [
            (
                one.name,
                f"{one.value:g} {one.unit}",
                f"±{one.spread / 2:g}",
                "" if one.yardstick is None else f"{one.yardstick:g} {one.unit}",
                "" if one.ratio is None else f"{one.ratio:g}",
                "" if one.target is None else f"≤ {one.target:g}",
                {True: "met", False: "MISSED", None: ""}[one.met],
            )
            for one in figures
        ]
        return aligned([("FIGURE", "MEDIAN", "SPREAD", "YARDSTICK", "RATIO", "TARGET", ""), *rows])


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Return rows in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _rounded(value: float) -> float:
    """Return four significant digits: the noise is larger than what is left out."""
    return float(f"{value:.4g}")
