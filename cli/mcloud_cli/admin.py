"""mcloud admin."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from mcloud_cli import builder, kinds, output

if TYPE_CHECKING:
    from mcloud_cli.session import Session

_LONGEST_S = 600.0


group = builder.group(
    "admin", "Care for the whole cloud; needs a role on the system.", example="admin verify"
)


@group.command()
@click.option("--host", default="", type=builder.Named(kinds.HOST), help="Only its things.")
@click.option(
    "-o",
    "--output",
    "form",
    type=click.Choice(["table", "json"]),
    default="table",
    help="How to print it; json is one finding a line.",
    show_default=True,
)
@click.pass_obj
def verify(session: Session, host: str, form: str) -> None:
    """Prove that everything has an owner and every owner its things; exit 1 if not.

    Changes nothing. Findings are printed as they come.

    Example: mcloud admin verify
    """
    count = 0
    answers = session.stream(
        "conductor.VerifyService/Verify",
        host_id=session.resolve(kinds.HOST, host),
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


def _print(finding: Any, form: str) -> None:
    if form == "json":
        click.echo(json.dumps(output.as_dict(finding), ensure_ascii=False))
        return
    where = f" on {finding.host_id}" if finding.host_id else ""
    owner = f" of {finding.owner_id}" if finding.owner_id else ""
    what = f" ({output.state(finding, 'artifact_kind')})" if finding.artifact_kind else ""
    kind = output.state(finding, "kind")
    click.echo(f"{kind}  {finding.subject}{what}{owner}{where}  {finding.detail}".rstrip())


def _summarize(summary: Any, form: str) -> None:
    if form == "json":
        click.echo(json.dumps(output.as_dict(summary), ensure_ascii=False))
        return
    click.echo(f"{summary.checked_count} things checked, {summary.finding_count} findings")
    if summary.silent_host_ids:
        silent = ", ".join(summary.silent_host_ids)
        click.echo(f"Nothing is known of what these silent hosts have: {silent}")
