"""mcloud instance; mcloud list, show, delete; mcloud capacity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from mcloud_cli import builder, follow, kinds, output
from mcloud_cli.instance_create import create as create_command
from mcloud_cli.output import Column

if TYPE_CHECKING:
    from mcloud_cli.session import Session


group = builder.group("instance", "Virtual machines.", example="instance list")


group.add_command(create_command)


@group.command("list")
@click.option("--filter", "condition", default="", help="Such as state=ACTIVE AND labels.k=v.")
@click.option("--order-by", default="", help='"create_time" or "name", with " desc" or not.')
@click.option("--limit", default=0, help="At most so many. [default: all]")
@click.option("--long", "is_long", is_flag=True, help="With ids and more.")
@click.option("--all-projects", is_flag=True, help="Of every project; needs a role on the system.")
@output.option
@click.pass_obj
def list_instances(
    session: Session,
    condition: str,
    order_by: str,
    limit: int,
    is_long: bool,
    all_projects: bool,
    form: str,
) -> None:
    """List instances.

    Example: mcloud list
    """
    items = session.list(
        kinds.INSTANCE,
        limit=limit,
        filter=condition,
        order_by=order_by,
        all_projects=all_projects,
    )
    names: dict[str, str] = {}
    floating: dict[str, str] = {}
    if form == "table" and items:
        names, floating = _network_names(session, items), _floating(session, all_projects)
    columns = [
        builder.NAME,
        Column("STATUS", lambda item: output.state(item.status), is_state=True),
        Column("ADDRESSES", lambda item: addresses(item, names, floating)),
        Column("FLAVOR", lambda item: str(item.status.flavor_name)),
    ]
    if is_long:
        columns.insert(0, builder.ID)
        columns.append(Column("IMAGE", lambda item: str(item.spec.image_id)))
        columns.append(Column("KEY", lambda item: str(item.status.key_pair_name) or "-"))
    if session.options.system or session.is_system():
        columns.append(Column("HOST", lambda item: str(item.status.host_name) or "-"))
    output.resources(items, form, (*columns, builder.AGE))


def _network_names(session: Session, items: Sequence[Any]) -> dict[str, str]:
    """Return the names of networks by id, as far as the instances do not tell them."""
    from mcloud_base import errors

    if all(address.network_name for item in items for address in item.status.addresses):
        return {}
    try:
        found = session.list(kinds.NETWORK)
    except errors.Unavailable:
        return {}
    return {item.metadata.id: item.metadata.name for item in found}


def _floating(session: Session, all_projects: bool) -> dict[str, str]:
    """Return the floating addresses by port; none where the network service does not answer."""
    from mcloud_base import errors

    try:
        found = session.list(kinds.FLOATING_IP, all_projects=all_projects)
    except errors.Unavailable:
        return {}
    return {
        item.spec.port_id: item.status.floating_ip_address for item in found if item.spec.port_id
    }


def addresses(item: Any, names: Mapping[str, str], floating: Mapping[str, str]) -> str:
    """Return an instance's addresses by network: "lan=10.0.0.5, 203.0.113.7"."""
    by_network: dict[str, list[str]] = {}
    for address in item.status.addresses:
        network = address.network_name or names.get(address.network_id, address.network_id)
        known = by_network.setdefault(network, [])
        known.append(address.ip_address)
        if address.port_id in floating:
            known.append(floating[address.port_id])
    return "; ".join(f"{name}={', '.join(known)}" for name, known in by_network.items()) or "-"


builder.add_show(group, kinds.INSTANCE, example="web")


@group.command()
@builder.named(kinds.INSTANCE)
@click.option("--name", default=None, help="A new name; its host name stays.")
@builder.labels
@output.option
@click.pass_obj
def update(
    session: Session, instance: str, name: str | None, labels: dict[str, str], form: str
) -> None:
    """Change an instance's name or labels.

    Example: mcloud instance update web --name www
    """
    changes = {"name": name, "labels": labels}
    builder.update(session, kinds.INSTANCE, instance, form, changes)


builder.add_delete(group, kinds.INSTANCE, example="web")


def _change(
    session: Session,
    verb: str,
    instance: str,
    wait: bool | None,
    form: str,
    sentence: str,
    **fields: Any,
) -> None:
    operation = session.call(
        f"{kinds.INSTANCE.service}/{verb}", id=session.resolve(kinds.INSTANCE, instance), **fields
    )
    operation = follow.finish(session, operation, wait, form)
    builder.said(operation, f"{sentence} {instance}", form)


@group.command()
@builder.named(kinds.INSTANCE)
@follow.option
@output.option
@click.pass_obj
def start(session: Session, instance: str, wait: bool | None, form: str) -> None:
    """Start an instance that is off.

    Example: mcloud instance start web
    """
    _change(session, "StartInstance", instance, wait, form, "Started")


@group.command()
@builder.named(kinds.INSTANCE)
@click.option("--force", is_flag=True, help="Power off at once.")
@follow.option
@output.option
@click.pass_obj
def stop(session: Session, instance: str, force: bool, wait: bool | None, form: str) -> None:
    """Shut an instance down; its disks and addresses stay.

    Example: mcloud instance stop web
    """
    _change(session, "StopInstance", instance, wait, form, "Stopped", force=force)


