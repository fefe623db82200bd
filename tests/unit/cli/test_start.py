"""The command line starts fast, because it imports late."""

from __future__ import annotations

import subprocess
import sys

import pytest

_HEAVY = ("grpc", "google.protobuf", "rich", "yaml", "pydantic", "cryptography", "asyncio")


def _modules_after(arguments: list[str]) -> set[str]:
    script = (
        "import sys\n"
        "from mcloud_cli.main import main\n"
        f"main({arguments!r}, standalone_mode=False)\n"
        "print('\\n'.join(sys.modules), file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    return set(done.stderr.split())


@pytest.mark.parametrize(
    "arguments", [["--help"], ["instance", "--help"], ["boot", "--help"], ["login", "--help"]]
)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    assert _modules_after(arguments).isdisjoint(_HEAVY)


def test_help_of_a_command_imports_only_its_file() -> None:
    loaded = _modules_after(["flavor", "--help"])

    assert "mcloud_cli.flavor" in loaded
    assert "mcloud_cli.network" not in loaded
    assert "mcloud_cli.instance" not in loaded
