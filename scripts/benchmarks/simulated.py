"""A control plane of a benchmark's own, with simulated hosts (`mcloud-agent simulate`)."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks import cloud
from benchmarks.cloud import ControlPlane
from benchmarks.plan import Plan
from benchmarks.processes import Family


@dataclass(frozen=True)
class Cloud:
    """A control plane with simulated hosts."""

    plane: ControlPlane
    server: Family | None  # of the database, if it has one
    simulator: Family | None
    place: Path  # for files

    def cpu_s(self) -> dict[str, float]:
        """Return the CPU time so far of the control plane, and of what is beside it."""
        families = {"": self.plane.processes}
        if self.server:
            families["_database"] = self.server
        if self.simulator:
            families["_simulator"] = self.simulator
        return {name: family.cpu_s() for name, family in families.items()}

    def cpu_since(self, before: Mapping[str, float]) -> dict[str, float]:
        """Return the CPU time since then."""
        return {name: now - before[name] for name, now in self.cpu_s().items()}


@contextmanager
def running(plan: Plan, host_count: int = 0, *, counted: bool = False) -> Iterator[Cloud]:
    """Run a control plane, and hosts that do their steps at once."""
    cloud.enter_private_network()
    with cloud.directory() as place, cloud.database(plan, place) as (url, server):
        where = place / "controlplane"
        with cloud.control_plane(where, cloud.ADDRESS, url, counted=counted) as plane:
            if not host_count:
                yield Cloud(plane, server, None, place)
                return
            with simulator(plane, place / "simulator", host_count) as hosts:
                yield Cloud(plane, server, hosts, place)


@contextmanager
def simulator(plane: ControlPlane, place: Path, host_count: int) -> Iterator[Family]:
    """Run simulated hosts; all are connected when the block begins."""
    said = place.with_suffix(".log")
    with said.open("wb") as log:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "mcloud_agents", "simulate", "--latency-ms", "0"),
                *("--control-plane", plane.public, "--ca", plane.authority),
                *("--state-dir", place, "--hosts", str(host_count)),
            ],
            env={**os.environ, "MCLOUD_PASSWORD": plane.password},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + cloud.START_S + host_count / 5
        while f"{host_count} of {host_count} hosts connected" not in said.read_text():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the hosts do not connect:\n{said.read_text()[-2000:]}")
            time.sleep(0.05)  # what it says is in a file, so that it never waits for its reader
        yield Family(process.pid)
    finally:
        cloud.end(process)


def statements(plane: ControlPlane) -> dict[str, int]:
    """Return how often a control plane that counts them has run each statement."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(plane.counts))
        with connection.makefile("rb") as answer:
            return dict(json.load(answer))
