"""Connections to a database: one a thread, opened when first used; what their errors mean."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import peewee
import psycopg

from mcloud_controlplane.core import statements

LOCK_S = 5.0  # for which SQLite waits for a file that another program has locked


class _QuickText:
    """Runs queries by texts that are made once (statements.py)."""

    def execute(self, query: Any, **options: Any) -> Any:
        made = None if options else statements.made(self, query)
        if made is None:
            return super().execute(query, **options)  # type: ignore[misc]
        return self.execute_sql(*made)  # type: ignore[attr-defined]


class _Sqlite(_QuickText, peewee.SqliteDatabase):
    """SQLite."""


class _Postgresql(_QuickText, peewee.PostgresqlDatabase):
    """PostgreSQL."""


def open_(url: str) -> peewee.Database:
    """Make a database of "sqlite:///absolute/path" or of "postgresql://user@host:port/name"."""
    statements.remember_columns()
    parts = urlsplit(url)
    if parts.scheme == "sqlite":
        path = Path(parts.path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(0o600)
        path.chmod(0o600)  # it has user data and signing keys; SQLite's other files follow it
        return _Sqlite(
            parts.path,
            pragmas={
                "journal_mode": "wal",
                "synchronous": "full",  # a commit that was answered survives power loss
                "foreign_keys": 1,
                "busy_timeout": int(LOCK_S * 1000),
                "cache_size": -16_000,
            },
            check_same_thread=False,
        )
    return _Postgresql(url, prefer_psycopg3=True, isolation_level=None)


_connections: dict[int, list[Any]] = {}


def open_here(database: peewee.Database) -> None:
    """Open this thread's connection."""
    database.connect(reuse_if_open=True)
    _connections.setdefault(id(database), []).append(database.connection())  # type: ignore[no-untyped-call]


@contextmanager
def connected(database: peewee.Database) -> Iterator[None]:
    """Have this thread's connection open; it stays open, unless it broke."""
    if database.is_closed():
        open_here(database)
    try:
        yield
    except peewee.OperationalError:
        if isinstance(database, peewee.PostgresqlDatabase):
            database.close()  # it may be the server that went away: connect anew next time
        raise


def another(database: peewee.SqliteDatabase) -> sqlite3.Connection:
    """Open one more connection, for `used`."""
    opened: Any = database
    connection: sqlite3.Connection = opened._connect()
    return connection


@contextmanager
def used(database: peewee.SqliteDatabase, connection: sqlite3.Connection) -> Iterator[None]:
    """Have this thread use a connection that has begun a transaction instead of its own."""
    opened: Any = database
    state = opened._state
    own = state.closed, state.conn, state.transactions
    # With a transaction there, `atomic` within it is a savepoint.
    state.closed, state.conn, state.transactions = False, connection, [connection]
    try:
        yield
    finally:
        state.closed, state.conn, state.transactions = own


class Snapshot:
    """Has what this thread reads from SQLite within the block be of one moment.

    Every read is in one, and a generator would take it several times as long.
    """

    __slots__ = ("_begun", "_connection", "_database")

    def __init__(self, database: peewee.Database) -> None:
        self._database = database

    def __enter__(self) -> None:
        if self._database.is_closed():
            open_here(self._database)
        connection: sqlite3.Connection = self._database.connection()  # type: ignore[no-untyped-call]
        self._connection = connection
        self._begun = not connection.in_transaction  # else it is of a unit around this one
        if self._begun:
            connection.execute("BEGIN")

    def __exit__(self, *_: object) -> None:
        if self._begun:
            self._connection.execute("ROLLBACK")  # nothing was written


def close_all(database: peewee.Database) -> None:
    """Close the connections of all threads."""
    for connection in _connections.pop(id(database), []):
        connection.close()


def is_repeatable(error: Exception) -> bool:
    """Tell whether what failed for it may succeed if it is done again."""
    text = str(error).lower()
    return isinstance(error, peewee.IntegrityError) or any(
        word in text for word in ("deadlock", "serialize", "locked", "busy")
    )


def cause_of(error: BaseException) -> str:
    """Return what was said first: SQLite ends a transaction itself, and a rollback then fails."""
    kinds = (peewee.PeeweeException, sqlite3.Error, psycopg.Error)
    while isinstance(error.__context__, kinds):
        error = error.__context__
    return str(error).strip()
