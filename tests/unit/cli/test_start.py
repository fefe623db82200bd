"""The command line starts fast, because it imports late."""

from __future__ import annotations

import resource
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


def test_help_takes_150_ms_of_work() -> None:
    """Of the processor's time, so that other work on the machine does not count."""
    command = [sys.executable, "-c", "from mcloud_cli.main import main; main()", "--help"]
    fastest = float("inf")
    for _ in range(10):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True, timeout=60)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        fastest = min(fastest, used)
    assert fastest <= 0.15, f"{fastest * 1000:.0f} ms"
