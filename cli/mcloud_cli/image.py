"""mcloud image."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mcloud_cli import builder, follow, kinds, output
from mcloud_cli.output import Column

if TYPE_CHECKING:
    from mcloud_cli.session import Session


group = builder.group("image", "Disk images that instances start from.", example="image list")


_FILE = click.option(
    "--file",
    "path",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    required=True,
    help="The disk image.",
)


@group.command()
@click.argument("name")
@_FILE
@click.option(
    "--disk-format",
    type=click.Choice(["qcow2", "raw"]),
    required=True,
    help="Of the file; never guessed.",
)
@click.option("--public", is_flag=True, help="For every project; needs a role on the system.")
@click.option("--min-disk", type=int, default=0, help="Least disk of a flavor, in GiB.")
@click.option("--min-memory", type=int, default=0, help="Least memory of a flavor, in MiB.")
@click.option("--protected", is_flag=True, help="Refuses deletion.")
@click.option("--property", "properties", multiple=True, callback=builder.pairs, help="KEY=VALUE.")
@click.option("--description", default="", help="For people.")
@builder.labels
@output.option
@click.pass_obj
def create(
    session: Session,
    name: str,
    path: Path,
    disk_format: str,
    public: bool,
    min_disk: int,
    min_memory: int,
    protected: bool,
    properties: dict[str, str],
    description: str,
    labels: dict[str, str],
    form: str,
) -> None:
    """Make an image and upload its bytes.

    Example: mcloud image create debian-12 --file debian-12.qcow2 --disk-format qcow2
    """
    from mcloud_cli import transfer

    spec = {
        "disk_format": f"DISK_FORMAT_{disk_format.upper()}",
        "visibility": f"IMAGE_VISIBILITY_{'PUBLIC' if public else 'PRIVATE'}",
        "min_disk_gib": min_disk,
        "min_memory_mib": min_memory,
        "protected": protected,
        "properties": properties,
        "description": description,
    }
    operation = session.call(
        kinds.IMAGE.rpc("Create"), as_system=public, name=name, labels=labels, spec=spec
    )
    operation = follow.finish(session, operation, None, form)
    output.resource(transfer.upload(session, operation.resource.id, path), form)


@group.command()
@builder.named(kinds.IMAGE)
@_FILE
@output.option
@click.pass_obj
def upload(session: Session, image: str, path: Path, form: str) -> None:
    """Upload the bytes of an image, or go on where an upload was interrupted.

    Example: mcloud image upload debian-12 --file debian-12.qcow2
    """
    from mcloud_cli import transfer

    id_ = session.resolve(kinds.IMAGE, image)
    output.resource(transfer.upload(session, id_, path), form)


@group.command()
@builder.named(kinds.IMAGE)
@click.option(
    "--file",
    "path",
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
    help="Where to; what is there of an interrupted download is kept.",
)
@click.pass_obj
def save(session: Session, image: str, path: Path) -> None:
    """Download the bytes of an image and check them.

    Example: mcloud image save debian-12 --file debian-12.qcow2
    """
    from mcloud_cli import transfer

    size = transfer.download(session, session.resolve(kinds.IMAGE, image), path)
    click.echo(f"Saved {path}: {output.size(size)}", err=True)


group.add_command(save, "download")


def _size(item: Any) -> str:
    return output.size(item.status.size_bytes) if item.status.size_bytes else "-"


builder.add_list(
    group,
    kinds.IMAGE,
    (
        Column("STATE", lambda item: output.state(item.status), is_state=True),
        Column("FORMAT", lambda item: output.state(item.spec, "disk_format").lower()),
        Column("SIZE", _size),
        Column("VISIBILITY", lambda item: output.state(item.spec, "visibility").lower()),
    ),
    long=(
        Column("DISK", lambda item: output.size(item.status.virtual_size_bytes)),
        Column("SHA256", lambda item: str(item.status.sha256)),
        Column("FAULT", lambda item: str(item.status.fault)),
    ),
)
builder.add_show(group, kinds.IMAGE, example="debian-12")


@group.command()
@builder.named(kinds.IMAGE)
@click.option("--name", default=None, help="A new name.")
@click.option("--public/--private", "public", default=None, help="For every project or not.")
@click.option("--min-disk", type=int, default=None, help="Least disk of a flavor, in GiB.")
@click.option("--min-memory", type=int, default=None, help="Least memory of a flavor, in MiB.")
@click.option("--protected/--unprotected", default=None, help="Whether it refuses deletion.")
@click.option("--description", default=None, help="For people.")
@builder.labels
@output.option
@click.pass_obj
def update(
    session: Session,
    image: str,
    name: str | None,
    public: bool | None,
    min_disk: int | None,
    min_memory: int | None,
    protected: bool | None,
    description: str | None,
    labels: dict[str, str],
    form: str,
) -> None:
    """Change an image.

    Example: mcloud image update debian-12 --protected
    """
    visibility = {True: "IMAGE_VISIBILITY_PUBLIC", False: "IMAGE_VISIBILITY_PRIVATE", None: None}
    changes = {
        "name": name,
        "spec.visibility": visibility[public],
        "spec.min_disk_gib": min_disk,
        "spec.min_memory_mib": min_memory,
        "spec.protected": protected,
        "spec.description": description,
        "labels": labels,
    }
    builder.update(session, kinds.IMAGE, image, form, changes, as_system=public is not None)


builder.add_delete(group, kinds.IMAGE, example="debian-12")
