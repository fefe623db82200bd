"""mcloud subnet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from mcloud_cli import builder, kinds, output
from mcloud_cli.output import Column

if TYPE_CHECKING:
    from mcloud_cli.session import Session


group = builder.group("subnet", "Address ranges of networks.", example="subnet list")


def _pools(
    ctx: click.Context, param: click.Parameter, value: Sequence[str]
) -> list[dict[str, str]]:
    found = []
    for item in value:
        first, dash, last = item.partition("-")
        if not dash:
            raise click.BadParameter(f"{item!r} is not FIRST-LAST", ctx, param)
        found.append({"first_ip": first, "last_ip": last})
    return found


def _routes(
    ctx: click.Context, param: click.Parameter, value: Sequence[str]
) -> list[dict[str, str]]:
    found = []
    for item in value:
        destination, comma, hop = item.partition(",")
        if not comma:
            raise click.BadParameter(f"{item!r} is not CIDR,GATEWAY", ctx, param)
        found.append({"destination_cidr": destination, "next_hop_ip": hop})
    return found


@group.command()
@click.argument("name")
@click.option("--network", required=True, type=builder.Named(kinds.NETWORK), help="Its network.")
@click.option("--cidr", "--subnet-range", required=True, help="Such as 10.0.0.0/24.")
@click.option("--gateway", default="", help='Address, or "none". [default: the first]')
@click.option("--no-dhcp", is_flag=True, help="Guests are not told their addresses.")
@click.option("--dns", multiple=True, help="Name server told to guests; may be repeated.")
@click.option("--pool", "pools", multiple=True, callback=_pools, help="FIRST-LAST to give away.")
@click.option("--route", "routes", multiple=True, callback=_routes, help="CIDR,GATEWAY for guests.")
@builder.labels
@output.option
@click.pass_obj
def create(
    session: Session,
    name: str,
    network: str,
    cidr: str,
    gateway: str,
    no_dhcp: bool,
    dns: Sequence[str],
    pools: list[dict[str, str]],
    routes: list[dict[str, str]],
    labels: dict[str, str],
    form: str,
) -> None:
    """Make a subnet.

    Example: mcloud subnet create lan-v4 --network lan --cidr 10.0.0.0/24
    """
    found = session.get(kinds.NETWORK, network)
    spec = {
        "network_id": found.metadata.id,
        "cidr": cidr,
        "gateway_ip": "" if gateway == "none" else gateway,
        "gateway_disabled": gateway == "none",
        "dhcp_disabled": no_dhcp,
        "dns_servers": list(dns),
        "allocation_pools": pools,
        "host_routes": routes,
    }
    builder.create(
        session,
        kinds.SUBNET,
        form,
        name=name,
        labels=labels,
        spec=spec,
        # A network of the system, such as an external one, takes subnets of the system's only.
        as_system=not found.metadata.project_id,
    )


builder.add_list(
    group,
    kinds.SUBNET,
    (
        Column("CIDR", lambda item: str(item.spec.cidr)),
        Column("GATEWAY", lambda item: str(item.status.gateway_ip) or "-"),
        Column("FREE", lambda item: str(item.status.free_address_count)),
        Column("DNS", lambda item: ", ".join(item.spec.dns_servers) or "-"),
    ),
    long=(Column("NETWORK", lambda item: str(item.spec.network_id)),),
)
builder.add_show(group, kinds.SUBNET, example="lan-v4")


@group.command()
@builder.named(kinds.SUBNET)
@click.option("--name", default=None, help="A new name.")
@click.option("--dns", multiple=True, help="All name servers told to guests; may be repeated.")
@builder.labels
@output.option
@click.pass_obj
def update(
    session: Session,
    subnet: str,
    name: str | None,
    dns: Sequence[str],
    labels: dict[str, str],
    form: str,
) -> None:
    """Change a subnet.

    Example: mcloud subnet update lan-v4 --dns 9.9.9.9
    """
    changes = {"name": name, "spec.dns_servers": list(dns) or None, "labels": labels}
    builder.update(session, kinds.SUBNET, subnet, form, changes)


builder.add_delete(group, kinds.SUBNET, example="lan-v4")
