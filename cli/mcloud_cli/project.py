"""mcloud project."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from mcloud_cli import builder, kinds, output
from mcloud_cli.output import Column

if TYPE_CHECKING:
    from mcloud_cli.session import Session


group = builder.group(
    "project", "Projects: whose the instances, networks and disks are.", example="project list"
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
    """Make a project; needs a role on the system.

    Example: mcloud project create norprod
    """
    spec = {"description": description}
    builder.create(session, kinds.PROJECT, form, name=name, labels=labels, spec=spec)


builder.add_list(
    group,
    kinds.PROJECT,
    (
        Column("ENABLED", lambda item: "no" if item.spec.disabled else "yes"),
        Column("DESCRIPTION", lambda item: str(item.spec.description)),
    ),
    all_projects=False,
)
builder.add_show(group, kinds.PROJECT, example="norprod")


@group.command()
@builder.named(kinds.PROJECT)
@click.option("--name", default=None, help="A new name.")
@click.option("--description", default=None, help="For people.")
@click.option("--enable/--disable", "enabled", default=None, help="Whether one can log in to it.")
@builder.labels
@output.option
@click.pass_obj
def update(
    session: Session,
    project: str,
    name: str | None,
    description: str | None,
    enabled: bool | None,
    labels: dict[str, str],
    form: str,
) -> None:
    """Change a project; needs a role on the system.

    Example: mcloud project update norprod --disable
    """
    changes = {
        "name": name,
        "spec.description": description,
        "spec.disabled": None if enabled is None else not enabled,
        "labels": labels,
    }
    builder.update(session, kinds.PROJECT, project, form, changes)


builder.add_delete(group, kinds.PROJECT, example="norprod")
