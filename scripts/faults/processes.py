"""The processes of a cloud that may be killed or frozen, and who starts them again.

All of them are in a network namespace of this program's own: PostgreSQL, copies of the control
plane, and a host with its libvirtd, its agent, the servers of its volumes and its guests.
"""

from __future__ import annotations

import asyncio
import os
import pwd
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import psycopg
from benchmarks import cloud
from benchmarks.cloud import ControlPlane

POSTGRESQL = Path("/usr/lib/postgresql/15/bin")
DATABASES = ("identity", "compute", "image", "network", "volume")
ADDRESS = "10.99.0.1"  # of the machine, as the lab's hosts see it
START_S = 120.0


class Program:
    """A program that is started again when it has ended.

    Args:
        start: starts it; returns its pid.
        pids: all its processes, the first one first; of these some are its children.
    """

    def __init__(
        self, name: str, start: Callable[[], int], pids: Callable[[int], list[int]] | None = None
    ) -> None:
        self.name = name
        self._start = start
        self._pids = pids or (lambda pid: [pid])
        self.pid = 0

    def start(self) -> None:
        """Start it."""
        self.pid = self._start()

    @property
    def lives(self) -> bool:
        """Tell whether its first process does."""
        return self.pid != 0 and is_alive(self.pid)

    def pids(self) -> list[int]:
        """Return its processes."""
        return self._pids(self.pid) if self.lives else []


class Postgresql:
    """A private server, from Debian's package; a crash loses nothing that was committed."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._account = pwd.getpwnam("postgres")  # the server refuses to run as root
        self.program = Program("postgresql", self._start, _family)
        self.url = "postgresql://postgres@127.0.0.1:5432/{name}"

    def make(self) -> None:
        """Make the server's files, start it, make the databases."""
        self._directory.mkdir()
        os.chown(self._directory, self._account.pw_uid, self._account.pw_gid)
        arguments = ["-D", self._data, "-U", "postgres", "--auth=trust", "--no-sync"]
        subprocess.run(
            [POSTGRESQL / "initdb", *arguments],
            check=True,
            cwd=self._directory,
            stdout=subprocess.DEVNULL,
            user=self._account.pw_uid,
            group=self._account.pw_gid,
            extra_groups=[],
        )
        self.program.start()
        end = time.monotonic() + START_S
        while True:
            try:
                with psycopg.connect(self.url.format(name="postgres"), autocommit=True) as server:
                    for name in DATABASES:
                        server.execute(f"CREATE DATABASE {name}")  # type: ignore[arg-type]
                    return
            except psycopg.OperationalError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.05)  # nothing tells when it accepts connections but trying

    @property
    def _data(self) -> Path:
        return self._directory / "data"

    def _start(self) -> int:
        (self._data / "postmaster.pid").unlink(missing_ok=True)  # of one that was killed
        options = {
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": self._directory,
            "max_connections": 500,
            "shared_buffers": "64MB",
        }
        return subprocess.Popen(
            [POSTGRESQL / "postgres", "-D", self._data]
            + [f"--{name}={value}" for name, value in options.items()],
            cwd=self._directory,
            stdin=subprocess.DEVNULL,
            stdout=(self._directory / "log").open("ab"),
            stderr=subprocess.STDOUT,
            user=self._account.pw_uid,
            group=self._account.pw_gid,
            extra_groups=[],
            start_new_session=True,
        ).pid


