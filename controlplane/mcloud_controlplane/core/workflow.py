"""Durable workflows: an ordered list of steps, each with do and undo, saved after each step.

A running operation is held by a lease (owner, number, expiry). Whoever takes it over increments
the number by compare-and-set, and every save repeats "where the number is mine": a runner that
was overtaken can save nothing, and its effects elsewhere are refused by the number (effects.py).

A `do` may run again, after a crash or a retry, and an `undo` may run for a `do` that never did or
only half did; so both ensure a state and are keyed by ids that stood in the job before.
"""

from __future__ import annotations

import asyncio
import contextvars
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import peewee
import structlog
from google.protobuf import any_pb2
from google.protobuf.message import Message
from google.rpc import status_pb2

from mcloud.common.v1 import operation_pb2
from mcloud_base import errors
from mcloud_controlplane.core import (
    database,
    operations,
    processes,
    statements,
    tables,
    trace,
    tracing,
)
from mcloud_controlplane.core.statements import Kept
from mcloud_controlplane.core.trace import Row

log = structlog.get_logger()

LEASE_S = 15.0
_POLL_S = 2.0
_BITE = 25  # operations taken at a time, so that other processes have a share
_BUSY = 50  # units that wait for the database; with more, what is held is gone on with first
_AT_ONCE = 256  # leases renewed by one statement
_RUNNING = ("RUNNING", "UNDOING")


@dataclass
class Job:
    """One run of a workflow: what its steps know. All of it can be read back from the database.

    `data` was made with the operation (every id that steps need); what a step adds to it is saved
    with the step.
    """

    operation_id: str
    resource_id: str
    project_id: str
    lease_number: int
    attempt: int
    deadline: int | None
    data: dict[str, Any]
    parent_id: str | None = None  # the operation that this one is a part of
    error: errors.Error | None = None
    trace: list[operation_pb2.OperationStep] = field(default_factory=list)
    response: Message | None = None
    known: dict[str, Any] = field(default_factory=dict)  # what need not be read again; not saved
    start: int = 0  # when the running step began
    detail: str = ""
    skipped: str = ""
    units: list[Callable[[], object]] = field(default_factory=list)

    def begin_step(self, moment: int) -> None:
        """Forget what the step before has told."""
        self.start, self.detail, self.skipped = moment, "", ""
        self.trace.clear()
        self.units.clear()

    def with_save(self, unit: Callable[[], object]) -> None:
        """Have a unit run in the transaction that saves the running step as done."""
        self.units.append(unit)

    def skip(self, reason: str) -> None:
        """Show the running step as not needed."""
        self.skipped = reason


Act = Callable[[Job], Awaitable[None]]


@dataclass(frozen=True)
class Step:
    """A row of a workflow. `number` is that of the trace; 0: no row of its own."""

    number: int
    name: str
    service: str
    do: Act
    undo: Act | None = None
    deadline_s: float = 60.0


@dataclass(frozen=True)
class Workflow:
    """Steps, and what the end means for the resource (written in the operation's transaction).

    `on_undo` runs, as a unit, when undoing begins; `on_done` and `on_failed` at the end.
    """

    name: str
    steps: tuple[Step, ...]
    on_done: Callable[[Job], None]
    on_failed: Callable[[Job], None]


# Called around each do and undo with (workflow, step index, "do" or "undo", "before" or "after").
# It may raise what the step may raise, with the same consequences; tests do, or end the process.
Probe = Callable[[str, int, str, str], Awaitable[None]]


async def no_probe(workflow: str, index: int, act: str, moment: str) -> None:
    """Do nothing."""


class _LeaseLostError(Exception):
    """Another runner holds the operation now."""


class _Cancellation:
    """Whether an operation is to end early; the step that runs then has no more time."""

    def __init__(self) -> None:
        self.is_requested = False
        self._bound: asyncio.Timeout | None = None

    def request(self) -> None:
        """End it."""
        self.is_requested = True
        if self._bound is not None and not self._bound.expired():
            self._bound.reschedule(asyncio.get_running_loop().time())

    @asynccontextmanager
    async def until(self, end: float) -> AsyncIterator[None]:
        """Bound what is done within the block.

        Raises:
            TimeoutError: it took until the end, or was to end early.
        """
        try:
            async with asyncio.timeout_at(end) as self._bound:
                yield
        finally:
            self._bound = None


