"""A control plane as a process that a test starts and stops, also as another release."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from service.core.cloud import Client, ControlPlane

_START_S = 120
_END_S = 60
THIS = ("-m", "mcloud_controlplane", "--config")
NEWER = ("-m", "fakes.newer_controlplane")


class Daemon:
    """One process of the control plane over `state`, and how to reach it."""

    def __init__(self, directory: Path, state: Path, ports: Sequence[int], database: str) -> None:
        directory.mkdir(exist_ok=True)
        self.plane = ControlPlane(state, f"127.0.0.1:{ports[0]}", f"127.0.0.1:{ports[1]}", database)
        values = {
            "state_dir": str(state),
            "public_listen": self.plane.public,
            "internal_listen": self.plane.internal,
            "database": database,
        }
        self.config = directory / "controlplane.toml"
        lines = (f"{key} = {json.dumps(value)}\n" for key, value in values.items())
        self.config.write_text("".join(lines))
        self._log = directory / "log"
        self._process: subprocess.Popen[bytes] | None = None

    def client(self) -> Client:
        return Client(self.plane)

    def log(self) -> str:
        return self._log.read_text()

    def start(self, program: Sequence[str] = THIS) -> None:
        """Start it, and return when it serves."""
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, *program, self.config], stdout=log, stderr=log, env=environment()
            )
        end = time.monotonic() + _START_S
        while "control plane serves" not in self.log():
            assert self._process.poll() is None, self.log()
            assert time.monotonic() < end, self.log()
            time.sleep(0.05)  # its log is all that tells

    def stop(self) -> None:
        """End it in the orderly way."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        assert self._process.wait(_END_S) == 0, self.log()
        assert "Traceback" not in self.log(), self.log()

    def kill(self) -> None:
        """End it, if it lives."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a command of the operator's: mcloud-controlplane WORDS --config …."""
        return subprocess.run(
            [sys.executable, "-m", "mcloud_controlplane", *words, "--config", str(self.config)],
            capture_output=True,
            text=True,
            env=environment(),
            timeout=_START_S,
            check=False,
        )


def environment() -> dict[str, str]:
    """Return the environment in which a child finds the tests' modules."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
