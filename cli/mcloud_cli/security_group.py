"""mcloud security-group."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from mcloud_cli import builder, follow, kinds, output
from mcloud_cli.output import Column

if TYPE_CHECKING:
    from mcloud_cli.session import Session


group = builder.group(
    "security-group",
    "What traffic reaches and leaves instances. What no rule allows is dropped.",
    example="security-group list",
)


@group.command()
@click.argument("name")
@click.option("--description", default="", help="For people.")
@builder.labels
@output.option
@click.pass_obj
def create(
    session: Session, name: str, description: str, labels: dict[str, str], form: str
) -> None:
    """Make a security group; it begins by allowing all that leaves.

    Example: mcloud security-group create norprod_sec_grp
    """
    spec = {"description": description}
    builder.create(session, kinds.SECURITY_GROUP, form, name=name, labels=labels, spec=spec)


builder.add_list(
    group,
    kinds.SECURITY_GROUP,
    (
        Column("RULES", lambda item: str(len(item.status.rules))),
        Column("PORTS", lambda item: str(item.status.port_count)),
        Column("DESCRIPTION", lambda item: str(item.spec.description)),
    ),
)


@group.command()
@builder.named(kinds.SECURITY_GROUP)
@output.option
@click.pass_obj
def show(session: Session, security_group: str, form: str) -> None:
    """Show a security group and its rules.

    Example: mcloud security-group show norprod_sec_grp
    """
    found = session.get(kinds.SECURITY_GROUP, security_group)
    if form != "table":
        output.resource(found, form)
        return
    rules = list(found.status.rules)
    del found.status.rules[:]
    output.resource(found, form)
    click.echo()
    _print_rules(rules, form)


@group.command()
@builder.named(kinds.SECURITY_GROUP)
@click.option("--name", default=None, help="A new name.")
@click.option("--description", default=None, help="For people.")
@builder.labels
@output.option
@click.pass_obj
def update(
    session: Session,
    security_group: str,
    name: str | None,
    description: str | None,
    labels: dict[str, str],
    form: str,
) -> None:
    """Change a security group.

    Example: mcloud security-group update web --description "of the web servers"
    """
    changes = {"name": name, "spec.description": description, "labels": labels}
    builder.update(session, kinds.SECURITY_GROUP, security_group, form, changes)


builder.add_delete(group, kinds.SECURITY_GROUP, example="web")


rule = builder.group(
    "rule", "What a group allows.", example="security-group rule list web", parent=group
)


@rule.command("create")
@builder.named(kinds.SECURITY_GROUP)
@click.option("--ingress/--egress", default=True, help="To or from the guest. [default: ingress]")
@click.option("--protocol", default="", help="tcp, udp, icmp, ipv6-icmp, a number. [default: any]")
@click.option("--dst-port", "--port", "port", default="", help="N or FIRST:LAST. [default: any]")
@click.option("--icmp-type", type=int, default=None, help="[default: any]")
@click.option("--remote-ip", "--remote-cidr", "cidr", default="", help="Range of the other side.")
@click.option(
    "--remote-group",
    default="",
    type=builder.Named(kinds.SECURITY_GROUP),
    help="The other side is in this group.",
)
@click.option("--ipv6", is_flag=True, help="For IPv6. [default: IPv4]")
@click.option("--description", default="", help="For people.")
@output.option
@click.pass_obj
def create_rule(
    session: Session,
    security_group: str,
    ingress: bool,
    protocol: str,
    port: str,
    icmp_type: int | None,
    cidr: str,
    remote_group: str,
    ipv6: bool,
    description: str,
    form: str,
) -> None:
    """Allow some traffic; answers to it are allowed too.

    Example: mcloud security-group rule create web --protocol tcp --dst-port 22
    """
    spec: dict[str, Any] = {
        "security_group_id": session.resolve(kinds.SECURITY_GROUP, security_group),
        "direction": "DIRECTION_INGRESS" if ingress else "DIRECTION_EGRESS",
        "ip_version": 6 if ipv6 or ":" in cidr else 4,
        "protocol": protocol,
        "remote_cidr": cidr,
        "remote_group_id": session.resolve(kinds.SECURITY_GROUP, remote_group),
        "description": description,
    }
    if port:
        first, _, last = port.partition(":")
        if not first.isdigit() or not (last or first).isdigit():
            raise click.BadParameter(f"{port!r} is not N or FIRST:LAST", param_hint="--dst-port")
        spec |= {"port_min": int(first), "port_max": int(last or first)}
    if icmp_type is not None:
        spec["port_min"] = icmp_type
    operation = session.call(f"{kinds.SECURITY_GROUP.service}/CreateSecurityGroupRule", spec=spec)
    operation = follow.finish(session, operation, None, form)
    if form in ("name", "id"):
        click.echo(operation.resource.id)
        return
    from mcloud_cli import contract

    output.resource(contract.unpack(operation.response), form)


@rule.command("list")
@builder.named(kinds.SECURITY_GROUP)
@output.option
@click.pass_obj
def list_rules(session: Session, security_group: str, form: str) -> None:
    """List the rules of a group.

    Example: mcloud security-group rule list web
    """
    _print_rules(list(session.get(kinds.SECURITY_GROUP, security_group).status.rules), form)


@rule.command("delete")
@click.argument("rule", metavar="RULE_ID...", nargs=-1, required=True)
@output.option
@click.pass_obj
def delete_rule(session: Session, rule: tuple[str, ...], form: str) -> None:
    """Take rules out of their groups; flows that only they allowed are cut.

    Example: mcloud security-group rule delete sgr-06h0a1b2c3d4e5f6g7h8
    """
    for id_ in rule:
        operation = session.call(f"{kinds.SECURITY_GROUP.service}/DeleteSecurityGroupRule", id=id_)
        operation = follow.finish(session, operation, None, form)
        builder.said(operation, f"Deleted security group rule {id_}", form)


def _print_rules(rules: list[Any], form: str) -> None:
    output.resources(rules, form, _RULE_COLUMNS)


def _ports(item: Any) -> str:
    spec = item.spec
    if not spec.HasField("port_min"):
        return "any"
    if not spec.HasField("port_max") or spec.port_max == spec.port_min:
        return str(spec.port_min)
    return f"{spec.port_min}:{spec.port_max}"


_RULE_COLUMNS = (
    builder.ID,
    Column("DIRECTION", lambda item: output.state(item.spec, "direction").lower()),
    Column("IP", lambda item: f"v{item.spec.ip_version or 4}"),
    Column("PROTOCOL", lambda item: str(item.spec.protocol) or "any"),
    Column("PORTS", _ports),
    Column("REMOTE", lambda item: item.spec.remote_cidr or item.spec.remote_group_id or "any"),
)
