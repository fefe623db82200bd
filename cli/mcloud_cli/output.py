"""What commands print: tables for people, JSON, YAML and ids for programs."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import click

FORMATS = ("table", "json", "yaml", "name", "id")


@dataclass(frozen=True)
class Column:
    """One column of a table."""

    title: str
    text: Callable[[Any], str]
    is_state: bool = False  # coloured


def option(function: Any) -> Any:
    """Give a command `-o`."""
    return click.option(
        "-o",
        "--output",
        "form",
        type=click.Choice(FORMATS),
        default="table",
        help="How to print it.",
        show_default=True,
    )(function)


def resources(items: Sequence[Any], form: str, columns: Sequence[Column]) -> None:
    """Print a list of resources."""
    if form == "table":
        rows = [[column.text(item) for column in columns] for item in items]
        table([column.title for column in columns], rows, [c.is_state for c in columns])
    elif form in ("name", "id"):
        for item in items:
            click.echo(getattr(item.metadata, form) or item.metadata.id)
    else:
        data([as_dict(item) for item in items], form)


def resource(item: Any, form: str) -> None:
    """Print one resource with all its fields."""
    if form == "table":
        fields([(name, text) for name, text in flat(item)])
    elif form in ("name", "id"):
        click.echo(getattr(item.metadata, form) or item.metadata.id)
    else:
        data(as_dict(item), form)


def data(value: Any, form: str) -> None:
    """Print JSON or YAML."""
    if form == "yaml":
        import yaml

        text = yaml.safe_dump(value, sort_keys=False, allow_unicode=True, default_flow_style=False)
        click.echo(text, nl=False)
    else:
        click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def as_dict(message: Any) -> Any:
    """Return a message as the API's JSON, with the contract's field names."""
    from google.protobuf import json_format

    return json_format.MessageToDict(message, preserving_proto_field_name=True)


# --- tables ---


def table(
    titles: Sequence[str], rows: Sequence[Sequence[str]], states: Sequence[bool] = ()
) -> None:
    """Print aligned columns; on a terminal no wider than it is."""
    widths = [
        max([_width(title), *(_width(row[number]) for row in rows)])
        for number, title in enumerate(titles)
    ]
    if sys.stdout.isatty():
        _narrow(widths, shutil.get_terminal_size().columns)
    coloured = colours()
    click.echo(_line(titles, widths))
    for row in rows:
        cells = [_fit(cell, width) for cell, width in zip(row, widths, strict=True)]
        if coloured and any(states):
            cells = [
                click.style(cell, fg=_COLOURS.get(text, ""), reset=True)
                if state and text in _COLOURS
                else cell
                for cell, text, state in zip(cells, row, states, strict=True)
            ]
        click.echo("  ".join(cells).rstrip())


def fields(pairs: Sequence[tuple[str, str]]) -> None:
    """Print names and values, one a line."""
    width = max((_width(name) for name, _ in pairs), default=0)
    for name, text in pairs:
        first, *rest = text.split("\n")
        click.echo(f"{_fit(name, width)}  {first}".rstrip())
        for line in rest:
            click.echo(f"{'':{width}}  {line}")


def colours() -> bool:
    """Tell whether colours are wanted: on a terminal, unless NO_COLOR is set."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


_GREEN = ("ACTIVE", "UP", "AVAILABLE", "IN_USE", "SUCCEEDED", "DONE", "RUNNING")
_RED = ("ERROR", "DOWN", "FAILED", "UNKNOWN", "CRASHED")
_YELLOW = ("BUILD", "CREATING", "DELETING", "QUEUED", "SAVING", "UNDOING")
_COLOURS = {
    **dict.fromkeys(_GREEN, "green"),
    **dict.fromkeys(_RED, "red"),
    **dict.fromkeys(_YELLOW, "yellow"),
}


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    fitted = (_fit(cell, width) for cell, width in zip(cells, widths, strict=True))
    return "  ".join(fitted).rstrip()


