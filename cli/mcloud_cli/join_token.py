"""mcloud join-token."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from mcloud_cli import builder, kinds, output
from mcloud_cli.output import Column

if TYPE_CHECKING:
    from mcloud_cli.session import Session


group = builder.group(
    "join-token",
    "One-use tokens with which machines become hosts.",
    example="join-token create host-1",
)


@group.command()
@click.argument("name")
@click.option("--ttl", type=int, default=3600, show_default=True, help="Seconds; at most 7 days.")
@output.option
@click.pass_obj
def create(session: Session, name: str, ttl: int, form: str) -> None:
    """Make a token for the machine NAME and print its secret, which is shown only now.

    Example: mcloud join-token create host-1 > host-1.token
    """
    answer = session.call(
        f"{kinds.JOIN_TOKEN.service}/CreateJoinToken", name=name, ttl={"seconds": ttl}
    )
    if form in ("json", "yaml"):
        output.data(output.as_dict(answer), form)
    elif form == "id":
        click.echo(answer.join_token.metadata.id)
    else:
        click.echo(answer.secret)


builder.add_list(
    group,
    kinds.JOIN_TOKEN,
    (
        Column("EXPIRES", lambda item: output.local(item.expire_time)),
        Column("HOST", lambda item: str(item.host_id) or "-"),
    ),
    all_projects=False,
)
builder.add_delete(group, kinds.JOIN_TOKEN, example="host-1")
