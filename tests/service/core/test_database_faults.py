"""The database goes away, or its disk is full: nothing is lost, and all goes on afterwards."""

from __future__ import annotations

import asyncio
import hashlib
import os
import sqlite3
import subprocess
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import fixtures_postgresql
from mcloud.image.v1 import image_pb2, image_service_pb2, image_service_pb2_grpc
from mcloud_base import errors, ids, rpc
from service.core import plane as planes
from service.core.cloud import Client, Rule, refused, run
from service.core.keys import Keys, create_request, new_project

_WITHIN_S = 120.0
_IMAGE_BYTES = 16 << 20


async def keys_of(client: Client) -> Keys:
    project = new_project()
    return Keys(client.public, await client.make_user(project, Rule.ROLE_MEMBER, project))


@pytest.mark.postgres
async def test_postgresql_goes_away_and_comes_back(tmp_path: Path) -> None:
    """Whoever asks meanwhile is told to come back; what was asked for once is done once."""
    with fixtures_postgresql.running() as postgresql:
        for plane in run(tmp_path, planes.free_ports(), postgresql.server.url("{name}")):
            client = Client(plane)
            keys = await keys_of(client)
            before = await keys.create("before")
            watch = keys.watch(from_revision=(await keys.list()).revision)
            postgresql.stop()
            for method, request in (
                (keys.stub.CreateKeyPair, create_request("lost?")),
                (keys.stub.ListKeyPairs, keys.list_request()),
            ):
                error = await refused(_once(method(request, metadata=keys.who, timeout=60)))
                assert error.reason in ("DATABASE_UNAVAILABLE", "IDENTITY_UNAVAILABLE")
                assert rpc.asked_to_wait_s(error) > 0
            patient = [
                asyncio.ensure_future(
                    rpc.call(keys.stub.CreateKeyPair, request, metadata=keys.who, timeout_s=90)
                )
                for request in (create_request(f"k{n}") for n in range(10))
            ]
            error = await refused(_end(watch))
            assert isinstance(error, errors.Unavailable)
            postgresql.start()
            made = await asyncio.gather(*patient)
            assert len({operation.resource.id for operation in made}) == 10
            assert set(await keys.names()) == {"before", *(f"k{n}" for n in range(10))}
            # A watch goes on where it was, and hears of commits again.
            again = keys.watch(from_revision=(await keys.list()).revision)
            await keys.delete(before.resource.id)
            async with asyncio.timeout(_WITHIN_S):
                assert (await again.read()).key_pair.metadata.id == before.resource.id
            again.cancel()
            await client.close()


@contextmanager
def disk(directory: Path, size_bytes: int) -> Iterator[Path]:
    """A directory that can be filled; `resize` makes room."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount one")
    directory.mkdir()
    options = f"size={size_bytes}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", directory], check=True)
    try:
        yield directory
    finally:
        subprocess.run(["umount", "--lazy", directory], check=True)


def resize(directory: Path, size_bytes: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size_bytes}", directory], check=True)


async def test_full_disks_are_said_and_pass(tmp_path: Path) -> None:
    with disk(tmp_path / "state", 64 << 20) as state, disk(tmp_path / "images", 4 << 20) as store:
        for plane in run(tmp_path, planes.free_ports(), "sqlite", image_store=str(store)):
            client = Client(plane)
            keys = await keys_of(client)
            await _fill_database(state, keys)
            await _fill_store(store, client, keys.who)
            for path in state.glob("*.db"):
                with sqlite3.connect(path) as connection:
                    assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
                connection.close()
            await client.close()


async def _fill_database(state: Path, keys: Keys) -> None:
    filler = state / "filler"
    done: list[str] = []
    error: errors.Error | None = None
    _fill(filler)
    while error is None:  # what is free in its files the database uses up first
        try:
            await keys.create(name := f"k{len(done)}", labels={"l": "x" * 4000})
            done.append(name)
        except errors.Error as caught:
            error = caught
    assert (type(error), error.reason) == (errors.Unavailable, "DATABASE_FULL")
    assert rpc.asked_to_wait_s(error) > 0
    assert await keys.names(page_size=1000) == done
    filler.unlink()
    await keys.create("after")
    assert await keys.names(page_size=1000) == [*done, "after"]


async def _fill_store(store: Path, client: Client, who: rpc.Metadata) -> None:
    images = image_service_pb2_grpc.ImageServiceStub(client.public)
    request = image_service_pb2.CreateImageRequest(request_id=ids.request_id(), name="i")
    request.spec.disk_format = image_pb2.DISK_FORMAT_RAW
    image = (await rpc.call(images.CreateImage, request, metadata=who)).resource.id
    error = await refused(_upload(images, image, who))
    assert (type(error), error.reason) == (errors.Exhausted, "STORE_FULL")
    resize(store, 32 << 20)
    uploaded = await _upload(images, image, who)
    assert uploaded.status.size_bytes == _IMAGE_BYTES
    # Whatever is done to the file, it is said.
    path = store / image
    download = image_service_pb2.DownloadImageRequest(id=image)
    for harm in (_turn_over, _cut, _replace):
        harm(path)
        stream = images.DownloadImage(download, metadata=tuple(who), timeout=60)
        error = await refused(_end(stream))
        assert (type(error), error.reason) == (errors.DataLoss, "IMAGE_CORRUPT")


def _turn_over(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(_IMAGE_BYTES // 2)
        file.write(b"x")


def _cut(path: Path) -> None:
    os.truncate(path, _IMAGE_BYTES // 2)


def _replace(path: Path) -> None:
    path.unlink()
    path.mkdir()


async def _once(call: Awaitable[object]) -> object:
    with rpc.reraised():
        return await call


async def _upload(
    images: image_service_pb2_grpc.ImageServiceStub[Any], image: str, who: rpc.Metadata
) -> image_pb2.Image:
    """Upload from where it stopped."""
    part = image_service_pb2.UploadImageDataRequest
    data = b"\0" * _IMAGE_BYTES
    end = image_service_pb2.UploadEnd(sha256=hashlib.sha256(data).hexdigest())
    offset = 0
    while True:
        start = image_service_pb2.UploadStart(id=image, offset=offset)
        chunks = [data[n : n + (1 << 18)] for n in range(offset, len(data), 1 << 18)]
        parts = [part(start=start), *(part(chunk=chunk) for chunk in chunks), part(end=end)]
        try:
            with rpc.reraised():
                call: Any = images.UploadImageData(iter(parts), metadata=tuple(who), timeout=60)
                return await call  # type: ignore[no-any-return]
        except errors.OutOfRange as error:
            offset = int(error.metadata["offset"])
        except (errors.Unavailable, errors.Conflict):
            await asyncio.sleep(0.1)  # what was said is lost in the sending; the try before ends


def _fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        for size in (1 << 20, 4096):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                continue


async def _end(stream: object) -> None:
    async for _ in rpc.received(aiter(stream)):  # type: ignore[call-overload]
        continue
