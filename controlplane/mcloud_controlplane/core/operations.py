"""Operations: reading their rows, and the OperationService that each package has."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

from google.protobuf import any_pb2
from google.rpc import status_pb2

from mcloud.common.v1 import metadata_pb2, operation_pb2
from mcloud_base import errors
from mcloud_controlplane.core import auth, contract, convert, database, listing, tables

Operation = operation_pb2.Operation
_ENDED = ("SUCCEEDED", "FAILED", "CANCELLED")
# Workflows of these names only go forward: what they delete is gone for its owner already.
FORWARD = "delete_"
_POLL_S = 2.0  # the net under the wake-ups


def message(row: Any, steps: Sequence[Any]) -> Operation:
    """Return an operation's row and those of its steps as the message."""
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
        steps=[_step(step) for step in steps],
        create_time=convert.timestamp(row.create_time),
        trace_id=row.trace_id,
    )
    if row.error:
        operation.error.CopyFrom(status_pb2.Status.FromString(bytes(row.error)))
    if row.request:
        operation.request.CopyFrom(any_pb2.Any.FromString(bytes(row.request)))
    if row.response:
        operation.response.CopyFrom(any_pb2.Any.FromString(bytes(row.response)))
    if row.end_time is not None:
        operation.end_time.CopyFrom(convert.timestamp(row.end_time))
    if row.deadline is not None:
        operation.deadline.CopyFrom(convert.timestamp(row.deadline))
    operation.progress_percent = _progress(row, steps)
    return operation


def get(shared: tables.Tables, operation_id: str) -> Operation:
    """Return an operation. Within a unit.

    Raises:
        errors.NotFound: OPERATION_NOT_FOUND.
    """
    row = shared.operation.find(operation_id)
    if row is None:
        raise errors.NotFound(
            "OPERATION_NOT_FOUND", f"there is no operation {operation_id}", id=operation_id
        )
    table = shared.operation_step
    steps = (
        table.select()
        .where(table.operation_id == operation_id)
        .order_by(table.number, table.attempt)
    )
    return message(row, list(steps))


def _step(row: Any) -> operation_pb2.OperationStep:
    step = operation_pb2.OperationStep(
        number=row.number,
        name=row.name,
        service=row.service,
        host=row.host,
        attempt=row.attempt,
        state=contract.enum_value(row.state, operation_pb2.OperationStep.State),
        start_time=convert.timestamp(row.start_time),
        detail=row.detail,
    )
    if row.end_time is not None:
        step.end_time.CopyFrom(convert.timestamp(row.end_time))
    return step


def _progress(row: Any, steps: Sequence[Any]) -> int:
    if row.state in _ENDED:
        return 100
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
        """Return a page, newest first; two statements and the revision."""
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
        table: Any = self._tables.operation
        query = table.select(table.state, table.project_id).where(table.id == id_)
        for state, project_id in query.tuples():
            if state not in _ENDED and caller.sees(project_id):
                return None
        return self._get(caller, id_)

    def _get(self, caller: auth.Caller, id_: str) -> Operation:
        operation = get(self._tables, id_)
        if not caller.sees(operation.project_id):
            raise errors.NotFound("OPERATION_NOT_FOUND", f"there is no operation {id_}", id=id_)
        return operation

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
            },
            orders={"create_time": table.create_time},
            default_order="create_time desc",
        )
        steps = self._tables.operation_step
        found: dict[str, list[Any]] = {row.id: [] for row in page.rows}
        query = steps.select().where(steps.operation_id.in_(list(found)))
        for step in query.order_by(steps.number, steps.attempt):
            found[step.operation_id].append(step)
        return operation_pb2.ListOperationsResponse(
            operations=[message(row, found[row.id]) for row in page.rows],
            next_page_token=page.next_page_token,
            revision=str(revision),
        )

    def _cancel(
        self, caller: auth.Caller, request: operation_pb2.CancelOperationRequest
    ) -> Operation:
        before = self._get(caller, request.id)
        table = self._tables.operation
        cancelled = (
            table.update(cancel_requested=True, not_before=0)
            .where(
                (table.id == request.id)
                & (table.state == "RUNNING")
                & (table.workflow != "")
                & ~table.workflow.startswith(FORWARD)
            )
            .execute()
        )
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
