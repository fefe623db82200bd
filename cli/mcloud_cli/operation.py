"""mcloud operation."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import click

from mcloud_cli import builder, follow, output
from mcloud_cli.output import Column

if TYPE_CHECKING:
    from mcloud_cli.session import Session

_DOMAINS = ("compute", "image", "network", "volume", "identity")
_WAIT_S = 60.0  # of one call; repeated


group = builder.group(
    "operation",
    "What is being done, step by step, and how it went.",
    example="operation trace cop-06h0a1b2c3d4e5f6g7h8",
)


@group.command("list")
@click.option(
    "--service",
    "domain",
    type=click.Choice(_DOMAINS),
    default="compute",
    show_default=True,
    help="Whose operations.",
)
@click.option("--filter", "condition", default="", help="Such as state=RUNNING.")
@click.option("--limit", default=20, show_default=True, help="At most so many; newest first.")
@click.option("--all-projects", is_flag=True, help="Of every project; needs a role on the system.")
@output.option
@click.pass_obj
def list_(
    session: Session, domain: str, condition: str, limit: int, all_projects: bool, form: str
) -> None:
    """List operations, newest first.

    Example: mcloud operation list --filter state=RUNNING

    Example: mcloud operation list --filter parent_id=cop-06h0a1b2c3d4e5f6g7h8 --limit 500
    """
    answer = session.call(
        f"{domain}.OperationService/ListOperations",
        page_size=limit,
        filter=condition,
        all_projects=all_projects,
    )
    items = list(answer.operations)
    if form == "table":
        rows = [[column.text(item) for column in _COLUMNS] for item in items]
        states = [column.is_state for column in _COLUMNS]
        output.table([column.title for column in _COLUMNS], rows, states)
    elif form in ("name", "id"):
        for item in items:
            click.echo(item.id)
    else:
        output.data([_dict(item) for item in items], form)


def _took(item: Any) -> str:
    end = item.end_time.ToNanoseconds() if item.HasField("end_time") else time.time_ns()
    return f"{(end - item.create_time.ToNanoseconds()) / 1e9:.2f} s"


_COLUMNS = (
    Column("ID", lambda item: str(item.id)),
    Column("METHOD", lambda item: str(item.method.rpartition("/")[2])),
    Column("RESOURCE", lambda item: str(item.resource.name or item.resource.id)),
    Column("STATE", lambda item: output.state(item), is_state=True),
    Column("TOOK", _took),
    Column("AGE", lambda item: output.age(item.create_time)),
)


@group.command()
@click.argument("operation_id")
@output.option
@click.pass_obj
def show(session: Session, operation_id: str, form: str) -> None:
    """Show an operation.

    Example: mcloud operation show cop-06h0a1b2c3d4e5f6g7h8
    """
    found = _get(session, operation_id)
    if form == "table":
        output.fields(_summary(found))
    elif form in ("name", "id"):
        click.echo(found.resource.id if form == "id" else found.resource.name)
    else:
        output.data(_dict(found), form)


def _summary(operation: Any) -> list[tuple[str, str]]:
    pairs = [
        ("id", operation.id),
        ("method", operation.method),
        ("resource", f"{operation.resource.type} {operation.resource.name}".strip()),
        ("resource id", operation.resource.id),
        ("state", output.state(operation)),
        ("progress", f"{operation.progress_percent} %"),
        ("steps", str(len(operation.steps) or "")),
        ("parts", follow.parts_line(operation.parts) if operation.HasField("parts") else ""),
        ("part of", operation.parent_id),
        ("caller", operation.caller_id),
        ("began", output.local(operation.create_time)),
        ("took", _took(operation)),
        ("trace id", operation.trace_id),
    ]
    if operation.error.code:
        from mcloud_base import errors

        pairs.append(("error", str(errors.from_status(operation.error))))
    return [(name, text) for name, text in pairs if text]


@group.command()
@click.argument("operation_id")
@output.option
@click.pass_obj
def trace(session: Session, operation_id: str, form: str) -> None:
    """Show every step of an operation: who did it, where, when and for how long.

    Example: mcloud operation trace cop-06h0a1b2c3d4e5f6g7h8
    """
    found = _get(session, operation_id)
    steps = sorted(found.steps, key=lambda step: (step.number, step.attempt))
    if form != "table":
        output.data([output.as_dict(step) for step in steps], "json" if form != "yaml" else form)
        return
    # The login (1) may have been long before; the clock starts with the request.
    begin = min((s.start_time.ToNanoseconds() for s in steps if s.number != 1), default=0)
    rows = [
        [
            str(step.number),
            str(step.attempt),
            step.name,
            step.service,
            step.host,
            _offset(step, begin),
            follow.duration(step),
            output.state(step),
            step.detail,
        ]
        for step in steps
    ]
    titles = ["#", "TRY", "STEP", "SERVICE", "HOST", "START", "TOOK", "STATE", "DETAIL"]
    output.table(titles, rows, [title == "STATE" for title in titles])
    if found.error.code:
        from mcloud_base import errors

        click.echo(f"{output.state(found)}: {errors.from_status(found.error)}")


def _offset(step: Any, begin: int) -> str:
    seconds = (step.start_time.ToNanoseconds() - begin) / 1e9
    return f"-{output.span(-seconds)}" if seconds <= -1 else f"{seconds:.3f} s"


@group.command()
@click.argument("operation_id")
@click.option("--timeout", type=float, default=600, show_default=True, help="Seconds.")
@output.option
@click.pass_obj
def wait(session: Session, operation_id: str, timeout: float, form: str) -> None:
    """Wait until an operation has ended; fail as it failed.

    Example: mcloud operation wait cop-06h0a1b2c3d4e5f6g7h8
    """
    try:
        _ended(_wait(session, operation_id, timeout), form)
    except KeyboardInterrupt:
        raise follow.interrupted(operation_id) from None


def _wait(session: Session, operation_id: str, timeout: float) -> Any:
    from mcloud_base import errors

    service = follow.service_of(operation_id)
    end = time.monotonic() + timeout
    while True:
        left = min(max(end - time.monotonic(), 0.0), _WAIT_S)
        found = session.call(
            f"{service}/WaitOperation",
            id=operation_id,
            timeout={"nanos": int(left % 1 * 1e9), "seconds": int(left)},
            timeout_s=left + 10,
        )
        if follow.is_ended(found):
            return found
        if time.monotonic() >= end:
            raise errors.DeadlineExceeded(
                "OPERATION_RUNNING", f"{operation_id} is still {output.state(found)}"
            )


@group.command()
@click.argument("operation_id")
@output.option
@click.pass_obj
def watch(session: Session, operation_id: str, form: str) -> None:
    """Follow an operation step by step until it has ended.

    Example: mcloud operation watch cop-06h0a1b2c3d4e5f6g7h8
    """
    _ended(follow.follow(session, _get(session, operation_id)), form)


@group.command()
@click.argument("operation_id")
@follow.option
@output.option
@click.pass_obj
def cancel(session: Session, operation_id: str, wait: bool | None, form: str) -> None:
    """Ask for an operation to be undone.

    Example: mcloud operation cancel cop-06h0a1b2c3d4e5f6g7h8
    """
    found = session.call(f"{follow.service_of(operation_id)}/CancelOperation", id=operation_id)
    if wait and not follow.is_ended(found):
        found = follow.follow(session, found)
    if form == "table":
        click.echo(f"{operation_id}: {output.state(found)}")
    else:
        output.data(_dict(found), "yaml" if form == "yaml" else "json")


def _get(session: Session, operation_id: str) -> Any:
    return session.call(f"{follow.service_of(operation_id)}/GetOperation", id=operation_id)


def _ended(operation: Any, form: str) -> None:
    follow.raise_error(operation)
    if form == "table":
        what = f"{operation.resource.type} {operation.resource.name or operation.resource.id}"
        click.echo(f"{operation.id} {output.state(operation)}: {what}")
    elif form in ("name", "id"):
        click.echo(operation.resource.id if form == "id" else operation.resource.name)
    else:
        output.data(_dict(operation), form)


def _dict(operation: Any) -> Any:
    """Return an operation as JSON; what it carries is of types that must be known first."""
    from mcloud.scheduler.v1 import placement_pb2  # noqa: F401 (an error may carry one)
    from mcloud_cli import contract

    contract.load(operation.method.partition("/")[0])
    return output.as_dict(operation)
