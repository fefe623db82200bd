"""Hosts as sets of namespaces, joined by a wire; guests as namespaces behind devices like taps.

Everything is real but for the virtual machines: kernel, packets, agents, DHCP servers.
"""

from __future__ import annotations

import base64
import contextlib
import difflib
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mcloud.network.v1 import dataplane_pb2 as pb

DEADLINE_S = 60.0
MTU = 1600

# What ip(8) says of bridges and carriers that changes by itself.
_FLEETING = r"([a-z_]+_timer|topology_change[a-z_]*) +[0-9.]+| state [A-Z]+"

_UDHCPC = """#!/bin/sh
[ "$1" = bound ] || [ "$1" = renew ] || exit 0
ip addr flush dev $interface
ip addr add $ip/$mask dev $interface
[ -n "$mtu" ] && ip link set $interface mtu $mtu
if [ -n "$staticroutes" ]; then
    set -- $staticroutes
    while [ $# -ge 2 ]; do
        [ "$2" = 0.0.0.0 ] && ip route replace $1 dev $interface || ip route replace $1 via $2
        shift 2
    done
else
    for r in $router; do ip route replace default via $r; done
fi
env > LEASE
"""


def await_true(condition: Callable[[], bool], what: str, deadline_s: float = DEADLINE_S) -> None:
    """Wait until a condition holds; what it asks takes its own time, so there is no busy loop."""
    end = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"{what}: not within {deadline_s:.0f} s")
        select.select([], [], [], 0.02)


def child_of(pid: int) -> int:
    """Return the only child of a process, when it has one."""
    path = Path(f"/proc/{pid}/task/{pid}/children")
    await_true(lambda: bool(path.read_text().split()), f"process {pid} has a child")
    return int(path.read_text().split()[0])


