"""One hypervisor host: what it looks like from inside, its cable and its libvirtd."""

from __future__ import annotations

import os
import re
import shutil
import socket
import string
import time
import uuid
from pathlib import Path

from hypervisor import kernel, machine
from hypervisor.kernel import LabError, Process
from hypervisor.machine import MTU, Settings

# What a host has for itself: kept in its directory of the lab's state, seen inside at these paths.
PRIVATE_DIRECTORIES = {
    "etc": "/etc/libvirt",
    "run": "/run/libvirt",
    "lib": "/var/lib/libvirt",
    "cache": "/var/cache/libvirt",
    "log": "/var/log/libvirt",
    "mcloud/etc": "/etc/mcloud",
    "mcloud/run": "/run/mcloud",
    "mcloud/lib": "/var/lib/mcloud",
    "pki": "/etc/pki/qemu",
}
PRIVATE_FILES = {"hosts": "/etc/hosts", "resolv.conf": "/etc/resolv.conf"}
GONE_AT_BOOT = ("run", "mcloud/run")

# What libvirt keeps of a guest that it starts, before there is a process.
_UNSTARTED = re.compile(r"<domstatus [^>]*\bpid='0'")

START_DEADLINE_S = 180.0  # a libvirtd that has to ask QEMU for its capabilities, on a busy machine


