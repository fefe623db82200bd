"""A control plane and one real host, both as processes that may be killed; and a client of it."""

from __future__ import annotations

import hashlib
import importlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import grpc

from fakes.crash_plan import Plan
from fakes.lab_host import LabHost
from mcloud.common.v1 import operation_pb2
from mcloud.compute.v1 import flavor_pb2, instance_pb2, instance_service_pb2
from mcloud.conductor.v1 import verify_service_pb2
from mcloud.identity.v1 import enrolment_service_pb2, token_service_pb2
from mcloud.image.v1 import image_pb2, image_service_pb2
from mcloud.network.v1 import network_pb2, subnet_pb2
from mcloud.volume.v1 import volume_pb2
from mcloud_base import errors, ids, rpc

T = TypeVar("T")
Operation = operation_pb2.Operation

TESTS = Path(__file__).parents[1]
# Of this process alone, so that several runs of the tests may share a machine.
_NUMBER = os.getpid() % 250 + 1
UNDERLAY = f"10.96.{_NUMBER}"
EXTERNAL = f"172.25.{_NUMBER}.0/24"
PREFIX = f"crs{_NUMBER}"
ENDED = (Operation.STATE_SUCCEEDED, Operation.STATE_FAILED, Operation.STATE_CANCELLED)
_OPTIONS = (
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
)


