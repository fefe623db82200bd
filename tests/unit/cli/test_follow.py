"""The sixteen steps as they are shown."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import click
import pytest

from mcloud.common.v1 import operation_pb2
from mcloud_base import errors
from mcloud_cli import follow

OPERATION_ID = "cop-06h07swr7vmatj37gvn9"
Step = operation_pb2.OperationStep

STEPS = (
    (1, "authenticate", "identity"),
    (2, "request", "compute"),
    (3, "authorize", "compute"),
    (4, "record, reserve", "compute"),
    (5, "ask for a host", "conductor"),
    (6, "take the request", "scheduler"),
    (7, "filter, weigh, claim", "scheduler"),
    (8, "pick the domain up", "agent"),
    (9, "answer with the spec", "conductor"),
    (10, "ask for the image", "agent"),
    (11, "authorize the image", "image"),
    (12, "ask for the network", "agent"),
    (13, "authorize the network", "network"),
    (14, "ask for volumes", "agent"),
    (15, "authorize volumes", "volume"),
    (16, "start the domain", "agent"),
)


def _operation(done: int, *, state: int = operation_pb2.Operation.STATE_RUNNING) -> Any:
    """Return an operation whose first steps are done and whose next one runs."""
    operation = operation_pb2.Operation(id=OPERATION_ID, state=state)
    operation.resource.type, operation.resource.name = "instance", "web"
    for number, name, service in STEPS[: done + 1]:
        step = operation.steps.add(number=number, name=name, service=service, host="host-1")
        step.attempt, step.state = 1, Step.STATE_DONE if number <= done else Step.STATE_RUNNING
        step.start_time.FromMilliseconds(1_700_000_000_000 + 10 * number)
        if number <= done:
            step.end_time.FromMilliseconds(1_700_000_000_000 + 10 * number + number * number * 10)
        if number in (14, 15):
            step.state, step.detail = Step.STATE_SKIPPED, "no volume was asked for"
    return operation


def _whole() -> list[Any]:
    changes = [_operation(done) for done in (2, 4, 4, 9, 15)]
    return [*changes, _operation(16, state=operation_pb2.Operation.STATE_SUCCEEDED)]


def test_each_step_is_a_line_once(
    capsys: pytest.CaptureFixture[str], golden: Callable[[str, str], None]
) -> None:
    ended = follow._line_by_line(iter(_whole()), _operation(0))

    assert follow.is_ended(ended)
    golden("cli/follow.txt", capsys.readouterr().err)


def test_terminal_shows_all_steps_and_the_end() -> None:
    from rich.console import Console

    console = Console(width=140, record=True, force_terminal=False)
    console.print(follow._picture(_whole()[-1]))

    *lines, end = console.export_text().splitlines()
    assert [line.split()[0] for line in lines] == [str(number) for number, _, _ in STEPS]
    assert all(name in line for line, (_, name, _) in zip(lines, STEPS, strict=True))
    assert end.strip() == "instance web: SUCCEEDED"


def test_undoing_is_shown_beside_what_was_done(capsys: pytest.CaptureFixture[str]) -> None:
    failed = _operation(4, state=operation_pb2.Operation.STATE_UNDOING)
    failed.steps[4].state, failed.steps[4].detail = Step.STATE_FAILED, "no host"
    undone = operation_pb2.Operation()
    undone.CopyFrom(failed)
    undone.steps[3].state = Step.STATE_UNDONE
    undone.state = operation_pb2.Operation.STATE_FAILED

    follow._line_by_line(iter([failed, undone]), failed)

    lines = capsys.readouterr().err.splitlines()
    assert lines[4].endswith("FAILED  no host")
    assert lines[5].startswith("  4  record, reserve")
    assert lines[5].endswith("UNDONE")


class _Session:
    """Answers watches from a script; an error in it is raised."""

    def __init__(self, *watches: list[Any]) -> None:
        self._watches = list(watches)

    def stream(self, name: str, **fields: Any) -> Iterator[Any]:
        assert name == "compute.OperationService/WatchOperation"
        for item in self._watches.pop(0):
            if isinstance(item, BaseException):
                raise item
            yield operation_pb2.WatchOperationResponse(operation=item)


def test_lost_watch_is_taken_up_again(capsys: pytest.CaptureFixture[str]) -> None:
    gone = errors.Unavailable("UNAVAILABLE", "gone")
    session = _Session([_operation(3), gone], [gone], _whole())

    ended = follow.follow(session, _operation(0))

    assert follow.is_ended(ended)
    assert len(capsys.readouterr().err.splitlines()) == 16


def test_interrupt_leaves_the_operation_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    session = _Session([_operation(3), KeyboardInterrupt()])

    with pytest.raises(click.exceptions.Exit) as caught:
        follow.follow(session, _operation(0))

    assert caught.value.exit_code == 130
    assert f"operation {OPERATION_ID} goes on" in capsys.readouterr().err


def test_end_in_error_raises_it() -> None:
    failed = _operation(4, state=operation_pb2.Operation.STATE_FAILED)
    failed.error.CopyFrom(errors.to_status(errors.Exhausted("NO_VALID_HOST", "no host")))

    with pytest.raises(errors.Exhausted, match="no host"):
        follow.finish(None, failed, True)


@pytest.mark.parametrize(
    ("id_", "service"),
    [
        ("cop-06h07swr7vmatj37gvn9", "compute.OperationService"),
        ("vop-06h07swr7vmatj37gvn9", "volume.OperationService"),
        ("iop-06h07swr7vmatj37gvn9", "identity.OperationService"),
    ],
)
def test_prefix_names_the_service(id_: str, service: str) -> None:
    assert follow.service_of(id_) == service


def test_other_ids_are_usage_errors() -> None:
    with pytest.raises(click.UsageError, match="not the id of an operation"):
        follow.service_of("i-06h07swr7vmatj37gvn9")
