"""mcloud application-credential."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from mcloud_cli import builder, kinds, output
from mcloud_cli.output import Column

if TYPE_CHECKING:
    from mcloud_cli.session import Session


group = builder.group(
    "application-credential",
    "Credentials with which programs log in to one project.",
    example="application-credential list",
)


@group.command()
@click.argument("name")
@click.option(
    "--role",
    type=click.Choice(["reader", "member", "manager", "admin"]),
    default=None,
    help="At most yours. [default: yours]",
)
@click.option("--expires-in", type=int, default=0, help="Days. [default: never expires]")
@click.option("--description", default="", help="For people.")
@output.option
@click.pass_obj
def create(
    session: Session, name: str, role: str | None, expires_in: int, description: str, form: str
) -> None:
    """Make a credential and print it for the environment; its secret is shown only now.

    Example: mcloud application-credential create ci --role member > ci.env
    """
    import time

    spec: dict[str, Any] = {"description": description}
    if role:
        spec["role"] = f"ROLE_{role.upper()}"
    if expires_in:
        spec["expire_time"] = {"seconds": int(time.time()) + expires_in * 86_400}
    answer = session.call(kinds.APPLICATION_CREDENTIAL.rpc("Create"), name=name, spec=spec)
    if form in ("json", "yaml"):
        output.data(output.as_dict(answer), form)
        return
    id_ = answer.application_credential.metadata.id
    if form in ("name", "id"):
        click.echo(name if form == "name" else id_)
        return
    click.echo(f"export MCLOUD_APPLICATION_CREDENTIAL_ID={id_}")
    click.echo(f"export MCLOUD_APPLICATION_CREDENTIAL_SECRET={answer.secret}")


builder.add_list(
    group,
    kinds.APPLICATION_CREDENTIAL,
    (
        Column("ROLE", lambda item: output.state(item.spec, "role").lower()),
        Column(
            "EXPIRES",
            lambda item: (
                output.local(item.spec.expire_time)
                if item.spec.HasField("expire_time")
                else "never"
            ),
        ),
        Column("DESCRIPTION", lambda item: str(item.spec.description)),
    ),
)
builder.add_show(group, kinds.APPLICATION_CREDENTIAL, example="ci")
builder.add_delete(group, kinds.APPLICATION_CREDENTIAL, example="ci")
