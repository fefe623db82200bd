"""Several processes of one daemon on the same ports; one that dies is there again at once.

The first process only imports, which is most of a start, then forks and waits. It has used neither
gRPC nor a database when it forks: neither survives that. Source:
https://github.com/grpc/grpc/blob/master/doc/fork_support.md.
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import structlog

from mcloud_base import endpoints, errors
from mcloud_controlplane.core.processes import Life

log = structlog.get_logger()

# The status of a worker that has said why no other one could do better; EX_CONFIG of sysexits.h.
_IN_VAIN = 78
_PR_SET_PDEATHSIG = 1
_QUICK_S = 5.0  # after a life that was shorter, the next worker waits
_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 5.0
_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGCHLD}


Work = Callable[[Life], None]


@dataclass(frozen=True)
class _Worker:
    life: Life
    start: float  # monotonic seconds


def run(count: int, work: Work, listens: Sequence[str]) -> None:
    """Keep `count` workers running until told to end; end when all of them have.

    Args:
        work: what each does, in a process of its own, until SIGTERM.
        listens: HOST:PORT, which the workers share.

    Raises:
        errors.Unavailable: PORT_IN_USE.
        SystemExit: no worker can do the work; one has said why.
    """
    for address in listens:
        _refuse_taken(address)
    gc.freeze()  # what is here now stays: workers share its memory, unwritten
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    workers: dict[int, _Worker] = {}  # by pid
    missing = [Life.first() for _ in range(count)]
    pause_s, due, status = 0.0, 0.0, 0
    stopping = False
    while workers or not stopping:
        while missing and not stopping and time.monotonic() >= due:
            life = missing.pop()
            workers[_fork(work, life)] = _Worker(life, time.monotonic())
        wait_s = due - time.monotonic() if missing and not stopping else 3600.0
        told = signal.sigtimedwait(_SIGNALS, max(wait_s, 0))
        end = told is not None and told.si_signo != signal.SIGCHLD
        for pid, code in _ended(workers):
            worker = workers.pop(pid)
            quick = time.monotonic() - worker.start < _QUICK_S
            if stopping:
                continue
            missing.append(worker.life.next())
            log.warning("worker ended", pid=pid, status=code)
            if code == _IN_VAIN:
                end, status = True, 1
            pause_s = min(max(pause_s * 2, _SHORTEST_PAUSE_S), _LONGEST_PAUSE_S) if quick else 0.0
            due = time.monotonic() + pause_s
        if end and not stopping:
            stopping = True
            for pid in workers:
                os.kill(pid, signal.SIGTERM)
    if status:
        raise SystemExit(status)


def _ended(workers: dict[int, _Worker]) -> list[tuple[int, int]]:
    """Return the pids and statuses of the workers that have ended; below 0: of which signal."""
    found = []
    with suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            if pid in workers:
                found.append((pid, os.waitstatus_to_exitcode(status)))
    return found


def _fork(work: Work, life: Life) -> int:
    """Start a worker; return its pid."""
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        # Without the first process nobody would start it again, or end it.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died meanwhile
            os._exit(status)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        work(life)
        status = 0
    except (errors.InvalidArgument, errors.WrongState) as error:
        print(f"Error: {error}", file=sys.stderr)
        status = _IN_VAIN
    except errors.Error as error:
        print(f"Error: {error}", file=sys.stderr)
    except BaseException:  # the outermost frame of the process
        log.exception("worker failed")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # what the first process is to do at its end is not this one's
    return 0  # not reached


def _refuse_taken(address: str) -> None:
    """Find another daemon on a port: the workers could not, since they share it."""
    host, port = endpoints.divide(address)
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise errors.Unavailable(
                "PORT_IN_USE", f"cannot listen on {address}; is mcloud running already?"
            ) from error