class Copies:
    """Copies of the control plane over one database; each serves everything."""

    def __init__(
        self,
        directory: Path,
        count: int,
        database: str,
        settings: Mapping[str, object],
        *,
        address: str = ADDRESS,
    ) -> None:
        self._directory = directory
        directory.mkdir()
        public, internal = (
            ",".join(f"{address}:{port + 10 * number}" for number in range(count))
            for port in (7700, 7701)
        )
        self.plane = ControlPlane(directory / "state", public)
        self.programs = [
            Program(f"control plane {number}", lambda number=number: self._start(number), _family)
            for number in range(count)
        ]
        for number in range(count):
            values = {
                "state_dir": str(directory / "state"),
                "public_listen": public.split(",")[number],
                "internal_listen": internal.split(",")[number],
                "internal_advertise": internal,
                "names": [address],
                "database": database,
                "underlay_mtu": 1600,
                **settings,
            }
            lines = [f"{key} = {_toml(value)}\n" for key, value in values.items()]
            self._config(number).write_text("".join(lines))

    def _config(self, number: int) -> Path:
        return self._directory / f"{number}.toml"

    def log(self, number: int) -> Path:
        """Return the file that one writes its log to."""
        return self._directory / f"{number}.log"

    def _start(self, number: int) -> int:
        return subprocess.Popen(
            [sys.executable, "-m", "mcloud_controlplane", "--config", self._config(number)],
            stdin=subprocess.DEVNULL,
            stdout=self.log(number).open("ab"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ).pid

    def await_serving(self) -> None:
        """Wait until each serves."""
        end = time.monotonic() + START_S
        for number, program in enumerate(self.programs):
            while "control plane serves" not in self.log(number).read_text():
                if not program.lives or time.monotonic() > end:
                    raise RuntimeError(self.log(number).read_text()[-3000:])
                time.sleep(0.02)  # nothing tells when a line is there but looking


class RealHost:
    """Host h1 of a lab."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.state = directory / "lab"
        self.files = self.state / "hosts" / "h1" / "mcloud"
        self.uri = f"qemu+unix:///system?socket={self.state}/hosts/h1/run/libvirt-sock"
        self.agent = Program("agent", self._start_agent)
        self.libvirtd = Program("libvirtd", self._start_libvirtd)
        self._inside = Path()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Have the host; its agent is not started."""
        try:
            cloud.lab("up", "--state", self.state, "--prefix", "mcc")
            status = cloud.lab("status", "--state", self.state)
            line = next(line for line in status.splitlines() if line.startswith("h1:"))
            init = int(line.partition("(pid ")[2].partition(")")[0])
            self._inside = Path(f"/proc/{init}/ns/pid").readlink()
            self.libvirtd.pid = self.named("libvirtd")[0]
            yield
        finally:
            cloud.uninterrupted(cloud.lab, "down", "--state", self.state)

    def enrol(self, plane: ControlPlane) -> None:
        """Make the host a member of the cloud."""
        (self.files / "etc").mkdir(parents=True, exist_ok=True)
        (self.files / "etc" / "agent.toml").write_text(
            f'control_plane = "{plane.public}"\n'
            'name = "h1"\n'
            'underlay_ip = "10.99.0.11"\n'
            'underlay_device = "br-ex"\n'
            'physical_networks = { external = "br-ex" }\n'
            "report_interval_s = 2\n"
        )
        token = asyncio.run(cloud.join_token(plane))
        command = (sys.executable, "-m", "mcloud_agents", "enrol", "--control-plane", plane.public)
        environment = {**os.environ, "MCLOUD_JOIN_TOKEN": token}
        cloud.lab("exec", "--state", self.state, "h1", "--", *command, environment=environment)

    def run(self, *command: str) -> str:
        """Run a command in the host; return what it prints."""
        return cloud.lab("exec", "--state", self.state, "h1", "--", *command)

    @property
    def agent_log(self) -> Path:
        """The file that the agent writes its log to."""
        return self._directory / "agent.log"

    def named(self, name: str) -> list[int]:
        """Return the host's processes of a name (the first 15 letters of it)."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it has just ended
                if (process / "comm").read_text().strip() != name[:15]:
                    continue
                if (process / "ns/pid").readlink() == self._inside and is_alive(int(process.name)):
                    found.append(int(process.name))
        return sorted(found)

    def _start_agent(self) -> int:
        pid_file = self._directory / "agent.pid"
        detach = ("--detach", "--pid-file", pid_file, "--log", self.agent_log)
        command = (sys.executable, "-m", "mcloud_agents", "run")
        cloud.lab("exec", "--state", self.state, *detach, "h1", "--", *command)
        return int(pid_file.read_text())

    def _start_libvirtd(self) -> int:
        cloud.lab("up", "--state", self.state, "--prefix", "mcc")
        return self.named("libvirtd")[0]


def is_alive(pid: int) -> bool:
    """Tell whether a process is there and no zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def send(pids: list[int], number: signal.Signals) -> None:
    """Send a signal to processes, unless they have ended."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def _family(pid: int) -> list[int]:
    """Return a process and its children."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    try:
        return [pid, *map(int, children.read_text().split())]
    except OSError:
        return [pid]


def _toml(value: object) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    return f'"{value}"' if isinstance(value, str) else str(value)
