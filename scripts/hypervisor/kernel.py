"""Namespaces, mounts and processes, straight from the kernel.

Python 3.11 wraps none of setns(2), unshare(2) and mount(2), hence ctypes.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
NAMESPACES = CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWPID | CLONE_NEWNET

MS_NOSUID, MS_NODEV, MS_NOEXEC = 2, 4, 8
MS_INERT = MS_NOSUID | MS_NODEV | MS_NOEXEC
MS_BIND, MS_REC, MS_SLAVE = 4096, 16384, 1 << 19
MNT_DETACH = 2
PR_SET_PDEATHSIG = 1

_libc = ctypes.CDLL(None, use_errno=True)


class LabError(Exception):
    """What went wrong and what to do about it, for the person at the terminal."""


# --- system calls -------------------------------------------------------------------------------


def _call(name: str, *arguments: object) -> None:
    if getattr(_libc, name)(*arguments) == -1:
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}")


def setns(pidfd: int, namespaces: int) -> None:
    """Join the namespaces of a process. For the PID namespace it is the children that join."""
    _call("setns", pidfd, namespaces)


def mount(source: str, target: str | Path, kind: str = "", flags: int = 0, data: str = "") -> None:
    """Mount a file system, or change the mount at `target`."""
    _call(
        "mount",
        source.encode(),
        str(target).encode(),
        kind.encode() or None,
        ctypes.c_ulong(flags),
        data.encode() or None,
    )


def bind(source: str | Path, target: str | Path) -> None:
    """Show the file or directory `source` at `target`."""
    mount(str(source), target, flags=MS_BIND)


def mirror(directory: Path) -> None:
    """Let names be added to `directory` in this mount namespace, and in no other.

    A tmpfs takes its place, holding a bind mount of each thing that was there. Mount points
    made in it leave nothing behind, and nobody outside can remove them: deleting a directory
    silently undoes what other namespaces have mounted on it.
    """
    original = os.open(directory, os.O_PATH | os.O_DIRECTORY)
    beneath = Path(f"/proc/self/fd/{original}")
    mode = directory.stat().st_mode & 0o7777
    mount("tmpfs", directory, "tmpfs", MS_NOSUID | MS_NODEV, f"mode={mode:o}")
    for entry in os.scandir(beneath):
        place = directory / entry.name
        if entry.is_symlink():
            place.symlink_to(os.readlink(entry.path))
            continue
        if entry.is_dir():
            place.mkdir()
        else:
            place.touch()
        bind(entry.path, place)
    os.close(original)


def unmount(target: str) -> None:
    """Take away whatever is mounted at and below `target`."""
    _call("umount2", target.encode(), MNT_DETACH)


def sethostname(name: str) -> None:
    """Set the host name of this UTS namespace."""
    _call("sethostname", name.encode(), len(name.encode()))


@contextmanager
def machine_lock() -> Iterator[None]:
    """One lab at a time changes the machine's network namespace; the others wait here.

    The lock is on the directory of the sysctls that labs have to share, which every network
    namespace has for itself and which no lab has to create.
    """
    directory = os.open("/proc/sys/net/ipv4/conf", os.O_RDONLY)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        yield
    finally:
        os.close(directory)


# --- processes ----------------------------------------------------------------------------------


def _stat(pid: int) -> tuple[str, int]:
    """State letter and start time (clock ticks after boot), fields 3 and 22 of proc(5)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return fields[0], int(fields[19])


