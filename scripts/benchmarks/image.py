"""Uploading and downloading an image of 512 MiB, through the public contract.

Random bytes, so that nothing is compressed or sparse. The upload's yardstick is `cp` and SHA-256 of
the same file, that of the download `cp`: the client writes what it gets to a file, too.
`image_stream_bare` is what a bare gRPC server of messages as long as the upload's reaches, beside
the same `cp`. Before each, what was written is on the disk, and the memory it will take is at hand.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import images, report, simulated, yardsticks
from benchmarks.client import Client
from benchmarks.plan import Plan
from benchmarks.report import Curve, Figure
from benchmarks.simulated import Cloud
from mcloud.image.v1 import image_pb2, image_service_pb2, image_service_pb2_grpc


@dataclass
class Samples:
    """MiB a second; one a repeat."""

    upload: list[float] = field(default_factory=list)
    download: list[float] = field(default_factory=list)
    bare: list[float] = field(default_factory=list)
    copied: list[float] = field(default_factory=list)
    digested: list[float] = field(default_factory=list)  # copied as well


def run(plan: Plan) -> list[Figure]:
    """Measure."""
    with simulated.running(plan) as cloud:
        samples = asyncio.run(_measure(plan, cloud, plan.size(512, 32)))
    return [
        report.figure("image_upload", samples.upload, "MiB/s", yardstick=samples.digested),
        report.figure("image_download", samples.download, "MiB/s", yardstick=samples.copied),
        report.figure("image_stream_bare", samples.bare, "MiB/s", yardstick=samples.copied),
    ]


def growth(plan: Plan) -> list[Curve]:
    """Measure with ever larger images."""
    upload, download = [], []
    with simulated.running(plan) as cloud:
        for size in plan.size((16, 64, 256, 1024), (2, 4, 8, 16)):
            samples = asyncio.run(_measure(Plan(1, plan.quick), cloud, size))
            upload.append((size, samples.upload[0]))
            download.append((size, samples.download[0]))
    return [
        Curve("image_upload", "MiB/s", "MiB", upload),
        Curve("image_download", "MiB/s", "MiB", download),
    ]


async def _measure(plan: Plan, cloud: Cloud, mib: int) -> Samples:
    samples, source = Samples(), cloud.place / "image"
    target = cloud.place / "copy"
    _write_random(source, mib)
    with source.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    async with Client(cloud.plane) as client, yardsticks.bare_server(cloud.plane) as bare:
        for number in range(plan.repeats):
            image = await images.create(client, f"bench-{mib}-{number}")
            _settle(target, mib)
            begin = time.perf_counter()
            await images.upload(client, image.metadata.id, _chunks(source), digest)
            samples.upload.append(mib / (time.perf_counter() - begin))
            _settle(target, mib)
            samples.download.append(mib / await _download(client, image.metadata.id, target))
            assert target.stat().st_size == source.stat().st_size
            await _delete(client, image)
            count = (mib << 20) // images.CHUNK_BYTES
            _settle(target, mib)
            took = await yardsticks.stream(bare, count, images.CHUNK_BYTES, target)
            samples.bare.append(mib / took)
            for yardstick, found in (
                (yardsticks.copy_and_digest, samples.digested),
                (yardsticks.copy, samples.copied),
            ):
                _settle(target, mib)
                found.append(mib / await asyncio.to_thread(yardstick, source, target))
    source.unlink()
    return samples


async def _download(client: Client, image_id: str, target: Path) -> float:
    """Download an image into a file; return how long that took, in seconds."""
    stub = image_service_pb2_grpc.ImageServiceStub(client.channel)
    request = image_service_pb2.DownloadImageRequest(id=image_id)
    begin = time.perf_counter()
    with target.open("wb") as file:
        async for part in stub.DownloadImage(request, metadata=client.metadata(), timeout=600):
            file.write(part.chunk)
    return time.perf_counter() - begin


def _settle(target: Path, mib: int) -> None:
    """Let no measurement pay for what the one before it left to be written or thrown away.

    Nor for its memory: what a virtual machine has not used for a while its host may have taken
    back, and the first use of it then takes several times as long. So as much is used just before.
    """
    target.unlink(missing_ok=True)
    os.sync()
    with target.open("wb") as file:
        for _ in range(2 * mib):
            file.write(bytes(1 << 20))
    target.unlink()


async def _delete(client: Client, image: image_pb2.Image) -> None:
    stub = image_service_pb2_grpc.ImageServiceStub(client.channel)
    request = image_service_pb2.DeleteImageRequest(id=image.metadata.id)
    await client.mutate(stub.DeleteImage, request, image_pb2.Image)


def _write_random(path: Path, mib: int) -> None:
    with path.open("wb") as file:
        for _ in range(mib):
            file.write(os.urandom(1 << 20))


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(images.CHUNK_BYTES):
            yield chunk
