"""Following an operation to its end, step by step as they happen."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import click

from mcloud_cli import output

_LONGEST_S = 3600.0  # an operation's own deadline ends it much sooner
_RECONNECT_S = 60.0
_PREFIXES = {"iop": "identity", "cop": "compute", "mop": "image", "nop": "network", "vop": "volume"}


def option(function: Any) -> Any:
    """Give a command `--wait/--no-wait`."""
    return click.option(
        "--wait/--no-wait", default=None, help="Follow it to its end. [default: on a terminal]"
    )(function)


def service_of(operation_id: str) -> str:
    """Return the service that an operation's id names: "compute.OperationService".

    Raises:
        click.UsageError: it is not the id of an operation.
    """
    from mcloud_base import ids

    domain = _PREFIXES.get(ids.prefix_of(operation_id))
    if domain is None:
        raise click.UsageError(
            f"{operation_id} is not the id of an operation; see: mcloud operation list"
        )
    return f"{domain}.OperationService"


def is_ended(operation: Any) -> bool:
    """Tell whether nothing further will happen."""
    return output.state(operation) in ("SUCCEEDED", "FAILED", "CANCELLED")


def finish(session: Any, operation: Any, wait: bool | None, form: str = "table") -> Any:
    """See an operation that has begun to its end, or say how to.

    Returns:
        The operation, ended or not.

    Raises:
        errors.Error: the one that the operation ended with.
    """
    operation = await_end(session, operation, wait, form)
    raise_error(operation)
    return operation


def await_end(session: Any, operation: Any, wait: bool | None, form: str = "table") -> Any:
    """See an operation that has begun to its end, whatever that is, or say how to."""
    if is_ended(operation):
        return operation
    if wait is False or (wait is None and not sys.stderr.isatty()):
        if form == "table":
            click.echo(f"{operation.id} goes on. See: mcloud operation wait {operation.id}")
        return operation
    return follow(session, operation)


def raise_error(operation: Any) -> None:
    """Raise the error that an operation ended with, if it did.

    Raises:
        errors.Error: by the operation's status.
    """
    if is_ended(operation) and operation.error.code:
        from mcloud.scheduler.v1 import placement_pb2  # noqa: F401 (an error may carry one)
        from mcloud_base import errors

        raise errors.from_status(operation.error)


def follow(session: Any, operation: Any) -> Any:
    """Show an operation's steps on stderr as they happen; return it when it has ended."""
    try:
        shown = _on_terminal if sys.stderr.isatty() else _line_by_line
        return shown(_changes(session, operation), operation)
    except KeyboardInterrupt:
        raise interrupted(operation.id) from None


def interrupted(operation_id: str) -> click.exceptions.Exit:
    """Say that only the command has ended, not the operation; return how to exit."""
    text = f"operation {operation_id} goes on. See: mcloud operation wait {operation_id}"
    click.echo(f"\nInterrupted; {text}", err=True)
    return click.exceptions.Exit(130)


def _changes(session: Any, operation: Any) -> Iterator[Any]:
    """Yield an operation after each change until it has ended; connect again if need be."""
    from mcloud_base import errors

    yield operation
    end = time.monotonic() + _LONGEST_S
    alive = time.monotonic()
    pause = 0.2
    while True:
        try:
            watch = f"{service_of(operation.id)}/WatchOperation"
            left = max(end - time.monotonic(), 0.001)
            for answer in session.stream(watch, id=operation.id, timeout_s=left):
                alive, pause = time.monotonic(), 0.2
                if answer.operation.id:
                    yield answer.operation
                    if is_ended(answer.operation):
                        return
        except errors.Unavailable:
            if time.monotonic() - alive > _RECONNECT_S:
                raise
        time.sleep(pause)
        pause = min(pause * 2, 5.0)


def _line_by_line(changes: Iterator[Any], operation: Any) -> Any:
    """Print a line for each step that has ended, and for each tenth of the parts."""
    seen: set[tuple[int, int, str, int]] = set()
    tenth = 0
    for operation in changes:  # noqa: B020 (the last one is the answer)
        if operation.HasField("parts") and operation.progress_percent // 10 > tenth:
            tenth = operation.progress_percent // 10
            click.echo(f"{operation.resource.name}: {parts_line(operation.parts)}", err=True)
        for step in operation.steps:
            state = output.state(step)
            key = (step.number, step.attempt, step.name, step.state)
            if key not in seen and state not in ("RUNNING", "UNDOING"):
                seen.add(key)
                click.echo(step_line(step), err=True)
    return operation


def parts_line(parts: Any) -> str:
    """Return how far the parts of an operation are: "7 of 10 done, 1 failed"."""
    counts = ((parts.failed_count, "failed"), (parts.cancelled_count, "cancelled"))
    told = "".join(f", {count} {what}" for count, what in counts if count)
    return f"{parts.succeeded_count} of {parts.count} done{told}"


def step_line(step: Any) -> str:
    """Return one step as a line: number, name, service, host, duration."""
    state = output.state(step)
    mark = "" if state in ("DONE", "RUNNING") else f"  {state}"
    detail = f"  {step.detail}" if step.detail and state != "DONE" else ""
    where = f"{step.service}@{step.host}" if step.host else step.service
    return f"{step.number:>3}  {step.name:<42} {where:<24} {duration(step):>9}{mark}{detail}"


def duration(step: Any) -> str:
    """Return how long a step took, or has taken."""
    if step.HasField("end_time"):
        taken = step.end_time.ToNanoseconds() - step.start_time.ToNanoseconds()
    elif step.start_time.seconds:
        taken = time.time_ns() - step.start_time.ToNanoseconds()
    else:
        return ""
    seconds = max(taken, 0) / 1e9
    return f"{seconds * 1000:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _on_terminal(changes: Iterator[Any], operation: Any) -> Any:
    """Keep a table of all steps up to date, in place."""
    from rich.console import Console
    from rich.live import Live

    console = Console(stderr=True, highlight=False)
    holder = [operation]
    render: Callable[[], Any] = lambda: _picture(holder[0])  # noqa: E731 (called at each refresh)
    with Live(get_renderable=render, console=console, refresh_per_second=8):
        for changed in changes:
            holder[0] = changed
    return holder[0]


_STYLES = {
    **dict.fromkeys(("DONE", "SUCCEEDED"), "green"),
    **dict.fromkeys(("RUNNING", "UNDOING"), "yellow"),
    **dict.fromkeys(("SKIPPED", "UNDONE"), "dim"),
    "FAILED": "red",
}


def _picture(operation: Any) -> Any:
    """Return all steps and the operation's state, a line each, as rich draws them."""
    from rich.console import Group
    from rich.text import Text

    def line(text: str, style: str) -> Text:
        return Text(text, style=style, no_wrap=True, overflow="ellipsis")

    lines = [line(step_line(step), _STYLES.get(output.state(step), "")) for step in operation.steps]
    state = output.state(operation)
    what = f"{operation.resource.type} {operation.resource.name or operation.resource.id}"
    if operation.HasField("parts"):
        state = f"{state}, {parts_line(operation.parts)}"
    return Group(*lines, line(f"     {what}: {state}", _STYLES.get(state, "bold")))
