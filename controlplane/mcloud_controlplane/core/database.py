"""One database: units of work in bounded threads, one transaction each, and wake-ups after commit.

A unit is a plain function of peewee calls. `write` runs it in one transaction (BEGIN IMMEDIATE on
SQLite, READ COMMITTED plus row locks on PostgreSQL), `read` in a read-only one. A unit may be run
again (deadlock, a lost race on a unique index), so it has no effect outside the database: what is
to happen after the commit is given to `after_commit`.
"""

from __future__ import annotations

import asyncio
import contextvars
import math
import random
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import peewee
import psycopg
import structlog

from mcloud_base import errors
from mcloud_controlplane.core import statements

log = structlog.get_logger()

T = TypeVar("T")

CHANNEL = "mcloud"  # of PostgreSQL's NOTIFY
_PAYLOAD_BYTES = 7000  # of one notice; PostgreSQL takes 8,000
_RETRIES = 5
_LOCK_S = 5.0  # for which SQLite waits for a file that another program has locked
_FULL_BYTES = 1 << 20
_POLL_S = 2.0  # the net under the wake-ups, at first
_LONGEST_POLL_S = 16.0
_TICK_NS = 50_000_000  # of the clock of files; it is at most 10 ms
_CLOCK_S = 10.0  # how often the server is asked for the time

# When the rpc that is being served must have ended; monotonic seconds.
deadline: contextvars.ContextVar[float | None] = contextvars.ContextVar("deadline", default=None)


@dataclass
class Unit:
    """What a running unit of work has gathered for the end of its transaction."""

    changes: list[tuple[str, str, str, str]] = field(default_factory=list)
    after_commit: list[Callable[[], None]] = field(default_factory=list)
    rollback: bool = False


@dataclass(frozen=True)
class _Listener:
    loop: asyncio.AbstractEventLoop
    event: asyncio.Event
    types: frozenset[str]  # empty: all
    id: str  # empty: all

    def wants(self, changes: Collection[tuple[str, str]]) -> bool:
        """Tell whether any of the changes, (type, id), matters; an empty id may be any."""
        if not self.id:
            return not self.types or any(type_ in self.types for type_, _ in changes)
        return any((type_, id_) in changes for type_ in self.types for id_ in (self.id, ""))


_unit: contextvars.ContextVar[Unit | None] = contextvars.ContextVar("unit", default=None)
_current: contextvars.ContextVar[Database | None] = contextvars.ContextVar("current", default=None)


def unit() -> Unit:
    """Return the unit that is running; there must be one."""
    current = _unit.get()
    assert current is not None, "outside of Database.write"
    return current


def changed_resources(current: Unit) -> set[tuple[str, str]]:
    """Return the resources that a unit has changed: (type, id)."""
    return {(type_, id_) for type_, id_, *_ in current.changes}


def now() -> int:
    """Return the time in microseconds since 1970, UTC: within a unit, of the database's clock."""
    store = _current.get()
    return time.time_ns() // 1000 if store is None else store.now()


def execute(sql: str, parameters: Sequence[object] = ()) -> Any:
    """Run a statement in the database whose unit is running, as Database.execute does."""
    store = _current.get()
    assert store is not None, "outside of a unit"
    return store.execute(sql, parameters)


