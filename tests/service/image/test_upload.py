"""Uploads: resumed where they stopped, one at a time, refused when the bytes are not right."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import stat
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

import ports
from mcloud.image.v1 import image_pb2, image_service_pb2, quota_service_pb2, quota_service_pb2_grpc
from mcloud_base import errors, rpc
from mcloud_controlplane.core import database
from mcloud_controlplane.image import contents, model, sweeper
from mcloud_controlplane.settings import Settings
from service.identity.cloud import eventually, refused
from service.image.cloud import (
    Project,
    StorageCloud,
    StorageStubs,
    Upload,
    both_databases,
    download,
    upload_requests,
)

State = image_pb2.ImageStatus
CONTENT = os.urandom(5_000_003)


@both_databases
async def test_an_upload_goes_on_where_it_stopped(cloud: StorageCloud, project: Project) -> None:
    id_ = (await cloud.create_image(project.user)).metadata.id
    half = 3_000_001

    refusal = await refused(cloud.upload(project.user, id_, CONTENT[:half], end=False))
    assert refusal.reason == "UPLOAD_UNFINISHED"
    seen = await cloud.get_image(project.user, id_)
    assert (seen.status.state, seen.status.uploaded_bytes) == (State.STATE_SAVING, half)

    refusal = await refused(cloud.upload(project.user, id_, CONTENT))
    assert (type(refusal), refusal.reason) == (errors.OutOfRange, "BAD_OFFSET")
    assert refusal.metadata["offset"] == str(half)
    done = await cloud.upload(project.user, id_, CONTENT[half:], offset=half, whole=CONTENT)

    assert done.status.state == State.STATE_ACTIVE
    assert done.status.sha256 == hashlib.sha256(CONTENT).hexdigest()
    assert (await download(cloud.storage, project.user, id_))[1] == CONTENT
    refusal = await refused(cloud.upload(project.user, id_, CONTENT))
    assert refusal.reason == "IMAGE_NOT_QUEUED"


async def test_a_client_that_goes_away_leaves_what_it_brought(
    cloud: StorageCloud, project: Project
) -> None:
    id_ = (await cloud.create_image(project.user)).metadata.id
    brought = asyncio.Event()

    async def stalling() -> AsyncIterator[Upload]:
        for request in upload_requests(id_, CONTENT[: 2 << 20], end=False):
            yield request
        brought.set()
        await asyncio.Event().wait()

    call = cloud.storage.images.UploadImageData(stalling(), metadata=tuple(project.user))
    await brought.wait()
    await eventually(lambda: on_disk(cloud, id_, 2 << 20))
    call.cancel()

    async def left() -> bool:
        row = await row_of(cloud, id_)
        return row.upload_expire_time == 0 and row.uploaded_bytes == 2 << 20

    await eventually(left)
    rest = CONTENT[2 << 20 :]
    await cloud.upload(project.user, id_, rest, offset=2 << 20, whole=CONTENT)
    assert (await download(cloud.storage, project.user, id_))[1] == CONTENT


async def test_wrong_bytes_are_thrown_away_and_may_be_brought_again(
    cloud: StorageCloud, project: Project
) -> None:
    id_ = (await cloud.create_image(project.user)).metadata.id

    refusal = await refused(cloud.upload(project.user, id_, CONTENT, sha256="0" * 64))

    assert (type(refusal), refusal.reason) == (errors.InvalidArgument, "DIGEST_MISMATCH")
    seen = await cloud.get_image(project.user, id_)
    assert seen.status.state == State.STATE_ERROR
    assert "SHA-256" in seen.status.fault
    assert list(store_of(cloud).iterdir()) == []
    done = await cloud.upload(project.user, id_, CONTENT)
    assert (done.status.state, done.status.fault) == (State.STATE_ACTIVE, "")


@both_databases
async def test_of_two_uploads_at_once_one_is_refused(cloud: StorageCloud, project: Project) -> None:
    id_ = (await cloud.create_image(project.user)).metadata.id
    results = await asyncio.gather(
        *(cloud.upload(project.user, id_, CONTENT) for _ in range(4)), return_exceptions=True
    )
    assert [type(r) for r in results].count(image_pb2.Image) == 1
    reasons = {r.reason for r in results if isinstance(r, errors.Error)}
    assert reasons <= {"UPLOAD_IN_PROGRESS", "IMAGE_NOT_QUEUED"}
    assert (await download(cloud.storage, project.user, id_))[1] == CONTENT


async def test_a_dead_uploader_blocks_only_until_its_lease_ends(
    cloud: StorageCloud, project: Project
) -> None:
    id_ = (await cloud.create_image(project.user)).metadata.id
    await set_lease(cloud, id_, database.now() + 60_000_000)
    refusal = await refused(cloud.upload(project.user, id_, CONTENT))
    assert (type(refusal), refusal.reason) == (errors.Conflict, "UPLOAD_IN_PROGRESS")
    await set_lease(cloud, id_, database.now() - 1)
    await cloud.upload(project.user, id_, CONTENT)


async def test_a_partial_file_is_locked_by_its_writer(tmp_path: Path) -> None:
    first, second = contents.Contents(tmp_path), contents.Contents(tmp_path)
    partial = await first.open_partial("img-x", 0)
    assert partial is not None
    assert await second.open_partial("img-x", 0) is None
    assert stat.S_IMODE(partial.path.stat().st_mode) == 0o600
    partial.close()
    again = await second.open_partial("img-x", 0)
    assert again is not None
    again.close()
    for opened in (first, second):
        opened.close()


async def test_a_full_store_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = contents.Contents(tmp_path)
    full = Path("/dev/full")  # every write to it fails with ENOSPC
    (tmp_path / "img-x.partial").touch()
    partial = await opened.open_partial("img-x", 0)
    assert partial is not None
    descriptor = os.open(full, os.O_RDWR)
    os.dup2(descriptor, partial._descriptor)
    os.close(descriptor)
    with pytest.raises(errors.Exhausted) as caught:
        await opened.run(partial.write, [b"x"])
    assert caught.value.reason == "STORE_FULL"
    partial.close()
    opened.close()


@both_databases
async def test_the_quota_of_bytes_holds_also_for_uploads_at_once(
    cloud: StorageCloud, project: Project
) -> None:
    await set_quota(cloud, project, image_bytes=len(CONTENT) * 2 + 10)
    images = [(await cloud.create_image(project.user, f"{n}")).metadata.id for n in range(4)]
    first = await asyncio.gather(
        *(cloud.upload(project.user, id_, CONTENT) for id_ in images), return_exceptions=True
    )
    reasons = [r.reason for r in first if isinstance(r, errors.Error)]
    assert set(reasons) <= {"QUOTA_EXCEEDED"}
    total = sum([(await row_of(cloud, id_)).reserved_bytes for id_ in images])
    assert total <= len(CONTENT) * 2 + 10
    # Those that were refused half-way may be given up; then there is room for two.
    for id_, result in zip(images, first, strict=True):
        if isinstance(result, errors.Error):
            await cloud.delete_image(project.user, id_)
    done = sum(1 for r in first if isinstance(r, image_pb2.Image))
    for n in range(2 - done):
        image = await cloud.create_image(project.user, f"again {n}")
        await cloud.upload(project.user, image.metadata.id, CONTENT)
    image = await cloud.create_image(project.user, "too much")
    refusal = await refused(cloud.upload(project.user, image.metadata.id, CONTENT))
    assert refusal.reason == "QUOTA_EXCEEDED"
    found = await rpc.call(
        quota_service_pb2_grpc.QuotaServiceStub(cloud.public.channel).GetQuota,
        quota_service_pb2.GetQuotaRequest(),
        metadata=project.user,
    )
    assert found.usage.image_bytes <= len(CONTENT) * 2 + 10
    await set_quota(cloud, project, image_bytes=-1)
    await cloud.upload(project.user, image.metadata.id, CONTENT)


async def test_an_image_that_is_deleted_meanwhile_ends_its_upload(
    cloud: StorageCloud, project: Project
) -> None:
    id_ = (await cloud.create_image(project.user)).metadata.id
    deleted = asyncio.Event()

    async def requests() -> AsyncIterator[Upload]:
        for request in upload_requests(id_, CONTENT[: 1 << 20], end=False):
            yield request
        await deleted.wait()
        yield Upload(chunk=CONTENT[1 << 20 : 2 << 20])
        yield Upload(end=image_service_pb2.UploadEnd(sha256="0" * 64))

    async def upload() -> None:
        with rpc.reraised():
            await cloud.storage.images.UploadImageData(
                requests(), metadata=tuple(project.user), timeout=30
            )

    running = asyncio.create_task(upload())
    await eventually(lambda: on_disk(cloud, id_, 1 << 20))
    await cloud.delete_image(project.user, id_)
    deleted.set()
    assert isinstance(await refused(running), errors.Error)

    async def swept() -> bool:
        return list(store_of(cloud).iterdir()) == []

    await eventually(swept, timeout_s=40)


@both_databases
async def test_an_upload_that_was_given_up_ends_in_an_error(
    cloud: StorageCloud, project: Project
) -> None:
    id_ = (await cloud.create_image(project.user)).metadata.id
    await refused(cloud.upload(project.user, id_, CONTENT, end=False))
    store = cloud.runtime.database("image", model.open_database)
    opened = contents.Contents(store_of(cloud))

    await sweeper.sweep(store, opened, abandoned_s=0)

    seen = await cloud.get_image(project.user, id_)
    assert (seen.status.state, seen.status.uploaded_bytes) == (State.STATE_ERROR, 0)
    assert list(store_of(cloud).iterdir()) == []
    assert (await row_of(cloud, id_)).reserved_bytes == 0
    await cloud.upload(project.user, id_, CONTENT)
    opened.close()


@pytest.mark.parametrize(
    ("requests", "reason"),
    [
        ([], "BAD_UPLOAD"),
        ([Upload(chunk=b"x")], "BAD_UPLOAD"),
        ([Upload(start=image_service_pb2.UploadStart(id="img-1"))], "BAD_REQUEST"),
    ],
)
async def test_an_upload_begins_with_start(
    cloud: StorageCloud, project: Project, requests: list[Upload], reason: str
) -> None:
    with pytest.raises(errors.InvalidArgument) as caught, rpc.reraised():
        await cloud.storage.images.UploadImageData(
            iter(requests), metadata=tuple(project.user), timeout=20
        )
    assert caught.value.reason == reason


async def test_a_chunk_is_at_most_a_mebibyte(cloud: StorageCloud, project: Project) -> None:
    id_ = (await cloud.create_image(project.user)).metadata.id
    refusal = await refused(cloud.upload(project.user, id_, CONTENT, chunk=(1 << 20) + 1))
    assert refusal.reason == "BAD_REQUEST"


async def test_an_upload_survives_the_death_of_its_process(
    cloud: StorageCloud, project: Project, settings: Settings, tmp_path: Path
) -> None:
    """A second process serves the upload and is killed in the middle of it."""
    id_ = (await cloud.create_image(project.user)).metadata.id
    public = f"127.0.0.1:{ports.free()}"
    config = tmp_path / "second.toml"
    config.write_text(
        f'state_dir = "{settings.state_dir}"\n'
        'services = ["image"]\n'
        f'public_listen = "{public}"\n'
        f'internal_listen = "127.0.0.1:{ports.free()}"\n'
        f'internal_endpoints = {{ identity = "{settings.internal_listen}" }}\n'
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "mcloud_controlplane",
        "--config",
        str(config),
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stderr=asyncio.subprocess.DEVNULL,
    )
    channel = rpc.channel(public, grpc.ssl_channel_credentials(cloud.runtime.authority.certificate))
    try:
        async with asyncio.timeout(60):
            await channel.channel_ready()
        brought = asyncio.Event()

        async def stalling() -> AsyncIterator[Upload]:
            for request in upload_requests(id_, CONTENT[: 4 << 20], end=False):
                yield request
            brought.set()
            await asyncio.Event().wait()

        call = StorageStubs(channel).images.UploadImageData(
            stalling(), metadata=tuple(project.user)
        )
        await brought.wait()
        await eventually(lambda: on_disk(cloud, id_, 4 << 20))
    finally:
        process.send_signal(signal.SIGKILL)
        await process.wait()
    with pytest.raises(grpc.RpcError):
        await call
    await channel.close(None)

    refusal = await refused(cloud.upload(project.user, id_, CONTENT))
    assert refusal.reason == "UPLOAD_IN_PROGRESS"
    await set_lease(cloud, id_, 0)
    known = (await cloud.get_image(project.user, id_)).status.uploaded_bytes
    await cloud.upload(project.user, id_, CONTENT[known:], offset=known, whole=CONTENT)
    assert (await download(cloud.storage, project.user, id_))[1] == CONTENT


def store_of(cloud: StorageCloud) -> Path:
    return cloud.settings.state_dir / "images"


async def on_disk(cloud: StorageCloud, id_: str, size: int) -> bool:
    path = store_of(cloud) / f"{id_}.partial"
    return path.exists() and path.stat().st_size == size


async def row_of(cloud: StorageCloud, id_: str) -> model.Image:
    store = cloud.runtime.database("image", model.open_database)
    row: model.Image = await store.read(model.Image.get_by_id, id_)
    return row


async def set_lease(cloud: StorageCloud, id_: str, end: int) -> None:
    table = model.Image
    await cloud.runtime.database("image", model.open_database).write(
        lambda: table.update(upload_expire_time=end).where(table.id == id_).execute()
    )


async def set_quota(cloud: StorageCloud, project: Project, **values: int) -> None:
    await cloud.runtime.database("image", model.open_database).write(
        lambda: (
            model.Quota.insert(project_id=project.id, **values)
            .on_conflict(conflict_target=[model.Quota.project_id], update=values)
            .execute()
        )
    )
