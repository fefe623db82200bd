"""The rows that a host adds to an operation's trace: its own, and those that services hand it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from mcloud.common.v1 import operation_pb2

Step = operation_pb2.OperationStep

NAMES = {
    8: ("agent", "pick the domain up; ask for its spec"),
    10: ("agent", "ask image for metadata and bytes"),
    11: ("image", "authorize, answer"),
    12: ("agent", "ask network to bind the ports"),
    13: ("network", "authorize, answer"),
    14: ("agent", "ask volume to connect the attachments"),
    15: ("volume", "authorize, answer"),
    16: ("agent", "define and start"),
}
_KEPT_ATTEMPTS = 7  # of nine rows each: DomainStatus takes 64


@dataclass
class StepLog:
    """The rows of one generation of a domain, newest attempt last.

    `changed` is called after each change of a row, so that people see it live.
    """

    host: str
    changed: Callable[[], None]
    attempt: int = 0
    rows: dict[tuple[int, int], Step] = field(default_factory=dict)  # by attempt, number

    def begin(self, attempt: int) -> None:
        """Start the rows of a further attempt."""
        self.attempt = attempt
        oldest = attempt - _KEPT_ATTEMPTS
        self.rows = {key: row for key, row in self.rows.items() if key[0] > oldest}

    @contextmanager
    def step(self, number: int) -> Iterator[Step]:
        """Record a step of the host's own; the caller may set its `detail`."""
        service, name = NAMES[number]
        row = Step(
            number=number,
            name=name,
            service=service,
            host=self.host,
            attempt=self.attempt,
            state=Step.STATE_RUNNING,
        )
        row.start_time.FromNanoseconds(time.time_ns())
        self._put(row)
        try:
            yield row
        except BaseException as error:  # a cancelled step has failed as well
            row.state = Step.STATE_FAILED
            row.detail = str(error) or type(error).__name__
            raise
        else:
            row.state = Step.STATE_DONE
        finally:
            row.end_time.FromNanoseconds(time.time_ns())
            self.changed()

    def skip(self, reason: str, *numbers: int) -> None:
        """Record that steps were not needed."""
        for number in numbers:
            service, name = NAMES[number]
            row = Step(
                number=number,
                name=name,
                service=service,
                host=self.host,
                attempt=self.attempt,
                state=Step.STATE_SKIPPED,
                detail=reason,
            )
            row.start_time.FromNanoseconds(time.time_ns())
            row.end_time.CopyFrom(row.start_time)
            self._put(row)

    def collect(self, step: Step) -> None:
        """Record a row that a service has returned; of several with one number, make one.

        A domain with three NICs binds three ports in its one step 12.
        """
        row = Step()
        row.CopyFrom(step)
        row.attempt = self.attempt
        earlier = self.rows.get((self.attempt, row.number))
        if earlier and earlier.state != Step.STATE_SKIPPED:
            if earlier.start_time.ToNanoseconds() < row.start_time.ToNanoseconds():
                row.start_time.CopyFrom(earlier.start_time)
            if earlier.state == Step.STATE_FAILED:
                row.state = earlier.state
            details = [text for text in (earlier.detail, row.detail) if text]
            row.detail = "; ".join(dict.fromkeys(details))
        self._put(row)

    def has(self, number: int) -> bool:
        """Whether this attempt has a row with the number."""
        return (self.attempt, number) in self.rows

    def listing(self) -> list[Step]:
        """Return the rows by attempt and number."""
        return [self.rows[key] for key in sorted(self.rows)]

    def _put(self, row: Step) -> None:
        self.rows[self.attempt, row.number] = row
        self.changed()
