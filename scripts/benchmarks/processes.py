"""What processes have used of the machine, as the kernel counts it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")
# Of /proc/PID/stat, counted behind the name. Source: proc_pid_stat(5).
_PARENT, _USER, _SYSTEM, _CHILDREN_USER, _CHILDREN_SYSTEM = 1, 11, 12, 13, 14


@dataclass(frozen=True)
class Family:
    """A process and its children."""

    pid: int

    @property
    def pids(self) -> list[int]:
        """All that live, the first one first."""
        return [self.pid, *_children(self.pid)]

    def cpu_s(self) -> float:
        """Return the CPU time of all, and of the first one's children that have ended."""
        own = _stat(self.pid)
        ended = int(own[_CHILDREN_USER]) + int(own[_CHILDREN_SYSTEM])
        living = sum(_ticks(pid) for pid in self.pids)
        return (living + ended) / _TICKS

    def pss_mib(self) -> float:
        """Return the memory of all: what they share with others counts in parts."""
        return sum(_pss_kib(pid) for pid in self.pids) / 1024


def _children(parent: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            if int(_stat(int(entry.name))[_PARENT]) == parent:
                found.append(int(entry.name))
        except OSError:
            continue  # it has ended
    return found


def _stat(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _ticks(pid: int) -> int:
    try:
        values = _stat(pid)
    except OSError:
        return 0
    return int(values[_USER]) + int(values[_SYSTEM])


def _pss_kib(pid: int) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1])
    return 0
