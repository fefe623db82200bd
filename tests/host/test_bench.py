"""`scripts/bench --quick`: a benchmark with everything that the others stand on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks import ALL

BENCH = Path(__file__).parents[2] / "scripts" / "bench"

pytestmark = pytest.mark.host


def test_a_quick_benchmark_writes_its_figures(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    command = (sys.executable, BENCH, "--only", "get_rate", "--quick", "--json", out)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=120, check=True)
    content = json.loads(out.read_text())
    assert content["quick"]
    figures = {figure["name"]: figure for figure in content["figures"]}
    assert set(figures) == {"get_rate", "get_p50", "get_cpu"}
    for figure in figures.values():
        assert figure["value"] > 0
        assert figure["met"] is None
        assert figure["name"] in done.stdout
    assert 0 < figures["get_rate"]["ratio"] < 1


def test_an_unknown_benchmark_is_refused_with_what_there_is() -> None:
    command = (sys.executable, BENCH, "--only", "nothing")
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "storm_rate" in done.stderr


def test_help_names_every_benchmark() -> None:
    command = (sys.executable, BENCH, "--help")
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=60, check=True)
    assert all(f"{name}:" in done.stdout for name in ALL)
