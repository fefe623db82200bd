"""The process that serves one volume: qemu-storage-daemon, which outlives the agent.

One process a volume, so that its NBD server admits exactly the clients of that volume (with a
shared one every client could list and open every export) and a crash touches one volume only.
https://www.qemu.org/docs/master/tools/qemu-storage-daemon.html
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qemu.qmp import ExecuteError, QMPClient, QMPError

from mcloud_agents.volume import data
from mcloud_base import errors, ids

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

PROGRAM = "qemu-storage-daemon"
STOP_TIMEOUT_S = 20.0  # it writes back what the file system has not taken yet
QMP_TIMEOUT_S = 10.0

_CLIENTS = "/objects/clients"


@dataclass(frozen=True)
class Export:
    """What a daemon is to serve, and to whom."""

    volume_id: str
    path: Path
    address: str
    port: int
    name: str
    subjects: tuple[str, ...]  # of the certificates that may connect; sorted


@dataclass
class Daemon:
    """A running daemon.

    Its pidfd cannot come to mean another process, and tells at once when it ends.
    """

    volume_id: str
    socket: Path  # of its monitor
    pid: int
    pidfd: int
    _subjects: tuple[str, ...] | None = None  # None: it has been adopted and not been asked
    _ended: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        asyncio.get_running_loop().add_reader(self.pidfd, self._on_end)

    @property
    def alive(self) -> bool:
        """Whether it has not ended, as far as the event loop has seen."""
        return not self._ended.is_set()

    def start_time(self) -> float:
        """Return when it began to serve, in seconds since 1970; 0 if that is not known."""
        try:
            return self.socket.with_suffix(".pid").stat().st_mtime
        except FileNotFoundError:
            return 0

    async def wait(self) -> None:
        """Return when it has ended."""
        await self._ended.wait()

    def release(self) -> None:
        """Stop watching it. It runs on."""
        if self.pidfd >= 0:
            asyncio.get_running_loop().remove_reader(self.pidfd)
            os.close(self.pidfd)
            self.pidfd = -1

    async def stop(self) -> None:
        """End it, cutting off its clients; what they had flushed is on disk.

        Raises:
            Unavailable: EXPORT_WILL_NOT_END: it hangs in the kernel.
        """
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self.alive:
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(self.pidfd, number)
                with suppress(TimeoutError):
                    async with asyncio.timeout(STOP_TIMEOUT_S):
                        await self._ended.wait()
        if self.alive:
            raise errors.Unavailable(
                "EXPORT_WILL_NOT_END",
                f"the server of {self.volume_id} (pid {self.pid}) does not end",
                volume=self.volume_id,
                pid=self.pid,
            )
        self.release()

    async def subjects(self) -> tuple[str, ...]:
        """Return the certificate subjects that it admits, sorted.

        Raises:
            Unavailable: EXPORT_NOT_ANSWERING.
        """
        if self._subjects is None:
            async with monitor(self.socket) as qmp:
                rules: Any = await qmp.execute("qom-get", {"path": _CLIENTS, "property": "rules"})
            self._subjects = tuple(sorted(rule["match"] for rule in rules))
        return self._subjects

    async def admit(self, subjects: tuple[str, ...]) -> None:
        """Let these subjects connect, and no others, without disturbing those that are."""
        async with monitor(self.socket) as qmp:
            await qmp.execute(
                "qom-set", {"path": _CLIENTS, "property": "rules", "value": _rules(subjects)}
            )
        self._subjects = subjects

    def _on_end(self) -> None:
        asyncio.get_running_loop().remove_reader(self.pidfd)
        self._ended.set()


async def start(export: Export, run_dir: Path, pki_dir: Path) -> Daemon:
    """Start a daemon; return when it accepts connections.

    A second one of the same file is refused by QEMU's lock on it, so that a lost record cannot
    make two of them write to it.

    Raises:
        Unavailable: STORAGE_COMMAND_FAILED, with what it printed.
    """
    run_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    socket, pid_file = _socket(run_dir, export.volume_id), run_dir / f"{export.volume_id}.pid"
    await data.run(
        PROGRAM,
        "--daemonize",  # returns when all that follows is in place
        *("--pidfile", str(pid_file)),
        *("--chardev", f"socket,id=monitor,path={socket},server=on,wait=off"),
        *("--monitor", "chardev=monitor"),
        *("--object", json.dumps(_credentials(pki_dir))),
        *("--object", json.dumps(_list_of_clients(export.subjects))),
        *("--blockdev", json.dumps(_node(export.path))),
        *("--nbd-server", json.dumps(_server(export.address, export.port))),
        *("--export", json.dumps(_export(export.name))),
    )
    daemon = _watch(int(pid_file.read_text()), run_dir)
    if daemon is None or daemon.volume_id != export.volume_id:
        raise errors.Unavailable(
            "EXPORT_ENDED", f"the server of {export.volume_id} ended at once", path=export.path
        )
    return daemon


def scan(run_dir: Path) -> dict[str, list[int]]:
    """Return the process numbers of the daemons that run, by volume.

    They are known by their command line, which names the monitor's socket in `run_dir`: no file
    can be lost or stale, and a number that has gone to another program is not mistaken for one.
    """
    found: dict[str, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (socket := _socket_of(int(entry), run_dir)):
            found.setdefault(socket.stem, []).append(int(entry))
    return found


async def adopt(volume_id: str, run_dir: Path) -> Daemon | None:
    """Return the daemon of a volume that runs already, or None.

    Raises:
        Unavailable: EXPORT_STARTING: one has been about to start for too long.
    """
    pids = (await asyncio.to_thread(scan, run_dir)).get(volume_id, [])
    daemons = [daemon for pid in pids if (daemon := _watch(pid, run_dir))]
    try:
        async with asyncio.timeout(STOP_TIMEOUT_S):
            # Two: an agent was killed while it started one, whose starter has not ended yet.
            while len(daemons) > 1:
                waits = {asyncio.create_task(daemon.wait()) for daemon in daemons}
                try:
                    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for wait in waits:
                        wait.cancel()
                for daemon in [d for d in daemons if not d.alive]:
                    daemon.release()
                    daemons.remove(daemon)
    except TimeoutError as error:
        raise errors.Unavailable(
            "EXPORT_STARTING", f"a server of {volume_id} neither starts nor ends", volume=volume_id
        ) from error
    return daemons[0] if daemons else None


@asynccontextmanager
async def monitor(socket: Path) -> AsyncIterator[QMPClient]:
    """Talk to a daemon.

    Raises:
        Unavailable: EXPORT_NOT_ANSWERING. EXPORT_REFUSED: with QEMU's own words.
    """
    qmp = QMPClient(socket.stem)
    try:
        async with asyncio.timeout(QMP_TIMEOUT_S):
            await qmp.connect(str(socket))
            try:
                yield qmp
            finally:
                await qmp.disconnect()
    except ExecuteError as error:
        raise errors.Unavailable("EXPORT_REFUSED", str(error), socket=socket) from error
    except (QMPError, OSError, TimeoutError) as error:
        raise errors.Unavailable(
            "EXPORT_NOT_ANSWERING", f"{socket.stem}: {error or 'no answer in time'}", socket=socket
        ) from error


def _watch(pid: int, run_dir: Path) -> Daemon | None:
    """Return the daemon with this process number, or None if it is none of this directory's."""
    try:
        pidfd = os.pidfd_open(pid)  # first: what is read below is then of this very process
    except OSError:
        return None
    socket = _socket_of(pid, run_dir)
    if socket is None:
        os.close(pidfd)
        return None
    return Daemon(socket.stem, socket, pid, pidfd)


