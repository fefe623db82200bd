"""mcloud-controlplane of the release after this one: `python -m fakes.newer_controlplane CONFIG`.

It is this release with further migrations, which are beside CONFIG.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path

from fakes import releases
from mcloud_base import logs
from mcloud_controlplane import settings as settings_module
from mcloud_controlplane.__main__ import serve


async def main(config: Path) -> None:
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    release = releases.to_0_2(config.parent)
    runtime = await serve(settings_module.load(config), release=release)
    await stopped.wait()
    await runtime.stop()


if __name__ == "__main__":
    logs.configure()
    asyncio.run(main(Path(sys.argv[1])))
