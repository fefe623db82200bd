"""mcloud server-group."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from mcloud_cli import builder, kinds, output
from mcloud_cli.output import Column

if TYPE_CHECKING:
    from mcloud_cli.session import Session


group = builder.group(
    "server-group",
    "Instances that are to run on one host (affinity) or on different ones (anti-affinity).",
    example="server-group list",
)


@group.command()
@click.argument("name")
@click.option(
    "--policy",
    type=click.Choice(["affinity", "anti-affinity", "soft-affinity", "soft-anti-affinity"]),
    required=True,
    help="Without soft-, what the rule does not allow is not built.",
)
@click.option(
    "--max-per-host",
    type=click.IntRange(min=1),
    help="With anti-affinity: so many may share a host. [default: 1]",
)
@builder.labels
@output.option
@click.pass_obj
def create(
    session: Session,
    name: str,
    policy: str,
    max_per_host: int | None,
    labels: dict[str, str],
    form: str,
) -> None:
    """Make a server group; mcloud boot --server-group puts instances into it.

    Example: mcloud server-group create web --policy anti-affinity
    """
    if max_per_host is not None and policy != "anti-affinity":
        raise click.UsageError("--max-per-host is for --policy anti-affinity only")
    spec = {
        "policy": f"POLICY_{policy.replace('-', '_').upper()}",
        "max_instances_per_host": max_per_host or 0,
    }
    builder.create(session, kinds.SERVER_GROUP, form, name=name, labels=labels, spec=spec)


def _policy(item: Any) -> str:
    return output.state(item.spec, "policy").lower().replace("_", "-")


builder.add_list(
    group,
    kinds.SERVER_GROUP,
    (
        Column("POLICY", _policy),
        Column("INSTANCES", lambda item: str(item.status.instance_count)),
    ),
    long=(
        Column("MAX PER HOST", lambda item: str(item.spec.max_instances_per_host or "-")),
        Column("INSTANCE IDS", lambda item: ", ".join(item.status.instance_ids) or "-"),
    ),
)
builder.add_show(group, kinds.SERVER_GROUP, example="web")


@group.command()
@builder.named(kinds.SERVER_GROUP)
@click.option("--name", default=None, help="A new name.")
@builder.labels
@output.option
@click.pass_obj
def update(
    session: Session, server_group: str, name: str | None, labels: dict[str, str], form: str
) -> None:
    """Change a server group's name or labels; its policy never changes.

    Example: mcloud server-group update web --name www
    """
    changes = {"name": name, "labels": labels}
    builder.update(session, kinds.SERVER_GROUP, server_group, form, changes)


builder.add_delete(group, kinds.SERVER_GROUP, example="web")