def _socket_of(pid: int, run_dir: Path) -> Path | None:
    """Return the monitor's socket that a process was started with, if it is such a daemon."""
    try:
        line = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return None
    arguments = [os.fsdecode(argument) for argument in line.split(b"\0")]
    if Path(arguments[0]).name != PROGRAM:
        return None
    for part in ",".join(arguments).split(","):
        socket = Path(part.removeprefix("path="))
        if part.startswith("path=") and socket.parent == run_dir and ids.is_id(socket.stem, "vol"):
            return socket
    return None


def _socket(run_dir: Path, volume_id: str) -> Path:
    return run_dir / f"{volume_id}.qmp"


def _credentials(pki_dir: Path) -> dict[str, Any]:
    return {
        "qom-type": "tls-creds-x509",
        "id": "tls",
        "dir": str(pki_dir),
        "endpoint": "server",
        "verify-peer": True,
    }


def _list_of_clients(subjects: tuple[str, ...]) -> dict[str, Any]:
    """Admit by a list, also for one client: only a list can be changed while it is in use."""
    return {
        "qom-type": "authz-list",
        "id": "clients",
        "policy": "deny",
        "rules": _rules(subjects),
    }


def _rules(subjects: tuple[str, ...]) -> list[dict[str, str]]:
    return [{"match": name, "policy": "allow", "format": "exact"} for name in subjects]


def _node(path: Path) -> dict[str, Any]:
    return {
        "driver": "qcow2",
        "node-name": "volume",
        "discard": "unmap",
        "detect-zeroes": "unmap",
        "file": {
            "driver": "file",
            "filename": str(path),
            "locking": "on",  # never served twice
            "discard": "unmap",
            "aio": "threads",
            "cache": {"direct": True},  # the guest has a cache of its own
        },
    }


def _server(address: str, port: int) -> dict[str, Any]:
    return {
        "addr": {"type": "inet", "host": address, "port": str(port)},
        "tls-creds": "tls",
        "tls-authz": "clients",
        "max-connections": 100,
    }


def _export(name: str) -> dict[str, Any]:
    return {"type": "nbd", "id": "export", "node-name": "volume", "name": name, "writable": True}