class Database:
    """A service's database, and the threads that use it.

    Args:
        url: "sqlite:///absolute/path" or "postgresql://user@host:port/name".
        proxy: of the models; bound here.
        before_commit: writes the unit's changes as the transaction's last statements.
        readers: threads for reading; writing has one on SQLite, as many on PostgreSQL.
        queue_limit: units that may wait; more are refused.
    """

    def __init__(
        self,
        url: str,
        proxy: peewee.DatabaseProxy,
        *,
        before_commit: Callable[[Unit], None],
        readers: int = 3,
        queue_limit: int = 2000,
    ) -> None:
        self.url = url
        self.is_postgresql = urlsplit(url).scheme.startswith("postgres")
        self.peewee = _open(url)
        proxy.initialize(self.peewee)
        self._before_commit = before_commit
        name = Path(urlsplit(url).path).stem
        writers = readers if self.is_postgresql else 1
        self._writers = ThreadPoolExecutor(writers, thread_name_prefix=f"{name}-write")
        self._readers = ThreadPoolExecutor(readers, thread_name_prefix=f"{name}-read")
        # SQLite has one writer, whose turns are short.
        self._urgent = (
            ThreadPoolExecutor(1, thread_name_prefix=f"{name}-urgent")
            if self.is_postgresql
            else self._writers
        )
        self._queue_limit = queue_limit
        self._queued = 0
        self._lock = threading.Lock()
        self._listeners: set[_Listener] = set()
        # Called within a unit with the row of an operation that is about to be written; returns the
        # row of its first step if this process goes on with it (workflow.py).
        self.offer: Callable[[Any], dict[str, Any] | None] = lambda row: None
        # Taken by reads that nobody waits for in person (watches), so that requests pass them.
        self.background_reads = asyncio.Semaphore(max(readers - 1, 1))
        self._closed = threading.Event()
        self._clock_start_us: int | None = None  # the server's time when this machine started
        self._follower = threading.Thread(target=self._follow, name=f"{name}-follow", daemon=True)
        self._follower.start()

    def now(self) -> int:
        """Return the time in microseconds since 1970 by the clock that all processes share.

        That of PostgreSQL's server, or, for a file, of the machine. Leases are compared by it.
        """
        if self._clock_start_us is None:
            return time.time_ns() // 1000
        return self._clock_start_us + _uptime_us()

    # -- running units -----------------------------------------------------------------------

    async def write(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Run a unit that changes things, in one transaction.

        Raises:
            errors.Exhausted: DATABASE_BUSY, too many units wait.
            errors.DeadlineExceeded: DEADLINE_EXCEEDED, the caller's deadline passed while waiting.
            errors.Unavailable: DATABASE_UNAVAILABLE.
        """
        return await self._submit(self._writers, self.write_now, function, *args, **kwargs)

    async def write_at_once(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Run a unit that other processes take this one for dead without, ahead of all others.

        Raises as `write` does.
        """
        return await self._submit(self._urgent, self.write_now, function, *args, **kwargs)

    async def read(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Run a unit that only reads. Raises as `write` does."""
        return await self._submit(self._readers, self.read_now, function, *args, **kwargs)

    async def read_few(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Run a unit that reads few rows, by keys. Raises as `write` does.

        Over SQLite at once, in this thread: nothing is waited for there, and to hand such a unit to
        another thread and back takes several times as long as it does.
        """
        if self.is_postgresql:
            return await self.read(function, *args, **kwargs)
        if self._closed.is_set():
            raise errors.Unavailable("DATABASE_UNAVAILABLE", "this process ends")
        return self.read_now(function, *args, **kwargs)

    async def _submit(
        self, pool: ThreadPoolExecutor, runner: Callable[..., T], *args: Any, **kwargs: Any
    ) -> T:
        context = contextvars.copy_context()
        end = deadline.get()

        def run() -> T:
            if end is not None and time.monotonic() > end:
                raise errors.DeadlineExceeded(
                    "DEADLINE_EXCEEDED", "the deadline passed while waiting for the database"
                )
            return context.run(runner, *args, **kwargs)

        with self._lock:
            if self._closed.is_set():
                raise errors.Unavailable("DATABASE_UNAVAILABLE", "this process ends")
            if self._queued >= self._queue_limit:
                raise errors.Exhausted(
                    "DATABASE_BUSY",
                    "too many requests wait for the database; try again in a second",
                    details=(errors.retry_after(1),),
                )
            self._queued += 1
            # Within the lock, so that `close` comes before or after.
            future = pool.submit(run)
        future.add_done_callback(self._leave)
        # Cancelling drops a unit that still waits; one that has started is finished.
        return await asyncio.wrap_future(future)

    @property
    def waiting(self) -> int:
        """How many units wait or run."""
        return self._queued

    def _leave(self, _: Future[Any]) -> None:
        with self._lock:
            self._queued -= 1

    def write_now(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Run a writing unit in this thread."""
        begin = time.monotonic()
        for attempt in range(_RETRIES):
            current, begun = Unit(), False
            token, token_of_store = _unit.set(current), _current.set(self)
            try:
                with _connected(self.peewee), self._transaction() as transaction:
                    begun = True
                    result = function(*args, **kwargs)
                    if current.rollback:
                        transaction.rollback()
                        return result
                    self._before_commit(current)
            except (peewee.IntegrityError, peewee.OperationalError) as error:
                # A lost race: run again, and the unit finds what the winner wrote.
                waited_s = time.monotonic() - begin  # for a lock, of another program perhaps
                # Or the server was started anew since this thread used it.
                repeatable = _repeatable(error) or (self.is_postgresql and not begun)
                if attempt == _RETRIES - 1 or waited_s > _LOCK_S or not repeatable:
                    raise self._unavailable(error) from error
                time.sleep(random.uniform(0.002, 0.02) * (attempt + 1))  # noqa: S311
                continue
            finally:
                _unit.reset(token)
                _current.reset(token_of_store)
            for action in current.after_commit:
                action()
            if current.changes:
                self._wake(changed_resources(current))
            return result
        raise AssertionError("unreachable")

    def read_now(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Run a reading unit in this thread.

        On PostgreSQL without a transaction: at READ COMMITTED each statement sees what is committed
        when it begins in any case, and a unit of one statement would take three round trips.
        """
        token, begin = _current.set(self), time.monotonic()
        try:
            for attempt in range(2):
                try:
                    with _connected(self.peewee), self._snapshot():
                        return function(*args, **kwargs)
                except peewee.OperationalError as error:
                    # The server may have been started anew since this thread used it.
                    late = attempt or time.monotonic() - begin > _LOCK_S
                    if late or not self.is_postgresql:
                        raise self._unavailable(error) from error
        finally:
            _current.reset(token)
        raise AssertionError("unreachable")

    def _unavailable(self, error: Exception) -> Exception:
        if isinstance(error, peewee.IntegrityError):
            return error  # not a race but a fault of ours
        cause = _cause(error)
        log.warning("database does not do its work", error=cause)
        if self._is_full(cause):
            return errors.Unavailable(
                "DATABASE_FULL",
                "the database's disk is full; the operator has to make room",
                details=(errors.retry_after(5),),
            )
        return errors.Unavailable(
            "DATABASE_UNAVAILABLE",
            "the database does not answer; try again in a moment",
            details=(errors.retry_after(1),),
        )

    def _is_full(self, text: str) -> bool:
        """Tell whether there is no room: SQLite says so of its file, not of what is beside it."""
        if "disk is full" in text or "No space left" in text:
            return True
        if self.is_postgresql or "disk I/O error" not in text:
            return False
        return shutil.disk_usage(Path(urlsplit(self.url).path).parent).free < _FULL_BYTES

    def _snapshot(self) -> Any:
        return nullcontext() if self.is_postgresql else self.peewee.atomic()

    def _transaction(self) -> Any:
        return (
            self.peewee.transaction()
            if self.is_postgresql
            else self.peewee.transaction("IMMEDIATE")
        )

    def locked(self, query: Any) -> Any:
        """Return a select that locks its rows; SQLite's transaction has locked them already."""
        return query.for_update() if self.is_postgresql else query

    # -- wake-ups ------------------------------------------------------------------------------

    @contextmanager
    def listening(self, *types: str, id_: str = "") -> Iterator[asyncio.Event]:
        """Give an event that is set after commits that logged a change, in whatever process.

        Wake-ups are hints: whoever waits on it waits with a timeout and looks for itself.

        Args:
            types: of the resources whose changes matter; none: all. A commit of another process
                may wake for others, too.
            id_: of the one resource, of one of the types, whose changes matter.
        """
        entry = _Listener(asyncio.get_running_loop(), asyncio.Event(), frozenset(types), id_)
        self._listeners.add(entry)
        try:
            yield entry.event
        finally:
            self._listeners.discard(entry)

    async def until(
        self,
        function: Callable[..., T | None],
        *args: Any,
        timeout_s: float,
        types: Collection[str] = (),
        id_: str = "",
    ) -> T:
        """Read again after each change until the unit returns something other than None.

        Args:
            function: a unit as `read_few` takes it.
            types: as `listening` takes them, and `id_`.

        Raises:
            TimeoutError: it did not in time.
        """
        pause = _POLL_S
        with self.listening(*types, id_=id_) as event:
            async with asyncio.timeout(timeout_s):
                while True:
                    event.clear()
                    found = await self.read_few(function, *args)
                    if found is not None:
                        return found
                    try:
                        async with asyncio.timeout(pause):
                            await event.wait()
                    except TimeoutError:
                        # What takes long is looked at less and less: there may be many of its kind.
                        pause = min(pause * 2, _LONGEST_POLL_S)

    def _wake(self, changes: Collection[tuple[str, str]] = ()) -> None:
        """Wake who listens for these changes, (type, id); none: everybody."""
        for listener in tuple(self._listeners):
            if changes and not listener.wants(changes):
                continue
            if not listener.loop.is_closed():
                listener.loop.call_soon_threadsafe(listener.event.set)

    def notice(self, changes: Collection[tuple[str, str]]) -> str | None:
        """Return what other processes are to be told on `CHANNEL`, as part of the transaction.

        None: SQLite's followers see the commit by themselves.
        """
        if not self.is_postgresql:
            return None
        text = ",".join(f"{type_}:{id_}" for type_, id_ in sorted(changes))
        if len(text) > _PAYLOAD_BYTES:
            text = ",".join(f"{type_}:" for type_ in sorted({type_ for type_, _ in changes}))
        return text

    def execute(self, sql: str, parameters: Sequence[object] = ()) -> Any:
        """Run one statement of SQL that peewee has no words for; return the cursor. Within a unit.

        Args:
            sql: with "?" where a parameter goes.
        """
        if self.is_postgresql:
            sql = sql.replace("?", "%s")
        return self.peewee.execute_sql(sql, parameters or None)  # type: ignore[no-untyped-call]

    def _follow(self) -> None:
        """Wake this process after commits of others, until closed."""
        while not self._closed.is_set():
            try:
                if self.is_postgresql:
                    self._follow_postgresql()
                else:
                    self._follow_sqlite()
            except (psycopg.Error, peewee.DatabaseError) as error:
                if not self._closed.wait(1):
                    log.warning("database follower restarts", error=str(error))

    def _follow_postgresql(self) -> None:
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(f"LISTEN {CHANNEL}")
            self._wake()  # for what was not heard while there was no connection
            looked = -math.inf
            while not self._closed.is_set():
                if time.monotonic() - looked > _CLOCK_S:
                    self._read_clock(connection)
                    looked = time.monotonic()
                for notice in connection.notifies(timeout=0.5, stop_after=1):
                    pairs = (text.partition(":") for text in notice.payload.split(","))
                    self._wake({(type_, id_) for type_, _, id_ in pairs})

    def _read_clock(self, connection: psycopg.Connection[Any]) -> None:
        begin = _uptime_us()
        row = connection.execute(
            "SELECT (EXTRACT(EPOCH FROM clock_timestamp()) * 1000000)::bigint"
        ).fetchone()
        assert row is not None
        self._clock_start_us = int(row[0]) - (begin + _uptime_us()) // 2

    def _follow_sqlite(self) -> None:
        """See the commits of other processes.

        A connection is not told of its own: so the one is asked that all of this process's
        commits go through. Source: https://www.sqlite.org/pragma.html#pragma_data_version.
        Asking takes a turn of the writers'; a commit writes to the log beside the file, so nothing
        is asked while that has not been written to.
        """
        seen = asked = None
        log_file = Path(urlsplit(self.url).path + "-wal")
        while not self._closed.wait(0.05):
            written = _written(log_file)
            if written is not None and written == asked:
                continue
            # What is written within the same tick of the clock has the same time.
            settled = written is not None and time.time_ns() - written[0] > _TICK_NS
            asked = written if settled else None
            try:
                version = self._writers.submit(self._data_version).result()
            except (CancelledError, RuntimeError):
                return  # it closes
            if seen is not None and version != seen:
                self._wake()
            seen = version

    def _data_version(self) -> int:
        with _connected(self.peewee):
            cursor: Any = self.peewee.execute_sql("PRAGMA data_version")  # type: ignore[no-untyped-call]
            return int(cursor.fetchone()[0])

    def close(self) -> None:
        """Finish the units that run, drop those that wait, close every connection."""
        with self._lock:
            self._closed.set()
        for pool in (self._writers, self._readers, self._urgent):
            pool.shutdown(wait=True, cancel_futures=True)
        self._follower.join(timeout=5)
        _close_all(self.peewee)


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


def _open(url: str) -> peewee.Database:
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
                "busy_timeout": int(_LOCK_S * 1000),
                "cache_size": -16_000,
            },
            check_same_thread=False,
        )
    return _Postgresql(url, prefer_psycopg3=True, isolation_level=None)


def _uptime_us() -> int:
    """Return microseconds since the machine started, suspended or not; never set back."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1000


def _written(path: Path) -> tuple[int, int] | None:
    """Return when a file was written to last, and its size."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


_connections: dict[int, list[Any]] = {}


@contextmanager
def _connected(database: peewee.Database) -> Iterator[None]:
    """Have this thread's connection open; it stays open, unless it broke."""
    if database.is_closed():
        database.connect(reuse_if_open=True)
        _connections.setdefault(id(database), []).append(database.connection())  # type: ignore[no-untyped-call]
    try:
        yield
    except peewee.OperationalError:
        if isinstance(database, peewee.PostgresqlDatabase):
            database.close()  # it may be the server that went away: connect anew next time
        raise


def _close_all(database: peewee.Database) -> None:
    for connection in _connections.pop(id(database), []):
        connection.close()


def _repeatable(error: Exception) -> bool:
    text = str(error).lower()
    return isinstance(error, peewee.IntegrityError) or any(
        word in text for word in ("deadlock", "serialize", "locked", "busy")
    )


def _cause(error: BaseException) -> str:
    """Return what was said first: SQLite ends a transaction itself, and a rollback then fails."""
    kinds = (peewee.PeeweeException, sqlite3.Error, psycopg.Error)
    while isinstance(error.__context__, kinds):
        error = error.__context__
    return str(error).strip()