@group.command()
@builder.named(kinds.INSTANCE)
@click.option("--hard", is_flag=True, help="Reset instead of asking the guest.")
@follow.option
@output.option
@click.pass_obj
def reboot(session: Session, instance: str, hard: bool, wait: bool | None, form: str) -> None:
    """Restart an instance.

    Example: mcloud instance reboot web --hard
    """
    _change(session, "RebootInstance", instance, wait, form, "Rebooted", hard=hard)


add = builder.group(
    "add", "Give an instance something.", example="instance add volume web data", parent=group
)


remove = builder.group(
    "remove",
    "Take something from an instance.",
    example="instance remove volume web data",
    parent=group,
)


@add.command("volume")
@builder.named(kinds.INSTANCE)
@builder.named(kinds.VOLUME)
@click.option("--delete-with-instance", is_flag=True, help="The volume goes with the instance.")
@follow.option
@output.option
@click.pass_obj
def add_volume(
    session: Session,
    instance: str,
    volume: str,
    delete_with_instance: bool,
    wait: bool | None,
    form: str,
) -> None:
    """Attach a volume to an instance as a further disk.

    Example: mcloud instance add volume web data
    """
    _change(
        session,
        "AttachVolume",
        instance,
        wait,
        form,
        f"Attached volume {volume} to",
        volume_id=session.resolve(kinds.VOLUME, volume),
        delete_with_instance=delete_with_instance,
    )


@remove.command("volume")
@builder.named(kinds.INSTANCE)
@builder.named(kinds.VOLUME)
@follow.option
@output.option
@click.pass_obj
def remove_volume(
    session: Session, instance: str, volume: str, wait: bool | None, form: str
) -> None:
    """Detach a volume from an instance; its data stays.

    Example: mcloud instance remove volume web data
    """
    _change(
        session,
        "DetachVolume",
        instance,
        wait,
        form,
        f"Detached volume {volume} from",
        volume_id=session.resolve(kinds.VOLUME, volume),
    )


@group.command()
@builder.named(kinds.INSTANCE)
@output.option
@click.pass_obj
def explain(session: Session, instance: str, form: str) -> None:
    """Say why an instance is where it is, or why it is nowhere.

    Example: mcloud instance explain web
    """
    id_ = session.resolve(kinds.INSTANCE, instance)
    answer = session.call(f"{kinds.INSTANCE.service}/ExplainInstance", id=id_)
    if form != "table":
        output.data(output.as_dict(answer), form)
        return
    status = answer.instance.status
    pairs = [("instance", f"{answer.instance.metadata.name} ({answer.instance.metadata.id})")]
    pairs.append(("state", output.state(status)))
    if status.fault.reason:
        pairs.append(("fault", f"{status.fault.message} ({status.fault.reason})"))
    if status.power_reason:
        pairs.append(("power", status.power_reason))
    if answer.blocking_operation_id:
        pairs.append(("busy with", answer.blocking_operation_id))
    output.fields(pairs)
    for placement in answer.placements:
        click.echo()
        _print_placement(placement)


def _print_placement(placement: Any) -> None:
    chosen = placement.chosen_host_name or placement.chosen_host_id or "no host"
    click.echo(
        f"Attempt {placement.attempt}, {output.local(placement.time)}: {chosen}, of "
        f"{placement.considered_count} looked at, in {placement.duration_us / 1000:.1f} ms"
    )
    filters(placement.filters)
    if placement.top_hosts:
        rows = []
        for host in placement.top_hosts:
            weights = " ".join(f"{name}={host.weights[name]:.2f}" for name in sorted(host.weights))
            rows.append([host.host_name, f"{host.score:.3f}", weights, host.rejected])
        output.table(["HOST", "SCORE", "WEIGHTS", "REJECTED"], rows)


def filters(found: Any) -> None:
    """Print what each filter did."""
    rows = [
        [item.name, str(item.removed_count), str(item.left_count), item.reason] for item in found
    ]
    output.table(["FILTER", "REMOVED", "LEFT", "REASON"], rows)


@click.command()
@click.argument("flavor", type=builder.Named(kinds.FLAVOR))
@click.option("--availability-zone", default="", help="Only here.")
@output.option
@click.pass_obj
def capacity(session: Session, flavor: str, availability_zone: str, form: str) -> None:
    """Tell how many more instances of a flavor fit.

    Example: mcloud capacity m1.small
    """
    size = session.get(kinds.FLAVOR, flavor).spec
    answer = session.call(
        "scheduler.PlacementService/GetCapacity",
        resources={
            "vcpu_count": size.vcpu_count,
            "memory_mib": size.memory_mib,
            "disk_gib": size.disk_gib,
        },
        availability_zone=availability_zone,
    )
    if form == "table":
        click.echo(f"{answer.count} more of {flavor} fit, on {answer.host_count} hosts")
        if answer.filters:
            filters(answer.filters)
    elif form in ("name", "id"):
        click.echo(answer.count)
    else:
        output.data(output.as_dict(answer), form)


show_instance = group.commands["show"]
delete_instance = group.commands["delete"]
