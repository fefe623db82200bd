"""mcloud port."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from mcloud_cli import builder, kinds, output
from mcloud_cli.output import Column

if TYPE_CHECKING:
    from mcloud_cli.session import Session


group = builder.group(
    "port",
    "Connections to networks: an address, an Ethernet address, security groups.",
    example="port list",
)


@group.command()
@click.argument("name")
@click.option("--network", required=True, type=builder.Named(kinds.NETWORK), help="Its network.")
@click.option("--subnet", default="", type=builder.Named(kinds.SUBNET), help="Address from here.")
@click.option("--ip", default="", help="This address.")
@click.option("--mac", default="", help="This Ethernet address.")
@click.option(
    "--security-group",
    "groups",
    multiple=True,
    type=builder.Named(kinds.SECURITY_GROUP),
    help='May be repeated. [default: "default"]',
)
@builder.labels
@output.option
@click.pass_obj
def create(
    session: Session,
    name: str,
    network: str,
    subnet: str,
    ip: str,
    mac: str,
    groups: Sequence[str],
    labels: dict[str, str],
    form: str,
) -> None:
    """Make a port, to boot an instance with or to keep an address.

    Example: mcloud port create web-port --network lan --ip 10.0.0.10
    """
    spec: dict[str, Any] = {
        "network_id": session.resolve(kinds.NETWORK, network),
        "mac": mac,
        "security_group_ids": [session.resolve(kinds.SECURITY_GROUP, item) for item in groups],
    }
    if subnet or ip:
        address = {"subnet_id": session.resolve(kinds.SUBNET, subnet), "ip_address": ip}
        spec["fixed_ips"] = [address]
    builder.create(session, kinds.PORT, form, name=name, labels=labels, spec=spec)


builder.add_list(
    group,
    kinds.PORT,
    (
        Column("STATE", lambda item: output.state(item.status), is_state=True),
        Column("ADDRESSES", lambda item: ", ".join(ip.ip_address for ip in item.status.fixed_ips)),
        Column("MAC", lambda item: str(item.status.mac)),
        Column("OWNER", lambda item: str(item.status.owner_type) or "-"),
    ),
    long=(
        Column("NETWORK", lambda item: str(item.spec.network_id)),
        Column("OWNER ID", lambda item: str(item.status.owner_id)),
    ),
)
builder.add_show(group, kinds.PORT, example="web-port")


@group.command()
@builder.named(kinds.PORT)
@click.option("--name", default=None, help="A new name.")
@click.option(
    "--security-group",
    "groups",
    multiple=True,
    type=builder.Named(kinds.SECURITY_GROUP),
    help="All of its groups; may be repeated.",
)
@builder.labels
@output.option
@click.pass_obj
def update(
    session: Session,
    port: str,
    name: str | None,
    groups: Sequence[str],
    labels: dict[str, str],
    form: str,
) -> None:
    """Change a port.

    Example: mcloud port update web-port --security-group web
    """
    ids = [session.resolve(kinds.SECURITY_GROUP, item) for item in groups]
    changes = {"name": name, "spec.security_group_ids": ids or None, "labels": labels}
    builder.update(session, kinds.PORT, port, form, changes)


builder.add_delete(group, kinds.PORT, example="web-port")
