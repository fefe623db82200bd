"""Short runs of scripts/chaos; long ones are run by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.host, pytest.mark.postgres]

CHAOS = Path(__file__).parents[2] / "scripts" / "chaos"
_LONGEST_S = 900


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_nothing_is_stuck_lost_or_left_over(seed: int, tmp_path: Path) -> None:
    counts = tmp_path / "counts.json"
    command = [sys.executable, CHAOS, "--seed", str(seed), "--faults", "16", "--minutes", "0.4"]
    run = subprocess.run(
        [*command, "--json", counts], capture_output=True, text=True, timeout=_LONGEST_S
    )
    assert run.returncode == 0, run.stdout + run.stderr
    result = json.loads(counts.read_text())
    assert sum(result["faults"].values()) == 16
    assert sum(result["outcomes"].values()) > 4
