"""What a database's records always are, and how they are made so again.

Each service lists its own as `INVARIANTS` in its `invariants.py`; those that every database has
are here. A `find` is one statement where it can be, so that it sees one moment; a `mend` looks
again, under locks, since what was found may have been mended or have changed meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import structlog

from mcloud.common.v1 import invariant_pb2
from mcloud_base import errors
from mcloud_controlplane.core import database, operations, tables
from mcloud_controlplane.core.auth import Context
from mcloud_controlplane.core.database import Database

log = structlog.get_logger()

Violation = invariant_pb2.Violation

RUNNING = ("RUNNING", "UNDOING")
OVERDUE_US = 60_000_000  # after its deadline an operation has this long to say that it failed
_LIMIT = 1000


@dataclass(frozen=True)
class Invariant:
    """A rule, as the name of the finding that says it is broken.

    `find` returns what breaks it, `mend` makes one right and tells whether it was still wrong.
    Both are units. Without a `mend` a person has to decide.
    """

    kind: str
    find: Callable[[], Iterable[Violation]]
    mend: Callable[[Violation], bool] | None = None
    repair: str = ""  # for people: what `mend` does


def of_operations(shared: tables.Tables, workflows: Collection[str]) -> Invariant:
    """Return the rule that operations are live or have ended.

    Args:
        workflows: names of those that some process can run; an operation with another will never
            end by itself.
    """
    table = shared.operation

    def find() -> Iterator[Violation]:
        late = table.deadline + OVERDUE_US < database.now()
        query = table.select(table.id, table.resource_id, table.workflow)
        for row in query.where(table.state.in_(RUNNING) & late).order_by(table.id):
            if row.workflow == operations.PARTS:
                yield Violation(
                    subject=row.id,
                    detail="its deadline is past and it has not ended",
                    repair="end it as soon as its parts have ended",
                )
                continue
            known = row.workflow in workflows
            why = "" if known else f"; nothing can run its workflow {row.workflow or '(none)'}"
            yield Violation(
                subject=row.id,
                owner_id=row.resource_id,
                detail=f"its deadline is past and it has not ended{why}",
                repair="have another runner go on with it, to undo it where it can be"
                if known
                else "end it as failed",
            )

    def mend(violation: Violation) -> bool:
        late = table.deadline + OVERDUE_US < database.now()
        this = (table.id == violation.subject) & table.state.in_(RUNNING) & late
        row = table.get_or_none(this)
        if row is None:
            return False
        if row.workflow == operations.PARTS:
            return operations.end_with_parts(shared, row.id)
        if row.workflow in workflows:
            # Whoever holds it is overtaken: the next one's lease number is higher.
            values: dict[str, Any] = {"lease_expire_time": 0, "not_before": 0}
            if row.state == "RUNNING" and not row.workflow.startswith(operations.FORWARD):
                values["cancel_requested"] = True
        else:
            lost = errors.Internal("OPERATION_LOST", f"nothing could go on with {row.workflow!r}")
            values = {
                "state": "FAILED",
                "end_time": database.now(),
                "error": errors.to_status(lost).SerializeToString(),
                "lease_number": table.lease_number + 1,
            }
        table.update(values).where(this).execute()
        tables.changed("operation", row.id, row.project_id)
        if "end_time" in values and row.parent_id is not None:
            operations.part_ended(shared, row)
        return True

    return Invariant("OPERATION_OVERDUE", find, mend)


def violations(invariants: Iterable[Invariant]) -> list[Violation]:
    """Return what breaks these rules, at most a thousand of each. Within a reading unit."""
    found = []
    for invariant in invariants:
        for violation in islice(invariant.find(), _LIMIT):
            violation.kind = invariant.kind
            if invariant.mend is not None:
                violation.repair = violation.repair or invariant.repair
            found.append(violation)
    return found


def mend(invariants: Iterable[Invariant], violation: Violation) -> bool:
    """Make one right; False: it was. Within a writing unit.

    Raises:
        errors.WrongState: NOT_MENDABLE.
    """
    for invariant in invariants:
        if invariant.kind == violation.kind and invariant.mend is not None:
            return invariant.mend(violation)
    raise errors.WrongState(
        "NOT_MENDABLE", f"{violation.kind} of {violation.subject} is for a person to decide"
    )


class InvariantServicer:
    """Serves `mcloud.<domain>.v1.InvariantService` over one database."""

    def __init__(
        self,
        opened: Database,
        invariants: Collection[Invariant],
        count: Callable[[], int] = lambda: 0,
    ) -> None:
        """Make it.

        Args:
            count: of the rows that are looked at; a unit.
        """
        self._database = opened
        self._invariants = tuple(invariants)
        self._count = count

    async def ListViolations(
        self, request: invariant_pb2.ListViolationsRequest, context: Context
    ) -> invariant_pb2.ListViolationsResponse:
        """Look."""
        found = await self._database.read(violations, self._invariants)
        return invariant_pb2.ListViolationsResponse(
            violations=found, checked_count=await self._database.read(self._count)
        )

    async def MendViolation(
        self, request: invariant_pb2.MendViolationRequest, context: Context
    ) -> invariant_pb2.MendViolationResponse:
        """Mend one."""
        violation = request.violation
        mended = await self._database.write(mend, self._invariants, violation)
        if mended:
            log.info("record mended", kind=violation.kind, subject=violation.subject)
        return invariant_pb2.MendViolationResponse(already_kept=not mended)


def count_rows(*models: Any) -> Callable[[], int]:
    """Return a unit that counts the rows of tables."""
    return lambda: sum(model.select().count() for model in models)
