"""The options of `mcloud-agent simulate`, and what it says."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

_STEPS = 10  # lines of progress where there is no terminal


def _range(context: click.Context, parameter: click.Parameter, value: str) -> tuple[float, float]:
    """Return the two numbers of LOW..HIGH, or one for both."""
    low, dots, high = value.partition("..")
    try:
        found = float(low), float(high if dots else low)
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is not LOW..HIGH") from error
    if not 0 <= found[0] <= found[1]:
        raise click.BadParameter(f"{value!r}: neither is below 0, and the first is the lower one")
    return found


@click.command()
@click.option(
    "--control-plane", envvar="MCLOUD_ENDPOINT", required=True, help="HOST:PORT of the public port."
)
@click.option(
    "--ca",
    envvar="MCLOUD_CA",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The authority of its certificate.",
)
@click.option(
    "--username",
    envvar="MCLOUD_USERNAME",
    default="admin",
    show_default=True,
    help="An administrator of the whole system; the password is MCLOUD_PASSWORD. "
    "MCLOUD_TOKEN does instead of both.",
)
@click.option("--password-file", type=click.File(), help="Instead of MCLOUD_PASSWORD.")
@click.option(
    "--state-dir",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="Who the hosts are and what they run; made if missing.",
)
@click.option(
    "--hosts",
    type=click.IntRange(1, 131_070),
    default=10,
    show_default=True,
    help="How many; may grow from run to run.",
)
@click.option("--seed", type=int, default=1, show_default=True, help="Of everything drawn.")
@click.option("--prefix", default="sim-", show_default=True, help="Of the hosts' names.")
@click.option("--vcpus", type=click.IntRange(1), default=32, show_default=True, help="Of each.")
@click.option(
    "--memory-mib", type=click.IntRange(1), default=131_072, show_default=True, help="Of each."
)
@click.option(
    "--disk-gib", type=click.IntRange(1), default=2_000, show_default=True, help="Of each."
)
@click.option(
    "--latency-ms",
    callback=_range,
    default="1..10",
    show_default=True,
    help="LOW..HIGH: what each step on a host takes.",
)
@click.option(
    "--refuse",
    type=click.FloatRange(0, 1),
    default=0.0,
    show_default=True,
    help="How probably a step of bringing a domain up is refused.",
)
@click.option(
    "--disconnects-per-hour",
    type=click.FloatRange(0),
    default=0.0,
    show_default=True,
    help="Of each host.",
)
@click.option(
    "--crashes-per-hour",
    type=click.FloatRange(0),
    default=0.0,
    show_default=True,
    help="Of each host's agent; its guests run on.",
)
@click.option(
    "--report-interval-s",
    type=click.FloatRange(0.1),
    default=10.0,
    show_default=True,
    help="Between the reports of a host.",
)
@click.option("--download", is_flag=True, help="Fetch the bytes of each image, once a host.")
@click.option(
    "--storage/--no-storage", default=True, show_default=True, help="Whether they store volumes."
)
@click.option(
    "--remove",
    "removing",
    is_flag=True,
    help="Delete the hosts of the state directory from the control plane instead.",
)
@click.option(
    "-o",
    "--output",
    "form",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="Of the summary.",
)
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="error",
    show_default=True,
    help="What the agents log.",
)
def simulate(
    control_plane: str,
    ca: Path | None,
    username: str,
    password_file: Any,
    removing: bool,
    form: str,
    log_level: str,
    **options: Any,
) -> None:
    """Play hosts that run nothing, to size a deployment or to test one.

    Each is a real host for the control plane: enrolled, with its certificate, connections and
    sessions. An interrupt ends them and prints what they have done; the same --state-dir brings
    back the same hosts with the same domains.

    Example: mcloud-agent simulate --control-plane 192.0.2.1:7700 --ca ca.pem --hosts 2000
    --state-dir /var/lib/mcloud-simulator --password-file admin-password
    """
    from mcloud_agents.simulate import fleet
    from mcloud_agents.simulate.administrator import Login
    from mcloud_base import errors, logs

    logs.configure("console", log_level)
    settings = _settings(control_plane, options)
    try:
        login = Login(
            control_plane,
            ca.read_bytes() if ca else None,
            username,
            password_file.read().strip()
            if password_file
            else os.environ.get("MCLOUD_PASSWORD", ""),
            os.environ.get("MCLOUD_TOKEN", ""),
        )
        if removing:
            _say_removed(*asyncio.run(fleet.remove(settings, login)), form)
            return

        async def until_told() -> dict[str, object]:
            stop = asyncio.Event()
            for number in (signal.SIGTERM, signal.SIGINT):
                asyncio.get_running_loop().add_signal_handler(number, stop.set)
            return await fleet.run(settings, login, stop, _progress())

        _say(asyncio.run(until_told()), form)
    except (errors.Error, OSError) as error:
        raise click.ClickException(str(error)) from error


def _settings(control_plane: str, options: dict[str, Any]) -> Any:
    from mcloud_agents.simulate.settings import Settings

    names = {
        "hosts": "host_count",
        "vcpus": "vcpu_count",
        "refuse": "refusal_probability",
    }
    values = {names.get(key, key): value for key, value in options.items()}
    return Settings(control_plane=control_plane, **values)


def _progress() -> Callable[[int, int], None]:
    """Return what shows how many hosts are connected: a line that changes, or ten lines."""
    terminal = sys.stderr.isatty()
    shown = 0

    def show(done: int, total: int) -> None:
        nonlocal shown
        if terminal:
            click.echo(f"\r{done} of {total} hosts connected", nl=done == total, err=True)
        elif done * _STEPS // total > shown:
            shown = done * _STEPS // total
            click.echo(f"{done} of {total} hosts connected", err=True)

    return show


def _say(summary: dict[str, object], form: str) -> None:
    if form == "json":
        click.echo(json.dumps(summary))
        return
    for key, value in summary.items():
        label = key.replace("_", " ")
        if not isinstance(value, dict):
            click.echo(f"{label + ':':<18}{value}")
            continue
        click.echo(f"{label}:" + ("" if value else " none"))
        for name, count in value.items():
            click.echo(f"  {count:>8} {name}")


def _say_removed(gone: int, kept: int, form: str) -> None:
    if form == "json":
        click.echo(json.dumps({"removed": gone, "disabled": kept}))
        return
    click.echo(f"{gone} hosts removed")
    if kept:
        click.echo(
            f"{kept} carry domains and are disabled; delete their instances while the simulator "
            "runs, then remove again"
        )
