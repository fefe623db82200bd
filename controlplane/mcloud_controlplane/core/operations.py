"""Operations: reading their rows, and the OperationService that each package has."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import peewee
from google.protobuf import any_pb2
from google.rpc import status_pb2

from mcloud.common.v1 import metadata_pb2, operation_pb2
from mcloud_base import errors
from mcloud_controlplane.core import auth, contract, convert, database, listing, tables
from mcloud_controlplane.core.model import Prepared

Operation = operation_pb2.Operation
_ENDED = ("SUCCEEDED", "FAILED", "CANCELLED")
# Workflows of these names only go forward: what they delete is gone for its owner already.
FORWARD = "delete_"
# No workflow: such an operation consists of others, and the last of them ends it.
PARTS = "parts"
_POLL_S = 2.0  # the net under the wake-ups


def message(
    row: Any, steps: Sequence[Any], parts: operation_pb2.OperationParts | None = None
) -> Operation:
    """Return an operation's row, those of its steps and how its parts are as the message."""
    operation = Operation(
        id=row.id,
        project_id=row.project_id,
        method=row.method,
        resource=operation_pb2.ResourceReference(
            type=row.resource_type, id=row.resource_id, name=row.resource_name
        ),
        caller_id=row.principal_id,
        request_id=row.request_id,
        state=contract.enum_value(row.state, Operation.State),
        cancellable=bool(row.workflow)
        and not row.workflow.startswith(FORWARD)
        and row.state == "RUNNING"
        and not row.cancel_requested,
        trace_id=row.trace_id,
        parent_id=row.parent_id or "",
        parts=parts,
    )
    convert.fill(operation.create_time, row.create_time)
    for step in steps:
        _add_step(operation, step)
    if row.error:
        operation.error.CopyFrom(status_pb2.Status.FromString(bytes(row.error)))
    if row.request:
        operation.request.CopyFrom(any_pb2.Any.FromString(bytes(row.request)))
    if row.response:
        operation.response.CopyFrom(any_pb2.Any.FromString(bytes(row.response)))
    if row.end_time is not None:
        convert.fill(operation.end_time, row.end_time)
    if row.deadline is not None:
        convert.fill(operation.deadline, row.deadline)
    operation.progress_percent = _progress(row, steps, parts)
    return operation


def get(shared: tables.Tables, operation_id: str) -> Operation:
    """Return an operation. Within a unit.

    Raises:
        errors.NotFound: OPERATION_NOT_FOUND.
    """
    row = shared.operation.find(operation_id)
    if row is None:
        raise _not_found(operation_id)
    return _whole(shared, row)


def _not_found(id_: str) -> errors.NotFound:
    return errors.NotFound("OPERATION_NOT_FOUND", f"there is no operation {id_}", id=id_)


def _whole(shared: tables.Tables, row: Any) -> Operation:
    table = shared.operation_step
    steps = _STEPS.get(table) or _STEPS.setdefault(table, _of_operation(table))
    return message(row, steps.rows([row.id]), find_parts(shared, [row]).get(row.id))


_STEPS: dict[type, Prepared] = {}  # by table


def _of_operation(table: Any) -> Prepared:
    return Prepared(
        table,
        lambda ids: (
            table.select().where(table.operation_id == ids[0]).order_by(table.number, table.attempt)
        ),
    )


def find_parts(
    shared: tables.Tables, rows: Sequence[Any]
) -> dict[str, operation_pb2.OperationParts]:
    """Return how the parts are of those among these that have some, in one statement."""
    ids = [row.id for row in rows if row.workflow == PARTS]
    if not ids:
        return {}
    found = {id_: operation_pb2.OperationParts() for id_ in ids}
    table: Any = shared.operation
    query = table.select(table.parent_id, table.state, peewee.fn.COUNT(table.id))
    counts = query.where(table.parent_id.in_(ids)).group_by(table.parent_id, table.state)
    for id_, state, count in counts.tuples():
        parts = found[id_]
        parts.count += count
        if state in _ENDED:
            setattr(parts, f"{state.lower()}_count", count)
        else:
            parts.running_count += count
    return found


