"""A control plane of a benchmark's own, with a real host or with many simulated ones.

Everything is in a network namespace and a directory that nobody else has, so that any number of
runs, and a cloud that is in use, can be on one machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from benchmarks import postgresql
from benchmarks.client import Client
from benchmarks.plan import Plan
from benchmarks.processes import Family
from mcloud.identity.v1 import enrolment_service_pb2, enrolment_service_pb2_grpc
from mcloud_base import ids

SCRIPTS = Path(__file__).parents[1]
START_S = 120.0
ADDRESS = "127.0.0.1"
_CLONE_NEWNET = 0x40000000
_private = False


@dataclass(frozen=True)
class ControlPlane:
    """A running control plane."""

    directory: Path
    public: str
    pid: int = 0
    database: str = "sqlite"  # as in its settings

    @property
    def processes(self) -> Family:
        """What it runs in."""
        return Family(self.pid)

    @property
    def counts(self) -> Path:
        """The socket of one that counts its statements."""
        return self.directory / "counts"

    @property
    def authority(self) -> Path:
        """The certificate that its own is signed by."""
        return self.directory / "pki" / "ca.pem"

    @property
    def password(self) -> str:
        """Of admin."""
        return (self.directory / "admin-password").read_text().strip()


@dataclass(frozen=True)
class Host:
    """A host of the lab; its agent runs."""

    uri: str  # of its libvirtd
    library: Path  # what it sees as /var/lib/mcloud


@contextmanager
def directory() -> Iterator[Path]:
    """Make a directory, and remove it."""
    path = Path(tempfile.mkdtemp(prefix="mcloud-bench-", dir="/tmp"))  # noqa: S108 (short: sockets)
    try:
        yield path
    finally:
        shutil.rmtree(path)


def enter_private_network() -> None:
    """Put this process, and what it starts from now on, into a network namespace of its own.

    Once: threads that gRPC has started by then would stay behind in the one before.
    """
    global _private
    if _private:
        return
    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "unshare")
    run("ip", "link", "set", "lo", "up")
    _private = True


@contextmanager
def control_plane(
    place: Path, address: str, database: str = "sqlite", *, counted: bool = False
) -> Iterator[ControlPlane]:
    """Run a control plane, on ports 7700 and 7701 of an address; its settings are the defaults.

    Args:
        counted: it counts its statements (counted.py).
    """
    place.mkdir(exist_ok=True)
    state = place / "state"
    settings = {
        "database": f'"{database}"',
        "state_dir": f'"{state}"',
        "public_listen": f'"{address}:7700"',
        "internal_listen": f'"{address}:7701"',
        "names": f'["{address}"]',
        "underlay_mtu": "1600",
    }
    config = place / "controlplane.toml"
    config.write_text("".join(f"{key} = {value}\n" for key, value in settings.items()))
    counting = ("benchmarks.counted", state / "counts")
    program = counting if counted else ("mcloud_controlplane",)
    with (place / "controlplane.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *program, "--config", config],
            cwd=SCRIPTS,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # an interrupt from the terminal is for this program only
        )
    running = ControlPlane(state, f"{address}:7700", process.pid, database)
    try:
        _await_serving(running, process, place / "controlplane.log")
        yield running
    finally:
        end(process)


def _await_serving(running: ControlPlane, process: subprocess.Popen[bytes], log: Path) -> None:
    """Return when the public port says that it serves."""
    end = time.monotonic() + START_S
    while not _serves(running):
        if process.poll() is not None or time.monotonic() > end:
            raise RuntimeError(f"the control plane does not serve:\n{log.read_text()[-2000:]}")
        time.sleep(0.005)  # nothing tells when a port is open but trying


def _serves(running: ControlPlane) -> bool:
    host, _, port = running.public.rpartition(":")
    with socket.socket() as probe:
        if probe.connect_ex((host, int(port))):
            return False
    credentials = grpc.ssl_channel_credentials(running.authority.read_bytes())
    with grpc.secure_channel(running.public, credentials) as channel:
        request = health_pb2.HealthCheckRequest()
        answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=10, wait_for_ready=True)
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


@contextmanager
def database(plan: Plan, place: Path) -> Iterator[tuple[str, Family | None]]:
    """Give a database that nobody has used, for the settings, and its server's processes."""
    if plan.database == "sqlite":
        yield "sqlite", None
        return
    with postgresql.running(place / "postgresql") as server:
        yield server.url, Family(server.pid)


@contextmanager
def private_cloud(plan: Plan) -> Iterator[tuple[ControlPlane, Host]]:
    """Run a control plane, and a host whose agent is enrolled and has begun to report."""
    enter_private_network()
    with ExitStack() as stack:
        place = stack.enter_context(directory())
        state = place / "lab"
        stack.callback(uninterrupted, lab, "down", "--state", state)
        lab("up", "--state", state, "--prefix", "mcb")
        url, _ = stack.enter_context(database(plan, place))
        plane = stack.enter_context(control_plane(place / "controlplane", "10.99.0.1", url))
        etc = state / "hosts" / "h1" / "mcloud" / "etc"
        etc.mkdir(parents=True, exist_ok=True)
        (etc / "agent.toml").write_text(
            f'control_plane = "{plane.public}"\n'
            'name = "h1"\n'
            'underlay_ip = "10.99.0.11"\n'
            'underlay_device = "br-ex"\n'
            'physical_networks = { external = "br-ex" }\n'
        )
        inside = ("exec", "--state", state)
        agent = (sys.executable, "-m", "mcloud_agents")
        token = asyncio.run(join_token(plane))
        environment = {**os.environ, "MCLOUD_JOIN_TOKEN": token}
        enrol = (*agent, "enrol", "--control-plane", plane.public)
        lab(*inside, "h1", "--", *enrol, environment=environment)
        lab(*inside, "--detach", "--log", place / "agent.log", "h1", "--", *agent, "run")
        uri = f"qemu+unix:///system?socket={state}/hosts/h1/run/libvirt-sock"
        yield plane, Host(uri, state / "hosts" / "h1" / "mcloud" / "lib")


async def join_token(plane: ControlPlane) -> str:
    """Return a one-use token with which host h1 is enrolled."""
    async with Client(plane) as client:
        answer = await client.call(
            enrolment_service_pb2_grpc.EnrolmentServiceStub(client.channel).CreateJoinToken,
            enrolment_service_pb2.CreateJoinTokenRequest(request_id=ids.request_id(), name="h1"),
            system=True,
        )
    return str(answer.secret)


def lab(verb: str, *arguments: object, environment: dict[str, str] | None = None) -> str:
    """Run scripts/lab; return what it prints.

    Raises:
        RuntimeError: it has failed.
    """
    command = (sys.executable, str(SCRIPTS / "lab"), verb, *map(str, arguments))
    return run(*command, environment=environment)


def run(*command: str, environment: dict[str, str] | None = None) -> str:
    """Run a command; return what it prints.

    Raises:
        RuntimeError: it has failed.
    """
    result = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        timeout=300,
        check=False,
    )
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)} has failed:\n{result.stdout[-2000:]}")
    return result.stdout


def uninterrupted(function: Any, *arguments: object) -> None:
    """Clean up; a second interrupt must not leave half of it."""
    former = [signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        function(*arguments)
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), former, strict=True):
            signal.signal(number, handler)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a program, by force if need be."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(15)
        return
    process.kill()
    process.wait()
