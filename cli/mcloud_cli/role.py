"""mcloud role."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from mcloud_cli import builder, follow, kinds, output

if TYPE_CHECKING:
    from mcloud_cli.session import Session

_ROLES = ("reader", "member", "manager", "admin")


group = builder.group(
    "role",
    "Who may do what, where. Each role includes the ones before: reader, member, manager, admin.",
    example="role list --user ada",
)


_USER = click.option("--user", required=True, type=builder.Named(kinds.USER), help="Who.")
_PROJECT = click.option("--project", default="", type=builder.Named(kinds.PROJECT), help="Where.")
_SYSTEM = click.option("--on-system", is_flag=True, help="On the whole system.")


def _place(project: str, on_system: bool) -> None:
    if bool(project) == on_system:
        raise click.UsageError("say where: --project NAME or --on-system")


@group.command()
@click.argument("role", type=click.Choice(_ROLES))
@_USER
@_PROJECT
@_SYSTEM
@output.option
@click.pass_obj
def add(session: Session, role: str, user: str, project: str, on_system: bool, form: str) -> None:
    """Give a user a role; needs a role on the system.

    Example: mcloud role add member --user ada --project norprod
    """
    _place(project, on_system)
    spec = {
        "user_id": session.resolve(kinds.USER, user),
        "project_id": session.resolve(kinds.PROJECT, project),
        "role": f"ROLE_{role.upper()}",
    }
    operation = session.call(kinds.ROLE_ASSIGNMENT.rpc("Create"), spec=spec)
    where = f"in project {project}" if project else "on the system"
    operation = follow.finish(session, operation, None, form)
    builder.said(operation, f"{user} is {role} {where}", form)


@group.command()
@click.argument("role", type=click.Choice(_ROLES))
@_USER
@_PROJECT
@_SYSTEM
@output.option
@click.pass_obj
def remove(
    session: Session, role: str, user: str, project: str, on_system: bool, form: str
) -> None:
    """Take a role from a user; tokens that rest on it end.

    Example: mcloud role remove member --user ada --project norprod
    """
    from mcloud_base import errors

    _place(project, on_system)
    found = _assignments(session, session.resolve(kinds.USER, user))
    project_id = session.resolve(kinds.PROJECT, project)
    for item in found:
        same_place = item.spec.project_id == project_id
        if same_place and output.state(item.spec, "role").lower() == role:
            operation = session.call(kinds.ROLE_ASSIGNMENT.rpc("Delete"), id=item.metadata.id)
            operation = follow.finish(session, operation, None, form)
            where = f"in project {project}" if project else "on the system"
            builder.said(operation, f"{user} is no longer {role} {where}", form)
            return
    raise errors.NotFound("ROLE_ASSIGNMENT_NOT_FOUND", f"{user} is not {role} there")


@group.command("list")
@click.option("--user", default="", type=builder.Named(kinds.USER), help="Only of this user.")
@output.option
@click.pass_obj
def list_(session: Session, user: str, form: str) -> None:
    """List who has which role where; needs a role on the system.

    Example: mcloud role list --user ada
    """
    found = _assignments(session, session.resolve(kinds.USER, user))
    if form != "table":
        output.resources(found, form, ())
        return
    users = {item.metadata.id: item.metadata.name for item in session.list(kinds.USER)}
    projects = {item.metadata.id: item.metadata.name for item in session.list(kinds.PROJECT)}
    rows = [
        [
            users.get(item.spec.user_id, item.spec.user_id),
            output.state(item.spec, "role").lower(),
            projects.get(item.spec.project_id, item.spec.project_id) or "(system)",
            item.metadata.id,
        ]
        for item in found
    ]
    output.table(["USER", "ROLE", "PROJECT", "ID"], rows)


def _assignments(session: Session, user_id: str) -> list[Any]:
    condition = f'user_id="{user_id}"' if user_id else ""
    return session.list(kinds.ROLE_ASSIGNMENT, filter=condition)
