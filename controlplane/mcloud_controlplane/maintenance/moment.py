"""All databases at one moment, while they are written to.

A workflow writes into several databases, one after the other, and what it has done in one it takes
for granted in the next: their copies must not be of different times. So for some milliseconds no
unit may commit in any of them, and within that time a reading transaction is begun in each. SQLite
has one writer: being it keeps everybody out. On PostgreSQL every unit that changes something for
others to see locks the revision's row last (tables.log_changes): whoever holds that row in each
database has before the moment all of a unit, or nothing. What is not logged there, such as leases
and heartbeats, means nothing to another database.

No unit works in two databases, so waiting for them one after the other cannot deadlock.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from typing import Any

import psycopg

from mcloud_base import errors
from mcloud_controlplane.core import migrations
from mcloud_controlplane.maintenance import databases
from mcloud_controlplane.settings import Settings

_WAIT_S = 30

Connection = sqlite3.Connection | psycopg.Connection[Any]


@contextmanager
def frozen(settings: Settings, during: Callable[[], None]) -> Iterator[Mapping[str, Connection]]:
    """Give connections that all see the databases as they were at one moment.

    Args:
        during: called at that moment, while nothing is committed; it is to be quick.

    Raises:
        errors.WrongState: DATABASE_MISSING.
        errors.Unavailable: DATABASE_UNAVAILABLE.
    """
    open_ = _open_sqlite if databases.is_sqlite(settings) else _open_postgresql
    with ExitStack() as readers:
        found: dict[str, Connection] = {}
        try:
            with ExitStack() as holders:
                for name in migrations.DATABASES:
                    holder = holders.enter_context(closing(open_(settings, name)))
                    _hold(holder)
                for name in migrations.DATABASES:
                    found[name] = readers.enter_context(closing(open_(settings, name)))
                    _begin_reading(found[name])
                during()
        except (sqlite3.OperationalError, psycopg.OperationalError) as error:
            raise errors.Unavailable(
                "DATABASE_UNAVAILABLE", f"a database does not answer: {error}"
            ) from error
        yield found


def _open_sqlite(settings: Settings, name: str) -> sqlite3.Connection:
    path = databases.file(settings, name)
    if not path.exists():
        raise errors.WrongState("DATABASE_MISSING", f"there is no {path}; is state_dir right?")
    return sqlite3.connect(path, timeout=_WAIT_S, isolation_level=None)


def _open_postgresql(settings: Settings, name: str) -> psycopg.Connection[Any]:
    return psycopg.connect(settings.database_url(name), autocommit=True)


def _hold(connection: Connection) -> None:
    """Keep units from committing until the connection is closed."""
    if isinstance(connection, sqlite3.Connection):
        connection.execute("BEGIN IMMEDIATE")
        return
    connection.execute("BEGIN")
    connection.execute(f"SET LOCAL lock_timeout = '{_WAIT_S}s'".encode())
    try:
        connection.execute("SELECT 1 FROM deployment FOR UPDATE")
    except psycopg.errors.UndefinedTable as error:
        raise errors.WrongState(
            "DATABASE_MISSING", "there are no tables; has the daemon ever been started?"
        ) from error


def _begin_reading(connection: Connection) -> None:
    if isinstance(connection, sqlite3.Connection):
        connection.execute("BEGIN")
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    else:
        connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
        connection.execute("SELECT 1")  # only now it sees a moment