@dataclass(frozen=True)
class Process:
    """A process that stays told apart from a later one with the same number."""

    pid: int  # as the machine numbers it
    start: int  # clock ticks after boot

    @classmethod
    def of(cls, pid: int) -> Process:
        """Describe a process that is there."""
        return cls(pid, _stat(pid)[1])

    def open(self) -> int | None:
        """Return a pidfd, or None if the process has ended (a zombie has)."""
        try:
            pidfd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return None
        try:
            state, start = _stat(self.pid)  # after opening: now it cannot become another one
        except (FileNotFoundError, ProcessLookupError):
            state, start = "X", -1
        if state in "ZX" or start != self.start:
            os.close(pidfd)
            return None
        return pidfd

    def alive(self) -> bool:
        """Tell whether the process still runs."""
        pidfd = self.open()
        if pidfd is None:
            return False
        os.close(pidfd)
        return True

    def runs(self, title: str) -> bool:
        """Tell whether the process is the init of that title, done with its preparations."""
        try:
            command = Path(f"/proc/{self.pid}/cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            return False
        return self.alive() and command.startswith(title.encode() + b"\0")

    def kill(self, deadline_s: float = 30) -> None:
        """End the process; return when it is gone.

        Of the init of a PID namespace the kernel says so only once every process in there
        has ended.
        """
        pidfd = self.open()
        if pidfd is None:
            return
        try:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            if not select.select([pidfd], [], [], deadline_s)[0]:
                raise LabError(f"process {self.pid} has not ended {deadline_s:.0f} s after SIGKILL")
        except ProcessLookupError:
            pass  # it ended meanwhile
        finally:
            os.close(pidfd)


def boot(title: str, prepare: Callable[[], None], record: Callable[[Process], None]) -> None:
    """Start an init in namespaces of its own.

    Args:
        title: how `ps` shows it.
        prepare: runs inside, as the namespaces' first process, before the init takes over.
        record: puts the process on disk. Until that is done the new process only waits, and
            it exits if this one dies: at no moment is there one that nobody knows of.

    Raises:
        LabError: with what prepare() raised.
    """
    report, tell = os.pipe()
    permit, allow = os.pipe()
    parent = os.fork()
    if parent == 0:
        with _child(tell):
            os.close(report)
            os.close(allow)
            os.setsid()
            _call("unshare", NAMESPACES)
            if os.fork():
                os._exit(0)
            os.write(tell, b"%s\n" % os.readlink(b"/proc/self"))  # still the machine's /proc
            if os.read(permit, 1):
                os.chdir("/")
                os.umask(0o022)
                prepare()
                _redirect(os.open(os.devnull, os.O_RDWR))
                os.execvp("tini", [title, "--", "sleep", "infinity"])
            os._exit(0)
    os.close(tell)
    os.close(permit)
    try:
        os.waitpid(parent, 0)
        process = _read_pid(report)
        record(process)
        os.write(allow, b"!")
        _read_outcome(report, f"{title} does not start")
    finally:
        os.close(allow)
        os.close(report)


def run_inside(init: Process, command: Sequence[str]) -> int:
    """Run a command in all namespaces of `init` and return its exit code, as a shell counts it.

    Nobody can move itself into a PID namespace, so the command is a child of this process,
    which passes signals on to it and takes it along when it dies.
    """
    pidfd = _pidfd(init)
    signals = {
        signal.SIGCHLD, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM,
        signal.SIGUSR1, signal.SIGUSR2,
    }  # fmt: skip
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    setns(pidfd, CLONE_NEWPID)
    child = os.fork()
    if child == 0:
        try:
            _call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
            _become(pidfd, command)
        except OSError as error:
            print(f"{command[0]}: {error.strerror}", file=sys.stderr, flush=True)
            os._exit(127 if isinstance(error, FileNotFoundError) else 126)
    while True:
        received = signal.sigwaitinfo(signals)
        if received.si_signo != signal.SIGCHLD:
            if received.si_code <= 0:  # sent by a process; a terminal signals the child itself
                os.kill(child, received.si_signo)
            continue
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


def start_inside(init: Process, command: Sequence[str], log: Path | None = None) -> Process:
    """Start a command in all namespaces of `init`, as the init's own child.

    Args:
        init: reaps the command, and takes it along when it ends.
        command: found in PATH, inside. It starts once its number and start time are known.
        log: file of the machine that standard output and error are appended to.

    Raises:
        LabError: it cannot be started.
    """
    pidfd = _pidfd(init)
    output = os.open(log or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    machine_proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY)
    report, tell = os.pipe()
    permit, allow = os.pipe()
    helper = os.fork()
    if helper == 0:
        with _child(tell):
            os.close(report)
            os.close(allow)
            os.setsid()
            setns(pidfd, CLONE_NEWPID)
            inside = os.fork()
            if inside:
                os.waitpid(inside, 0)
                os._exit(0)
            if os.fork():
                os._exit(0)  # leaves the other one an orphan, which falls to the init
            os.write(tell, b"%s\n" % os.readlink(b"self", dir_fd=machine_proc))
            if os.read(permit, 1):
                _redirect(os.open(os.devnull, os.O_RDONLY), output)
                _become(pidfd, command)
    for descriptor in (pidfd, output, machine_proc, tell, permit):
        os.close(descriptor)
    try:
        os.waitpid(helper, 0)
        process = _read_pid(report)
        os.write(allow, b"!")
        _read_outcome(report, f"cannot start {command[0]}")
    finally:
        os.close(allow)
        os.close(report)
    return process


def ip(batch: str, init: Process | None = None) -> None:
    """Have iproute2 do some lines of commands, in the network namespace of `init`."""
    run(["ip", "-batch", "-"], init, input=batch)


def run(
    command: Sequence[str],
    init: Process | None = None,
    input: str = "",  # noqa: A002
    timeout_s: float = 60,
) -> str:
    """Run one of the machine's programs and return its output.

    Args:
        command: what to run.
        init: whose network namespace to run it in, if not this one.
        input: what it reads.
        timeout_s: it is ended then.

    Raises:
        LabError: it failed, with what it said, or took too long.
    """
    if init:
        command = ["nsenter", f"--net=/proc/{init.pid}/ns/net", "--", *command]
    try:
        result = subprocess.run(
            command, input=input, capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise LabError(f"`{' '.join(command)}` took more than {timeout_s:.0f} s") from error
    if result.returncode:
        raise LabError(f"`{' '.join(command)}` failed: {result.stderr.strip()}")
    return result.stdout


def _pidfd(init: Process) -> int:
    pidfd = init.open()
    if pidfd is None:
        raise LabError("the host is not running; start it with: lab up")
    return pidfd


@contextmanager
def _child(tell: int) -> Iterator[None]:
    """Keep a forked child from running on into its parent's code; tell the parent why it failed."""
    try:
        yield
    except BaseException as error:  # noqa: BLE001
        os.write(tell, f"{error}\n".encode())
    os._exit(1)


def _become(pidfd: int, command: Sequence[str]) -> NoReturn:
    """Turn this process into `command` in the namespaces of the process behind `pidfd`."""
    here = os.getcwd()
    setns(pidfd, NAMESPACES & ~CLONE_NEWPID)  # leaves it at the root
    with suppress(OSError):
        os.chdir(here)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # which Python ignores, and exec would pass on
    os.execvp(command[0], list(command))


def _redirect(stdin: int, output: int | None = None) -> None:
    """Replace the standard streams, and keep every other one from being passed on."""
    for stream, descriptor in enumerate((stdin, output or stdin, output or stdin)):
        os.dup2(descriptor, stream)
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        if descriptor > 2:
            with suppress(OSError):  # the one that listdir() itself had open
                os.set_inheritable(descriptor, False)


def _read_pid(report: int) -> Process:
    """Read the number that a child reports first, or why it could not."""
    line = b""
    while not line.endswith(b"\n") and (byte := os.read(report, 1)):
        line += byte
    if not line.strip().isdigit():
        raise LabError(line.decode().strip() or "a child process ended without a word")
    return Process.of(int(line))


def _read_outcome(report: int, failure: str) -> None:
    """Wait until the child has become another program, which closes its end."""
    with open(report, closefd=False) as stream:
        if reason := stream.read().strip():
            raise LabError(f"{failure}: {reason}")
