"""mcloud-agent: the one program of mcloud on a hypervisor host.

Imports stand inside the commands: help must not wait for gRPC, and only `run` needs libvirt.
"""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mcloud_agents.simulate.command import simulate
from mcloud_base import cores

if TYPE_CHECKING:
    from mcloud_agents.enrolment import Files
    from mcloud_agents.settings import Settings

_CONFIG = click.option(
    "--config",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("/etc/mcloud/agent.toml"),
    show_default=True,
    help="The host's settings.",
)


@click.group()
def main() -> None:
    """Make this machine a host of an mcloud, and run its guests."""
    cores.forbid()


@main.command()
@_CONFIG
@click.option(
    "--join-token",
    envvar="MCLOUD_JOIN_TOKEN",
    required=True,
    help="From `mcloud join-token create NAME`; the environment hides it from `ps`.",
)
@click.option("--control-plane", default="", help="HOST:PORT of the public port.")
@click.option("--name", default="", help="Of the host. [default: the settings' name]")
@click.option("--force", is_flag=True, help="Enrol again, although it is enrolled already.")
def enrol(config: Path, join_token: str, control_plane: str, name: str, force: bool) -> None:
    """Make this machine a host. Harmless to repeat.

    Example: mcloud-agent enrol --join-token s3cr3t.ab12… --control-plane 192.0.2.1:7700
    """
    from mcloud_agents import enrolment
    from mcloud_base import errors

    try:
        settings = _settings(config)
        membership = asyncio.run(
            enrolment.enrol(
                _files(settings),
                control_plane or settings.control_plane,
                join_token,
                name=name or settings.name,
                underlay_ip=settings.underlay_ip,
                force=force,
            )
        )
    except (errors.Error, OSError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"This machine is the host {membership.name} ({membership.host_id}).")
    click.echo("Now run: mcloud-agent run")


@main.command()
@_CONFIG
def run(config: Path) -> None:
    """Run the agent in the foreground. When it ends, guests run on."""
    from mcloud_agents import program
    from mcloud_agents.state import State
    from mcloud_base import errors, logs

    async def until_told() -> None:
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        await program.run(settings, _files(settings), State(settings.state_dir), stop)

    try:
        settings = _settings(config)
        logs.configure(settings.log_format, settings.log_level)
        asyncio.run(until_told())
    except errors.Error as error:
        raise click.ClickException(str(error)) from error


@main.command()
@_CONFIG
def status(config: Path) -> None:
    """Show who this host is and what it keeps, from its files alone."""
    from mcloud_agents import enrolment
    from mcloud_agents.state import State
    from mcloud_base import errors

    try:
        settings = _settings(config)
        known = _files(settings).load()
    except errors.Error as error:
        raise click.ClickException(str(error)) from error
    if known is None:
        raise click.ClickException("this machine is not a host yet; first: mcloud-agent enrol")
    identity, membership = known
    running = State(settings.state_dir).is_locked()
    rows = {
        "name": membership.name,
        "id": membership.host_id,
        "control plane": membership.control_plane,
        "internal port": settings.internal_endpoint or membership.internal_endpoint,
        "certificate": f"good until {enrolment.expiry(identity.certificate):%Y-%m-%d %H:%M} UTC",
        "agent": "running" if running else "not running",
        "domains": _names(settings.state_dir / "compute" / "instances", "*"),
        "volumes": _names(settings.state_dir / "volumes", "*.qcow2"),
    }
    for label, value in rows.items():
        click.echo(f"{label + ':':<15}{value}")


main.add_command(simulate)


def _settings(path: Path) -> Settings:
    from mcloud_agents import settings

    return settings.load(path)


def _files(settings: Settings) -> Files:
    from mcloud_agents.enrolment import Files

    return Files(settings.state_dir / "identity", settings.pki_dir, settings.pki_group)


def _names(directory: Path, pattern: str) -> str:
    return " ".join(sorted(path.stem for path in directory.glob(pattern))) or "none"


if __name__ == "__main__":
    main()