class Runner:
    """Runs the operations of one database that have a workflow.

    Args:
        workflows: by name; every workflow of the database.
        concurrency: operations at a time; the others wait in the database.
        lease_s: for how long an operation is left to a runner that has fallen silent.
        life: of the process; what its predecessor held is gone on with at once.
    """

    def __init__(
        self,
        store: database.Database,
        shared: tables.Tables,
        workflows: Mapping[str, Workflow],
        *,
        concurrency: int = 200,
        lease_s: float = LEASE_S,
        probe: Probe = no_probe,
        host_name: str = "",
        life: processes.Life | None = None,
    ) -> None:
        self._database = store
        self._tables = shared
        self.workflows = workflows
        self.concurrency = concurrency  # 0: go on with what is held, take nothing more
        self._lease_s = lease_s
        self._probe = probe
        self._host_name = host_name
        self._life = life or processes.Life.first()
        self._owner = self._life.id
        self._saves: dict[tuple[str, ...], Kept] = {}  # by the columns that they write
        self._highest = -1  # lease number that was given, as far as is known; -1: look
        self._moment = 0  # when it was last looked for work
        self._left_some = True  # for want of room, perhaps: there is more when one has ended
        self._held: dict[str, asyncio.Task[None]] = {}
        self._cancelled: dict[str, _Cancellation] = {}
        self._event = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None  # while it runs
        self._context = contextvars.Context()  # of the runner, not of whoever asks for work

    async def run(self) -> None:
        """Take and run operations until cancelled; then leave them to others."""
        self._loop, self._context = asyncio.get_running_loop(), contextvars.copy_context()
        self._database.offer = self._offered
        renewing = asyncio.create_task(self._renew())
        try:
            with self._database.listening("work") as event:
                self._event = event
                inherited = not self._life.predecessor
                while True:
                    if not inherited:
                        inherited = await self._inherit()
                    event.clear()
                    await self._take_all()
                    try:
                        async with asyncio.timeout(_POLL_S):
                            await event.wait()
                    except TimeoutError:
                        continue
        finally:
            self._loop = None
            tasks = [renewing, *self._held.values()]
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            await self._database.write(self._let_go)

    async def _inherit(self) -> bool:
        """Free what the predecessor held; tell whether the database did it."""

        def free() -> None:
            table = self._tables.operation
            held = (table.lease_owner == self._life.predecessor) & table.state.in_(_RUNNING)
            table.update(lease_expire_time=0).where(held).execute()

        try:
            await self._database.write(free)
        except errors.Error as error:
            log.warning("workflow runner could not inherit work", reason=error.reason)
            return False
        return True

    def _let_go(self) -> None:
        """Let another runner go on at once."""
        table = self._tables.operation
        mine = (table.lease_owner == self._owner) & table.state.in_(_RUNNING)
        if table.update(lease_expire_time=0).where(mine).execute():
            tables.wake_runners("", "")

    def _offered(self, row: Any, known: dict[str, Any]) -> Row | None:
        """Take an operation in the unit that records it; return the row of its first step.

        So whoever accepts it goes on with it at once, and nobody has to look for it. None: it is
        left to whoever looks.
        """
        loop, busy = self._loop, self._database.waiting > _BUSY
        promised = len(database.unit().after_commit)  # of a request for many, those before this one
        if loop is None or busy or len(self._held) + promised >= self.concurrency:
            return None
        if row.workflow not in self.workflows:
            return None
        row.lease_owner = self._owner
        row.lease_number = self._next_number(row.lease_number)
        row.lease_expire_time = self._expiry()

        def start() -> None:
            if loop is self._loop:
                self._start(row, known)

        database.unit().after_commit.append(lambda: _soon(loop, start))
        first = self.workflows[row.workflow].steps[0]
        return self._row(first, "RUNNING", row.create_time, None)

    def _start(self, row: Any, begun: dict[str, Any] | None = None) -> None:
        """Run an operation that is held.

        Args:
            begun: its first step is in the trace; what its steps need not read.
        """
        # The deadline of the call that asked for it is not that of the operation.
        task = asyncio.create_task(self._hold(row, begun), context=self._context.copy())
        self._held[row.id] = task
        task.add_done_callback(partial(self._left, row.id))

    async def _take_all(self) -> None:
        """Take what is free, as far as there is room, and hear of cancellations."""
        room = min(self.concurrency - len(self._held), _BITE)
        if self._database.waiting > _BUSY:
            room = 0
        self._left_some = True  # as far as is known, until it has looked
        try:
            # Most wake-ups are for something else: look first, without a writer's turn.
            free, cancelled = await self._database.read_few(self._look, room)
            taken = await self._database.write(self._take, free) if free else []
        except errors.Error as error:
            log.warning("workflow runner could not take work", reason=error.reason)
            return
        for id_ in cancelled:
            self._cancellation(id_).request()
        for row in taken:
            self._start(row)
        self._left_some = len(free) == room
        if taken and self._left_some:
            self._event.set()  # there may be more

    def _left(self, id_: str, _: asyncio.Task[None]) -> None:
        self._held.pop(id_, None)
        self._cancelled.pop(id_, None)
        if self._left_some:
            self._event.set()

    def _look(self, room: int) -> tuple[list[tuple[str, int]], list[str]]:
        """Return what is free, (id, lease number), and which of those that are held are cancelled.

        There may be hundreds of either: what is held is told by its lease, not named.
        """
        table: Any = self._tables.operation
        moment = database.now()
        free: list[tuple[str, int]] = []
        if room > 0:
            query = (
                table.select(table.id, table.lease_number)
                .where(
                    table.state.in_(_RUNNING)
                    & (table.workflow.in_(list(self.workflows)))
                    & self._is_free(moment)
                    & (table.not_before <= moment)
                )
                .order_by(table.create_time)
                .limit(room)
            )
            free = [row for row in query.tuples() if row[0] not in self._held]
        cancelled = table.select(table.id).where(
            (table.state == "RUNNING")
            & (table.lease_expire_time > moment)
            & (table.lease_owner == self._owner)
            & table.cancel_requested
        )
        return free, [id_ for (id_,) in cancelled.tuples() if id_ in self._held]

    def _is_free(self, moment: int) -> Any:
        """Return the condition that nobody holds an operation.

        A lease that ends later than any that is given now was given before the clock was set back.
        """
        table = self._tables.operation
        latest = moment + int(2 * self._lease_s * 1_000_000)
        return (table.lease_expire_time < moment) | (table.lease_expire_time > latest)

    def _take(self, free: list[tuple[str, int]]) -> list[Any]:
        table = self._tables.operation
        taken = []
        for id_, number in free:
            lease = {
                "lease_owner": self._owner,
                "lease_number": self._next_number(number),
                "lease_expire_time": self._expiry(),
            }
            mine = (table.id == id_) & (table.lease_number == number)
            if table.update(lease).where(mine).execute():
                taken.append(table.get_by_id(id_))
        return taken

    def _next_number(self, number: int) -> int:
        """Return the number of a lease that follows another one.

        Higher than those of earlier operations on the same resource, which went with their effects
        in other databases: hence the time, were it not for clocks that are set back.
        """
        table = self._tables.operation
        moment = database.now()
        if self._highest < 0 or moment < self._moment:  # it was set back: others gave some, too
            self._highest = table.select(peewee.fn.MAX(table.lease_number)).scalar() or 0
        self._moment = moment
        self._highest = max(number, moment - 1, self._highest) + 1
        return self._highest

    async def _renew(self) -> None:
        """Keep every lease that is held, in one statement."""
        while True:
            await asyncio.sleep(self._lease_s / 4)
            held = list(self._held)
            if not held:
                continue
            try:
                lost = await self._database.write_at_once(self._renew_now, held)
            except errors.Error as error:
                log.warning("leases could not be renewed", reason=error.reason)
                continue
            for id_ in lost:
                if task := self._held.get(id_):
                    task.cancel()

    def _renew_now(self, held: list[str]) -> list[str]:
        table: Any = self._tables.operation
        kept: set[str] = set()
        for some in peewee.chunked(held, _AT_ONCE):
            mine = table.id.in_(statements.padded(some)) & (table.lease_owner == self._owner)
            renewed = table.update(lease_expire_time=self._expiry()).where(mine)
            kept.update(id_ for (id_,) in renewed.returning(table.id).tuples().execute())
        return [id_ for id_ in held if id_ not in kept]

    def _expiry(self) -> int:
        return database.now() + int(self._lease_s * 1_000_000)

    # -- one operation ---------------------------------------------------------------------------

    async def _hold(self, row: Any, begun: dict[str, Any] | None) -> None:
        workflow = self.workflows[row.workflow]
        job = Job(
            operation_id=row.id,
            resource_id=row.resource_id,
            project_id=row.project_id,
            lease_number=row.lease_number,
            attempt=row.attempt,
            deadline=row.deadline,
            data=json.loads(row.job),
            parent_id=row.parent_id,
            known=begun or {},
        )
        if row.error:
            job.error = errors.from_status(status_pb2.Status.FromString(bytes(row.error)))
        structlog.contextvars.bind_contextvars(op=row.id, resource=row.resource_id)
        try:
            position = row.position
            if row.state == "RUNNING":
                if row.cancel_requested:
                    self._cancellation(row.id).request()
                if begun is not None:
                    job.begin_step(row.create_time)
                else:
                    job.begin_step(self._database.now())
                    await self._database.write(self._begin, job, workflow.steps[position])
                position = await self._do_all(workflow, job, position)
            if job.error is not None:
                await self._undo_all(workflow, job, position)
        except _LeaseLostError:
            log.info("operation taken over by another runner")
        except errors.Unavailable as error:
            log.warning("operation waits for its database", reason=error.reason)
        except Exception:
            # A fault of ours must not end the runner: the lease runs out, the step is tried again.
            log.exception("operation's runner failed")

    def _cancellation(self, id_: str) -> _Cancellation:
        return self._cancelled.setdefault(id_, _Cancellation())

    async def _do_all(self, workflow: Workflow, job: Job, position: int) -> int:
        cancellation = self._cancellation(job.operation_id)
        for index, step in enumerate(workflow.steps[position:], position):
            await self._database.requests.turn()
            try:
                await self._attempt(workflow, index, job, cancellation)
            except errors.Error as error:
                job.error = error
                await self._database.write(self._fail_step, job, step, index, error)
                return index
            moment = self._database.now()
            await self._database.write(self._end_step, workflow, job, index, moment)
            job.begin_step(moment)
        return len(workflow.steps)

    async def _attempt(
        self, workflow: Workflow, index: int, job: Job, cancellation: _Cancellation
    ) -> None:
        """Do a step; on UNAVAILABLE and ABORTED again, until the step's or the job's deadline."""
        step = workflow.steps[index]
        limit = step.deadline_s
        if job.deadline is not None:
            limit = min(limit, max((job.deadline - self._database.now()) / 1e6, 0.1))
        end = asyncio.get_running_loop().time() + limit
        pause = 0.1
        while True:
            try:
                if cancellation.is_requested:
                    raise _cancelled_error()
                job.units.clear()
                await self._probe(workflow.name, index, "do", "before")
                async with cancellation.until(end):
                    await step.do(job)
                await self._probe(workflow.name, index, "do", "after")
                return
            except (errors.Unavailable, errors.Conflict, errors.DeadlineExceeded) as error:
                if error.reason == "STALE_LEASE":
                    raise _LeaseLostError from error
                if asyncio.get_running_loop().time() + pause > end:
                    raise
                log.info("step is tried again", step=step.number, reason=error.reason)
            except TimeoutError as error:
                if cancellation.is_requested:
                    raise _cancelled_error() from error
                raise errors.DeadlineExceeded(
                    "STEP_OVERDUE",
                    f'"{step.name}" did not end within {limit:.0f} s',
                    step=step.number,
                ) from error
            except errors.Error:
                raise
            except Exception as error:
                log.exception("step failed unexpectedly", step=step.number)
                raise errors.Internal(
                    "INTERNAL",
                    f'"{step.name}" failed unexpectedly; tell the operator {job.operation_id}',
                ) from error
            await asyncio.sleep(pause * random.uniform(0.8, 1.2))  # noqa: S311
            pause = min(pause * 2, 5.0)

    async def _undo_all(self, workflow: Workflow, job: Job, position: int) -> None:
        """Undo the step that failed and those that are done, last first; without bound."""
        for index in range(min(position, len(workflow.steps) - 1), -1, -1):
            step = workflow.steps[index]
            if step.undo is not None:
                await self._undo(workflow, job, step, index)
            await self._database.write(self._end_undo, workflow, job, step, index)

    async def _undo(self, workflow: Workflow, job: Job, step: Step, index: int) -> None:
        assert step.undo is not None
        pause = 0.1
        while True:
            await self._database.write(self._begin_undo_step, job, step)
            job.detail = ""
            try:
                await self._probe(workflow.name, index, "undo", "before")
                await step.undo(job)
                await self._probe(workflow.name, index, "undo", "after")
                return
            except errors.Error as error:
                if error.reason == "STALE_LEASE":
                    raise _LeaseLostError from error
                job.detail = f"undo is tried again: {error}"
                log.warning("undo is tried again", step=step.number, reason=error.reason)
            await asyncio.sleep(pause * random.uniform(0.8, 1.2))  # noqa: S311
            pause = min(pause * 2, 10.0)

    # -- saves; each within one unit ---------------------------------------------------------------

    def _save(self, job: Job, **values: Any) -> None:
        names = ("job", *values)
        save = self._saves.get(names) or self._saves.setdefault(names, self._saving(names))
        values_ = [tables.encode(job.data), *values.values()]
        held = [job.operation_id, job.lease_number]
        if not save.cursor(self._database.peewee, values_, held).rowcount:
            raise _LeaseLostError
        tables.changed("operation", job.operation_id, job.project_id)
        if values.get("end_time"):
            tables.tell_end(job.operation_id, job.project_id)
            if job.parent_id is not None:
                operations.part_ended(self._tables, job)

    def _saving(self, names: Sequence[str]) -> Kept:
        """Return the statement that writes these columns of an operation that is held."""
        table = self._tables.operation
        return Kept(
            lambda values, held: table.update(dict(zip(names, values, strict=True))).where(
                (table.id == held[0]) & (table.lease_number == held[1])
            )
        )

    def _row(self, step: Step, state: str, start: int, end: int | None, detail: str = "") -> Row:
        return {
            "number": step.number,
            "name": step.name,
            "service": step.service,
            "host": self._host_name,
            "state": state,
            "start_time": start,
            "end_time": end,
            "detail": detail,
        }

    def _begin(self, job: Job, step: Step) -> None:
        self._save(job)
        self._save_rows(job, self._row(step, "RUNNING", job.start, None))

    def _end_step(self, workflow: Workflow, job: Job, index: int, moment: int) -> None:
        """Save that a step is done, and that the next one runs."""
        step, rest = workflow.steps[index], workflow.steps[index + 1 :]
        state, detail = ("SKIPPED", job.skipped) if job.skipped else ("DONE", job.detail)
        self._save(job, position=index + 1)
        for unit in job.units:
            unit()
        rows = [self._row(step, state, job.start, moment, detail)]
        if rest:
            rows.append(self._row(rest[0], "RUNNING", moment, None))
        self._save_rows(job, *rows)
        if rest:
            return
        workflow.on_done(job)
        response = None
        if job.response is not None:
            response = any_pb2.Any()
            response.Pack(job.response)
        self._save(
            job,
            state="SUCCEEDED",
            end_time=moment,
            response=response.SerializeToString() if response else None,
        )
        self._export(job.operation_id)

    def _fail_step(self, job: Job, step: Step, index: int, error: errors.Error) -> None:
        self._save(
            job,
            state="UNDOING",
            position=index,
            error=errors.to_status(error).SerializeToString(),
        )
        self._save_rows(job, self._row(step, "FAILED", job.start, database.now(), str(error)))

    def _begin_undo_step(self, job: Job, step: Step) -> None:
        self._save(job)
        if job.detail:
            self._update_row(job, step, state="UNDOING", detail=job.detail)

    def _end_undo(self, workflow: Workflow, job: Job, step: Step, index: int) -> None:
        self._save(job, position=max(index - 1, 0))
        if step.undo is not None:
            detail = {"detail": job.detail} if job.detail else {}
            self._update_row(job, step, state="UNDONE", end_time=database.now(), **detail)
        job.detail = ""
        if index == 0:
            workflow.on_failed(job)
            cancelled = isinstance(job.error, errors.Cancelled)
            self._save(job, state="CANCELLED" if cancelled else "FAILED", end_time=database.now())
            self._export(job.operation_id)

    def _save_rows(self, job: Job, *rows: Row) -> None:
        """Write rows of steps, others' with them; of one that stands, how it began stays."""
        every = [*rows, *map(trace.row_of, job.trace)]
        changed = ("state", "end_time", "detail")
        trace.write(self._tables, job.operation_id, job.attempt, every, changed)

    def _update_row(self, job: Job, step: Step, **values: Any) -> None:
        """Change the row of a step that is being undone; what has failed is shown as that."""
        table = self._tables.operation_step
        table.update(values).where(
            (table.operation_id == job.operation_id)
            & (table.number == step.number)
            & (table.attempt == job.attempt)
            & (table.state.in_(("DONE", "UNDOING", "RUNNING")))
        ).execute()

    def _export(self, operation_id: str) -> None:
        if not tracing.is_configured():
            return
        row = self._tables.operation.get_by_id(operation_id)
        table = self._tables.operation_step
        steps = list(table.select().where(table.operation_id == operation_id))
        database.unit().after_commit.append(lambda: tracing.export(row, steps))


def _soon(loop: asyncio.AbstractEventLoop, action: Callable[[], object]) -> None:
    """Do something in a loop, from another thread; not at all if it has ended."""
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(action)


def _cancelled_error() -> errors.Cancelled:
    return errors.Cancelled("OPERATION_CANCELLED", "the operation was cancelled")