def _width(text: str) -> int:
    if text.isascii():
        return len(text)
    wide = sum(unicodedata.east_asian_width(sign) in "WF" for sign in text)
    return len(text) + wide - sum(unicodedata.combining(sign) != 0 for sign in text)


def _fit(text: str, width: int) -> str:
    """Return the text in exactly this many columns."""
    if _width(text) > width:
        while _width(text) > width - 1:
            text = text[:-1]
        text += "…"
    return text + " " * (width - _width(text))


def _narrow(widths: list[int], available: int) -> None:
    """Take from the widest columns until the table fits, but leave 8 to each."""
    while sum(widths) + 2 * (len(widths) - 1) > available and max(widths) > 8:
        widths[widths.index(max(widths))] -= 1


# --- values for people ---


def flat(message: Any, prefix: str = "", *, nested: bool = False) -> list[tuple[str, str]]:
    """Return the set fields of a message as dotted names and texts for people."""
    pairs: list[tuple[str, str]] = []
    for field, value in message.ListFields():
        if field.name in _FOR_PROGRAMS or (nested and field.name in _FOR_OWNERS):
            continue
        name = field.name if field.name in _PLAIN and not prefix else f"{prefix}{field.name}"
        if _is_map(field):
            text = " ".join(f"{key}={value[key]}" for key in sorted(value))
            pairs.append((name, text))
        elif field.is_repeated:
            separator = "\n" if field.message_type else ", "
            pairs.append((name, separator.join(_text(field, item) for item in value)))
        elif field.message_type is None or _is_time(field):
            pairs.append((name, _text(field, value)))
        else:
            inner = "" if field.name in _PLAIN and not prefix else f"{name}."
            pairs += flat(value, inner, nested=nested)
    return pairs


_PLAIN = ("metadata", "spec", "status")
_FOR_PROGRAMS = ("resource_version", "generation", "observed_generation")  # JSON has them
_FOR_OWNERS = ("project_id", "create_time", "update_time")  # said once, not in each part


def _is_map(field: Any) -> bool:
    kind = field.message_type
    return kind is not None and kind.GetOptions().map_entry


def _is_time(field: Any) -> bool:
    return field.message_type is not None and field.message_type.full_name in (
        "google.protobuf.Timestamp",
        "google.protobuf.Duration",
    )


def _text(field: Any, value: Any) -> str:
    if _is_time(field):
        return local(value) if hasattr(value, "ToDatetime") else f"{value.ToMilliseconds()} ms"
    if field.message_type is not None:
        return " ".join(f"{name}={text}" for name, text in flat(value, nested=True))
    if field.enum_type is not None:
        return enum(field.enum_type, value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, bytes):
        return f"({len(value)} bytes)"
    if field.name.endswith("_bytes"):
        return size(value)
    return str(value).rstrip("\n")


def enum(kind: Any, value: int) -> str:
    """Return an enum's value without the prefix that proto puts before it."""
    from mcloud_cli.contract import snake

    found = kind.values_by_number.get(value)
    return found.name.removeprefix(f"{snake(kind.name).upper()}_") if found else str(value)


def state(message: Any, name: str = "state") -> str:
    """Return the text of an enum field of a message."""
    return enum(message.DESCRIPTOR.fields_by_name[name].enum_type, getattr(message, name))


def size(count: int) -> str:
    """Return a number of bytes for people: "19.2 MiB"."""
    value, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def age(moment: Any) -> str:
    """Return how long ago a Timestamp was: "3m"; "-" if it is not set."""
    if not moment.seconds:
        return "-"
    return span(max(time.time() - moment.seconds, 0))


def span(seconds: float) -> str:
    """Return a time span in its largest unit: "42s", "3m", "5h", "12d"."""
    for unit, length in (("d", 86_400), ("h", 3600), ("m", 60)):
        if seconds >= length:
            return f"{int(seconds // length)}{unit}"
    return f"{int(seconds)}s"


def local(moment: Any) -> str:
    """Return a Timestamp in the time of this place."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment.seconds))
