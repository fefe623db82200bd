"""The writer of an SQLite file: units that wait run together, in one transaction.

A file has one writer at a time, and Python runs in one thread at a time. To hand each unit to a
thread and back took longer than most of them run, and a commit for each waited for the disk each
time. So the units run in the event loop's thread, one after the other, and what they wrote is
committed together. The commit waits for the disk. Where that takes less than to hand it to a thread
would, the loop does it, else a thread; what comes meanwhile is the next transaction.
"""

from __future__ import annotations

import asyncio
import contextvars
import math
import os
import random
import sqlite3
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peewee

from mcloud_base import errors
from mcloud_controlplane.core import connections
from mcloud_controlplane.core.unit import Unit

_MOST_S = 0.01  # for which units of one transaction run before others of the loop have a turn
# Between two transactions, so that the next has more units: what these have in common costs as
# much as one of them. Only for as long as that comes true; and less for those of calls, whose
# callers wait for the answer.
_PAUSE_S = 0.012
_PAUSE_OF_CALLS_S = 0.004
# After such a rest a unit runs at once, without turns of the loop before and after; not within it,
# as one who writes again and again would keep the loop to itself.
_REST_S = 0.001
_TRIES = 5  # of a unit: one that lost a race finds what the winner wrote
_LOOK_S = 0.05  # between looks for the commits of other processes
_CLOSE_S = 60.0  # for the loop to get to it, and for the commit that runs
_TICK_NS = 50_000_000  # of the clock of files; it is at most 10 ms
# For a commit; to have it done by a thread and to hear of it holds the loop up for about as long.
_QUICK_S = 0.001
_SLOW_TIMES = 3  # in a row, after which a thread does it (one alone may have copied the log)
_BY_THREAD = 50  # commits, after which the loop finds out whether the disk is quick again


@dataclass(eq=False)
class _Turn:
    """A unit that waits or runs.

    Args:
        end: when it is no longer wanted; monotonic seconds.
    """

    function: Callable[[Unit], Any]
    end: float | None
    context: contextvars.Context
    future: asyncio.Future[Any]
    unit: Unit = field(default_factory=Unit)
    result: Any = None

    def settle(self) -> None:
        """Tell whoever waits for it."""
        try:
            for action in self.unit.after_commit:
                action()
        except Exception as error:
            self.refuse(error)
        if not self.future.done():
            self.future.set_result(self.result)

    def refuse(self, error: BaseException) -> None:
        """Tell whoever waits for it that it failed."""
        if not self.future.done():
            self.future.set_exception(error)


class _AbandonedError(Exception):
    """SQLite has ended the transaction by itself, with all that was in it."""


