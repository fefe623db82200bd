"""mcloud volume."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from mcloud_cli import builder, follow, kinds, output
from mcloud_cli.output import Column

if TYPE_CHECKING:
    from mcloud_cli.session import Session


group = builder.group("volume", "Disks that outlive instances.", example="volume list")


@group.command()
@click.argument("name")
@click.option("--size", type=int, required=True, help="In GiB.")
@click.option("--description", default="", help="For people.")
@builder.labels
@follow.option
@output.option
@click.pass_obj
def create(
    session: Session,
    name: str,
    size: int,
    description: str,
    labels: dict[str, str],
    wait: bool | None,
    form: str,
) -> None:
    """Make an empty volume.

    Example: mcloud volume create data --size 1 --wait
    """
    spec = {"size_gib": size, "description": description}
    builder.create(session, kinds.VOLUME, form, wait=wait, name=name, labels=labels, spec=spec)


builder.add_list(
    group,
    kinds.VOLUME,
    (
        Column("STATE", lambda item: output.state(item.status), is_state=True),
        Column("SIZE", lambda item: f"{item.spec.size_gib} GiB"),
        Column("INSTANCE", lambda item: str(item.status.instance_id) or "-"),
    ),
    long=(
        Column("HOST", lambda item: str(item.status.host_id)),
        Column("FAULT", lambda item: str(item.status.fault)),
    ),
)
builder.add_show(group, kinds.VOLUME, example="data")


@group.command()
@builder.named(kinds.VOLUME)
@click.option("--name", default=None, help="A new name.")
@click.option("--description", default=None, help="For people.")
@builder.labels
@output.option
@click.pass_obj
def update(
    session: Session,
    volume: str,
    name: str | None,
    description: str | None,
    labels: dict[str, str],
    form: str,
) -> None:
    """Change a volume.

    Example: mcloud volume update data --description "of the database"
    """
    changes = {"name": name, "spec.description": description, "labels": labels}
    builder.update(session, kinds.VOLUME, volume, form, changes)


builder.add_delete(group, kinds.VOLUME, example="data")
