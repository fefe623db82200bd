"""docs/errors.md names every reason that the code can give."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from mcloud_base import errors

ROOT = Path(__file__).resolve().parents[3]
SOURCES = ("protos/mcloud_base", "controlplane", "agents", "cli")
BEGIN = "<!-- reasons: kept by tests/unit/docs/test_errors.py --update-golden -->\n"
KINDS = {kind.__name__: kind for kind in errors.Error.__subclasses__()}


def reasons() -> dict[str, set[str]]:
    """Return the gRPC codes of each reason, from the calls that make errors."""
    found: dict[str, set[str]] = {}
    for source in SOURCES:
        for path in (ROOT / source).rglob("*.py"):
            if "_pb2" in path.name:
                continue
            for node in ast.walk(ast.parse(path.read_text())):
                if not isinstance(node, ast.Call) or not node.args:
                    continue
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                first = node.args[0]
                if name in KINDS and isinstance(first, ast.Constant):
                    found.setdefault(str(first.value), set()).add(KINDS[name].code.name)
    return found


def table() -> str:
    rows = [
        f"| `{reason}` | {', '.join(sorted(codes))} |"
        for reason, codes in sorted(reasons().items())
    ]
    return "\n".join(["| reason | code |", "|---|---|", *rows]) + "\n"


def test_every_reason_is_documented(request: pytest.FixtureRequest) -> None:
    path = ROOT / "docs" / "errors.md"
    head, marker, found = path.read_text().partition(BEGIN)
    assert marker
    assert len(reasons()) > 80
    if request.config.getoption("--update-golden"):
        path.write_text(head + BEGIN + "\n" + table())
        return
    assert found.strip() == table().strip(), "pytest tests/unit/docs --update-golden renews it"


def test_reasons_are_upper_snake_case() -> None:
    for reason in reasons():
        assert reason == reason.upper(), reason
        assert reason.replace("_", "").isalnum(), reason
