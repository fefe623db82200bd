"""mcloud quota."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from mcloud_cli import builder, follow, kinds, output

if TYPE_CHECKING:
    from mcloud_cli.session import Session

_SERVICE = "compute.QuotaService"


group = builder.group("quota", "What a project may have at once.", example="quota show")


@group.command()
@click.argument("project", default="", type=builder.Named(kinds.PROJECT), required=False)
@output.option
@click.pass_obj
def show(session: Session, project: str, form: str) -> None:
    """Show limits and use, of your project or another.

    Example: mcloud quota show norprod
    """
    found = session.call(
        f"{_SERVICE}/GetQuota",
        project_id=session.resolve(kinds.PROJECT, project),
        as_system=bool(project),
    )
    if form == "table":
        rows = []
        for field in found.limits.DESCRIPTOR.fields:
            limit = getattr(found.limits, field.name)
            name = field.name.removesuffix("_count").replace("_mib", " (MiB)")
            rows.append(
                [name, str(getattr(found.usage, field.name)), "none" if limit < 0 else str(limit)]
            )
        output.table(["OF", "USED", "LIMIT"], rows)
    elif form in ("name", "id"):
        click.echo(found.project_id)
    else:
        output.data(output.as_dict(found), form)


@group.command("set")
@click.argument("project", type=builder.Named(kinds.PROJECT))
@click.option("--instances", type=int, default=None, help="-1: no limit.")
@click.option("--vcpus", type=int, default=None, help="-1: no limit.")
@click.option("--memory", type=int, default=None, help="In MiB; -1: no limit.")
@click.option("--keypairs", type=int, default=None, help="-1: no limit.")
@output.option
@click.pass_obj
def set_(
    session: Session,
    project: str,
    instances: int | None,
    vcpus: int | None,
    memory: int | None,
    keypairs: int | None,
    form: str,
) -> None:
    """Set limits of a project; needs a role on the system.

    Example: mcloud quota set norprod --instances 20 --memory -1
    """
    limits = {
        "instance_count": instances,
        "vcpu_count": vcpus,
        "memory_mib": memory,
        "key_pair_count": keypairs,
    }
    given = {name: value for name, value in limits.items() if value is not None}
    if not given:
        raise click.UsageError("say what to set; see --help")
    operation = session.call(
        f"{_SERVICE}/UpdateQuota",
        project_id=session.resolve(kinds.PROJECT, project),
        update_mask={"paths": list(given)},
        limits=given,
    )
    operation = follow.finish(session, operation, None, form)
    builder.said(operation, f"Set the quota of {project}", form)