class Host:
    """Host `number` of a lab."""

    def __init__(self, settings: Settings, number: int) -> None:
        self.name = f"h{number}"
        self.address = settings.address(number)
        self.directory = settings.state / "hosts" / self.name
        self.socket = self.directory / "run" / "libvirt-sock"
        self.uri = f"qemu+unix:///system?socket={self.socket}"
        self._settings = settings

    # --- files ----------------------------------------------------------------------------------

    def write_files(self, names: dict[str, str]) -> None:
        """Write everything that the host finds in its files.

        Args:
            names: address of each host of the lab by name, this one's own among them: libvirtd
                resolves its host name again and again, and waits 10 s each time if it cannot.
        """
        for name in PRIVATE_DIRECTORIES:
            (self.directory / name).mkdir(parents=True, exist_ok=True)
        for name in ("qemu", "nwfilter", "storage", "secrets"):
            (self.directory / "etc" / name).mkdir(exist_ok=True)
        id_file = self.directory / "host_uuid"
        if not id_file.exists():
            id_file.write_text(str(uuid.uuid4()))
        for name in ("libvirtd.conf", "qemu.conf"):
            template = string.Template(Path(__file__).with_name(name).read_text())
            (self.directory / "etc" / name).write_text(
                template.substitute(uuid=id_file.read_text(), address=self.address)
            )
        lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in names.items())]
        (self.directory / "hosts").write_text("".join(f"{line}\n" for line in lines))
        (self.directory / "resolv.conf").write_text(_resolver_configuration())

    def furnish(self) -> None:
        """Make the mounts and the name of a host. Runs as the first process in its namespaces."""
        for name in GONE_AT_BOOT:
            shutil.rmtree(self.directory / name)
            (self.directory / name).mkdir()
        state = os.open(self.directory, os.O_PATH | os.O_DIRECTORY)  # in case a mount hides it
        # Slave: the machine can still unmount its file systems; nothing travels the other way.
        kernel.mount("none", "/", flags=kernel.MS_REC | kernel.MS_SLAVE)
        # An empty /run also keeps the machine's D-Bus, systemd and libvirt out of reach.
        kernel.mount("tmpfs", "/run", "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "mode=755")
        Path("/run/lock").mkdir()
        Path("/run/netns").mkdir()
        kernel.mirror(Path("/etc"))
        kernel.mirror(Path("/var/lib"))
        for name, target in PRIVATE_DIRECTORIES.items():
            Path(target).mkdir(parents=True, exist_ok=True)
            kernel.bind(f"/proc/self/fd/{state}/{name}", target)
        for name, target in PRIVATE_FILES.items():
            if os.path.islink(target):  # resolv.conf often is, to something in /run
                os.unlink(target)
            Path(target).touch()
            kernel.bind(f"/proc/self/fd/{state}/{name}", target)
        kernel.sethostname(self.name)
        # sysfs shows the interfaces of the namespace that mounted it: libvirt reads them there.
        kernel.unmount("/sys")
        kernel.mount("sysfs", "/sys", "sysfs", kernel.MS_INERT)
        kernel.unmount("/proc")
        kernel.mount("proc", "/proc", "proc", kernel.MS_INERT)

    # --- cable ----------------------------------------------------------------------------------

    def connect(self, init: Process, switch: Process) -> None:
        """Join the host to the switch: eth0 in the bridge br-ex, which has the host's address.

        A bridge takes the lowest MTU and MAC address of its ports, and routers' ports come and
        go: both are set, so that they stay.
        """
        if not machine.has_link(self.name, switch):
            machine.remove_link("eth0", init)
            veth = f"link add {self.name} mtu {MTU} type veth peer eth0 mtu {MTU} netns {init.pid}"
            kernel.ip(veth, switch)
        kernel.ip(f"link set {self.name} master bridge up", switch)
        if not machine.has_link("br-ex", init):
            kernel.ip("link add br-ex type bridge", init)
        mac = "02:00:" + ":".join(f"{byte:02x}" for byte in self.address.packed)
        kernel.ip(
            f"""
            link set lo up
            link set br-ex address {mac} mtu {MTU} up
            link set eth0 master br-ex up
            addr replace {self.address}/{self._settings.underlay.prefixlen} dev br-ex
            route replace default via {self._settings.gateway}
            """,
            init,
        )

    # --- libvirtd -------------------------------------------------------------------------------

    def listens(self) -> bool:
        """Tell whether a libvirtd has its socket open."""
        with socket.socket(socket.AF_UNIX) as client:
            return client.connect_ex(str(self.socket)) == 0

    def start_libvirtd(self, init: Process) -> Process:
        """Start libvirtd; it may not answer yet."""
        self._forget_unstarted()
        return kernel.start_inside(init, ["libvirtd"], self.directory / "log" / "stdout.log")

    def _forget_unstarted(self) -> None:
        """Have libvirt take guests for off whose start has not come to a process.

        Killed at that moment, libvirtd (9.0) takes such a guest for running ever after, and lets
        nobody start, stop or remove it. QEMU waits for the pid to be written, so there is none.
        scripts/systemd/libvirtd.service.d/mcloud.conf does this where systemd starts libvirtd.
        """
        for status in (self.directory / "run" / "qemu").glob("*.xml"):
            if _UNSTARTED.search(status.read_text()):
                status.unlink()

    def await_libvirtd(self, libvirtd: Process | None) -> None:
        """Wait until libvirtd answers.

        Args:
            libvirtd: the process, if this program has started it; then its end ends the wait.

        Raises:
            LabError: it ended, or is silent for too long.
        """
        deadline = time.monotonic() + START_DEADLINE_S
        log = self.directory / "log" / "libvirtd.log"
        while not self.listens():
            if libvirtd and not libvirtd.alive():
                raise LabError(f"{self.name}: libvirtd has ended; see {log.parent}")
            if time.monotonic() > deadline:
                raise LabError(f"{self.name}: libvirtd opens no socket; see {log}")
            time.sleep(0.02)
        # It listens before its drivers are ready, and answers when they are.
        try:
            kernel.run(["virsh", "-c", self.uri, "uri"], timeout_s=deadline - time.monotonic())
        except LabError as error:
            raise LabError(f"{self.name}: {error}\nsee {log}") from error


def _resolver_configuration() -> str:
    """Name the machine's name servers, unless it is its own: that one is not the host's."""
    servers: list[str] = []
    for path in (Path("/etc/resolv.conf"), Path("/run/systemd/resolve/resolv.conf")):
        lines = path.read_text().splitlines() if path.exists() else []
        servers = servers or [
            line for line in lines if line.startswith("nameserver ") and not _is_loopback(line)
        ]
    return "".join(f"{line}\n" for line in [*servers, "options timeout:1 attempts:1"])


def _is_loopback(line: str) -> bool:
    server = line.split()[1]
    return server.startswith("127.") or server == "::1"
