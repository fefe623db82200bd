"""mcloud login, logout, token, endpoint."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import click

from mcloud_cli import builder, output, profile

if TYPE_CHECKING:
    from mcloud_cli.session import Session


@click.command()
@click.option("--cloud", default="", help="Name to remember it by.  [default: default]")
@click.option("--endpoint", default="", help="host:port.")
@click.option("--ca", type=click.Path(exists=True, dir_okay=False), help="Authority's file (PEM).")
@click.option("--username", default="", help="Who you are.")
@click.option("--project", default=None, help="Name or id.  [default: your only one]")
@click.option("--system", is_flag=True, help="Only the role on the whole system.")
@click.option(
    "--password-file", type=click.File(), help="Instead of the prompt and MCLOUD_PASSWORD."
)
@click.pass_context
def login(
    ctx: click.Context,
    cloud: str,
    endpoint: str,
    ca: str | None,
    username: str,
    project: str | None,
    system: bool,
    password_file: TextIO | None,
) -> None:
    """Log in to a cloud and remember it; never the password.

    Draws a token for your project and, if you have a role there, one for the whole system.

    Example: mcloud login --endpoint cloud.example:7700 --ca ca.pem --username ada
    """
    from mcloud_base import errors
    from mcloud_cli.session import Options, Session

    told = ctx.obj.options
    name = cloud or told.cloud or profile.find("")[0] or "default"
    known = profile.find("")[1] if profile.find("")[0] == name else _known(name)
    chosen = profile.Profile(
        endpoint=endpoint or told.endpoint or known.endpoint,
        ca=ca or told.ca or known.ca,
        username=username or told.username or known.username,
        project=project if project is not None else told.project or known.project,
    )
    if not chosen.endpoint:
        raise click.UsageError("say where the cloud is: --endpoint HOST:PORT")
    if not chosen.username:
        chosen = profile.Profile(
            chosen.endpoint, chosen.ca, click.prompt("User name", err=True), chosen.project
        )
    new = Session(
        Options(
            endpoint=chosen.endpoint,
            ca=chosen.ca,
            username=chosen.username,
            project=chosen.project,
        )
    )
    ctx.find_root().obj = new  # errors name the endpoint that was tried
    secret = password_file.read().strip() if password_file else _password(chosen)
    tokens = []
    refusals: list[errors.Error] = []
    try:
        for way in (True,) if system or told.system else (False, True):
            try:
                tokens.append(new.log_in(system=way, password=secret))
            except errors.PermissionDenied as error:
                refusals.append(error)
            except errors.InvalidArgument as error:
                refusals.append(error)  # PROJECT_REQUIRED; a role on the system may still do
    finally:
        new.close()
    if not tokens or (refusals and refusals[0].reason == "PROJECT_REQUIRED"):
        raise refusals[0]
    ca_file = _keep_authority(name, chosen.ca)
    profile.save(name, profile.Profile(chosen.endpoint, ca_file, chosen.username, chosen.project))
    places = [f"project {token.project_name}" for token in tokens if not token.system]
    places += ["the whole system"] * any(token.system for token in tokens)
    click.echo(f"Logged in to {chosen.endpoint} as {chosen.username}: {', '.join(places)}")


def _known(name: str) -> profile.Profile:
    try:
        return profile.find(name)[1]
    except click.UsageError:
        return profile.Profile()  # a new one


def _password(chosen: profile.Profile) -> str:
    if password := os.environ.get("MCLOUD_PASSWORD"):
        return password
    if os.environ.get("MCLOUD_APPLICATION_CREDENTIAL_SECRET"):
        return ""
    if not sys.stdin.isatty():
        return sys.stdin.readline().rstrip("\n")
    who = f"{chosen.username} at {chosen.endpoint}"
    return str(click.prompt(f"Password of {who}", hide_input=True, err=True))


def _keep_authority(name: str, ca: str) -> str:
    if not ca:
        return ""
    kept = profile.directory() / "ca" / f"{name}.pem"
    profile.write(kept, Path(ca).expanduser().read_bytes())
    return str(kept)


@click.command()
@click.pass_obj
def logout(session: Session) -> None:
    """Forget the tokens of the cloud in use; its address stays known.

    Example: mcloud logout
    """
    count = profile.forget_tokens(f"{session.endpoint}|")
    click.echo(f"Forgot {count} token{'' if count == 1 else 's'} of {session.endpoint}")


token = builder.group("token", "The token in use.", example="token show")


@token.command("show")
@click.option("--value", is_flag=True, help="The token itself, for other programs. Keep it secret.")
@output.option
@click.pass_obj
def show_token(session: Session, value: bool, form: str) -> None:
    """Show whose token is in use, for what, and how long.

    Example: mcloud token show
    """
    import datetime

    found = session.token(system=session.options.system)
    if value:
        click.echo(found.token)
        return
    expiry = ""
    if found.expire_time != float("inf"):
        moment = datetime.datetime.fromtimestamp(found.expire_time, datetime.UTC)
        expiry = (
            moment.astimezone().strftime("%Y-%m-%d %H:%M:%S")
            if form == "table"
            else moment.strftime("%Y-%m-%dT%H:%M:%SZ")
        )
    pairs = {
        "endpoint": session.endpoint,
        "user_name": found.user_name,
        "project_name": found.project_name,
        "project_id": found.project_id,
        "system": found.system,
        "expire_time": expiry,
    }
    if form == "table":
        output.fields([(name, str(text)) for name, text in pairs.items() if text])
    elif form in ("name", "id"):
        click.echo(found.user_name if form == "name" else found.project_id)
    else:
        output.data(pairs, form)


@token.command("revoke")
@click.option("--user", default="", help="Another's; needs a role on the system.")
@click.pass_obj
def revoke_tokens(session: Session, user: str) -> None:
    """End every token of yours that was issued until now.

    Example: mcloud token revoke
    """
    from mcloud_cli import kinds

    session.call(
        "identity.UserService/RevokeTokens",
        user_id=session.resolve(kinds.USER, user),
        as_system=bool(user),
    )
    if not user:
        profile.forget_tokens(f"{session.endpoint}|{session.username}|")
    click.echo(f"Ended the tokens of {user or session.username}")


endpoint = builder.group("endpoint", "Where the services are.", example="endpoint list")


@endpoint.command("list")
@output.option
@click.pass_obj
def list_endpoints(session: Session, form: str) -> None:
    """List the services and their addresses.

    Example: mcloud endpoint list
    """
    answer = session.call("identity.EndpointService/ListEndpoints")
    if form == "table":
        rows = [[item.service, item.address or session.endpoint] for item in answer.endpoints]
        output.table(["SERVICE", "ADDRESS"], rows)
    elif form in ("name", "id"):
        for item in answer.endpoints:
            click.echo(item.service)
    else:
        output.data(output.as_dict(answer), form)
