"""One database: units of work, bounded in number, and wake-ups after commit.

A unit is a plain function of peewee calls. `write` runs it in a transaction (on SQLite together
with others that wait, sqlite_writer.py; on PostgreSQL in a thread and one of its own, READ
COMMITTED plus row locks), `read` in a read-only one. A unit may be run again (deadlock, a lost race
on a unique index), so it has no effect outside the database: what is to happen after the commit is
given to `after_commit`.
"""

from __future__ import annotations

import asyncio
import contextvars
import math
import random
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import peewee
import psycopg
import structlog

from mcloud_base import errors
from mcloud_controlplane.core import connections
from mcloud_controlplane.core.precedence import Precedence
from mcloud_controlplane.core.sqlite_writer import SqliteWriter
from mcloud_controlplane.core.unit import Unit
from mcloud_controlplane.core.wakeups import Gathering, Wakeups

log = structlog.get_logger()

T = TypeVar("T")

CHANNEL = "mcloud"  # of PostgreSQL's NOTIFY
_PAYLOAD_BYTES = 7000  # of one notice; PostgreSQL takes 8,000
_RETRIES = 5
_FULL_BYTES = 1 << 20
_POLL_S = 2.0  # the net under the wake-ups, at first
_LONGEST_POLL_S = 16.0
_CLOCK_S = 10.0  # how often the server is asked for the time

# When the rpc that is being served must have ended; monotonic seconds.
deadline: contextvars.ContextVar[float | None] = contextvars.ContextVar("deadline", default=None)


_unit: contextvars.ContextVar[Unit | None] = contextvars.ContextVar("unit", default=None)
_current: contextvars.ContextVar[Database | None] = contextvars.ContextVar("current", default=None)


def unit() -> Unit:
    """Return the unit that is running; there must be one."""
    current = _unit.get()
    assert current is not None, "outside of Database.write"
    return current


def now() -> int:
    """Return the time in microseconds since 1970, UTC: within a unit, of the database's clock."""
    store = _current.get()
    return time.time_ns() // 1000 if store is None else store.now()


def execute(sql: str, parameters: Sequence[object] = ()) -> Any:
    """Run a statement in the database whose unit is running, as Database.execute does."""
    store = _current.get()
    assert store is not None, "outside of a unit"
    return store.execute(sql, parameters)


def constant(sql: str) -> Any:
    """Return a value that stays the same while a process lives; it is read once. Within a unit."""
    store = _current.get()
    assert store is not None, "outside of a unit"
    if sql not in store.constants:
        ((store.constants[sql],),) = store.execute(sql).fetchall()
    return store.constants[sql]


