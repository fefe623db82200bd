"""Figures, how they are shown to people, and how they are written for machines."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from benchmarks.targets import TARGETS


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
    target: str | None = None  # "<= 6", "ratio >= 0.4"
    met: bool | None = None  # None also where the sizes are not those of the target
    database: str = ""  # that it was measured with, where that matters


def figure(
    name: str,
    samples: Sequence[float],
    unit: str,
    *,
    yardstick: Sequence[float] = (),
    holds: bool = True,
) -> Figure:
    """Return the figure that samples make: their median, beside that of the yardstick's.

    Args:
        holds: whether what the target takes for granted is so (none has failed).
    """
    value = statistics.median(samples)
    beside = statistics.median(yardstick) if yardstick else None
    ratio = None if not beside else value / beside
    target = TARGETS.get(name)
    return Figure(
        name,
        _rounded(value),
        unit,
        _rounded(spread(samples)),
        None if beside is None else _rounded(beside),
        None if ratio is None else _rounded(ratio),
        None if target is None else str(target),
        None if target is None else holds and target.met_by(value, ratio),
    )


def percentile(samples: Sequence[float], percent: int) -> float:
    """Return a percentile; of few samples the largest stands for the last ones."""
    if len(samples) < 2:
        return max(samples, default=0.0)
    return statistics.quantiles(samples, n=100, method="inclusive")[percent - 1]


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


@dataclass(frozen=True)
class Curve:
    """How a figure goes with a size: y = factor * size ** exponent, as near as that can be."""

    name: str
    unit: str
    of: str  # what the size counts: "hosts"
    points: Sequence[tuple[float, float]]
    database: str = ""

    @property
    def exponent(self) -> float:
        """0: it does not matter; 1: in proportion. By least squares over the logarithms."""
        logs = [(math.log(size), math.log(max(value, 1e-9))) for size, value in self.points]
        slope, _ = statistics.linear_regression(*zip(*logs, strict=True))
        return round(slope, 2) + 0.0  # not -0

    def __str__(self) -> str:
        points = ", ".join(f"{size:g}: {value:.4g}" for size, value in self.points)
        return f"{self.name} [{self.unit}] by {self.of}: {points}; ~ {self.of}^{self.exponent:g}"


@dataclass
class Report:
    """Everything that a run has found."""

    machine: Machine
    quick: bool = False
    figures: list[Figure] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)

    def add(self, figures: Sequence[Figure], database: str) -> Sequence[Figure]:
        """Take figures in; return them as they are reported: small sizes meet no target."""
        changes = {"database": database, **({"met": None} if self.quick else {})}
        added = [replace(each, **changes) for each in figures]  # type: ignore[arg-type]
        self.figures += added
        return added

    def json(self) -> str:
        """Return it for machines."""
        content = {
            "machine": asdict(self.machine),
            "quick": self.quick,
            "figures": [asdict(figure) for figure in self.figures],
            "growth": [{**asdict(curve), "exponent": curve.exponent} for curve in self.curves],
        }
        return json.dumps(content, indent=1) + "\n"

    @staticmethod
    def table(figures: Sequence[Figure]) -> str:
        """Return figures for people."""
        rows = [
            (
                one.name,
                f"{one.value:g} {one.unit}",
                f"±{one.spread / 2:g}",
                "" if one.yardstick is None else f"{one.yardstick:g} {one.unit}",
                "" if one.ratio is None else f"{one.ratio:g}",
                one.target or "",
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
