"""Start-up and rest: the control plane until it serves, its memory then, the command line, warm.

The yardstick of each is Python with nothing but the imports that none of them can be without.
The database is SQLite's: PostgreSQL's start is not mcloud's.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks import cloud, report
from benchmarks.plan import Plan
from benchmarks.processes import Family
from benchmarks.report import Figure

YARDSTICK = (sys.executable, "-c", "import click, grpc.aio")
_RESTING = "import click, grpc.aio; print(flush=True); input()"
_SETTLED_S = 5.0
MCLOUD = str(Path(sys.executable).with_name("mcloud"))


def run(plan: Plan) -> list[Figure]:
    """Measure."""
    fresh, again, bare, help_, list_, memory = ([] for _ in range(6))
    cloud.enter_private_network()
    with cloud.directory() as place:
        for number in range(plan.repeats):
            fresh.append(_start(place / str(number)))
            again.append(_start(place / str(number)))
            bare.append(_timed(YARDSTICK))
        with cloud.control_plane(place / "0", "127.0.0.1") as plane:
            environment = _session(plane, place)
            time.sleep(_SETTLED_S)
            memory.append(plane.processes.pss_mib())
            _timed((MCLOUD, "list"), environment)  # the first one logs in
            for _ in range(plan.repeats):
                help_.append(_timed((MCLOUD, "--help"), environment))
                list_.append(_timed((MCLOUD, "list"), environment))
    return [
        report.figure("start_time_first", fresh, "s", yardstick=bare),
        report.figure("start_time", again, "s", yardstick=bare),
        report.figure("idle_memory", memory, "MiB", yardstick=[_resting()]),
        report.figure("cli_help", help_, "s", yardstick=bare),
        report.figure("cli_list", list_, "s", yardstick=bare),
    ]


def _start(place: Path) -> float:
    """Start a control plane and end it; return the seconds until it served."""
    begin = time.perf_counter()
    with cloud.control_plane(place, "127.0.0.1"):
        return time.perf_counter() - begin


def _timed(command: Sequence[str], environment: Mapping[str, str] | None = None) -> float:
    begin = time.perf_counter()
    subprocess.run(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        timeout=60,
        check=True,
    )
    return time.perf_counter() - begin


def _resting() -> float:
    """Return the memory of Python with these imports, in MiB."""
    command = (sys.executable, "-c", _RESTING)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin
        assert process.stdout
        process.stdout.readline()
        found = Family(process.pid).pss_mib()
        process.stdin.write(b"\n")
    return found


def _session(plane: cloud.ControlPlane, place: Path) -> dict[str, str]:
    """Return an environment in which `mcloud` is the administrator's."""
    return {
        **os.environ,
        "MCLOUD_CONFIG_DIR": str(place / "cli"),
        "MCLOUD_ENDPOINT": plane.public,
        "MCLOUD_CA": str(plane.authority),
        "MCLOUD_USERNAME": "admin",
        "MCLOUD_PASSWORD": plane.password,
        "MCLOUD_PROJECT": "default",
    }
