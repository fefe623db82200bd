"""mcloud floating-ip."""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING, Any

import click

from mcloud_cli import builder, kinds, output
from mcloud_cli.output import Column

if TYPE_CHECKING:
    from mcloud_cli.session import Session


group = builder.group(
    "floating-ip",
    "Addresses of the outside world that lead to instances.",
    example="floating-ip list",
)


_PORT = click.option("--port", default="", type=builder.Named(kinds.PORT), help="Leads here.")
_INSTANCE = click.option(
    "--instance", default="", type=builder.Named(kinds.INSTANCE), help="Leads to its port."
)
_FIXED = click.option("--fixed-ip", default="", help="Which of the instance's addresses.")


@group.command()
@click.argument("network", type=builder.Named(kinds.NETWORK), metavar="EXTERNAL_NETWORK")
@click.option("--name", default="floating-ip", help="For people.", show_default=True)
@click.option("--address", default="", help="This one. [default: any free one]")
@_PORT
@_INSTANCE
@_FIXED
@click.option("--description", default="", help="For people.")
@builder.labels
@output.option
@click.pass_obj
def create(
    session: Session,
    network: str,
    name: str,
    address: str,
    port: str,
    instance: str,
    fixed_ip: str,
    description: str,
    labels: dict[str, str],
    form: str,
) -> None:
    """Take an address of an external network.

    Example: mcloud floating-ip create public --instance web
    """
    spec = {
        "external_network_id": session.resolve(kinds.NETWORK, network),
        "floating_ip_address": address,
        "port_id": _port(session, port, instance, fixed_ip),
        "description": description,
    }
    builder.create(session, kinds.FLOATING_IP, form, name=name, labels=labels, spec=spec)


builder.add_list(
    group,
    kinds.FLOATING_IP,
    (
        Column("ADDRESS", lambda item: str(item.status.floating_ip_address)),
        Column("LEADS TO", lambda item: str(item.status.fixed_ip_address) or "-"),
    ),
    long=(Column("PORT", lambda item: str(item.spec.port_id)),),
)


@group.command()
@builder.named(kinds.FLOATING_IP, "ADDRESS")
@output.option
@click.pass_obj
def show(session: Session, floating_address: str, form: str) -> None:
    """Show a floating address, named by address, name or id.

    Example: mcloud floating-ip show 203.0.113.7
    """
    output.resource(find(session, floating_address), form)


@group.command()
@builder.named(kinds.FLOATING_IP, "ADDRESS")
@_PORT
@_INSTANCE
@_FIXED
@output.option
@click.pass_obj
def associate(
    session: Session, floating_address: str, port: str, instance: str, fixed_ip: str, form: str
) -> None:
    """Lead a floating address to an instance or a port.

    Example: mcloud floating-ip associate 203.0.113.7 --instance web
    """
    if not port and not instance:
        raise click.UsageError("say where it leads: --instance NAME or --port NAME")
    id_ = find(session, floating_address).metadata.id
    target = _port(session, port, instance, fixed_ip)
    builder.update(session, kinds.FLOATING_IP, id_, form, {"spec.port_id": target})


@group.command()
@builder.named(kinds.FLOATING_IP, "ADDRESS")
@output.option
@click.pass_obj
def disassociate(session: Session, floating_address: str, form: str) -> None:
    """Let a floating address lead nowhere; it stays yours.

    Example: mcloud floating-ip disassociate 203.0.113.7
    """
    id_ = find(session, floating_address).metadata.id
    builder.update(session, kinds.FLOATING_IP, id_, form, {"spec.port_id": ""})


def find(session: Session, text: str) -> Any:
    """Return a floating address named by address, name or id."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return session.get(kinds.FLOATING_IP, text)
    return session.get(kinds.FLOATING_IP, text, field="floating_ip_address")


builder.add_delete(group, kinds.FLOATING_IP, example="203.0.113.7", find=find)


def _port(session: Session, port: str, instance: str, fixed_ip: str) -> str:
    """Return the id of the port that is meant; empty if none is.

    Raises:
        errors.NotFound: PORT_NOT_FOUND, the instance has none, or none with this address.
    """
    if port or not instance:
        return session.resolve(kinds.PORT, port)
    from mcloud_base import errors

    instance_id = session.resolve(kinds.INSTANCE, instance)
    ports = session.list(kinds.PORT, filter=f'owner_id="{instance_id}"')
    matching = [item for item in ports if not fixed_ip or fixed_ip in _addresses(item)]
    if not matching:
        what = f"port with address {fixed_ip}" if fixed_ip else "port"
        raise errors.NotFound("PORT_NOT_FOUND", f"instance {instance} has no {what}")
    if len(matching) > 1:
        known = ", ".join(address for item in matching for address in _addresses(item))
        raise click.UsageError(f"instance {instance} has several; say which: --fixed-ip {known}")
    return str(matching[0].metadata.id)


def _addresses(port: Any) -> list[str]:
    return [str(item.ip_address) for item in port.status.fixed_ips]
