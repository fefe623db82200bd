"""Where the programs beside this file run: in the project's virtual environment."""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def enter(*parts: str, root: bool = False) -> None:
    """Start the program again in the virtual environment, unless it is in one.

    Args:
        parts: of scripts/setup, which makes what is not there yet.
        root: whether the program needs its rights.
    """
    if root and os.geteuid() != 0:
        os.execvp("sudo", ["sudo", sys.executable, *sys.argv])  # noqa: S606, S607
    os.environ["PATH"] += ":/usr/local/sbin:/usr/sbin:/sbin"  # which `su` leaves out
    if sys.prefix != sys.base_prefix:
        return
    setup = ROOT / "scripts" / "setup"
    if os.spawnv(os.P_WAIT, setup, [str(setup), *parts]):  # noqa: S606
        sys.exit("scripts/setup has failed")
    python = ROOT / ".venv" / "bin" / "python"
    os.execv(python, [str(python), *sys.argv])  # noqa: S606
