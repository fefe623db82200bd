"""mcloud-controlplane: runs any set of the services in one process."""

from __future__ import annotations

import asyncio
import importlib
import signal
from pathlib import Path

import click
import structlog

from mcloud_base import errors, logs
from mcloud_controlplane import settings as settings_module
from mcloud_controlplane.core import tracing, workflow
from mcloud_controlplane.core.runtime import Runtime
from mcloud_controlplane.settings import SERVICES, Settings

log = structlog.get_logger()


async def serve(settings: Settings, *, probe: workflow.Probe = workflow.no_probe) -> Runtime:
    """Start the services of the settings; they run until the runtime is stopped.

    Args:
        probe: called around each step of each workflow; for tests of failure.

    Raises:
        errors.Unavailable: PORT_IN_USE.
        errors.WrongState: SCHEMA_UNKNOWN.
    """
    runtime = Runtime(settings, probe=probe)
    for name in settings.services:
        service = importlib.import_module(f"mcloud_controlplane.{name}.service")
        service.register(runtime)
    await runtime.start()
    log.info(
        "control plane serves",
        services=",".join(settings.services),
        public=settings.public_listen,
        internal=settings.internal_listen,
    )
    return runtime


async def _run(settings: Settings) -> None:
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    runtime = await serve(settings)
    await stopped.wait()
    log.info("control plane stops")
    await runtime.stop()
    tracing.flush()


@click.command()
@click.option("--config", type=click.Path(path_type=Path, exists=True), help="controlplane.toml.")
@click.option("--services", default="", help=f"Comma-separated, or all: {', '.join(SERVICES)}.")
@click.option(
    "--state-dir", type=click.Path(path_type=Path), help="Overrides the file's state_dir."
)
def main(config: Path | None, services: str, state_dir: Path | None) -> None:
    """Run mcloud's control plane: every service in this process, unless --services says which.

    Example: mcloud-controlplane --config /etc/mcloud/controlplane.toml --services identity,compute
    """
    try:
        settings = settings_module.load(config)
        changes: dict[str, object] = {}
        if services and services != "all":
            changes["services"] = tuple(services.split(","))
        if state_dir:
            changes["state_dir"] = state_dir
        settings = settings_module.changed(settings, changes)
        logs.configure(settings.log_format)
        tracing.configure(settings.otlp_endpoint)
        asyncio.run(_run(settings))
    except errors.Error as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main()