def part_ended(shared: tables.Tables, part: Any) -> None:
    """Say that a part of an operation has ended; if it was the last one, so has the operation.

    Within the unit that has ended the part. It has locked the part's row and locks the other one's
    now: who does so last sees that all have ended.
    """
    tables.changed("operation", part.parent_id, part.project_id)
    end_with_parts(shared, part.parent_id)


def end_with_parts(shared: tables.Tables, id_: str) -> bool:
    """End an operation whose parts have ended; tell whether it did. Within a unit."""
    table: Any = shared.operation
    this = (table.id == id_) & (table.state == "RUNNING") & (table.workflow == PARTS)
    lock = table.update(cancel_requested=table.cancel_requested).where(this)
    if not lock.execute():
        return False
    parts = table.parent_id == id_
    if table.select().where(parts & table.state.not_in(_ENDED)).exists():
        return False
    row = table.get_by_id(id_)
    failed = list(
        table.select(table.resource_name, table.state, table.error)
        .where(parts & (table.state != "SUCCEEDED"))
        .order_by(table.id)
        .tuples()
    )
    values: dict[str, Any] = {"state": "SUCCEEDED"}
    if failed:
        count = table.select().where(parts).count()
        # What went wrong says more than what was given up.
        name, state, error = min(failed, key=lambda each: each[1] != "FAILED")
        status = status_pb2.Status.FromString(bytes(error))
        first = f"{len(failed)} of {count} could not be done; the first, {name}: "
        status.message = first + status.message
        cancelled = row.cancel_requested and state == "CANCELLED"
        values["state"] = "CANCELLED" if cancelled else "FAILED"
        values["error"] = status.SerializeToString()
    table.update(values | {"end_time": database.now()}).where(this).execute()
    tables.changed("operation", id_, row.project_id)
    tables.tell_end(id_, row.project_id)
    return True


def _add_step(operation: Operation, row: Any) -> None:
    step = operation.steps.add(
        number=row.number,
        name=row.name,
        service=row.service,
        host=row.host,
        attempt=row.attempt,
        state=contract.enum_value(row.state, operation_pb2.OperationStep.State),
        detail=row.detail,
    )
    convert.fill(step.start_time, row.start_time)
    if row.end_time is not None:
        convert.fill(step.end_time, row.end_time)


