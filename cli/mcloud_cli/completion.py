"""Shell completion: the script, and the names that it asks for."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from mcloud_cli.kinds import Kind

_SOON_S = 1.0  # a shell waits for it


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script of a shell.

    Example: eval "$(mcloud completion bash)"
    """
    from mcloud_cli.main import main

    found = get_completion_class(shell)
    assert found is not None
    click.echo(found(main, {}, "mcloud", "_MCLOUD_COMPLETE").source())


def names(ctx: click.Context, kind: Kind, incomplete: str) -> list[str]:
    """Return the names of a kind that begin so; none if the cloud does not answer soon."""
    from mcloud_base import errors
    from mcloud_cli.session import Options, Session

    told = ctx.find_root().params
    session = Session(
        Options(
            cloud=told.get("cloud") or "",
            endpoint=told.get("endpoint") or "",
            ca=told.get("ca") or "",
            username=told.get("username") or "",
            project=told.get("project") or "",
            system=bool(told.get("system")),
        )
    )
    try:
        answer = session.call(kind.rpc("List"), page_size=200, timeout_s=_SOON_S)
        found = [item.metadata.name for item in getattr(answer, kind.field)]
    except (errors.Error, click.UsageError):
        return []  # a shell is no place for errors
    finally:
        session.close()
    return sorted({name for name in found if name.startswith(incomplete)})
