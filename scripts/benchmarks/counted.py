"""mcloud-controlplane, with its SQL statements counted where they go to the driver.

    python -m benchmarks.counted SOCKET [options of mcloud-controlplane]

Whoever connects to the socket is told how often each statement was run, as JSON. Counting costs
less than a microsecond a statement. `PRAGMA` is left out: a file is looked at every 50 ms, whatever
goes on.
"""

from __future__ import annotations

import json
import socket
import sqlite3
import sys
import threading
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import psycopg


class Counts:
    """How often each statement has been run. Any thread may count."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def add(self, statement: Any) -> None:
        """Count one."""
        text = statement.decode() if isinstance(statement, bytes) else str(statement)
        if not text.startswith("PRAGMA"):
            with self._lock:
                self._counts[text] += 1

    def serve(self, path: Path) -> None:
        """Tell whoever connects, for ever."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen()
            while True:
                connection, _ = listener.accept()
                with self._lock:
                    answer = json.dumps(self._counts)
                with connection:
                    connection.sendall(answer.encode())


def count_statements(counts: Counts) -> None:
    """Have both drivers count from now on."""

    class SqliteCursor(sqlite3.Cursor):
        def execute(self, sql: str, *arguments: Any) -> SqliteCursor:
            counts.add(sql)
            return super().execute(sql, *arguments)

        def executemany(self, sql: str, *arguments: Any) -> SqliteCursor:
            counts.add(sql)
            return super().executemany(sql, *arguments)

    class SqliteConnection(sqlite3.Connection):
        def cursor(self, factory: Any = SqliteCursor) -> Any:
            return super().cursor(factory)

    class PostgresqlCursor(psycopg.Cursor[Any]):
        def execute(self, query: Any, *arguments: Any, **options: Any) -> Any:
            counts.add(query)
            return super().execute(query, *arguments, **options)

        def executemany(self, query: Any, *arguments: Any, **options: Any) -> Any:
            counts.add(query)
            return super().executemany(query, *arguments, **options)

    sqlite3.connect = partial(sqlite3.connect, factory=SqliteConnection)  # type: ignore[assignment]
    psycopg.connect = partial(psycopg.connect, cursor_factory=PostgresqlCursor)  # type: ignore


def main() -> None:
    """Count, and run the program."""
    counts, path = Counts(), Path(sys.argv.pop(1))
    count_statements(counts)
    threading.Thread(target=counts.serve, args=(path,), daemon=True).start()
    from mcloud_controlplane.__main__ import main as run

    run()


if __name__ == "__main__":
    main()
