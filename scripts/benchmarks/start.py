"""Start-up: the control plane until it serves, and the command line, warm.

The yardstick of each is Python with nothing but the imports that none of them can be without.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks import cloud, report
from benchmarks.report import Figure

YARDSTICK = (sys.executable, "-c", "import click, grpc.aio")
MCLOUD = str(Path(sys.executable).with_name("mcloud"))


def run(repeats: int) -> list[Figure]:
    """Measure."""
    fresh, again, bare, help_, list_ = ([] for _ in range(5))
    cloud.enter_private_network()
    with cloud.directory() as place:
        for number in range(repeats):
            fresh.append(_start(place / str(number)))
            again.append(_start(place / str(number)))
            bare.append(_timed(YARDSTICK))
        with cloud.control_plane(place / "0", "127.0.0.1") as plane:
            environment = _session(plane, place)
            _timed((MCLOUD, "list"), environment)  # the first one logs in
            for _ in range(repeats):
                help_.append(_timed((MCLOUD, "--help"), environment))
                list_.append(_timed((MCLOUD, "list"), environment))
    return [
        report.figure("start_time_first", fresh, "s", yardstick=bare),
        report.figure("start_time", again, "s", yardstick=bare, target=2.5),
        report.figure("cli_help", help_, "s", yardstick=bare, target=0.15),
        report.figure("cli_list", list_, "s", yardstick=bare, target=0.4),
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