class SqliteWriter:
    """Runs the units of one event loop.

    Args:
        opened: the database whose models the units use.
        before_commit: called with what a transaction's units have gathered, for its last writes.
        committed: called with the same after the commit.
        refusal: makes of an error of the database what is raised.
        wake: called when another process has committed.
    """

    def __init__(
        self,
        opened: peewee.SqliteDatabase,
        *,
        before_commit: Callable[[Unit], None],
        committed: Callable[[Unit], None],
        refusal: Callable[[Exception], Exception],
        wake: Callable[[], None],
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self._opened = opened
        self._before_commit = before_commit
        self._committed = committed
        self._refusal = refusal
        self._wake = wake
        self._waiting: deque[_Turn] = deque()
        self._running: list[_Turn] = []  # of the transaction
        self._commits = False  # a thread uses the connection
        self._untouched = True  # no unit of the transaction has succeeded yet
        self._slow_times = 0
        self._by_thread = 0  # commits that are a thread's still
        self._scheduled: asyncio.TimerHandle | None = None
        self._ended = -math.inf  # when the last transaction did; of the loop's clock
        self._pause_s = 0.0
        self._locked_since: float | None = None  # when another process was first met
        self._closed = False
        self._thread = ThreadPoolExecutor(
            1, thread_name_prefix=f"{Path(opened.database).stem}-commit"
        )
        self._connect()
        self._log_file = f"{opened.database}-wal"
        self._version: int | None = None
        self._asked: tuple[int, int] | None = None
        self._look_next = self.loop.call_soon(self._look)

    def _connect(self) -> None:
        self._connection = connections.another(self._opened)
        self._cursor = self._connection.cursor()
        self._cursor.execute("PRAGMA busy_timeout = 0")  # nothing waits in this thread
        # Else what a unit of more than 16 pages would take back goes to a file, which is made anew
        # each time.
        # Source: https://www.sqlite.org/tempfiles.html#statement_journal_files
        self._cursor.execute("PRAGMA temp_store = MEMORY")

    @property
    def waiting(self) -> int:
        """How many units wait or run."""
        return len(self._waiting) + len(self._running)

    async def run(
        self, function: Callable[[Unit], Any], end: float | None, *, urgent: bool = False
    ) -> Any:
        """Run a unit; return what it returns, once that is committed.

        Args:
            end: when it must have begun; monotonic seconds.
            urgent: ahead of all that wait.
        """
        turn = _Turn(function, end, contextvars.copy_context(), self.loop.create_future())
        if urgent:
            self._waiting.appendleft(turn)
        else:
            self._waiting.append(turn)
        self._schedule(turn)
        # Cancelling drops a unit that still waits; one that has run is committed.
        return await turn.future

    def _schedule(self, turn: _Turn) -> None:
        """Have a transaction begun in which it has its turn; or begin it."""
        if self._commits or self._closed:
            return
        of_call = turn.end is not None
        when = self._ended + min(self._pause_s, _PAUSE_OF_CALLS_S if of_call else _PAUSE_S)
        if self._scheduled is None:
            if self._pause_s < _REST_S and self.loop.time() > self._ended + _REST_S:
                self._work()
            else:
                self._scheduled = self.loop.call_at(when, self._work)
        elif when < self._scheduled.when() and self._locked_since is None:
            self._scheduled.cancel()
            self._scheduled = self.loop.call_at(when, self._work)

    def _work(self) -> None:
        """Run what waits in one transaction, and have it committed."""
        self._scheduled = None
        if self._closed or not self._wanted() or not self._begun():
            return
        written = self._connection.total_changes
        try:
            with connections.used(self._opened, self._connection):
                self._run_waiting()
                units = [turn.unit for turn in self._running]
                gathered = Unit(changes=[each for unit in units for each in unit.changes])
                self._before_commit(gathered)
            waits = self._connection.total_changes > written  # for the disk
            if self._connection.in_transaction:  # not all has been taken back
                if waits and self._by_thread:
                    self._commit_by_thread(gathered)
                    return
                self._commit_here(waits)
        except Exception as error:
            self._fail(error)
            return
        self._finish(gathered)

    def _commit_by_thread(self, gathered: Unit) -> None:
        self._by_thread -= 1
        self._commits = True
        commit = self.loop.run_in_executor(self._thread, self._cursor.execute, "COMMIT")
        commit.add_done_callback(lambda done: self._after_commit(gathered, done.exception()))

    def _commit_here(self, waits: bool) -> None:
        """Commit in the loop's thread; if the disk makes it wait again and again, no more."""
        begin = time.perf_counter()
        self._cursor.execute("COMMIT")
        slow = waits and time.perf_counter() - begin > _QUICK_S
        self._slow_times = self._slow_times + 1 if slow else 0
        if self._slow_times == _SLOW_TIMES:
            self._slow_times, self._by_thread = 0, _BY_THREAD

    def _wanted(self) -> bool:
        """Drop what is no longer wanted from those that are next; tell whether any is left."""
        while self._waiting:
            turn = self._waiting[0]
            if turn.future.done():
                self._waiting.popleft()
            elif turn.end is not None and time.monotonic() > turn.end:
                self._waiting.popleft().refuse(
                    errors.DeadlineExceeded(
                        "DEADLINE_EXCEEDED", "the deadline passed while waiting for the database"
                    )
                )
            else:
                return True
        return False

    def _begun(self) -> bool:
        """Begin a transaction; or, while another process has one, come back in a moment."""
        try:
            self._begin()
        except sqlite3.OperationalError as error:
            moment = self.loop.time()
            if self._locked_since is None:
                self._locked_since = moment
            if (
                connections.is_repeatable(error)
                and moment - self._locked_since < connections.LOCK_S
            ):
                pause = random.uniform(0.001, 0.01)  # noqa: S311
                self._scheduled = self.loop.call_later(pause, self._work)
                return False
            self._locked_since = None
            refusal = self._refusal(error)
            while self._waiting:
                self._waiting.popleft().refuse(refusal)
            return False
        self._locked_since = None
        return True

    def _run_waiting(self) -> None:
        end = time.monotonic() + _MOST_S
        while self._wanted():
            if not self._connection.in_transaction and not self._begun():
                break
            self._run(self._waiting.popleft())
            if time.monotonic() > end:
                break

    def _run(self, turn: _Turn) -> None:
        """Run a unit within a savepoint, or if it is the first within the transaction itself."""
        self._running.append(turn)
        for attempt in range(_TRIES):
            turn.unit = Unit()
            if not self._connection.in_transaction:
                self._begin()
            if not self._untouched:
                self._cursor.execute("SAVEPOINT unit")
            try:
                turn.result = turn.context.run(turn.function, turn.unit)
            except Exception as error:
                if not self._connection.in_transaction:
                    raise _AbandonedError from error
                self._take_back()
                database_s = isinstance(error, peewee.IntegrityError | peewee.OperationalError)
                if database_s and connections.is_repeatable(error) and attempt < _TRIES - 1:
                    continue
                self._running.remove(turn)
                turn.refuse(self._refusal(error) if database_s else error)
                return
            if turn.unit.rollback:
                self._take_back()
                turn.unit = Unit()
            elif self._untouched:
                self._untouched = False
            else:
                self._cursor.execute("RELEASE unit")
            return

    def _begin(self) -> None:
        self._cursor.execute("BEGIN IMMEDIATE")
        self._untouched = True

    def _take_back(self) -> None:
        if self._untouched:
            self._cursor.execute("ROLLBACK")
        else:
            self._cursor.execute("ROLLBACK TO unit")
            self._cursor.execute("RELEASE unit")

    def _after_commit(self, gathered: Unit, error: BaseException | None) -> None:
        self._commits = False
        if error is None:
            self._finish(gathered)
        else:
            self._fail(error)

    def _finish(self, gathered: Unit) -> None:
        self._ended = self.loop.time()
        turns, self._running = self._running, []
        self._pause_s = _PAUSE_S if len(turns) > 1 else self._pause_s / 2
        for turn in turns:
            turn.settle()
        self._committed(gathered)
        for turn in self._waiting:
            self._schedule(turn)

    def _fail(self, error: BaseException) -> None:
        """Refuse all units of the transaction: none of them is in the database."""
        self._ended = self.loop.time()
        with suppress(sqlite3.Error):
            if self._connection.in_transaction:
                self._cursor.execute("ROLLBACK")
        if self._connection.in_transaction:
            self._connection.close()
            self._connect()
        cause = error.__cause__ if isinstance(error, _AbandonedError) else error
        if isinstance(cause, peewee.PeeweeException | sqlite3.Error):
            cause = self._refusal(cause)
        assert cause is not None
        turns, self._running = self._running, []
        for turn in turns:
            turn.refuse(cause)
        for turn in self._waiting:
            self._schedule(turn)

    def _look(self) -> None:
        """See the commits of other processes.

        A connection is not told of its own: so the one is asked that this loop's commits go
        through. Source: https://www.sqlite.org/pragma.html#pragma_data_version. A commit writes to
        the log beside the file, so nothing is asked while that has not been written to.
        """
        if self._closed:
            return
        self._look_next = self.loop.call_later(_LOOK_S, self._look)
        if self._commits:
            return
        written = _written(self._log_file)
        if written is not None and written == self._asked:
            return
        # What is written within the same tick of the clock has the same time.
        settled = written is not None and time.time_ns() - written[0] > _TICK_NS
        self._asked = written if settled else None
        try:
            version = int(self._cursor.execute("PRAGMA data_version").fetchone()[0])
        except sqlite3.Error:
            return  # the next write will say so
        if self._version is not None and version != self._version:
            self._wake()
        self._version = version

    def close(self) -> None:
        """Finish the commit that runs, drop what waits. Whoever calls, it is the loop that does it.

        The loop uses the connection without a lock; SQLite does not survive that somebody else
        closes it meanwhile.
        """
        if not self.loop.is_running() or self._is_in_loop():
            self._close()
        else:
            asyncio.run_coroutine_threadsafe(self._close_in_loop(), self.loop).result(_CLOSE_S)

    async def _close_in_loop(self) -> None:
        self._close()

    def _is_in_loop(self) -> bool:
        try:
            return asyncio.get_running_loop() is self.loop
        except RuntimeError:
            return False

    def _close(self) -> None:
        self._closed = True
        self._look_next.cancel()
        self._thread.shutdown(wait=True)
        ended = errors.Unavailable("DATABASE_UNAVAILABLE", "this process ends")
        if not self.loop.is_closed():
            for turn in self._waiting:
                turn.refuse(ended)
        self._waiting.clear()
        self._connection.close()


def _written(path: str) -> tuple[int, int] | None:
    """Return when a file was written to last, and its size."""
    try:
        found = os.stat(path)  # (of a Path it takes three times as long, and it is looked at often)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size
