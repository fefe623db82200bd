"""docs/errors.md names every reason that the code can give."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from mcloud_base import errors

ROOT = Path(__file__).resolve().parents[3]
SOURCES = ("protos/mcloud_base", "controlplane", "agents", "cli")
BEGIN = "<!-- reasons: kept by tests/unit/docs/test_errors.py --update-golden -->\n"


def sources() -> list[ast.Module]:
    """Return every module of ours, parsed."""
    files = (path for source in SOURCES for path in sorted((ROOT / source).rglob("*.py")))
    return [ast.parse(path.read_text()) for path in files if "_pb2" not in path.name]


def kinds(modules: list[ast.Module]) -> dict[str, str]:
    """Return the gRPC code of each class of error: the base's, and those derived anywhere."""
    codes = {kind.__name__: kind.code.name for kind in errors.Error.__subclasses__()}
    for module in modules:
        for node in ast.walk(module):
            if isinstance(node, ast.ClassDef):
                bases = {getattr(base, "attr", getattr(base, "id", "")) for base in node.bases}
                for base in bases & codes.keys():
                    codes[node.name] = codes[base]
    return codes


def reasons() -> dict[str, set[str]]:
    """Return the gRPC codes of each reason, from the calls that make errors."""
    modules = sources()
    codes = kinds(modules)
    found: dict[str, set[str]] = {}
    for module in modules:
        for node in ast.walk(module):
            if not isinstance(node, ast.Call) or not node.args:
                continue
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            first = node.args[0]
            if name in codes and isinstance(first, ast.Constant):
                found.setdefault(str(first.value), set()).add(codes[name])
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
