"""A real control plane in a process of its own, and commands run against it."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import ports
from mcloud_cli.main import main

_START_S = 90.0


@dataclass(frozen=True)
class ControlPlane:
    """Where it is and how to get in."""

    endpoint: str
    ca: Path
    password_file: Path


@dataclass
class Cli:
    """Runs commands with a home of their own."""

    cloud: ControlPlane
    home: Path
    env: dict[str, str] = field(default_factory=dict)

    def invoke(self, *arguments: str, stdin: str | None = None) -> Result:
        """Run a command."""
        env = {
            **dict.fromkeys(_FROM_OUTSIDE),
            "MCLOUD_CONFIG_DIR": str(self.home),
            "TZ": "UTC",
            **self.env,
        }
        return CliRunner().invoke(main, arguments, env=env, input=stdin, prog_name="mcloud")

    def run(self, *arguments: str, code: int = 0) -> str:
        """Run a command that ends with a code; return its standard output."""
        done = self.invoke(*arguments)
        assert done.exit_code == code, f"{arguments}: {done.exit_code}\n{done.output}\n" + (
            f"{done.exception!r}" if done.exception else ""
        )
        return done.stdout

    def error(self, *arguments: str, code: int) -> str:
        """Run a command that fails with a code; return what it says."""
        done = self.invoke(*arguments)
        assert done.exit_code == code, f"{arguments}: {done.exit_code}\n{done.output}"
        return done.stderr

    def json(self, *arguments: str) -> Any:
        """Run a command and return what it prints as JSON."""
        return json.loads(self.run(*arguments, "-o", "json"))

    def id(self, *arguments: str) -> str:
        """Run a command and return the one id that it prints."""
        return self.run(*arguments, "-o", "id").strip()

    def log_in(self, *arguments: str) -> str:
        """Log in as the administrator."""
        return self.run(
            "login",
            "--endpoint",
            self.cloud.endpoint,
            "--ca",
            str(self.cloud.ca),
            "--username",
            "admin",
            "--password-file",
            str(self.cloud.password_file),
            *arguments,
        )


_FROM_OUTSIDE = tuple(
    f"MCLOUD_{name}"
    for name in (
        "CLOUD",
        "ENDPOINT",
        "CA",
        "USERNAME",
        "PASSWORD",
        "PROJECT",
        "TOKEN",
        "APPLICATION_CREDENTIAL_ID",
        "APPLICATION_CREDENTIAL_SECRET",
    )
)


@pytest.fixture(scope="session")
def control_plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """All services in one process."""
    directory = tmp_path_factory.mktemp("controlplane")
    public, internal = _free_ports()
    config = directory / "controlplane.toml"
    config.write_text(
        f'state_dir = "{directory}/state"\n'
        f'public_listen = "127.0.0.1:{public}"\n'
        f'internal_listen = "127.0.0.1:{internal}"\n'
    )
    command = [sys.executable, "-m", "mcloud_controlplane", "--config", str(config)]
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        _await_port(process, public, directory / "log")
        yield ControlPlane(
            endpoint=f"127.0.0.1:{public}",
            ca=directory / "state" / "pki" / "ca.pem",
            password_file=directory / "state" / "admin-password",
        )
    finally:
        process.terminate()
        process.wait(30)


def _free_ports() -> tuple[int, int]:
    return ports.free(), ports.free()


def _await_port(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    end = time.monotonic() + _START_S
    while True:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < end, log.read_text()
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return


@pytest.fixture
def stranger(control_plane: ControlPlane, tmp_path: Path) -> Cli:
    """Somebody who has never logged in."""
    return Cli(control_plane, tmp_path / "home")


@pytest.fixture
def cli(stranger: Cli) -> Cli:
    """The administrator, logged in."""
    stranger.log_in()
    return stranger


def masked(text: str) -> str:
    """Return an output without what differs each time."""
    text = re.sub(r"\b([a-z]{1,4})-[0-9a-hjkmnp-tv-z]{20}\b", r"\1-ID", text)
    text = re.sub(r"\b[0-9a-f]{32,64}\b", "HEX", text)
    text = re.sub(r"SHA256:[A-Za-z0-9+/]{43}", "SHA256:FINGERPRINT", text)
    text = re.sub(r"\bssh-ed25519 \S+", "ssh-ed25519 KEY", text)
    text = re.sub(r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d(\.\d+)?Z?", "TIME", text)
    text = re.sub(r"\bfa:16:3e(:[0-9a-f]{2}){3}\b", "MAC", text)
    text = re.sub(r"-?\b\d+(\.\d+)? (ms|s)\b", "SPAN", text)
    text = re.sub(r"-?\b\d+[smhd]\b", "SPAN", text)
    text = re.sub(r"\bvni +\d+", "vni NUMBER", text)
    text = re.sub(rf"\b{re.escape(socket.gethostname())}\b", "MACHINE", text)
    return re.sub(r" {2,}", "  ", text)


@pytest.fixture
def mask() -> Any:
    """Hide what differs each time."""
    return masked
