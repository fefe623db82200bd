"""Every command explains itself, and docs/cli.md says the same."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from mcloud_cli.main import COMMANDS, main

REFERENCE = Path(__file__).parents[3] / "docs" / "cli.md"


def _walk(command: click.Command, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    yield path
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            assert child is not None, name
            yield from _walk(child, (*path, name))


def _find(path: tuple[str, ...]) -> click.Command:
    command: click.Command = main
    for name in path[1:]:
        assert isinstance(command, click.Group)
        found = command.get_command(click.Context(command), name)
        assert found is not None
        command = found
    return command


def _root() -> click.Context:
    # Commands keep their --help as the first context has it.
    return click.Context(main, info_name="mcloud", **main.context_settings)


ALL = list(_walk(main, ("mcloud",)))
each_command = pytest.mark.parametrize("path", ALL, ids=" ".join)


def test_there_are_commands() -> None:
    assert len(ALL) > 100


@each_command
def test_command_has_help_and_an_example(path: tuple[str, ...]) -> None:
    text = _find(path).help or ""

    assert text.strip(), "no help"
    assert "Example: " in text, "no example"


@each_command
def test_example_is_a_command_that_parses(
    path: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = (_find(path).help or "").rpartition("Example: ")[2].strip()
    if example.startswith("eval"):
        return
    words = shlex.split(example.split(" > ")[0])
    assert words[0] == "mcloud"
    command: click.Command = main
    rest = words[1:]
    while isinstance(command, click.Group):
        found = command.get_command(click.Context(command), rest[0])
        assert found is not None, example
        command, rest = found, rest[1:]
    monkeypatch.chdir(tmp_path)
    for word in rest:
        if word.endswith((".pem", ".qcow2", ".password")):
            (tmp_path / word).touch()
    with command.make_context("mcloud", rest, parent=_root()):  # raises where it does not parse
        pass


@each_command
def test_every_option_has_help(path: tuple[str, ...]) -> None:
    for parameter in _find(path).params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name


def test_short_help_of_the_table_is_near_the_command() -> None:
    for name in COMMANDS:
        assert _find(("mcloud", name)).help


def test_reference_is_current(request: pytest.FixtureRequest) -> None:
    text = _reference()
    if request.config.getoption("--update-golden"):
        REFERENCE.write_text(text)
    assert text == REFERENCE.read_text(), "docs/cli.md is old; run this with --update-golden"


def _reference() -> str:
    parts = [
        "# mcloud: the command line",
        "",
        "Written by `pytest tests/unit/cli/test_help.py --update-golden` from the commands "
        "themselves.",
        "",
    ]
    runner = CliRunner()
    for path in ALL:
        done = runner.invoke(main, [*path[1:], "--help"], prog_name="mcloud", terminal_width=100)
        assert done.exit_code == 0, path
        parts += [f"## {' '.join(path)}", "", "```", done.stdout.rstrip(), "```", ""]
    return "\n".join(parts)
