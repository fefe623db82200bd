"""What the figures are to reach; a figure that is not here has no target."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """A bound of a figure's value, or of its ratio to the yardstick."""

    limit: float
    at_least: bool = False  # instead of: at most
    of_ratio: bool = False

    def met_by(self, value: float, ratio: float | None) -> bool:
        """Tell whether a figure reaches it; one without a yardstick has no ratio that could."""
        found = ratio if self.of_ratio else value
        if found is None:
            return False
        return found >= self.limit if self.at_least else found <= self.limit

    def __str__(self) -> str:
        sign = ">=" if self.at_least else "<="
        return f"{'ratio ' if self.of_ratio else ''}{sign} {self.limit:g}"


def _at_least(limit: float) -> Target:
    return Target(limit, at_least=True)


TARGETS = {
    "create_accepted_p50": Target(6),
    "create_accepted_p99_64": Target(60),
    "create_active_p50": Target(100),
    "storm_rate": _at_least(60),
    "storm_failed": Target(0),
    "storm_unevenness": Target(1),
    "boot_statements": Target(60),
    "boot_cpu": Target(20),
    "get_rate": Target(0.4, at_least=True, of_ratio=True),
    "token_check_cpu": Target(0.05),
    "decision_p50_10000": Target(3),
    "decision_p50_10000_full": Target(3),
    "decision_rate_10000": _at_least(300),
    "decision_rate_10000_full": _at_least(300),
    "decision_overcommit": Target(0),
    "decision_anti_affinity_rate_1000": _at_least(100),
    "decision_anti_affinity_broken": Target(0),
    "list_p99": Target(40),
    "list_more_statements": Target(0),
    "hosts_2000_cpu": Target(40),
    "hosts_2000_memory": Target(800),
    "idle_memory": Target(180),
    "start_time": Target(2.5),
    "cli_help": Target(0.15),
    "cli_list": Target(0.4),
    "image_upload": Target(0.4, at_least=True, of_ratio=True),
    "image_download": Target(0.4, at_least=True, of_ratio=True),
    "boot_ratio": Target(1.3),
}
