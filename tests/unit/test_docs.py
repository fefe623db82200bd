"""docs/deploy.md says what the code does: generated tables, examples that load, units that run."""

from __future__ import annotations

import configparser
import inspect
import io
import re
import tokenize
import tomllib
from pathlib import Path
from typing import Any

import click
import pytest
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from mcloud_agents import settings as agent_settings
from mcloud_cli.main import main
from mcloud_controlplane import settings as controlplane_settings
from mcloud_controlplane.__main__ import main as controlplane
from mcloud_controlplane.core import pki
from mcloud_controlplane.identity import enrolment_store

ROOT = Path(__file__).resolve().parents[2]
GUIDE = ROOT / "docs" / "deploy.md"
OPERATE = ROOT / "docs" / "operate.md"
UNITS = ROOT / "scripts" / "systemd"
END = "<!-- end -->"
MODELS: dict[str, type[BaseModel]] = {
    "controlplane.toml": controlplane_settings.Settings,
    "agent.toml": agent_settings.Settings,
}


def comments(model: type[BaseModel]) -> dict[str, str]:
    """Return what is said of each field: beside it or, if nothing is, right above it."""
    source = inspect.getsource(model)
    beside = {
        token.start[0]: token.string.removeprefix("#").strip()
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT and not token.string.startswith("# type:")
    }
    said: dict[str, str] = {}
    above: list[str] = []
    for number, line in enumerate(source.splitlines(), 1):
        text = beside.get(number, "")
        if field := re.match(r"    (\w+): ", line):
            text = text or " ".join(above)
            said[field[1]] = text[:1].upper() + text[1:].removesuffix(".")
        above = [*above, text] if line.strip().startswith("#") else []
    return {name: text for name, text in said.items() if name in model.model_fields}


def default(field: Any) -> str:
    if field.default_factory is not None:
        made = field.default_factory()
        return "the machine's name" if isinstance(made, str) else f"`{toml(made)}`"
    if field.default is PydanticUndefined:
        return "none: say it"
    return "" if field.default is None else f"`{toml(field.default)}`"


def toml(value: Any) -> str:
    match value:
        case bool():
            return str(value).lower()
        case str() | Path():
            return f'"{value}"'
        case dict():
            inside = ", ".join(f"{key} = {toml(each)}" for key, each in value.items())
            return f"{{ {inside} }}" if inside else "{}"
        case tuple() | list():
            return f"[{', '.join(map(toml, value))}]"
        case _:
            return str(value)


def settings_table(model: type[BaseModel]) -> str:
    said = comments(model)
    rows = [
        f"| `{name}` | {default(field)} | {said[name]} |"
        for name, field in model.model_fields.items()
    ]
    return "\n".join(["| setting | default | meaning |", "|---|---|---|", *rows])


def lives_table() -> str:
    rows = {
        "authority": "10 years",
        "a control-plane process": f"{pki.SERVICE_DAYS} days from its start",
        "a host": f"{pki.HOST_DAYS} days, renewed by itself",
        "join token": f"{enrolment_store._USUAL_TTL_S // 3600} h, at most "
        f"{enrolment_store._LONGEST_TTL_S // 86400} days (`--ttl`)",
        "a login's token": f"{controlplane_settings.load(None).token_ttl_s // 60} min "
        "(`token_ttl_s`), sooner when it is revoked",
    }
    lines = [f"| {what} | {life} |" for what, life in rows.items()]
    return "\n".join(["| of | lives |", "|---|---|", *lines])


GENERATED = {
    "lives": lives_table,
    "settings: controlplane": lambda: settings_table(controlplane_settings.Settings),
    "settings: agent": lambda: settings_table(agent_settings.Settings),
}


@pytest.mark.parametrize("name", GENERATED)
def test_generated_parts_are_up_to_date(name: str, request: pytest.FixtureRequest) -> None:
    marker = f"<!-- {name}"
    head, _, rest = GUIDE.read_text().partition(marker)
    first, _, rest = rest.partition("\n")
    found, end, tail = rest.partition(END)
    assert end, f"{marker} stands nowhere"
    wanted = GENERATED[name]() + "\n"
    if request.config.getoption("--update-golden"):
        GUIDE.write_text(f"{head}{marker}{first}\n{wanted}{END}{tail}")
        return
    assert found == wanted, "pytest tests/unit/test_docs.py --update-golden renews it"


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_every_setting_says_what_it_means(model: type[BaseModel]) -> None:
    said = comments(model)
    assert len(said) == len(model.model_fields) > 10
    assert not [name for name, text in said.items() if not text]


def test_examples_of_settings_load() -> None:
    examples = re.findall(r"(?ms)^ *```toml\n *# /etc/mcloud/(\S+)\n(.*?)^ *```", GUIDE.read_text())
    assert len(examples) >= 4
    for name, text in examples:
        MODELS[name].model_validate(tomllib.loads(text))


def test_commands_of_the_guide_exist() -> None:
    text = GUIDE.read_text() + OPERATE.read_text()
    lines = re.findall(r"(?m)(?:^ *(?:\$ )?|`)mcloud ((?:--\w+ )?[a-z][^`\n\\#>]*)", text)
    assert len(lines) > 6
    for line in lines:
        command: click.Command = main
        for word in (word for word in line.split() if not word.startswith("--")):
            if not isinstance(command, click.Group):
                break
            found = command.get_command(click.Context(command), word)
            assert found is not None, f"mcloud {line}"
            command = found
        assert not isinstance(command, click.Group), f"mcloud {line}"


def test_commands_of_the_daemon_are_told() -> None:
    told = set(re.findall(r"mcloud-controlplane ([a-z]+)", OPERATE.read_text()))
    assert told == set(controlplane.commands)


@pytest.mark.parametrize("program", ["mcloud-controlplane", "mcloud-agent"])
def test_a_unit_runs_a_program_that_there_is(program: str) -> None:
    unit = configparser.RawConfigParser(strict=True)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read_string((UNITS / f"{program}.service").read_text())
    words = unit["Service"]["ExecStart"].split()
    assert words[0] == f"/opt/mcloud/bin/{program}"
    programs = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert program in programs
    assert f"{program}.service" in GUIDE.read_text()


def test_what_must_outlive_an_agent_does() -> None:
    text = (UNITS / "mcloud-agent.service").read_text()
    assert "\nKillMode=process\n" in text
    assert "\nRuntimeDirectoryPreserve=yes\n" in text
    # Each of these makes a mount namespace, in which /run/netns would be the agent's alone.
    settings = [line.partition("=")[0] for line in text.splitlines() if not line.startswith("#")]
    assert not [name for name in settings if name.startswith(("Private", "Protect", "ReadOnly"))]
