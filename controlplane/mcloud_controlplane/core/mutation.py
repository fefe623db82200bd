"""The frame of every rpc that changes something: once per request id, receipt, dry run.

A servicer's method reads `return await self._frame.mutate(request, store.create_thing)`; the unit
gets the Mutation and the request, does its checks and writes, and returns the resource as it is
then, or None after `start`ing a workflow.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

from google.protobuf import any_pb2
from google.protobuf.message import Message

from mcloud.common.v1 import operation_pb2
from mcloud_base import errors, ids
from mcloud_controlplane.core import auth, contract, database, operations, tables, trace
from mcloud_controlplane.core.statements import Kept

RUNNING = "RUNNING"
SUCCEEDED = "SUCCEEDED"


@dataclass
class Mutation:
    """The mutation whose unit is running."""

    caller: auth.Caller
    call: auth.Call
    tables: tables.Tables
    operation_id: str
    validate_only: bool
    longest_s: float  # that an operation may take, whatever its workflow would
    _resource: tuple[str, str, str] = ("", "", "")
    _project_id: str = ""
    _workflow: str = ""
    _job: str = "{}"
    _deadline: int | None = None
    _known: dict[str, Any] = field(default_factory=dict)
    _steps: list[dict[str, Any]] = field(default_factory=list)
    _parent_id: str | None = None
    _parts: list[Mutation] = field(default_factory=list)

    def concerns(self, type_: str, id_: str, name: str, project_id: str = "") -> None:
        """Name the resource that the operation works on, and whose it is."""
        self._resource = (type_, id_, name)
        self._project_id = project_id

    def start(self, workflow: str, job: str, *, deadline_s: float, **known: Any) -> None:
        """Leave the rest to a workflow; `job` is JSON with every id that it will need.

        Args:
            known: what it need not read if it begins here and now (`Job.known`).
        """
        self._workflow, self._job, self._known = workflow, job, known
        self._deadline = database.now() + int(min(deadline_s, self.longest_s) * 1_000_000)

    def part(self) -> Mutation:
        """Begin an operation of its own for a part of what was asked for.

        The whole ends when its parts have ended.
        """
        id_ = ids.new(ids.prefix_of(self.operation_id))
        made = replace(self, operation_id=id_, _parent_id=self.operation_id, _steps=[], _parts=[])
        self._parts.append(made)
        return made

    def wait_for_parts(self, *, deadline_s: float) -> None:
        """Leave the rest to the parts, which have begun theirs."""
        self.start(operations.PARTS, "{}", deadline_s=deadline_s)

    def step(
        self,
        number: int,
        name: str,
        service: str,
        start: int,
        end: int | None,
        *,
        host: str = "",
        detail: str = "",
    ) -> None:
        """Add a row to the trace for what has been done already; end None: the workflow ends it."""
        self._steps.append(
            {
                "number": number,
                "name": name,
                "service": service,
                "host": host,
                "state": "RUNNING" if end is None else "DONE",
                "start_time": start,
                "end_time": end,
                "detail": detail,
            }
        )


class Frame:
    """Accepts the mutations of one database.

    Args:
        store: the database.
        shared: its shared tables.
        prefix: of its operations' ids.
        longest_s: that an operation may take.
    """

    def __init__(
        self,
        store: database.Database,
        shared: tables.Tables,
        prefix: str,
        longest_s: float = 3600.0,
    ) -> None:
        self._database = store
        self._tables = shared
        self._prefix = prefix
        self._longest_s = longest_s

    async def mutate(
        self,
        request: Any,
        unit: Callable[[Mutation, Any], Message | None],
        *,
        is_long: bool = False,
    ) -> operation_pb2.Operation:
        """Run a MUTATE's unit once per request id and return its operation.

        Args:
            is_long: it writes hundreds of rows; others are served meanwhile.

        Raises:
            errors.InvalidArgument: REQUEST_ID_REUSED, with a different request.
        """
        write = self._database.write_long if is_long else self._database.write
        with self._database.requests.accepting():
            return await write(self._mutate, auth.caller(), auth.call(), request, unit)

    def _mutate(
        self,
        caller: auth.Caller,
        call: auth.Call,
        request: Any,
        unit: Callable[[Mutation, Any], Message | None],
    ) -> operation_pb2.Operation:
        operation_id = ids.new(self._prefix)
        if not request.validate_only:
            earlier = self.accept(caller, call.method, request, operation_id)
            if earlier:
                return operations.get(self._tables, earlier)
        mutation = Mutation(
            caller, call, self._tables, operation_id, request.validate_only, self._longest_s
        )
        answer = unit(mutation, request)
        row = self._row(mutation, request, answer)
        if request.validate_only:
            database.unit().rollback = True
            return operations.message(row, [])
        steps = self._record(mutation, row)
        parts = None
        if mutation._parts:
            count = len(mutation._parts)
            parts = operation_pb2.OperationParts(count=count, running_count=count)
            for part in mutation._parts:
                self._record(part, self._row(part, request, None))
        return operations.message(row, steps, parts)

    def _record(self, mutation: Mutation, row: tables.Operation) -> list[SimpleNamespace]:
        """Write an operation and its steps so far; offer it to whoever runs it."""
        steps = list(mutation._steps)
        if row.workflow and not mutation._parts:
            first = self._database.offer(row, mutation._known)
            if first is None:
                tables.wake_runners("", row.project_id)
            elif first["number"] not in {step["number"] for step in steps}:
                steps.append(first)
        row.save(force_insert=True)
        if steps:
            trace.insert(self._tables, row.id, steps)
        tables.changed("operation", row.id, row.project_id, "ADDED")
        return [SimpleNamespace(attempt=1, **step) for step in steps]

    def accept(self, caller: auth.Caller, method: str, request: Any, made_id: str) -> str:
        """Record a request, first thing in its unit; return what its first time made, if earlier.

        Raises:
            errors.InvalidArgument: REQUEST_ID_REUSED.
        """
        table = self._tables.request
        key = dict(
            project_id=caller.project_id,
            principal_id=caller.principal_id,
            method=method,
            request_id=request.request_id,
        )
        digest = contract.digest(request, self._tables.request_key())
        accept = _ACCEPTS.get(table) or _ACCEPTS.setdefault(table, _accepting(table, [*key]))
        values = [*key.values(), digest, made_id, database.now()]
        if accept.run(self._database.peewee, values):
            return ""
        row = table.get(*(getattr(table, name) == value for name, value in key.items()))
        if row.hash != digest:
            raise errors.InvalidArgument(
                "REQUEST_ID_REUSED",
                f"request_id {request.request_id} was used for a different request; make a new one",
                request_id=request.request_id,
            )
        return str(row.operation_id)

    def _row(self, mutation: Mutation, request: Any, answer: Message | None) -> tables.Operation:
        moment = database.now()
        type_, resource_id, name = mutation._resource
        running = bool(mutation._workflow)
        packed = response = None
        if mutation._parent_id is None:  # which has it
            packed = any_pb2.Any()
            packed.Pack(contract.masked(request))
        if answer is not None:
            response = any_pb2.Any()
            response.Pack(answer)
        return self._tables.operation.fresh(
            id="" if mutation.validate_only else mutation.operation_id,
            project_id=mutation._project_id or mutation.caller.project_id,
            method=mutation.call.method,
            resource_type=type_,
            resource_id=resource_id,
            resource_name=name,
            principal_id=mutation.caller.principal_id,
            request_id=request.request_id,
            state=RUNNING if running else SUCCEEDED,
            request=packed.SerializeToString() if packed else None,
            response=response.SerializeToString() if response else None,
            workflow=mutation._workflow,
            job=mutation._job,
            trace_id=mutation.call.trace_id or secrets.token_hex(16),
            create_time=moment,
            end_time=None if running else moment,
            deadline=mutation._deadline,
            parent_id=mutation._parent_id,
        )


_ACCEPTS: dict[type, Kept] = {}  # by table


def _accepting(table: Any, key: Sequence[str]) -> Kept:
    """Return the statement that records a request; without a row if it was recorded earlier."""
    fields = [getattr(table, name) for name in (*key, "hash", "operation_id", "time")]
    return Kept(
        lambda row: (
            table.insert_many([row], fields=fields).on_conflict_ignore().returning(table.hash)
        )
    )
