"""mcloud flavor."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from mcloud_cli import builder, kinds, output
from mcloud_cli.output import Column

if TYPE_CHECKING:
    from mcloud_cli.session import Session


group = builder.group("flavor", "Sizes of instances.", example="flavor list")


@group.command()
@click.argument("name")
@click.option("--vcpus", type=int, required=True, help="Virtual processors.")
@click.option("--memory", "--ram", type=int, required=True, help="In MiB.")
@click.option("--disk", type=int, required=True, help="Of the root disk, in GiB.")
@click.option("--description", default="", help="For people.")
@builder.labels
@output.option
@click.pass_obj
def create(
    session: Session,
    name: str,
    vcpus: int,
    memory: int,
    disk: int,
    description: str,
    labels: dict[str, str],
    form: str,
) -> None:
    """Make a flavor; needs a role on the system.

    Example: mcloud flavor create m1.small --vcpus 1 --memory 512 --disk 1
    """
    spec = {
        "vcpu_count": vcpus,
        "memory_mib": memory,
        "disk_gib": disk,
        "description": description,
    }
    builder.create(session, kinds.FLAVOR, form, name=name, labels=labels, spec=spec)


builder.add_list(
    group,
    kinds.FLAVOR,
    (
        Column("VCPUS", lambda item: str(item.spec.vcpu_count)),
        Column("MEMORY", lambda item: f"{item.spec.memory_mib} MiB"),
        Column("DISK", lambda item: f"{item.spec.disk_gib} GiB"),
    ),
    long=(Column("DESCRIPTION", lambda item: str(item.spec.description)),),
    all_projects=False,
)
builder.add_show(group, kinds.FLAVOR, example="m1.small")
builder.add_delete(group, kinds.FLAVOR, example="m1.small")
