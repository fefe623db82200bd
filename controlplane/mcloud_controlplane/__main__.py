"""mcloud-controlplane: runs any set of the services in one process, and cares for their data."""

from __future__ import annotations

import asyncio
import gc
import importlib
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import structlog

from mcloud_base import cores, errors, logs
from mcloud_controlplane import settings as settings_module
from mcloud_controlplane.core import migrations, ports, processes, tracing, workers, workflow
from mcloud_controlplane.core.runtime import Runtime
from mcloud_controlplane.settings import SERVICES, Settings

log = structlog.get_logger()

# For how long a thread may keep the interpreter from others. With Python's 5 ms the event loop, one
# of some dozen threads with work in a storm, would have its turn every 50 ms: calls time out.
_SWITCH_S = 0.0005
# How many objects come to be between two collections, of the young and of the older ones. With
# Python's own (700, 10, 10) a fourth of the event loop's time went into them with 2,000 hosts.
_COLLECTIONS = (50_000, 20, 50)


async def serve(
    settings: Settings,
    *,
    probe: workflow.Probe = workflow.no_probe,
    release: migrations.Release = migrations.THIS,
    life: processes.Life | None = None,
) -> Runtime:
    """Start the services of the settings; they run until the runtime is stopped.

    Args:
        probe: called around each step of each workflow; for tests of failure.
        release: which schema changes are known; for tests of upgrades.
        life: of this process, where it has taken the place of another.

    Raises:
        errors.Unavailable: PORT_IN_USE.
        errors.WrongState: SCHEMA_UNKNOWN, SCHEMA_BEHIND.
    """
    runtime = Runtime(settings, probe=probe, release=release, life=life)
    for service in _modules(settings):
        service.register(runtime)
    await runtime.start()
    log.info(
        "control plane serves",
        services=",".join(settings.services),
        public=settings.public_listen,
        internal=settings.internal_listen,
    )
    return runtime


def _modules(settings: Settings) -> list[ModuleType]:
    return [
        importlib.import_module(f"mcloud_controlplane.{name}.service") for name in settings.services
    ]


def _run(settings: Settings) -> None:
    """Serve in this process, or in workers of it."""

    def work(life: processes.Life) -> None:
        tracing.configure(settings.otlp_endpoint)
        asyncio.run(_serve_until_told(settings, life))

    if settings.workers == 1:
        work(processes.Life.first())
    else:
        _modules(settings)
        workers.run(settings.workers, work, (settings.public_listen, settings.internal_listen))


async def _serve_until_told(settings: Settings, life: processes.Life) -> None:
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    ports.raise_open_files()
    sys.setswitchinterval(_SWITCH_S)
    gc.set_threshold(*_COLLECTIONS)
    runtime = await serve(settings, life=life)
    waits = [asyncio.create_task(each.wait()) for each in (stopped, runtime.process.unfit)]
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()
    log.info("control plane stops")
    await runtime.stop()
    tracing.flush()
    if runtime.process.unfit.is_set():
        raise errors.WrongState(
            "SCHEMA_UNKNOWN",
            "a newer release has changed a database so that this one cannot use it any more: "
            "start the newer one here",
        )


def _settings_options(command: Callable[..., Any]) -> Callable[..., Any]:
    path = click.Path(path_type=Path, exists=True)
    for option in (
        click.option("--state-dir", type=click.Path(path_type=Path), help="Instead of the file's."),
        click.option("--config", type=path, help="controlplane.toml."),
    ):
        command = option(command)
    return command


def _settings(config: Path | None, state_dir: Path | None, services: str = "") -> Settings:
    """Return the settings of a file and the command line; what stands before counts as well."""
    context = click.get_current_context().parent
    if context is not None:
        config = config or context.params.get("config")
        state_dir = state_dir or context.params.get("state_dir")
    changes: dict[str, object] = {}
    if services and services != "all":
        changes["services"] = tuple(services.split(","))
    if state_dir:
        changes["state_dir"] = state_dir
    settings = settings_module.changed(settings_module.load(config), changes)
    logs.configure(settings.log_format)
    return settings


@contextmanager
def _told() -> Iterator[None]:
    """Turn an error of ours into the program's last word."""
    try:
        yield
    except errors.Error as error:
        raise click.ClickException(str(error)) from error


@click.group(invoke_without_command=True)
@_settings_options
@click.option("--services", default="", help=f"Comma-separated, or all: {', '.join(SERVICES)}.")
@click.pass_context
def main(
    context: click.Context, config: Path | None, services: str, state_dir: Path | None
) -> None:
    """Run mcloud's control plane: every service in this process, unless --services says which.

    Example: mcloud-controlplane --config /etc/mcloud/controlplane.toml --services identity,compute
    """
    cores.forbid()
    if context.invoked_subcommand is not None:
        return
    with _told():
        _run(_settings(config, state_dir, services))


@main.command()
@_settings_options
@click.option("--dry-run", is_flag=True, help="Only say what would be done.")
def migrate(config: Path | None, state_dir: Path | None, dry_run: bool) -> None:
    """Run every pending change of the databases' tables, those included that end an older release.

    Daemons add what is new by themselves. What an older release needs goes only here, and only
    once no process of it is left.

    Example: mcloud-controlplane migrate --dry-run
    """
    from mcloud_controlplane.maintenance import migrate as migrating

    with _told():
        for line in migrating.run(_settings(config, state_dir), dry_run=dry_run):
            click.echo(line)


@main.command()
@_settings_options
@click.option(
    "--to", required=True, type=click.Path(path_type=Path, dir_okay=False), help="A new tar file."
)
@click.option("--without-images", is_flag=True, help="Leave the image store out.")
def backup(config: Path | None, state_dir: Path | None, to: Path, without_images: bool) -> None:
    """Write the whole control plane into one file, while it runs.

    The file holds every secret of the cloud: its authority's key and the keys of tokens.

    Example: mcloud-controlplane backup --to /backup/mcloud.tar
    """
    from mcloud_controlplane.maintenance import backup as backing_up

    with _told():
        for line in backing_up.run(_settings(config, state_dir), to, images=not without_images):
            click.echo(line)


@main.command()
@_settings_options
@click.option(
    "--from",
    "source",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="A file that backup has written.",
)
def restore(config: Path | None, state_dir: Path | None, source: Path) -> None:
    """Make a control plane from a backup, where there is none; the daemon must not run.

    Example: mcloud-controlplane restore --from /backup/mcloud.tar
    """
    from mcloud_controlplane.maintenance import restore as restoring

    with _told():
        for line in restoring.run(_settings(config, state_dir), source):
            click.echo(line)


if __name__ == "__main__":
    main()
