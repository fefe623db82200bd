"""The first start of a deployment, by several processes at once and after a kill."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import ports
from mcloud.identity.v1 import user_service_pb2
from mcloud_base import rpc
from mcloud_controlplane.__main__ import serve
from mcloud_controlplane.settings import Settings
from service.identity.cloud import Cloud, eventually


async def test_several_processes_make_one_administrator(tmp_path: Path, settings: Settings) -> None:
    started = []
    for number in range(3):
        config = tmp_path / f"{number}.toml"
        config.write_text(
            f'state_dir = "{settings.state_dir}"\nservices = ["identity"]\n'
            f'public_listen = "127.0.0.1:{ports.free()}"\n'
            f'internal_listen = "127.0.0.1:{ports.free()}"\n'
            f'database = "{settings.database}"\n'
        )
        started.append(
            await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "mcloud_controlplane",
                "--config",
                str(config),
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
                stderr=asyncio.subprocess.PIPE,
            )
        )
    try:
        for process in started:
            await serves(process)
    finally:
        for process in started:
            if process.returncode is None:
                process.terminate()
        await asyncio.gather(*(process.communicate() for process in started))
    runtime = await serve(settings)
    cloud = Cloud(settings, runtime)
    page = await rpc.call(
        cloud.public.user.ListUsers,
        user_service_pb2.ListUsersRequest(),
        metadata=await cloud.admin(),
    )
    assert [user.metadata.name for user in page.users] == ["admin"]
    await cloud.close()
    await runtime.stop(0)


async def serves(process: asyncio.subprocess.Process) -> None:
    assert process.stderr is not None
    stream, lines = process.stderr, []

    async def said() -> bool:
        line = await stream.readline()
        assert line, b"".join(lines).decode()
        lines.append(line)
        return b"control plane serves" in line

    await eventually(said, 60)


async def test_a_start_that_was_killed_before_its_commit_leaves_the_password(
    settings: Settings,
) -> None:
    settings.state_dir.mkdir(parents=True)
    (settings.state_dir / "admin-password").write_text("written before the kill\n")
    runtime = await serve(settings)
    cloud = Cloud(settings, runtime)
    await cloud.login(password="written before the kill")
    await cloud.close()
    await runtime.stop(0)
