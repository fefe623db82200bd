"""A control plane, and a host with its agent, of a benchmark's own; and a client of them.

Everything is in a network namespace and a directory that nobody else has, so that any number of
runs, and a cloud that is in use, can be on one machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import importlib
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
from typing import Any, Protocol, TypeVar

import grpc
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc

from mcloud.common.v1 import operation_pb2
from mcloud.identity.v1 import (
    enrolment_service_pb2,
    enrolment_service_pb2_grpc,
    token_service_pb2,
    token_service_pb2_grpc,
)
from mcloud_base import errors, ids, rpc

SCRIPTS = Path(__file__).parents[1]
START_S = 120.0
_CLONE_NEWNET = 0x40000000

MessageT = TypeVar("MessageT", bound=Message)


@dataclass(frozen=True)
class ControlPlane:
    """A running control plane."""

    directory: Path
    public: str

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
    """Put this process, and what it starts from now on, into a network namespace of its own."""
    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "unshare")
    run("ip", "link", "set", "lo", "up")


@contextmanager
def control_plane(place: Path, address: str) -> Iterator[ControlPlane]:
    """Run a control plane, on ports 7700 and 7701 of an address."""
    place.mkdir(exist_ok=True)
    settings = {
        "state_dir": f'"{place / "state"}"',
        "public_listen": f'"{address}:7700"',
        "internal_listen": f'"{address}:7701"',
        "names": f'["{address}"]',
        "underlay_mtu": "1600",
    }
    config = place / "controlplane.toml"
    config.write_text("".join(f"{key} = {value}\n" for key, value in settings.items()))
    running = ControlPlane(place / "state", f"{address}:7700")
    with (place / "controlplane.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "mcloud_controlplane", "--config", config],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # an interrupt from the terminal is for this program only
        )
    try:
        _await_serving(running, process, place / "controlplane.log")
        yield running
    finally:
        _end(process)


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
def private_cloud() -> Iterator[tuple[ControlPlane, Host]]:
    """Run a control plane, and a host whose agent is enrolled and has begun to report."""
    enter_private_network()
    with ExitStack() as stack:
        place = stack.enter_context(directory())
        state = place / "lab"
        stack.callback(uninterrupted, lab, "down", "--state", state)
        lab("up", "--state", state, "--prefix", "mcb")
        plane = stack.enter_context(control_plane(place / "controlplane", "10.99.0.1"))
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


class Reachable(Protocol):
    """A control plane that a client can reach, whoever runs it."""

    @property
    def public(self) -> str:
        """host:port of its public port."""

    @property
    def authority(self) -> Path:
        """The certificate that its own is signed by."""

    @property
    def password(self) -> str:
        """Of admin."""


class Client:
    """The administrator, over asynchronous stubs."""

    def __init__(self, plane: Reachable) -> None:
        self._plane = plane
        credentials = grpc.ssl_channel_credentials(plane.authority.read_bytes())
        self.channel = rpc.channel(plane.public, credentials)
        self._tokens: dict[bool, str] = {}
        self.project_id = ""

    async def __aenter__(self) -> Client:
        """Log in, to the project and to the system."""
        password = token_service_pb2.PasswordCredential(
            user_name="admin", password=self._plane.password
        )
        stub = token_service_pb2_grpc.TokenServiceStub(self.channel)
        for system in (False, True):
            request = token_service_pb2.CreateTokenRequest(
                password=password, project="" if system else "default", system=system
            )
            answer = await rpc.call(stub.CreateToken, request, timeout_s=30)
            self._tokens[system] = answer.token
            self.project_id = self.project_id or answer.claims.project_id
        return self

    async def __aexit__(self, *_: object) -> None:
        """Hang up."""
        await self.channel.close()

    def metadata(self, *, system: bool = False) -> Any:
        """Return what authorizes a call."""
        return rpc.bearer(self._tokens[system])

    async def call(
        self, method: Any, request: Any, *, system: bool = False, timeout_s: float = 30
    ) -> Any:
        """Call a method of a stub."""
        metadata = self.metadata(system=system)
        return await rpc.call(method, request, metadata=metadata, timeout_s=timeout_s)

    async def mutate(
        self, method: Any, request: Any, answer: type[MessageT], *, system: bool = False
    ) -> MessageT:
        """Call a method that returns an operation; wait for its end, return its response."""
        request.request_id = ids.request_id()
        operation = await self.call(method, request, system=system)
        operation = await self.ended(operation, system=system)
        response = answer()
        operation.response.Unpack(response)
        return response

    async def ended(
        self, operation: operation_pb2.Operation, *, system: bool = False
    ) -> operation_pb2.Operation:
        """Wait until an operation has succeeded.

        Raises:
            errors.Error: what it failed with.
        """
        states = operation_pb2.Operation
        if operation.state in (states.STATE_RUNNING, states.STATE_UNDOING):
            package = operation.method.strip("/").rpartition("/")[0].rpartition(".")[0]
            module = importlib.import_module(f"{package}.operation_service_pb2_grpc")
            request = operation_pb2.WaitOperationRequest(id=operation.id)
            request.timeout.FromSeconds(300)
            wait = module.OperationServiceStub(self.channel).WaitOperation
            operation = await self.call(wait, request, system=system, timeout_s=310)
        if operation.state != states.STATE_SUCCEEDED:
            raise errors.from_status(operation.error)
        return operation


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


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(15)
        return
    process.kill()
    process.wait()
