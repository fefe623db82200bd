"""mcloud admin."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import click

from mcloud_cli import builder, follow, kinds, output
from mcloud_cli.upgrade_check import upgrade_check

if TYPE_CHECKING:
    from mcloud_cli.session import Session

_LONGEST_S = 600.0


group = builder.group(
    "admin", "Care for the whole cloud; needs a role on the system.", example="admin verify"
)

group.add_command(upgrade_check)


def _selection(function: Any) -> Any:
    """Give a command the options that narrow what it is about."""
    options = (
        click.option(
            "--host", default="", type=builder.Named(kinds.HOST), help="Only this host's things."
        ),
        click.option(
            "--only", "only", multiple=True, metavar="KIND", help="Only this kind; may be repeated."
        ),
        click.option(
            "--resource", "resources", multiple=True, metavar="ID",
            help="Only what is about this: the id of the thing, what its host calls it, or the id "
            "of its owner; may be repeated.",
        ),
        click.option(
            "-o", "--output", "form", type=click.Choice(["table", "json"]), default="table",
            help="How to print it; json is one finding a line.", show_default=True,
        ),
    )  # fmt: skip
    for option in reversed(options):
        function = option(function)
    return function


def _fields(session: Session, host: str, only: Sequence[str], resources: Sequence[str]) -> Any:
    """Return the fields of a request.

    Raises:
        click.UsageError: a kind that there is not.
    """
    from mcloud.conductor.v1 import verify_service_pb2

    known = verify_service_pb2.Finding.Kind
    names = [f"KIND_{name.upper().replace('-', '_')}" for name in only]
    for name in names:
        if name not in known.keys():  # noqa: SIM118 (an enum, not a mapping)
            every = ", ".join(key.removeprefix("KIND_") for key in known.keys()[1:])
            raise click.UsageError(f"{name.removeprefix('KIND_')} is no kind of finding: {every}")
    return {
        "host_id": session.resolve(kinds.HOST, host),
        "kinds": [known.Value(name) for name in names],
        "resources": list(resources),
    }


@group.command()
@_selection
@click.pass_obj
def verify(
    session: Session, host: str, only: tuple[str, ...], resources: tuple[str, ...], form: str
) -> None:
    """Prove that everything has an owner and every owner its things; exit 1 if not.

    Changes nothing. Works while the cloud does: what is in flight is no finding.

    Example: mcloud admin verify
    """
    count = 0
    answers = session.stream(
        "conductor.VerifyService/Verify",
        **_fields(session, host, only, resources),
        timeout_s=_LONGEST_S,
    )
    for answer in answers:
        if answer.HasField("finding"):
            count += 1
            _print(answer.finding, form)
        elif answer.HasField("summary"):
            _summarize(answer.summary, form)
    if count:
        raise click.exceptions.Exit(1)


@group.command()
@click.option("--dry-run", "way", flag_value="dry", help="Say what --yes would do; do nothing.")
@click.option("--yes", "way", flag_value="yes", help="Do it.")
@_selection
@click.pass_obj
def repair(
    session: Session,
    way: str | None,
    host: str,
    only: tuple[str, ...],
    resources: tuple[str, ...],
    form: str,
) -> None:
    """Mend what verify finds, as an operation that says who did what and when.

    What no row and no tombstone names on a host is removed only where --resource names it, and
    never without an id of mcloud's. Exits 1 if something could not be mended.

    Example: mcloud admin repair --dry-run
    """
    if way is None:
        raise click.UsageError("say --dry-run or --yes")
    operation = session.call(
        "conductor.VerifyService/Repair",
        **_fields(session, host, only, resources),
        validate_only=way == "dry",
        timeout_s=_LONGEST_S,
    )
    if operation.id:
        operation = follow.finish(session, operation, True, form)
    from mcloud.conductor.v1 import verify_service_pb2

    report = verify_service_pb2.RepairReport()
    operation.response.Unpack(report)
    for each in report.repairs:
        _print_repair(each, form)
    if form == "table":
        _say_end(operation.id, report)
    if any(output.state(each) == "FAILED" for each in report.repairs):
        raise click.exceptions.Exit(1)


def _print_repair(each: Any, form: str) -> None:
    if form == "json":
        click.echo(json.dumps(output.as_dict(each), ensure_ascii=False))
        return
    finding, state = each.finding, output.state(each)
    if state == "PLANNED":
        what = f"would {finding.repair}"
    elif state == "FAILED":
        what = each.error
    elif state == "LEFT" and finding.must_be_named:
        what = f"left; with --resource {finding.owner_id}: {finding.repair}"
    elif state == "LEFT":
        what = "left for a person to decide"
    else:
        what = finding.repair
    click.echo(f"{state:<10}  {_line(finding)}\n            {what}")


def _say_end(operation_id: str, report: Any) -> None:
    states = [output.state(each) for each in report.repairs]
    if not states:
        click.echo("Nothing to repair")
    elif operation_id:
        done = sum(state == "DONE" for state in states)
        click.echo(f"{done} of {len(states)} repaired; see: mcloud operation show {operation_id}")
    if report.silent_host_ids:
        click.echo(_silence(report.silent_host_ids))


def _print(finding: Any, form: str) -> None:
    if form == "json":
        click.echo(json.dumps(output.as_dict(finding), ensure_ascii=False))
        return
    click.echo(_line(finding))


def _line(finding: Any) -> str:
    where = f" on {finding.host_id}" if finding.host_id else ""
    owner = f" of {finding.owner_id}" if finding.owner_id else ""
    what = f" ({output.state(finding, 'artifact_kind')})" if finding.artifact_kind else ""
    kind = output.state(finding, "kind")
    return f"{kind}  {finding.subject}{what}{owner}{where}  {finding.detail}".rstrip()


def _summarize(summary: Any, form: str) -> None:
    if form == "json":
        click.echo(json.dumps(output.as_dict(summary), ensure_ascii=False))
        return
    click.echo(f"{summary.checked_count} things checked, {summary.finding_count} findings")
    if summary.silent_host_ids:
        click.echo(_silence(summary.silent_host_ids))


def _silence(host_ids: Iterable[str]) -> str:
    return f"Nothing is known of what these hosts have, which did not answer: {', '.join(host_ids)}"