def _progress(row: Any, steps: Sequence[Any], parts: operation_pb2.OperationParts | None) -> int:
    if row.state in _ENDED:
        return 100
    if parts is not None:
        return min(99, (parts.count - parts.running_count) * 100 // max(parts.count, 1))
    done = {step.number for step in steps if step.state in ("DONE", "SKIPPED")}
    return min(99, len(done) * 100 // 16)


class OperationServicer:
    """Serves `mcloud.<domain>.v1.OperationService` over one database."""

    def __init__(self, store: database.Database, shared: tables.Tables) -> None:
        self._database = store
        self._tables = shared

    async def GetOperation(
        self, request: operation_pb2.GetOperationRequest, context: auth.Context
    ) -> Operation:
        """Return one."""
        return await self._database.read_few(self._get, auth.caller(), request.id)

    async def ListOperations(
        self, request: operation_pb2.ListOperationsRequest, context: auth.Context
    ) -> operation_pb2.ListOperationsResponse:
        """Return a page, newest first; two statements, or three, and the revision."""
        return await self._database.read(self._list, auth.caller(), request)

    async def WaitOperation(
        self, request: operation_pb2.WaitOperationRequest, context: auth.Context
    ) -> Operation:
        """Return at its end or at the timeout."""
        timeout = request.timeout.ToSeconds() if request.HasField("timeout") else 30
        try:
            return await self._database.until(
                self._ended,
                auth.caller(),
                request.id,
                timeout_s=min(max(timeout, 0), 600),
                types=("end",),
                id_=request.id,
            )
        except TimeoutError:
            return await self._database.read_few(self._get, auth.caller(), request.id)

    async def WatchOperation(
        self, request: operation_pb2.WatchOperationRequest, context: auth.Context
    ) -> AsyncIterator[operation_pb2.WatchOperationResponse]:
        """Stream it until its end."""
        async for operation in self._follow(auth.caller(), request.id):
            yield operation_pb2.WatchOperationResponse(
                type=metadata_pb2.CHANGE_TYPE_MODIFIED, operation=operation
            )

    async def CancelOperation(
        self, request: operation_pb2.CancelOperationRequest, context: auth.Context
    ) -> Operation:
        """Ask its runner to undo it."""
        return await self._database.write(self._cancel, auth.caller(), request)

    async def _follow(self, caller: auth.Caller, id_: str) -> AsyncIterator[Operation]:
        seen = b""
        with self._database.listening("operation", id_=id_) as event:
            while True:
                event.clear()
                async with self._database.background_reads:
                    operation = await self._database.read_few(self._get, caller, id_)
                state = operation.SerializeToString(deterministic=True)
                if state != seen:
                    seen = state
                    yield operation
                if Operation.State.Name(operation.state).removeprefix("STATE_") in _ENDED:
                    return
                try:
                    async with asyncio.timeout(_POLL_S):
                        await event.wait()
                except TimeoutError:
                    continue

    def _ended(self, caller: auth.Caller, id_: str) -> Operation | None:
        """Return an operation that has ended; None before."""
        row = self._tables.operation.find(id_)
        if row is not None and row.state not in _ENDED and caller.sees(row.project_id):
            return None
        return self._visible(caller, id_, row)

    def _get(self, caller: auth.Caller, id_: str) -> Operation:
        return self._visible(caller, id_, self._tables.operation.find(id_))

    def _visible(self, caller: auth.Caller, id_: str, row: Any) -> Operation:
        if row is None or not caller.sees(row.project_id):
            raise _not_found(id_)
        return _whole(self._tables, row)

    def _list(
        self, caller: auth.Caller, request: operation_pb2.ListOperationsRequest
    ) -> operation_pb2.ListOperationsResponse:
        table = self._tables.operation
        revision = self._tables.revision()
        page = listing.page(
            table,
            request,
            caller,
            fields={
                "id": table.id,
                "state": table.state,
                "resource.id": table.resource_id,
                "resource.type": table.resource_type,
                "method": table.method,
                "parent_id": table.parent_id,
            },
            orders={"create_time": table.create_time},
            default_order="create_time desc",
        )
        steps = self._tables.operation_step
        found: dict[str, list[Any]] = {row.id: [] for row in page.rows}
        query = steps.select().where(steps.operation_id.in_(list(found)))
        for step in query.order_by(steps.number, steps.attempt):
            found[step.operation_id].append(step)
        parts = find_parts(self._tables, page.rows)
        return operation_pb2.ListOperationsResponse(
            operations=[message(row, found[row.id], parts.get(row.id)) for row in page.rows],
            next_page_token=page.next_page_token,
            revision=str(revision),
        )

    def _cancel(
        self, caller: auth.Caller, request: operation_pb2.CancelOperationRequest
    ) -> Operation:
        before = self._get(caller, request.id)
        table = self._tables.operation
        running = (
            (table.state == "RUNNING")
            & (table.workflow != "")
            & ~table.workflow.startswith(FORWARD)
        )
        cancel: Any = table.update(cancel_requested=True, not_before=0)
        if before.HasField("parts"):  # locked as their ends lock them: before what they belong to
            cancel.where(running & (table.parent_id == request.id)).execute()
        cancelled = cancel.where(running & (table.id == request.id)).execute()
        operation = get(self._tables, request.id)
        if not cancelled:
            if operation.state in (Operation.STATE_CANCELLED, Operation.STATE_UNDOING):
                return operation
            raise errors.WrongState(
                "OPERATION_NOT_CANCELLABLE",
                f"operation {request.id} has ended, or deletes",
                id=request.id,
            )
        if request.validate_only:
            database.unit().rollback = True
            return before
        tables.changed("operation", request.id, operation.project_id)
        tables.wake_runners(request.id, operation.project_id)
        return operation
