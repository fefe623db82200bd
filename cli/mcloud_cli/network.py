"""mcloud network."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from mcloud_cli import builder, kinds, output
from mcloud_cli.output import Column

if TYPE_CHECKING:
    from mcloud_cli.session import Session


group = builder.group(
    "network", "Networks: what is in one hears each other, across hosts.", example="network list"
)


@group.command()
@click.argument("name")
@click.option("--description", default="", help="For people.")
@click.option("--mtu", type=int, default=0, help="Of the guests. [default: what the hosts allow]")
@click.option("--shared", is_flag=True, help="For every project; needs a role on the system.")
@click.option("--external", is_flag=True, help="Of the outside world; needs a role on the system.")
@click.option("--physical-network", default="", help="How hosts know the external network.")
@builder.labels
@output.option
@click.pass_obj
def create(
    session: Session,
    name: str,
    description: str,
    mtu: int,
    shared: bool,
    external: bool,
    physical_network: str,
    labels: dict[str, str],
    form: str,
) -> None:
    """Make a network.

    Example: mcloud network create lan
    """
    spec = {
        "description": description,
        "mtu": mtu,
        "shared": shared,
        "external": external,
        "physical_network": physical_network,
    }
    builder.create(
        session,
        kinds.NETWORK,
        form,
        name=name,
        labels=labels,
        spec=spec,
        as_system=shared or external,
    )


builder.add_list(
    group,
    kinds.NETWORK,
    (
        Column("EXTERNAL", lambda item: "yes" if item.spec.external else "no"),
        Column("SHARED", lambda item: "yes" if item.spec.shared else "no"),
        Column("MTU", lambda item: str(item.status.mtu or item.spec.mtu)),
    ),
    long=(Column("SUBNETS", lambda item: ", ".join(item.status.subnet_ids)),),
)
builder.add_show(group, kinds.NETWORK, example="lan")


@group.command()
@builder.named(kinds.NETWORK)
@click.option("--name", default=None, help="A new name.")
@click.option("--description", default=None, help="For people.")
@builder.labels
@output.option
@click.pass_obj
def update(
    session: Session,
    network: str,
    name: str | None,
    description: str | None,
    labels: dict[str, str],
    form: str,
) -> None:
    """Change a network.

    Example: mcloud network update lan --description "of the web servers"
    """
    changes = {"name": name, "spec.description": description, "labels": labels}
    builder.update(session, kinds.NETWORK, network, form, changes)


builder.add_delete(group, kinds.NETWORK, example="lan")
