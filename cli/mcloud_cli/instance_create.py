"""mcloud boot, which is mcloud instance create."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, BinaryIO

import click

from mcloud_cli import builder, follow, kinds, output
from mcloud_cli.output import Column

if TYPE_CHECKING:
    from mcloud_cli.session import Session

_NIC_KEYS = {
    "net-id": "network",
    "net": "network",
    "network": "network",
    "port-id": "port",
    "port": "port",
    "v4-fixed-ip": "ip",
    "v6-fixed-ip": "ip",
    "ip": "ip",
}


def _nics(ctx: click.Context, param: click.Parameter, value: Sequence[str]) -> list[dict[str, str]]:
    """Read net-id=NETWORK[,ip=ADDRESS] or port-id=PORT."""
    found = []
    for item in value:
        nic: dict[str, str] = {}
        for part in item.split(","):
            key, equals, text = part.partition("=")
            if not equals or key not in _NIC_KEYS or not text:
                raise click.BadParameter(
                    f"{item!r} is not net-id=NETWORK[,ip=ADDRESS] or port-id=PORT", ctx, param
                )
            nic[_NIC_KEYS[key]] = text
        if ("network" in nic) == ("port" in nic):
            raise click.BadParameter(f"{item!r} must name a network or a port", ctx, param)
        found.append(nic)
    return found


@click.command("create")
@click.argument("name")
@click.option("--flavor", required=True, type=builder.Named(kinds.FLAVOR), help="Its size.")
@click.option("--image", required=True, type=builder.Named(kinds.IMAGE), help="Starts from it.")
@click.option(
    "--nic",
    "nics",
    multiple=True,
    callback=_nics,
    help="net-id=NETWORK[,ip=ADDRESS] or port-id=PORT, by name or id; may be repeated.",
)
@click.option(
    "--security-group",
    "groups",
    multiple=True,
    type=builder.Named(kinds.SECURITY_GROUP),
    help='May be repeated. [default: "default"]',
)
@click.option("--key-name", default="", type=builder.Named(kinds.KEY_PAIR), help="Key let in.")
@click.option(
    "--volume",
    "volumes",
    multiple=True,
    type=builder.Named(kinds.VOLUME),
    help="A further disk; may be repeated.",
)
@click.option("--user-data", type=click.File("rb"), help="Script or cloud-config for the guest.")
@click.option("--config-drive", is_flag=True, help="Tell the guest by a disk, too.")
@click.option("--meta", multiple=True, callback=builder.pairs, help="KEY=VALUE shown to the guest.")
@click.option("--availability-zone", default="", help="Where it may run.")
@click.option(
    "--server-group",
    default="",
    type=builder.Named(kinds.SERVER_GROUP),
    help="Whose rule says on which hosts it may run.",
)
@click.option(
    "--host",
    default="",
    type=builder.Named(kinds.HOST),
    help="Run it here; needs a role on the system.",
)
@click.option(
    "--count",
    type=click.IntRange(1, 500),
    default=1,
    show_default=True,
    help="So many of them, named NAME-1, NAME-2, ...",
)
@click.option("--dry-run", is_flag=True, help="Check everything, room for it too; make nothing.")
@builder.labels
@follow.option
@output.option
@click.pass_obj
def create(
    session: Session,
    name: str,
    flavor: str,
    image: str,
    nics: list[dict[str, str]],
    groups: Sequence[str],
    key_name: str,
    volumes: Sequence[str],
    user_data: BinaryIO | None,
    config_drive: bool,
    meta: dict[str, str],
    availability_zone: str,
    server_group: str,
    host: str,
    count: int,
    dry_run: bool,
    labels: dict[str, str],
    wait: bool | None,
    form: str,
) -> None:
    """Build the instance NAME: sixteen steps from your login to a running machine.

    Example: mcloud boot --flavor m1.small --image debian-12 --nic net-id=lan --key-name my_key web

    Example: mcloud boot --flavor m1.small --image debian-12 --nic net-id=lan --count 20 worker
    """
    spec: dict[str, Any] = {
        "flavor_id": session.resolve(kinds.FLAVOR, flavor),
        "image_id": session.resolve(kinds.IMAGE, image),
        "nics": [_nic(session, nic) for nic in nics],
        "volumes": [{"volume_id": session.resolve(kinds.VOLUME, item)} for item in volumes],
        "security_group_ids": [session.resolve(kinds.SECURITY_GROUP, item) for item in groups],
        "key_pair_id": session.resolve(kinds.KEY_PAIR, key_name),
        "user_data": user_data.read() if user_data else b"",
        "guest_metadata": meta,
        "config_drive": config_drive,
    }
    if availability_zone or server_group or host:
        spec["placement"] = {
            "availability_zone": availability_zone,
            "server_group_id": session.resolve(kinds.SERVER_GROUP, server_group),
            "host_id": session.resolve(kinds.HOST, host),
        }
    operation = session.call(
        kinds.INSTANCE.rpc("Create"),
        name=name,
        labels=labels,
        spec=spec,
        count=count,
        validate_only=dry_run,
    )
    if dry_run:
        click.echo(f"{name} could be built now")
        return
    if form == "table":
        _begun(operation)
    if count > 1:
        operation = follow.await_end(session, operation, wait, form)
        _show_all(session, operation, form)
        follow.raise_error(operation)
        return
    operation = follow.finish(session, operation, wait, form)
    builder.shown(session, kinds.INSTANCE, operation, form)


def _begun(operation: Any) -> None:
    """Say the ids at once: what follows may be interrupted."""
    made = operation.resource.id
    if operation.HasField("parts"):
        name, count = operation.resource.name, operation.parts.count
        made = f"{name}-1 to {name}-{count}"
    click.echo(f"instance   {made}\noperation  {operation.id}")
    sys.stdout.flush()


def _show_all(session: Session, operation: Any, form: str) -> None:
    """Print what came of each of many: programs get those that there are."""
    from mcloud_cli import contract

    if form not in ("name", "id") and not follow.is_ended(operation):
        if form != "table":
            output.data(output.as_dict(operation), form)
        return
    parts = _parts(session, operation.id)
    if form == "table":
        output.resources(parts, form, _PARTS)
    elif form in ("name", "id"):
        for part in parts:
            click.echo(getattr(part.resource, form))
    else:
        built = [contract.unpack(part.response) for part in parts]
        output.data([output.as_dict(instance) for instance in built if instance], form)


def _parts(session: Session, operation_id: str) -> list[Any]:
    """Return the operations of one for many, in the order of their making."""
    found: list[Any] = []
    token = ""
    while True:
        answer = session.call(
            f"{follow.service_of(operation_id)}/ListOperations",
            filter=f'parent_id="{operation_id}"',
            order_by="create_time",
            page_token=token,
        )
        found += answer.operations
        token = answer.next_page_token
        if not token:
            return found


def _why(part: Any) -> str:
    from mcloud.scheduler.v1 import placement_pb2  # noqa: F401 (an error may carry one)
    from mcloud_base import errors

    return str(errors.from_status(part.error)) if part.error.code else ""


_PARTS = (
    Column("NAME", lambda part: str(part.resource.name)),
    Column("ID", lambda part: str(part.resource.id)),
    Column("BUILT", lambda part: output.state(part), is_state=True),
    Column("WHY NOT", _why),
)


def _nic(session: Session, nic: dict[str, str]) -> dict[str, str]:
    return {
        "network_id": session.resolve(kinds.NETWORK, nic.get("network", "")),
        "port_id": session.resolve(kinds.PORT, nic.get("port", "")),
        "ip_address": nic.get("ip", ""),
    }


boot = click.Command("boot", callback=create.callback, params=create.params, help=create.help)
