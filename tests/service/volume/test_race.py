"""Two processes reserve the same volumes at once, over each kind of database."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

from mcloud.volume.v1 import volume_pb2
from mcloud_base import ids
from mcloud_controlplane.core import database
from mcloud_controlplane.volume import model
from service.image.cloud import both_databases

VOLUMES = 150


@both_databases
async def test_each_volume_is_reserved_once(tmp_path: Path, database_url: str) -> None:
    url = (
        f"sqlite://{tmp_path}/volume.db"
        if database_url == "sqlite"
        else database_url.replace("{name}", "volume")
    )
    store = model.open_database(url)
    project_id = ids.new("p")
    volumes = [ids.new("vol") for _ in range(VOLUMES)]
    await store.write(make_volumes, project_id, volumes)

    racers = [await start(url) for _ in range(2)]
    # In opposite order, so that each begins with what the other has not won yet.
    for racer, order in zip(racers, (volumes, volumes[::-1]), strict=True):
        racer.stdin.write(json.dumps([project_id, *order]).encode() + b"\n")
    results: list[dict[str, Any]] = []
    async with asyncio.timeout(120):
        for racer in racers:
            output, _ = await racer.communicate()
            results.append(json.loads(output))

    won = [volume_id for result in results for volume_id in result["won"]]
    print(f"{url.split(':')[0]}: won {[len(r['won']) for r in results]} of {VOLUMES}")
    assert sorted(won) == sorted(volumes)
    refused = {reason for result in results for reason in result["refused"]}
    assert refused <= {"VOLUME_IN_USE"}
    assert await store.read(model.Attachment.select().count) == VOLUMES
    await asyncio.to_thread(store.close)


def make_volumes(project_id: str, volumes: list[str]) -> None:
    moment = database.now()
    for volume_id in volumes:
        model.Volume.create(
            id=volume_id,
            name=volume_id,
            project_id=project_id,
            create_time=moment,
            update_time=moment,
            spec=volume_pb2.VolumeSpec(size_gib=1).SerializeToString(),
            size_gib=1,
            state="AVAILABLE",
            host_id="h-1",
            desired_generation=1,
        )


async def start(url: str) -> Any:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "service.volume.racer",
        url,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    async with asyncio.timeout(60):
        assert await process.stdout.readline() == b"ready\n"
    return process
