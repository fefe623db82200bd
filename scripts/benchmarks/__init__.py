"""Benchmarks: a module each, and the list of them. A new one is a module and a line below.

report.py targets.py       figures, what they are to reach, their table and their JSON
yardsticks.py echo.py      what the machine does without mcloud
cloud.py simulated.py      a control plane, a host, simulated hosts of a benchmark's own
client.py load.py storm.py clients of them, one or many
counted.py processes.py    statements; CPU time and memory
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from benchmarks import (
    boot,
    burst,
    create,
    decisions,
    get,
    hosts,
    image,
    listing,
    start,
    statements,
    tokens,
    watch,
)
from benchmarks.plan import Plan
from benchmarks.report import Curve, Figure


@dataclass(frozen=True)
class Benchmark:
    """What `scripts/bench --only NAME` runs."""

    module: ModuleType
    repeats: int
    quick: int
    figures: tuple[str, ...]  # that `--only` knows it by as well
    both: bool = True  # databases matter to it

    @property
    def summary(self) -> str:
        """What it measures."""
        return str(self.module.__doc__).splitlines()[0].rstrip(".")

    @property
    def run(self) -> Callable[[Plan], list[Figure]]:
        """Measures."""
        return self.module.run  # type: ignore[no-any-return]

    @property
    def growth(self) -> Callable[[Plan], list[Curve]] | None:
        """Measures at several sizes, where size matters."""
        found: Any = getattr(self.module, "growth", None)
        return found  # type: ignore[no-any-return]


ALL = {
    "start": Benchmark(
        start, 7, 2, ("start_time", "idle_memory", "cli_help", "cli_list"), both=False
    ),
    "create": Benchmark(
        create,
        3,
        1,
        ("create_accepted_p50", "create_accepted_p99_64", "create_active_p50", "delete_p50"),
    ),
    "storm": Benchmark(
        burst,
        3,
        1,
        (
            "storm_rate",
            "storm_failed",
            "storm_unevenness",
            "storm_delete_rate",
            "boot_cpu",
        ),
    ),
    "statements": Benchmark(
        statements, 2, 1, ("boot_statements", "boot_transactions", "boot_fsyncs")
    ),
    "get": Benchmark(get, 5, 1, ("get_rate", "get_p50")),
    "list": Benchmark(listing, 3, 1, ("list_p99", "list_statements", "list_more_statements")),
    "watch": Benchmark(watch, 2, 1, ("watch_last_p50",)),
    "token": Benchmark(tokens, 3, 1, ("token_check_cpu", "token_issue_p50")),
    "decisions": Benchmark(
        decisions,
        3,
        1,
        (
            "decision_p50_10000",
            "decision_p50_10000_full",
            "decision_rate_10000",
            "decision_rate_10000_full",
            "decision_overcommit",
            "decision_anti_affinity_p50_1000",
            "decision_anti_affinity_rate_1000",
            "decision_anti_affinity_broken",
        ),
    ),
    "hosts": Benchmark(hosts, 3, 1, ("hosts_2000_cpu", "hosts_2000_memory")),
    "image": Benchmark(image, 5, 2, ("image_upload", "image_download", "image_stream_bare")),
    "boot": Benchmark(boot, 12, 3, ("boot_ratio",)),
}