class HostCloud:
    """Control plane, agent, and what a test asks of them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.host = LabHost(root / "lab", ())
        self.state_dir = root / "cp"
        self.controlplane_plan = Plan(root / "cp-plan")
        self.agent_plan = Plan(root / "agent-plan")
        self.restarts = {"control plane": 0, "agent": 0}
        self.agent_wanted = True
        self._settings: dict[str, object] = {}
        self._controlplane: subprocess.Popen[bytes] | None = None
        self._agent_pid = 0
        self._tokens: dict[bool, str] = {}

    # --- processes ------------------------------------------------------------------------------

    def start(self, **settings: object) -> None:
        """Bring everything up."""
        self.host.lab(
            "up", "--prefix", PREFIX, "--underlay", f"{UNDERLAY}.0/24", "--external", EXTERNAL
        )
        self.configure(**settings)
        self.start_controlplane()
        self._enrol()
        self.start_agent()

    def configure(self, **settings: object) -> None:
        """Say how the next control plane is to be; numbers only."""
        self._settings = settings
        lines = [
            f'state_dir = "{self.state_dir}"',
            f'public_listen = "{UNDERLAY}.1:7700"',
            f'internal_listen = "{UNDERLAY}.1:7701"',
            f'names = ["{UNDERLAY}.1"]',
            "underlay_mtu = 1600",
            *(f"{name} = {value}" for name, value in settings.items()),
        ]
        (self.root / "controlplane.toml").write_text("\n".join(lines) + "\n")

    def start_controlplane(self) -> None:
        log = self.root / "controlplane.log"
        before = log.read_text().count("control plane serves") if log.exists() else 0
        with log.open("ab") as output:
            self._controlplane = subprocess.Popen(
                self._python("controlplane", self.root / "cp-plan"),
                stdout=output,
                stderr=subprocess.STDOUT,
                env=_environment(),
                start_new_session=True,
            )
        self.until(lambda: log.read_text().count("control plane serves") > before, revive=False)
        authority = (self.state_dir / "pki" / "ca.pem").read_bytes()
        self.channel = grpc.secure_channel(
            f"{UNDERLAY}.1:7700", grpc.ssl_channel_credentials(authority), options=_OPTIONS
        )

    def stop_controlplane(self) -> None:
        """Stop it in the orderly way."""
        if self._controlplane is not None:
            self._controlplane.terminate()
            self._controlplane.wait(timeout=60)
            self._controlplane = None

    def restart_controlplane(self, **settings: object) -> None:
        """Have another one, with these settings."""
        self.stop_controlplane()
        self.configure(**settings)
        self.start_controlplane()

    def start_agent(self) -> None:
        pid_file = self.root / "agent.pid"
        pid_file.unlink(missing_ok=True)
        log, pid = str(self.root / "agent.log"), str(pid_file)
        command = self._python("agent", self.root / "agent-plan")
        self.host.lab(
            "exec", "--detach", "--pid-file", pid, "--log", log, "h1", "--", *map(str, command)
        )
        self._agent_pid = int(pid_file.read_text())
        self.agent_wanted = True

    @property
    def agent_pid(self) -> int:
        """The agent's process, as the machine counts."""
        return self._agent_pid

    def kill_agent(self) -> None:
        """End the agent, and let it be."""
        self.agent_wanted = False
        with suppress(ProcessLookupError):
            os.kill(self._agent_pid, signal.SIGKILL)
        self.until(lambda: not _lives(self._agent_pid), revive=False)

    def revive(self) -> None:
        """Start again what was killed."""
        if self._controlplane is not None and self._controlplane.poll() is not None:
            assert self._controlplane.returncode == -signal.SIGKILL, self._controlplane.returncode
            self.restarts["control plane"] += 1
            self.start_controlplane()
        if self.agent_wanted and not _lives(self._agent_pid):
            self.restarts["agent"] += 1
            self.start_agent()

    def logs(self) -> str:
        """Return the ends of the programs' logs."""
        texts = []
        for name in ("controlplane", "agent"):
            lines = (self.root / f"{name}.log").read_text().splitlines()[-80:]
            texts += [f"--- {name}", *lines]
        return "\n".join(texts)

    def stop(self) -> None:
        """Take everything down, with what is on the host."""
        if self._controlplane is not None:
            self._controlplane.kill()
            self._controlplane.wait()
        self.host.lab("down")

    def until(
        self, find: Callable[[], T | None | bool], deadline_s: float = 60, *, revive: bool = True
    ) -> T:
        """Look until something is found, reviving whoever dies meanwhile.

        While the control plane is away, what asks it finds nothing.
        """
        end = time.monotonic() + deadline_s
        while True:
            if revive:
                self.revive()
            with suppress(errors.Unavailable, errors.DeadlineExceeded):
                if found := find():
                    return found  # type: ignore[return-value]
            assert time.monotonic() < end, f"still not so after {deadline_s} s"
            time.sleep(0.03)

    def _python(self, name: str, plan: Path) -> list[str]:
        config = "controlplane.toml" if name == "controlplane" else "agent.toml"
        module = f"fakes.crashing_{name}"
        return [sys.executable, "-m", module, str(self.root / config), str(plan)]

    def _enrol(self) -> None:
        (self.root / "agent.toml").write_text(
            f'control_plane = "{UNDERLAY}.1:7700"\n'
            'name = "h1"\n'
            f'underlay_ip = "{UNDERLAY}.11"\n'
            'underlay_device = "br-ex"\n'
            'physical_networks = { external = "br-ex" }\n'
            'report_interval_s = 2\nlog_level = "debug"\n'
        )
        token = self.call(
            "identity.EnrolmentService/CreateJoinToken",
            enrolment_service_pb2.CreateJoinTokenRequest(request_id=ids.request_id(), name="h1"),
            system=True,
        )
        agent = Path(sys.executable).with_name("mcloud-agent")
        config = str(self.root / "agent.toml")
        self.host.run(str(agent), "enrol", "--config", config, "--join-token", token.secret)

    # --- calls ----------------------------------------------------------------------------------

    def call(
        self, method: str, request: Any, *, system: bool = False, timeout_s: float = 15
    ) -> Any:
        """Call "compute.InstanceService/GetInstance" as the administrator."""
        with rpc.reraised():
            return self._method(method)(
                request, timeout=timeout_s, metadata=rpc.bearer(self._token(system))
            )

    def mutate(self, method: str, request: Any, *, system: bool = False) -> Operation:
        """Call a MUTATE; once, however often it has to be tried."""
        request.request_id = ids.request_id()
        operation: Operation = self.until(lambda: self.call(method, request, system=system))
        return operation

    def ended(self, operation: Operation, deadline_s: float = 60) -> Operation:
        """Wait for an operation's end; compute's and volume's differ by the prefix."""
        service = {"cop": "compute", "vop": "volume"}.get(operation.id.partition("-")[0])

        def look() -> Operation | None:
            request = operation_pb2.GetOperationRequest(id=operation.id)
            method = f"{service}.OperationService/GetOperation"
            seen: Operation = self.call(method, request, system=True)
            return seen if seen.state in ENDED else None

        return operation if operation.state in ENDED else self.until(look, deadline_s)

    def make(self, method: str, request: Any, kind: type[T], *, system: bool = False) -> T:
        """Call a MUTATE and return what it has made."""
        operation = self.ended(self.mutate(method, request, system=system))
        assert operation.state == Operation.STATE_SUCCEEDED, operation
        made: Any = kind()
        assert operation.response.Unpack(made)
        return made  # type: ignore[no-any-return]

    def _token(self, system: bool) -> str:
        if system not in self._tokens:
            password = (self.state_dir / "admin-password").read_text().strip()
            request = token_service_pb2.CreateTokenRequest(
                password=token_service_pb2.PasswordCredential(user_name="admin", password=password),
                project="" if system else "default",
                system=system,
            )
            method = self._method("identity.TokenService/CreateToken")
            self._tokens[system] = method(request, timeout=15).token
        return self._tokens[system]

    def _method(self, name: str) -> Any:
        package, _, rest = name.partition(".")
        service, _, method = rest.partition("/")
        file = "".join(f"_{c.lower()}" if c.isupper() else c for c in service).lstrip("_")
        module = importlib.import_module(f"mcloud.{package}.v1.{file}_pb2_grpc")
        return getattr(getattr(module, f"{service}Stub")(self.channel), method)

    # --- things ---------------------------------------------------------------------------------

    def furnish(self) -> None:
        """Make what instances need: an image without an OS, a flavor, a network, two volumes."""
        self.image_id = self._upload()
        flavor = _request(
            "compute.FlavorService/CreateFlavor",
            name="tiny",
            spec=flavor_pb2.FlavorSpec(vcpu_count=1, memory_mib=64, disk_gib=1),
        )
        self.flavor_id = self.make(*flavor, flavor_pb2.Flavor, system=True).metadata.id
        spec_of_network = network_pb2.NetworkSpec()
        network = _request(
            "network.NetworkService/CreateNetwork", name="private", spec=spec_of_network
        )
        self.network_id = self.make(*network, network_pb2.Network).metadata.id
        spec = subnet_pb2.SubnetSpec(network_id=self.network_id, cidr="10.10.0.0/24")
        subnet = _request("network.SubnetService/CreateSubnet", name="private", spec=spec)
        self.make(*subnet, subnet_pb2.Subnet)
        self.until(self._host_is_up)
        self.volume_ids = []
        for name in ("first", "second"):
            size = volume_pb2.VolumeSpec(size_gib=1)
            volume = _request("volume.VolumeService/CreateVolume", name=name, spec=size)
            self.volume_ids.append(self.make(*volume, volume_pb2.Volume).metadata.id)

    def _host_is_up(self) -> bool:
        from mcloud.compute.v1 import host_pb2, host_service_pb2

        request = host_service_pb2.ListHostsRequest()
        hosts = self.call("compute.HostService/ListHosts", request, system=True).hosts
        return any(host.status.state == host_pb2.HostStatus.STATE_UP for host in hosts)

    def _upload(self) -> str:
        path = self.root / "image.qcow2"
        command = ["qemu-img", "create", "-q", "-f", "qcow2", str(path), "1M"]
        subprocess.run(command, check=True, timeout=60)
        content = path.read_bytes()
        spec = image_pb2.ImageSpec(disk_format=image_pb2.DISK_FORMAT_QCOW2)
        image = self.make(
            *_request("image.ImageService/CreateImage", name="empty", spec=spec), image_pb2.Image
        )

        def parts() -> Iterator[image_service_pb2.UploadImageDataRequest]:
            kind = image_service_pb2.UploadImageDataRequest
            yield kind(start=image_service_pb2.UploadStart(id=image.metadata.id, offset=0))
            yield kind(chunk=content)
            digest = hashlib.sha256(content).hexdigest()
            yield kind(end=image_service_pb2.UploadEnd(sha256=digest))

        self.call("image.ImageService/UploadImageData", parts())
        return image.metadata.id

    def create(self, name: str = "crash", volume: int = 0) -> Operation:
        """Begin to create an instance with a port and one of the volumes, by default the first."""
        spec = instance_pb2.InstanceSpec(
            flavor_id=self.flavor_id,
            image_id=self.image_id,
            nics=[instance_pb2.InstanceNic(network_id=self.network_id)],
            volumes=[instance_pb2.InstanceVolume(volume_id=self.volume_ids[volume])],
            config_drive=True,
        )
        method = "compute.InstanceService/CreateInstance"
        return self.mutate(*_request(method, name=name, spec=spec))

    def instance(self, id_: str) -> instance_pb2.Instance | None:
        """Return an instance; None if it is gone."""
        request = instance_service_pb2.GetInstanceRequest(id=id_)
        try:
            found: instance_pb2.Instance = self.call("compute.InstanceService/GetInstance", request)
        except errors.NotFound:
            return None
        return found

    def delete(self, id_: str) -> Operation:
        """Begin to delete an instance."""
        return self.mutate(*_request("compute.InstanceService/DeleteInstance", id=id_))

    def gone(self, id_: str, deadline_s: float = 60) -> None:
        """Wait until an instance is gone."""
        self.until(lambda: self.instance(id_) is None, deadline_s)

    def verify(self) -> list[verify_service_pb2.Finding]:
        """Return what is wrong; every host has to have answered."""
        findings: list[verify_service_pb2.Finding] = []
        with rpc.reraised():
            stream = self._method("conductor.VerifyService/Verify")(
                verify_service_pb2.VerifyRequest(),
                timeout=60,
                metadata=rpc.bearer(self._token(True)),
            )
            for answer in stream:
                if answer.HasField("finding"):
                    findings.append(answer.finding)
                elif answer.summary.silent_host_ids:
                    raise errors.Unavailable("HOST_SILENT", "a host has not answered")
        return findings


def _request(method: str, **fields: Any) -> tuple[str, Any]:
    """Return a method's name and its request."""
    package, _, rest = method.partition(".")
    service, _, name = rest.partition("/")
    file = "".join(f"_{c.lower()}" if c.isupper() else c for c in service).lstrip("_")
    module = importlib.import_module(f"mcloud.{package}.v1.{file}_pb2")
    return method, getattr(module, f"{name}Request")(**fields)


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *filter(None, sys.path)])}


def _lives(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


@contextmanager
def running_cloud(**settings: object) -> Iterator[HostCloud]:
    """A cloud that is up and furnished; its files are kept if the test leaves with an error."""
    root = Path(tempfile.mkdtemp(prefix="mcloud-crash-", dir="/tmp"))  # sockets: a short path
    cloud = HostCloud(root)
    os.environ["PYTHONPATH"] = _environment()["PYTHONPATH"]
    try:
        cloud.start(**settings)
        cloud.furnish()
        yield cloud
    finally:
        cloud.stop()
        shutil.rmtree(root)
