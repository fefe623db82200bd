"""mcloud domain."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from mcloud_cli import builder, kinds, output
from mcloud_cli.output import Column

if TYPE_CHECKING:
    from mcloud_cli.session import Session


group = builder.group(
    "domain",
    "What hosts run for instances: each incarnation of an instance on a host.",
    example="domain list --instance web",
)


@group.command("list")
@click.option("--instance", default="", type=builder.Named(kinds.INSTANCE), help="Only of it.")
@click.option("--host", default="", type=builder.Named(kinds.HOST), help="Only on it.")
@click.option("--all", "everything", is_flag=True, help="Also those that are gone.")
@output.option
@click.pass_obj
def list_(session: Session, instance: str, host: str, everything: bool, form: str) -> None:
    """List domains; needs a role on the system.

    Example: mcloud domain list --host host-1
    """
    conditions = []
    if instance:
        conditions.append(f'instance_id="{session.resolve(kinds.INSTANCE, instance)}"')
    if host:
        conditions.append(f'host_id="{session.resolve(kinds.HOST, host)}"')
    found: list[Any] = []
    token = ""
    while True:
        answer = session.call(
            "conductor.DomainService/ListDomains",
            page_size=500,
            page_token=token,
            filter=" AND ".join(conditions),
        )
        found += [d for d in answer.domains if everything or not d.HasField("absent_time")]
        token = answer.next_page_token
        if not token:
            break
    if form == "table":
        rows = [[column.text(item) for column in _COLUMNS] for item in found]
        titles = [column.title for column in _COLUMNS]
        output.table(titles, rows, [column.is_state for column in _COLUMNS])
    elif form in ("name", "id"):
        for item in found:
            click.echo(item.id)
    else:
        output.data([output.as_dict(item) for item in found], form)


_COLUMNS = (
    Column("ID", lambda item: str(item.id)),
    Column("INSTANCE", lambda item: str(item.instance_id)),
    Column("HOST", lambda item: str(item.host_id)),
    Column("WANTED", lambda item: output.state(item, "desired_power_state")),
    Column("STATE", lambda item: output.state(item), is_state=True),
    Column("GENERATION", lambda item: f"{item.observed_generation}/{item.generation}"),
    Column("AGE", lambda item: output.age(item.create_time)),
)


@group.command()
@click.argument("domain_id")
@output.option
@click.pass_obj
def show(session: Session, domain_id: str, form: str) -> None:
    """Show a domain; needs a role on the system.

    Example: mcloud domain show d-06h0a1b2c3d4e5f6g7h8
    """
    found = session.call("conductor.DomainService/GetDomain", id=domain_id)
    if form == "table":
        output.fields(output.flat(found))
    elif form in ("name", "id"):
        click.echo(found.id)
    else:
        output.data(output.as_dict(found), form)
