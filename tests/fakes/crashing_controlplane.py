"""mcloud-controlplane, with a plan of what goes wrong: SETTINGS PLAN_DIRECTORY."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path

from fakes.crash_plan import Plan
from mcloud_base import logs
from mcloud_controlplane import settings
from mcloud_controlplane.__main__ import serve


async def main(config: Path, plan: Plan) -> None:
    """Serve until told to stop."""
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)

    async def probe(workflow: str, index: int, act: str, moment: str) -> None:
        await plan.probe(workflow, str(index), act, moment)

    runtime = await serve(settings.load(config), probe=probe)
    await stopped.wait()
    await runtime.stop()


if __name__ == "__main__":
    logs.configure("console")
    asyncio.run(main(Path(sys.argv[1]), Plan(Path(sys.argv[2]))))