class Database:
    """A service's database, and the threads that use it.

    Args:
        url: "sqlite:///absolute/path" or "postgresql://user@host:port/name".
        proxy: of the models; bound here.
        before_commit: writes the unit's changes as the transaction's last statements.
        readers: threads for reading; on PostgreSQL as many for writing.
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
        self.peewee = connections.open_(url)
        proxy.initialize(self.peewee)
        self._before_commit = before_commit
        name = Path(urlsplit(url).path).stem
        self._writers = ThreadPoolExecutor(readers, thread_name_prefix=f"{name}-write")
        self._readers = ThreadPoolExecutor(readers, thread_name_prefix=f"{name}-read")
        self._urgent = ThreadPoolExecutor(1, thread_name_prefix=f"{name}-urgent")
        self._sqlite_writers: dict[asyncio.AbstractEventLoop, SqliteWriter] = {}
        self._queue_limit = queue_limit
        self._queued = 0
        self._lock = threading.Lock()
        self._wakeups = Wakeups()
        self.constants: dict[str, Any] = {}  # by the statement that reads it
        # Called within a unit with the row of an operation that is about to be written, and what
        # its steps need not read; returns the row of the first step if this process goes on with
        # it (workflow.py).
        self.offer: Callable[[Any, dict[str, Any]], dict[str, Any] | None] = lambda row, known: None
        self.requests = Precedence()  # over the steps of what was accepted
        # Taken by reads that nobody waits for in person (watches), so that requests pass them.
        self.background_reads = asyncio.Semaphore(max(readers - 1, 1))
        self._closed = threading.Event()
        self._clock_start_us: int | None = None  # the server's time when this machine started
        self._follower = threading.Thread(target=self._follow, name=f"{name}-follow", daemon=True)
        if self.is_postgresql:
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
        unit = partial(function, *args, **kwargs)
        if self.is_postgresql:
            return await self._submit(self._writers, self.write_now, unit)
        return await self._write_sqlite(unit)

    async def write_long(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Run a unit that changes much, in a thread of its own. Raises as `write` does."""
        unit = partial(function, *args, **kwargs)
        return await self._submit(self._writers, self.write_now, unit)

    async def write_at_once(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Run a unit that other processes take this one for dead without, ahead of all others.

        Raises as `write` does.
        """
        unit = partial(function, *args, **kwargs)
        if self.is_postgresql:
            return await self._submit(self._urgent, self.write_now, unit)
        return await self._write_sqlite(unit, urgent=True)

    async def read(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Run a unit that only reads. Raises as `write` does."""
        return await self._submit(self._readers, self.read_now, partial(function, *args, **kwargs))

    async def read_few(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Run a unit that reads few rows, by keys. Raises as `write` does.

        Over SQLite at once, in this thread: nothing is waited for there, and to hand such a unit to
        another thread and back takes several times as long as it does.
        """
        if self.is_postgresql:
            return await self.read(function, *args, **kwargs)
        self._require_open()
        return self.read_now(function, *args, **kwargs)

    async def read_one(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Run a unit as `read_few` does, of one statement: it needs no transaction around it."""
        if self.is_postgresql:
            return await self.read(function, *args, **kwargs)
        self._require_open()
        return self._reading(self._read_statement, partial(function, *args, **kwargs))

    async def _write_sqlite(self, function: Callable[[], T], *, urgent: bool = False) -> T:
        self._require_room()
        writer = self._sqlite_writer()
        found: T = await writer.run(partial(self._run, function), deadline.get(), urgent=urgent)
        return found

    def _sqlite_writer(self) -> SqliteWriter:
        """Return the writer of the running loop."""
        loop = asyncio.get_running_loop()
        writer = self._sqlite_writers.get(loop)
        if writer is None:
            for ended in [each for each in self._sqlite_writers if each.is_closed()]:
                self._sqlite_writers.pop(ended).close()
            assert isinstance(self.peewee, peewee.SqliteDatabase)
            writer = self._sqlite_writers[loop] = SqliteWriter(
                self.peewee,
                before_commit=self._log_changes,
                committed=self._committed,
                refusal=self._unavailable,
                wake=self._wakeups.wake,
            )
        return writer

    async def _submit(
        self, pool: ThreadPoolExecutor, runner: Callable[..., T], function: Callable[..., T]
    ) -> T:
        context = contextvars.copy_context()
        end = deadline.get()

        def run() -> T:
            if end is not None and time.monotonic() > end:
                raise errors.DeadlineExceeded(
                    "DEADLINE_EXCEEDED", "the deadline passed while waiting for the database"
                )
            return context.run(runner, function)

        with self._lock:
            self._require_room()
            self._queued += 1
            # Within the lock, so that `close` comes before or after.
            future = pool.submit(run)
        future.add_done_callback(self._leave)
        # Cancelling drops a unit that still waits; one that has started is finished.
        return await asyncio.wrap_future(future)

    def _require_open(self) -> None:
        if self._closed.is_set():
            raise errors.Unavailable("DATABASE_UNAVAILABLE", "this process ends")

    def _require_room(self) -> None:
        self._require_open()
        if self.waiting >= self._queue_limit:
            raise errors.Exhausted(
                "DATABASE_BUSY",
                "too many requests wait for the database; try again in a second",
                details=(errors.retry_after(1),),
            )

    @property
    def waiting(self) -> int:
        """How many units wait or run."""
        return self._queued + sum(each.waiting for each in self._sqlite_writers.values())

    def _leave(self, _: Future[Any]) -> None:
        with self._lock:
            self._queued -= 1

    def write_now(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Run a writing unit in this thread."""
        begin = time.monotonic()
        for attempt in range(_RETRIES):
            current, begun = Unit(), False
            try:
                with connections.connected(self.peewee), self._transaction() as transaction:
                    begun = True
                    result = self._run(partial(function, *args, **kwargs), current)
                    if current.rollback:
                        transaction.rollback()
                        return result
                    self._log_changes(current)
            except (peewee.IntegrityError, peewee.OperationalError) as error:
                # A lost race: run again, and the unit finds what the winner wrote.
                waited_s = time.monotonic() - begin  # for a lock, of another program perhaps
                # Or the server was started anew since this thread used it.
                repeatable = connections.is_repeatable(error) or (self.is_postgresql and not begun)
                if attempt == _RETRIES - 1 or waited_s > connections.LOCK_S or not repeatable:
                    raise self._unavailable(error) from error
                time.sleep(random.uniform(0.002, 0.02) * (attempt + 1))  # noqa: S311
                continue
            for action in current.after_commit:
                action()
            self._committed(current)
            return result
        raise AssertionError("unreachable")

    def _run(self, function: Callable[[], T], current: Unit) -> T:
        """Run a unit within the transaction that this thread has begun."""
        token, token_of_store = _unit.set(current), _current.set(self)
        try:
            return function()
        finally:
            _unit.reset(token)
            _current.reset(token_of_store)

    def _log_changes(self, current: Unit) -> None:
        token = _current.set(self)
        try:
            self._before_commit(current)
        finally:
            _current.reset(token)

    def _committed(self, current: Unit) -> None:
        if current.changes:
            self._wakeups.wake(current.changed())

    def read_now(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Run a reading unit in this thread."""
        read = self._read_postgresql if self.is_postgresql else self._read_snapshot
        return self._reading(read, partial(function, *args, **kwargs))

    def _reading(self, read: Callable[[Callable[[], T]], T], function: Callable[[], T]) -> T:
        token = _current.set(self)
        try:
            return read(function)
        except peewee.OperationalError as error:
            raise self._unavailable(error) from error
        finally:
            _current.reset(token)

    def _read_snapshot(self, function: Callable[[], T]) -> T:
        with connections.Snapshot(self.peewee):
            return function()

    def _read_statement(self, function: Callable[[], T]) -> T:
        if self.peewee.is_closed():
            connections.open_here(self.peewee)
        return function()

    def _read_postgresql(self, function: Callable[[], T]) -> T:
        """Run a unit; once more if the server was started anew since this thread used it.

        Without a transaction: at READ COMMITTED each statement sees what is committed when it
        begins in any case, and a unit of one statement would take three round trips.
        """
        begin = time.monotonic()
        try:
            with connections.connected(self.peewee):
                return function()
        except peewee.OperationalError:
            if time.monotonic() - begin > connections.LOCK_S:
                raise
        with connections.connected(self.peewee):
            return function()

    def _unavailable(self, error: Exception) -> Exception:
        if isinstance(error, peewee.IntegrityError):
            return error  # not a race but a fault of ours
        cause = connections.cause_of(error)
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
        if not self.is_postgresql:
            self._sqlite_writer()  # which also looks for the commits of others
        with self._wakeups.listening(types, id_) as event:
            yield event

    @contextmanager
    def gathering(self, *types: str) -> Iterator[Gathering]:
        """Give what tells which changes were committed, in whatever process, as far as is known.

        Hints like those of `listening`.

        Args:
            types: of the resources whose changes matter; none: all.
        """
        if not self.is_postgresql:
            self._sqlite_writer()
        with self._wakeups.gathering(types) as gathered:
            yield gathered

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
        """Wake this process after commits of others over PostgreSQL, until closed."""
        while not self._closed.is_set():
            try:
                self._follow_postgresql()
            except (psycopg.Error, peewee.DatabaseError) as error:
                if not self._closed.wait(1):
                    log.warning("database follower restarts", error=str(error))

    def _follow_postgresql(self) -> None:
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(f"LISTEN {CHANNEL}")
            self._wakeups.wake()  # for what was not heard while there was no connection
            looked = -math.inf
            while not self._closed.is_set():
                if time.monotonic() - looked > _CLOCK_S:
                    self._read_clock(connection)
                    looked = time.monotonic()
                for notice in connection.notifies(timeout=0.5, stop_after=1):
                    pairs = (text.partition(":") for text in notice.payload.split(","))
                    self._wakeups.wake({(type_, id_) for type_, _, id_ in pairs})

    def _read_clock(self, connection: psycopg.Connection[Any]) -> None:
        begin = _uptime_us()
        row = connection.execute(
            "SELECT (EXTRACT(EPOCH FROM clock_timestamp()) * 1000000)::bigint"
        ).fetchone()
        assert row is not None
        self._clock_start_us = int(row[0]) - (begin + _uptime_us()) // 2

    def close(self) -> None:
        """Finish the units that run, drop those that wait, close every connection."""
        with self._lock:
            self._closed.set()
        for pool in (self._writers, self._readers, self._urgent):
            pool.shutdown(wait=True, cancel_futures=True)
        for writer in self._sqlite_writers.values():
            writer.close()
        if self.is_postgresql:
            self._follower.join(timeout=5)
        connections.close_all(self.peewee)


def _uptime_us() -> int:
    """Return microseconds since the machine started, suspended or not; never set back."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1000
