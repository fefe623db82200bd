"""Everything that simulated hosts keep, in one SQLite file: identities, records, guests, volumes.

One thread has the connection. What was asked for while it worked is done in one transaction, so
that thousands of hosts cost little more than one.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import queue
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

from mcloud_base import errors

T = TypeVar("T")

_VERSION = 1
_MOST_AT_ONCE = 1000

Job = Callable[[sqlite3.Connection], object]


class StateFile:
    """The file under a directory; private, and used by one simulator at a time.

    Raises:
        WrongState: SIMULATOR_RUNNING; SIMULATOR_STATE_UNKNOWN, another release has written it.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = directory / "hosts.db"
        self._lock = _lock(directory / "lock")
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        try:
            _prepare(self._connection, path)
        except errors.WrongState:
            self._connection.close()
            os.close(self._lock)
            raise
        self._jobs: queue.SimpleQueue[tuple[Job, Future[object]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="state file", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Finish what was asked for."""
        self._jobs.put(None)
        self._thread.join()
        self._connection.close()
        os.close(self._lock)

    # --- objects: a body by (host, kind, id) ----------------------------------------------------

    def read(self, host: int, kind: str) -> dict[str, bytes]:
        """Return a host's objects of a kind, by id."""
        return self._now(lambda connection: _select(connection, host, kind))

    def hosts(self, kind: str) -> list[int]:
        """Return the hosts that have an object of a kind."""
        statement = "SELECT DISTINCT host FROM object WHERE kind = ? ORDER BY host"
        return self._now(
            lambda connection: [row[0] for row in connection.execute(statement, [kind])]
        )

    def count(self, kind: str) -> int:
        """Return how many objects of a kind all hosts have."""
        statement = "SELECT COUNT(*) FROM object WHERE kind = ?"
        return self._now(
            lambda connection: int(connection.execute(statement, [kind]).fetchone()[0])
        )

    def write_now(self, host: int, kind: str, id_: str, body: bytes) -> None:
        """Write an object; it is in the file when this returns."""
        self._now(lambda connection: _write(connection, host, kind, id_, body))

    async def write(self, host: int, kind: str, id_: str, body: bytes | None) -> None:
        """Write an object, or remove it; it is in the file when this returns."""
        future = self._submit(lambda connection: _write(connection, host, kind, id_, body))
        # A caller who is cancelled is kept, as with files: what comes next would overtake it.
        waiting = asyncio.ensure_future(asyncio.wrap_future(future))
        try:
            await asyncio.shield(waiting)
        except asyncio.CancelledError:
            await asyncio.wait({waiting})
            raise

    def remove(self, host: int, kind: str, id_: str) -> None:
        """Remove an object, soon."""
        self._submit(lambda connection: _write(connection, host, kind, id_, None))

    def forget(self, host: int) -> None:
        """Remove everything of a host."""
        statement = "DELETE FROM object WHERE host = ?"
        self._now(lambda connection: connection.execute(statement, [host]).rowcount)

    # --- the thread -----------------------------------------------------------------------------

    def _now(self, job: Callable[[sqlite3.Connection], T]) -> T:
        return self._submit(job).result()

    def _submit(self, job: Callable[[sqlite3.Connection], T]) -> Future[T]:
        future: Future[T] = Future()
        self._jobs.put((job, future))  # type: ignore[arg-type]
        return future

    def _work(self) -> None:
        ends = False
        while not ends:
            jobs = [self._jobs.get()]
            while len(jobs) < _MOST_AT_ONCE and not self._jobs.empty():
                jobs.append(self._jobs.get())
            ends = None in jobs
            self._do([job for job in jobs if job is not None])

    def _do(self, jobs: list[tuple[Job, Future[object]]]) -> None:
        """Do jobs in one transaction; if it fails, they have all failed."""
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            results = [job(self._connection) for job, _ in jobs]
            self._connection.execute("COMMIT")
        except Exception as error:  # the thread's outermost loop: who waits is told
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            failure = errors.Unavailable("SIMULATOR_STATE_FAILED", f"the state file: {error}")
            for _, future in jobs:
                future.set_exception(failure)
        else:
            for (_, future), result in zip(jobs, results, strict=True):
                future.set_result(result)


def _lock(path: Path) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise errors.WrongState(
            "SIMULATOR_RUNNING", f"another simulator holds {path}; end it first", path=path
        ) from error
    return descriptor


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version not in (0, _VERSION):
        raise errors.WrongState(
            "SIMULATOR_STATE_UNKNOWN",
            f"{path} is of another release ({version}, not {_VERSION}); remove its hosts with that",
            path=path,
        )
    connection.execute("PRAGMA journal_mode = WAL")
    # It survives the process; after a power failure the hosts are behind, as restored ones are.
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.execute(
        "CREATE TABLE IF NOT EXISTS object (host INTEGER NOT NULL, kind TEXT NOT NULL, "
        "id TEXT NOT NULL, body BLOB NOT NULL, PRIMARY KEY (host, kind, id)) WITHOUT ROWID"
    )
    connection.execute(f"PRAGMA user_version = {_VERSION}")


def _select(connection: sqlite3.Connection, host: int, kind: str) -> dict[str, bytes]:
    statement = "SELECT id, body FROM object WHERE host = ? AND kind = ?"
    return dict(connection.execute(statement, [host, kind]))


def _write(
    connection: sqlite3.Connection, host: int, kind: str, id_: str, body: bytes | None
) -> None:
    if body is None:
        statement = "DELETE FROM object WHERE host = ? AND kind = ? AND id = ?"
        connection.execute(statement, [host, kind, id_])
    else:
        statement = "INSERT OR REPLACE INTO object (host, kind, id, body) VALUES (?, ?, ?, ?)"
        connection.execute(statement, [host, kind, id_, body])
