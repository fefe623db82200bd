"""The rows of operations' traces, as they are written: each step by whoever did it, or timed it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import peewee

from mcloud.common.v1 import operation_pb2
from mcloud_controlplane.core import contract, tables
from mcloud_controlplane.core.statements import Kept

Row = dict[str, Any]  # but for the operation and the attempt

_COLUMNS = ("number", "name", "service", "host", "state", "start_time", "end_time", "detail")
_INSERTS: dict[type, Kept] = {}
_WRITES: dict[tuple[type, tuple[str, ...]], Kept] = {}


def insert(shared: tables.Tables, operation_id: str, rows: Sequence[Row]) -> None:
    """Write the first rows of an operation that is being recorded. Within a unit."""
    table = shared.operation_step
    kept = _INSERTS.get(table) or _INSERTS.setdefault(table, _inserting(table))
    kept.run(table._meta.database, *_values(operation_id, 1, rows))


def save(
    shared: tables.Tables, operation_id: str, attempt: int, steps: list[operation_pb2.OperationStep]
) -> None:
    """Write the rows that other services timed. Within a unit."""
    names = ("name", "service", "host", "state", "start_time", "end_time", "detail")
    write(shared, operation_id, attempt, [row_of(step) for step in steps], names)


def write(
    shared: tables.Tables,
    operation_id: str,
    attempt: int,
    rows: Sequence[Row],
    changed: tuple[str, ...],
) -> None:
    """Write rows in one statement; those without a number are not shown. Within a unit.

    Args:
        changed: columns that are taken over by rows that stand.
    """
    table = shared.operation_step
    # The last of a number counts: a statement may not meet a row twice.
    found = {row["number"]: row for row in rows if row["number"]}
    if not found:
        return
    key = (table, changed)
    kept = _WRITES.get(key) or _WRITES.setdefault(key, _writing(table, changed))
    kept.run(table._meta.database, *_values(operation_id, attempt, list(found.values())))


def row_of(step: operation_pb2.OperationStep) -> Row:
    """Return a step that others timed as its row."""
    return {
        "number": step.number,
        "name": step.name,
        "service": step.service,
        "host": step.host,
        "state": contract.enum_name(step.state, operation_pb2.OperationStep.State),
        "start_time": step.start_time.ToMicroseconds(),
        "end_time": step.end_time.ToMicroseconds() if step.HasField("end_time") else None,
        "detail": step.detail,
    }


def _values(operation_id: str, attempt: int, rows: Sequence[Row]) -> list[tuple[Any, ...]]:
    return [(operation_id, attempt, *[row[name] for name in _COLUMNS]) for row in rows]


def _fields(table: Any) -> list[peewee.Field]:
    return [getattr(table, name) for name in ("operation_id", "attempt", *_COLUMNS)]


def _inserting(table: Any) -> Kept:
    return Kept(lambda *rows: table.insert_many(rows, fields=_fields(table)))


def _writing(table: Any, changed: Sequence[str]) -> Kept:
    """Return the statement that writes rows; of those that stand, these columns."""
    return Kept(
        lambda *rows: table.insert_many(rows, fields=_fields(table)).on_conflict(
            conflict_target=[table.operation_id, table.number, table.attempt],
            update={getattr(table, name): getattr(peewee.EXCLUDED, name) for name in changed},
        )
    )
