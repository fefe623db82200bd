"""Everything that simulated hosts keep, in one SQLite file: identities, records, guests, volumes.

It is written where it is asked for, in the event loop: what is not waited for on a disk takes less
time than to hand it to a thread.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
from pathlib import Path

from mcloud_base import errors

_VERSION = 2


class StateFile:
    """The file under a directory; private, and used by one simulator at a time.

    Each change is in the file, whole, when its method returns.

    Raises:
        WrongState: SIMULATOR_RUNNING; SIMULATOR_STATE_UNKNOWN, another release has written it.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = directory / "hosts.db"
        self._lock = _lock(directory / "lock")
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        # An epoch or a certificate is written in another thread: SQLite keeps them apart.
        self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        try:
            _prepare(self._connection, path)
        except errors.WrongState:
            self.close()
            raise

    def close(self) -> None:
        """Let another simulator use it."""
        self._connection.close()
        os.close(self._lock)

    # --- objects: a body by (host, kind, id) ----------------------------------------------------

    def read(self, host: int, kind: str) -> dict[str, bytes]:
        """Return a host's objects of a kind, by id."""
        statement = "SELECT id, body FROM object WHERE host = ? AND kind = ?"
        return dict(self._connection.execute(statement, [host, kind]))

    def hosts(self, kind: str) -> list[int]:
        """Return the hosts that have an object of a kind."""
        statement = "SELECT DISTINCT host FROM object WHERE kind = ? ORDER BY host"
        return [row[0] for row in self._connection.execute(statement, [kind])]

    def count(self, kind: str) -> int:
        """Return how many objects of a kind all hosts have."""
        statement = "SELECT COUNT(*) FROM object WHERE kind = ?"
        return int(self._connection.execute(statement, [kind]).fetchone()[0])

    def write(self, host: int, kind: str, id_: str, body: bytes) -> None:
        """Write an object.

        Raises:
            Unavailable: SIMULATOR_STATE_FAILED.
        """
        statement = "INSERT OR REPLACE INTO object (host, kind, id, body) VALUES (?, ?, ?, ?)"
        self._change(statement, host, kind, id_, body)

    def remove(self, host: int, kind: str, id_: str) -> None:
        """Remove an object.

        Raises:
            Unavailable: SIMULATOR_STATE_FAILED.
        """
        self._change("DELETE FROM object WHERE host = ? AND kind = ? AND id = ?", host, kind, id_)

    def forget(self, host: int) -> None:
        """Remove everything of a host.

        Raises:
            Unavailable: SIMULATOR_STATE_FAILED.
        """
        self._change("DELETE FROM object WHERE host = ?", host)

    def _change(self, statement: str, *values: int | str | bytes) -> None:
        try:
            self._connection.execute(statement, values)
        except sqlite3.Error as error:
            raise errors.Unavailable(
                "SIMULATOR_STATE_FAILED", f"the state file: {error}"
            ) from error


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
    # Nobody else opens it: no locks are taken for each change.
    connection.execute("PRAGMA locking_mode = EXCLUSIVE")
    connection.execute("PRAGMA journal_mode = WAL")
    # It survives the process; after a power failure the hosts are behind, as restored ones are.
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.execute(
        "CREATE TABLE IF NOT EXISTS object (host INTEGER NOT NULL, kind TEXT NOT NULL, "
        "id TEXT NOT NULL, body BLOB NOT NULL, PRIMARY KEY (host, kind, id)) WITHOUT ROWID"
    )
    connection.execute(f"PRAGMA user_version = {_VERSION}")
