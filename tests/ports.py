"""Ports that nobody listens on, and that nobody else takes before they are used."""

from __future__ import annotations

import os
import socket
from itertools import count

# Below those that the kernel gives out by itself (from 32768 on), to connections too; each of the
# processes that run tests side by side begins at a part of its own.
_FIRST, _LAST = 10_000, 32_000
_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
_numbers = count((_LAST - _FIRST) * _WORKER // _WORKERS)


def free() -> int:
    """Return a port of this process's own."""
    while True:
        port = _FIRST + next(_numbers) % (_LAST - _FIRST)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
