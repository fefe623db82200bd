"""mcloud router."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from mcloud_cli import builder, follow, kinds, output
from mcloud_cli.output import Column

if TYPE_CHECKING:
    from mcloud_cli.session import Session


group = builder.group(
    "router", "Routers between networks, and to the outside world.", example="router list"
)


@group.command()
@click.argument("name")
@click.option(
    "--external-network",
    "--external-gateway",
    "network",
    default="",
    type=builder.Named(kinds.NETWORK),
    help="Where its gateway is.",
)
@click.option("--no-snat", is_flag=True, help="Only floating addresses reach out.")
@click.option("--description", default="", help="For people.")
@builder.labels
@output.option
@click.pass_obj
def create(
    session: Session,
    name: str,
    network: str,
    no_snat: bool,
    description: str,
    labels: dict[str, str],
    form: str,
) -> None:
    """Make a router.

    Example: mcloud router create gate --external-network public
    """
    spec = {
        "external_network_id": session.resolve(kinds.NETWORK, network),
        "snat_disabled": no_snat,
        "description": description,
    }
    builder.create(session, kinds.ROUTER, form, name=name, labels=labels, spec=spec)


builder.add_list(
    group,
    kinds.ROUTER,
    (
        Column("GATEWAY", lambda item: str(item.status.gateway_ip) or "-"),
        Column(
            "INTERFACES", lambda item: ", ".join(leg.ip_address for leg in item.status.interfaces)
        ),
    ),
    long=(Column("HOST", lambda item: str(item.status.host_id)),),
)
builder.add_show(group, kinds.ROUTER, example="gate")


@group.command()
@builder.named(kinds.ROUTER)
@click.option("--name", default=None, help="A new name.")
@click.option("--description", default=None, help="For people.")
@click.option(
    "--external-network", "network", default=None, help='Where its gateway is, or "none".'
)
@click.option("--snat/--no-snat", default=None, help="Whether guests reach out without floating.")
@builder.labels
@output.option
@click.pass_obj
def update(
    session: Session,
    router: str,
    name: str | None,
    description: str | None,
    network: str | None,
    snat: bool | None,
    labels: dict[str, str],
    form: str,
) -> None:
    """Change a router.

    Example: mcloud router update gate --external-network public
    """
    if network is not None:
        network = "" if network == "none" else session.resolve(kinds.NETWORK, network)
    changes = {
        "name": name,
        "spec.description": description,
        "spec.external_network_id": network,
        "spec.snat_disabled": None if snat is None else not snat,
        "labels": labels,
    }
    builder.update(session, kinds.ROUTER, router, form, changes)


builder.add_delete(group, kinds.ROUTER, example="gate")


add = builder.group(
    "add", "Join something to a router.", example="router add subnet gate lan-v4", parent=group
)


remove = builder.group(
    "remove",
    "Take something off a router.",
    example="router remove subnet gate lan-v4",
    parent=group,
)


@add.command("subnet")
@builder.named(kinds.ROUTER)
@builder.named(kinds.SUBNET)
@output.option
@click.pass_obj
def add_subnet(session: Session, router: str, subnet: str, form: str) -> None:
    """Join a subnet to a router, at the subnet's gateway address.

    Example: mcloud router add subnet gate lan-v4
    """
    _change(session, "AddRouterInterface", router, subnet, form, "Joined {} to {}")


@remove.command("subnet")
@builder.named(kinds.ROUTER)
@builder.named(kinds.SUBNET)
@output.option
@click.pass_obj
def remove_subnet(session: Session, router: str, subnet: str, form: str) -> None:
    """Take a subnet off a router.

    Example: mcloud router remove subnet gate lan-v4
    """
    _change(session, "RemoveRouterInterface", router, subnet, form, "Took {} off {}")


def _change(
    session: Session, verb: str, router: str, subnet: str, form: str, sentence: str
) -> None:
    operation = session.call(
        f"{kinds.ROUTER.service}/{verb}",
        id=session.resolve(kinds.ROUTER, router),
        subnet_id=session.resolve(kinds.SUBNET, subnet),
    )
    operation = follow.finish(session, operation, None, form)
    builder.said(operation, sentence.format(f"subnet {subnet}", f"router {router}"), form)
