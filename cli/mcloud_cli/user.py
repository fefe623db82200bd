"""mcloud user."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, TextIO

import click

from mcloud_cli import builder, kinds, output
from mcloud_cli.output import Column

if TYPE_CHECKING:
    from mcloud_cli.session import Session


group = builder.group("user", "Users: who logs in.", example="user list")


_PASSWORD = click.option(
    "--password-file", type=click.File(), help="Where the new password is. [default: asks]"
)


def _new_password(file: TextIO | None) -> str:
    if file is not None:
        return str(file.read()).strip()
    if not sys.stdin.isatty():
        return sys.stdin.readline().rstrip("\n")
    return str(click.prompt("New password", hide_input=True, confirmation_prompt=True, err=True))


@group.command()
@click.argument("name")
@_PASSWORD
@click.option("--email", default="", help="For people.")
@click.option("--description", default="", help="For people.")
@builder.labels
@output.option
@click.pass_obj
def create(
    session: Session,
    name: str,
    password_file: TextIO | None,
    email: str,
    description: str,
    labels: dict[str, str],
    form: str,
) -> None:
    """Make a user; needs a role on the system. Without a role one cannot log in: mcloud role add.

    Example: mcloud user create ada --password-file ada.password
    """
    builder.create(
        session,
        kinds.USER,
        form,
        name=name,
        labels=labels,
        spec={"email": email, "description": description},
        password=_new_password(password_file),
    )


builder.add_list(
    group,
    kinds.USER,
    (
        Column("ENABLED", lambda item: "no" if item.spec.disabled else "yes"),
        Column("EMAIL", lambda item: str(item.spec.email)),
        Column("DESCRIPTION", lambda item: str(item.spec.description)),
    ),
    all_projects=False,
)
builder.add_show(group, kinds.USER, example="ada")


@group.command()
@builder.named(kinds.USER)
@click.option("--name", default=None, help="A new name.")
@click.option("--email", default=None, help="For people.")
@click.option("--description", default=None, help="For people.")
@click.option("--enable/--disable", "enabled", default=None, help="Whether it can log in.")
@builder.labels
@output.option
@click.pass_obj
def update(
    session: Session,
    user: str,
    name: str | None,
    email: str | None,
    description: str | None,
    enabled: bool | None,
    labels: dict[str, str],
    form: str,
) -> None:
    """Change a user; needs a role on the system. Disabling ends the user's tokens.

    Example: mcloud user update ada --disable
    """
    changes = {
        "name": name,
        "spec.email": email,
        "spec.description": description,
        "spec.disabled": None if enabled is None else not enabled,
        "labels": labels,
    }
    builder.update(session, kinds.USER, user, form, changes)


@group.command("set-password")
@click.option("--user", default="", type=builder.Named(kinds.USER), help="Another's; needs a role.")
@_PASSWORD
@click.pass_obj
def set_password(session: Session, user: str, password_file: TextIO | None) -> None:
    """Change your password; your tokens end.

    Example: mcloud user set-password
    """
    current = ""
    if not user:
        current = os.environ.get("MCLOUD_PASSWORD", "")
        if not current:
            current = click.prompt("Current password", hide_input=True, err=True)
    session.call(
        f"{kinds.USER.service}/ChangePassword",
        user_id=session.resolve(kinds.USER, user),
        current_password=current,
        new_password=_new_password(password_file),
        as_system=bool(user),
    )
    click.echo(f"Changed the password of {user or session.username}")


builder.add_delete(group, kinds.USER, example="ada")
