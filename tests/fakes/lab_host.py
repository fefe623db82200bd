"""A host with a libvirtd and a network of its own, for tests against real QEMU."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

LAB = Path(__file__).parents[2] / "scripts" / "lab"
DEADLINE_S = 300


@dataclass(frozen=True)
class LabHost:
    """Host h1 of a lab; files outside /etc, /run and /var/lib are the same inside and out."""

    state: Path
    prefix: tuple[str, ...]  # of a command, to run it in the machine of the lab

    @property
    def uri(self) -> str:
        return f"qemu+unix:///system?socket={self.state}/hosts/h1/run/libvirt-sock"

    def run(self, *command: str) -> str:
        """Run a command in the host."""
        return self.lab("exec", "h1", "--", *command)

    def lab(self, verb: str, *arguments: str) -> str:
        """Run the lab's program on this lab."""
        command = (*self.prefix, sys.executable, str(LAB), verb, "--state", str(self.state))
        result = subprocess.run(
            (*command, *arguments), capture_output=True, text=True, timeout=DEADLINE_S, check=False
        )
        assert result.returncode == 0, (arguments, result.stdout, result.stderr)
        return result.stdout

    def libvirtd_pids(self) -> list[int]:
        """The host's libvirtd, as the machine counts."""
        inside = Path(f"/proc/{self._init_pid()}/ns/pid").readlink()
        pids = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                name = (process / "comm").read_text().strip()
                if name == "libvirtd" and (process / "ns/pid").readlink() == inside:
                    pids.append(int(process.name))
            except OSError:
                continue  # it has just ended
        return pids

    def _init_pid(self) -> int:
        line = next(line for line in self.lab("status").splitlines() if line.startswith("h1:"))
        return int(line.partition("(pid ")[2].partition(")")[0])


@contextmanager
def running_host() -> Iterator[LabHost]:
    """Bring a host up in a network namespace of its own, and take it down again."""
    state = Path(
        tempfile.mkdtemp(prefix="mcloud-compute-", dir="/tmp")
    )  # sockets need a short path
    machine = subprocess.Popen(["unshare", "--net", "--", "sleep", "infinity"])
    host = LabHost(state / "l", ("nsenter", f"--net=/proc/{machine.pid}/ns/net", "--"))
    try:
        end = time.monotonic() + 30
        while Path(f"/proc/{machine.pid}/comm").read_text() != "sleep\n":
            assert time.monotonic() < end, "unshare has not become sleep"
        host.lab("up", "--prefix", "cmp")
        yield host
    finally:
        host.lab("down")
        machine.kill()
        machine.wait()
        shutil.rmtree(state)
