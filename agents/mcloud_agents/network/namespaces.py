"""Network namespaces: named as iproute2 names them, entered by one thread at a time.

pyroute2's NetNS forks the process for each socket, which a process with gRPC's threads must not
do. A thread that moves itself needs no fork, and sockets and child processes that it makes
belong to the namespace.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pyroute2 import netns

DIRECTORY = Path("/run/netns")
_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


def _own() -> int:
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def list_names() -> list[str]:
    """Return the names of all namespaces, ours and others'."""
    return sorted(netns.listnetns())


def _is_mounted(path: Path) -> bool:
    """Tell whether a namespace hangs there: making one can be cut short after its file."""
    try:
        return path.stat().st_dev != path.parent.stat().st_dev
    except FileNotFoundError:
        return False


def ensure(name: str) -> bool:
    """Make a namespace; return False if it was there."""
    path = DIRECTORY / name
    if _is_mounted(path):
        return False
    path.unlink(missing_ok=True)
    with _thread_restored():
        if _libc.unshare(_CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"unshare for namespace {name}")
        netns.attach(name, "thread-self")
    return True


def identity(name: str) -> int:
    """Return what tells a namespace from a later one of the same name."""
    return (DIRECTORY / name).stat().st_ino


def remove(name: str) -> None:
    """Take the name away; the namespace ends with the last process in it."""
    try:
        netns.remove(name)
    except FileNotFoundError:
        return


@contextmanager
def entered(name: str) -> Iterator[None]:
    """Put the calling thread into the namespace for a while. Never the main thread."""
    target = os.open(DIRECTORY / name, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with _thread_restored():
            netns.setns(target)
            yield
    finally:
        os.close(target)


@contextmanager
def _thread_restored() -> Iterator[None]:
    assert threading.current_thread() is not threading.main_thread()
    own = _own()
    try:
        yield
    finally:
        netns.setns(own)
        os.close(own)


def set_sysctl(key: str, value: int) -> None:
    """Set a value under /proc/sys/net of the thread's namespace, unless it is set already."""
    path = Path("/proc/sys/net") / key
    if path.read_text().strip() != str(value):
        path.write_text(str(value))
