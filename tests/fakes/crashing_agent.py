"""mcloud-agent run, with a plan of what goes wrong: SETTINGS PLAN_DIRECTORY."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path

from fakes.crash_plan import Plan
from mcloud_agents import program, settings
from mcloud_agents.enrolment import Files
from mcloud_agents.state import State
from mcloud_base import logs


async def main(config: Path, plan: Plan) -> None:
    """Run until told to stop."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    chosen = settings.load(config)
    files = Files(chosen.state_dir / "identity", chosen.pki_dir, chosen.pki_group)
    await program.run(chosen, files, State(chosen.state_dir), stop, probe=plan.probe)


if __name__ == "__main__":
    logs.configure("console", "info")
    asyncio.run(main(Path(sys.argv[1]), Plan(Path(sys.argv[2]))))