class Host:
    """Network, mount and PID namespaces of their own, and an agent in them."""

    def __init__(self, directory: Path, underlay_ip: str, **settings: Any) -> None:
        directory.mkdir(parents=True)
        for parent in (directory, *directory.parents):  # DHCP servers pass through without rights
            if parent != Path("/") and not parent.stat().st_mode & 1:
                parent.chmod(parent.stat().st_mode | 0o111)
        self.directory = directory
        self.underlay_ip = underlay_ip
        self.settings = {
            "underlay_ip": underlay_ip,
            "underlay_device": "eth0",
            "state_dir": str(directory / "state"),
            "runtime_dir": str(directory / "run"),
            **settings,
        }
        script = (
            "mount -t tmpfs tmpfs /run && mkdir /run/netns && echo up && exec tini -s sleep 99999"
        )
        self._holder = subprocess.Popen(
            ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
            + ["--propagation", "private", "sh", "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._agent: subprocess.Popen[str] | None = None
        self.init = 0

    def enter(self) -> None:
        """Find the way in, once the host is up."""
        assert self._holder.stdout
        assert self._holder.stdout.readline() == "up\n"
        self.init = child_of(self._holder.pid)
        self.run("ip", "link", "set", "lo", "up")

    def inside(self, *command: str) -> list[str]:
        return ["nsenter", f"--target={self.init}", "--net", "--mount", "--pid", "--", *command]

    def run(self, *command: str, check: bool = True) -> str:
        """Run something in the host and return what it prints."""
        result = subprocess.run(
            self.inside(*command), capture_output=True, text=True, check=False, timeout=DEADLINE_S
        )
        if check and result.returncode:
            raise AssertionError(f"{command}: {result.stdout}{result.stderr}")
        return result.stdout

    def succeeds(self, *command: str) -> bool:
        result = subprocess.run(
            self.inside(*command), capture_output=True, check=False, timeout=DEADLINE_S
        )
        return result.returncode == 0

    # --- agent ----------------------------------------------------------------------------------

    def start_agent(self) -> None:
        path = self.directory / "settings.json"
        path.write_text(json.dumps(self.settings))
        program = Path(__file__).with_name("dataplane_process.py")
        with (self.directory / "agent.log").open("a") as log:
            self._agent = subprocess.Popen(
                self.inside(sys.executable, "-W", "error", str(program), str(path)),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            )
        self._receive("ready")

    def kill_agent(self) -> None:
        assert self._agent is not None
        os.kill(child_of(self._agent.pid), signal.SIGKILL)
        self._agent.wait(DEADLINE_S)
        self._close_agent()

    def _close_agent(self) -> None:
        assert self._agent is not None
        for pipe in (self._agent.stdin, self._agent.stdout):
            assert pipe
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        self._agent.wait(DEADLINE_S)
        self._agent = None

    def _receive(self, key: str) -> Any:
        """Return the next line with this key; the program's log lines pass by."""
        assert self._agent is not None
        assert self._agent.stdout is not None
        while line := self._agent.stdout.readline():
            with contextlib.suppress(ValueError):
                reply = json.loads(line)
                if isinstance(reply, dict) and key in reply:
                    return reply
        raise AssertionError("the agent ended: " + (self.directory / "agent.log").read_text())

    def ask(self, do: str, argument: object = None) -> Any:
        assert self._agent is not None
        assert self._agent.stdin is not None
        self._agent.stdin.write(json.dumps({"do": do, "argument": argument}) + "\n")
        self._agent.stdin.flush()
        reply = self._receive("seconds")
        self.seconds = float(reply["seconds"])
        if "reason" in reply:
            raise Refused(reply["reason"], reply["message"])
        return reply["result"]

    def apply(self, document: pb.HostDataplane) -> Any:
        return self.ask("apply", base64.b64encode(document.SerializeToString()).decode())

    def stop(self) -> None:
        if self._agent is not None:
            self._close_agent()
        self._holder.kill()  # the namespaces' init goes with it, and everything in them
        self._holder.wait(DEADLINE_S)
        for pipe in (self._holder.stdin, self._holder.stdout):
            assert pipe
            pipe.close()

    # --- what can be seen -----------------------------------------------------------------------

    def facts(self) -> str:
        """Everything that the kernel has, without what changes by itself."""
        parts = [
            re.sub(_FLEETING, "", self.run("ip", "-d", "-o", "link")),
            self.run("ip", "-o", "addr").replace(" tentative", ""),
            self.run("ip", "route"),
            self.run("sh", "-c", "bridge fdb | sort"),
            self.run("nft", "-s", "list", "ruleset"),
            self.run("sh", "-c", "ls -i /run/netns"),
        ]  # fmt: skip
        return "\n".join(parts)


def difference(before: str, after: str) -> str:
    """Return what differs, for a person; empty if nothing does."""
    # Line breaks in place of the rest of ip's one long line a device.
    before, after = (text.replace("    ", "\n") for text in (before, after))
    return "\n".join(
        difflib.unified_diff(before.splitlines(), after.splitlines(), n=0, lineterm="")
    )


class Refused(Exception):
    """What the agent answered."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(f"{reason}: {message}")
        self.reason = reason


@dataclass
class Guest:
    """A namespace with one device, whose other end a host has as a tap."""

    host: Host
    name: str
    mac: str
    lease: Path = field(init=False)

    def __post_init__(self) -> None:
        self.lease = self.host.directory / f"{self.name}.lease"

    def plug(self, bridge: str, device: str) -> None:
        """Do as libvirt does: make the device, put it into the bridge, switch it on."""
        self.host.run("ip", "netns", "add", self.name)
        self.host.run(
            *("ip", "link", "add", device, "type", "veth"),
            *("peer", "name", "eth0", "address", self.mac, "netns", self.name),
        )
        self.host.run("ip", "link", "set", device, "master", bridge, "up")
        self.run("ip", "link", "set", "eth0", "up")
        self.run("ip", "link", "set", "lo", "up")

    def unplug(self, device: str) -> None:
        self.host.run("ip", "link", "del", device)
        self.host.run("ip", "netns", "del", self.name)

    def command(self, *command: str) -> list[str]:
        return ["ip", "netns", "exec", self.name, *command]

    def run(self, *command: str, check: bool = True) -> str:
        return self.host.run(*self.command(*command), check=check)

    def succeeds(self, *command: str) -> bool:
        return self.host.succeeds(*self.command(*command))

    def popen(self, *command: str, **options: Any) -> subprocess.Popen[str]:
        return subprocess.Popen(self.host.inside(*self.command(*command)), text=True, **options)

    def get_lease(self, tries: int = 20) -> dict[str, str]:
        """Ask for an address as BusyBox' client does; empty if nobody answers."""
        script = self.host.directory / "udhcpc.sh"
        script.write_text(_UDHCPC.replace("LEASE", f"{self.host.directory}/$LEASE_NAME"))
        script.chmod(0o755)
        self.lease.unlink(missing_ok=True)
        done = self.succeeds(
            *("env", f"LEASE_NAME={self.lease.name}", "busybox", "udhcpc", "-i", "eth0", "-n"),
            *("-q", "-f", "-s", str(script), "-t", str(tries), "-T", "1", "-A", "1"),
            *("-O", "staticroutes", "-O", "mtu", "-O", "dns", "-O", "domain"),
        )
        if not done:
            return {}
        pairs = (line.partition("=") for line in self.lease.read_text().splitlines())
        return {key: value for key, _, value in pairs}

    def pings(self, address: str, *options: str, tries: int = 3) -> bool:
        return self.succeeds("ping", "-c", str(tries), "-i", "0.2", "-W", "2", *options, address)

    def cannot_ping(self, address: str, *options: str) -> bool:
        return not self.succeeds("ping", "-c", "2", "-i", "0.2", "-W", "1", *options, address)

    def http(self, path: str, *headers: str, method: str = "GET") -> tuple[int, bytes]:
        """Ask the metadata service; (0, b"") if it does not answer."""
        program = (
            "import http.client, sys\n"
            "c = http.client.HTTPConnection('169.254.169.254', timeout=5)\n"
            "h = dict(a.split(': ') for a in sys.argv[3:])\n"
            "try:\n"
            "    c.request(sys.argv[1], sys.argv[2], headers=h)\n"
            "    r = c.getresponse()\n"
            "    print(r.status); print(r.read().decode(), end='')\n"
            "except OSError:\n"
            "    print(0)\n"
        )
        out = self.run(sys.executable, "-c", program, method, path, *headers)
        status, _, body = out.partition("\n")
        return int(status), body.encode()


def connect(one: Host, other: Host, prefix: int = 24) -> None:
    """Lay a wire between two hosts' eth0."""
    # Made from outside, where both hosts have a number.
    enter = ["nsenter", f"--target={one.init}", "--net", "--"]
    subprocess.run(
        [*enter, "ip", "link", "add", "eth0", "mtu", str(MTU), "type", "veth"]
        + ["peer", "name", "eth0", "mtu", str(MTU), "netns", str(other.init)],
        check=True,
    )
    for host in (one, other):
        host.run("ip", "addr", "add", f"{host.underlay_ip}/{prefix}", "dev", "eth0")
        host.run("ip", "link", "set", "eth0", "up")


@contextlib.contextmanager
def host(directory: Path, underlay_ip: str, **settings: Any) -> Iterator[Host]:
    """Have a host, whose agent does not run yet; everything in it ends afterwards."""
    made = Host(directory, underlay_ip, **settings)
    try:
        made.enter()
        yield made
    finally:
        made.stop()
