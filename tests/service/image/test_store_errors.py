"""The image store's disk fails: EIO of the kernel's own, in the middle of an upload or a download.

Every reading or writing of an address that nothing is mapped to fails so in /proc/self/mem, which
is put in the place of the open file. A disk fails no differently: Linux has one way to say it.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mcloud.image.v1 import image_pb2, image_service_pb2
from mcloud_base import errors, rpc
from mcloud_controlplane.image import contents
from service.identity.cloud import refused
from service.image.cloud import Project, StorageCloud, Upload, download

State = image_pb2.ImageStatus
CONTENT = os.urandom(40 << 20)  # more than is on its way to a client that does not read
CHUNK = 1 << 20


@contextmanager
def failing(path: Path) -> Iterator[None]:
    """Have this process's open files of a path fail; others, also of the same path, do not."""
    failed = []
    memory = os.open("/proc/self/mem", os.O_RDWR)
    with pytest.raises(OSError, match="Input/output") as caught:
        os.pread(memory, 1, 0)
    assert caught.value.errno == errno.EIO
    for entry in os.listdir("/proc/self/fd"):
        if Path(f"/proc/self/fd/{entry}").is_symlink() and _link(entry) == str(path):
            failed.append((int(entry), os.dup(int(entry))))
            os.dup2(memory, int(entry))
    os.close(memory)
    assert failed, f"{path} is not open"
    try:
        yield
    finally:
        for number, kept in failed:
            if _link(str(number)) != str(path):
                os.close(kept)  # the service has closed what failed


def _link(entry: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{entry}")
    except FileNotFoundError:
        return ""


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)  # it is another thread's


async def test_a_disk_that_cannot_be_read_fails_the_download_only(
    cloud: StorageCloud, project: Project
) -> None:
    image = await cloud.active_image(project.user, CONTENT)
    path = cloud.settings.state_dir / "images" / image.metadata.id
    request = image_service_pb2.DownloadImageRequest(id=image.metadata.id)
    call = cloud.storage.images.DownloadImage(request, metadata=tuple(project.user), timeout=60)
    answers = rpc.received(call)
    for _ in range(2):  # the image and the first of its bytes
        await anext(answers)
    with failing(path):
        error = await refused(_drain(answers))
    assert (type(error), error.reason) == (errors.Unavailable, "STORE_UNAVAILABLE")
    assert "Input/output error" in error.message
    assert rpc.asked_to_wait_s(error) > 0
    # It has passed: the bytes are there, and the image is what it was.
    seen, content, _ = await download(cloud.storage, project.user, image.metadata.id)
    assert (seen, content) == (image, CONTENT)


async def _drain(answers: object) -> None:
    async for _ in answers:  # type: ignore[attr-defined]
        continue


async def test_a_disk_that_cannot_be_written_keeps_what_it_has(
    cloud: StorageCloud, project: Project
) -> None:
    image = (await cloud.create_image(project.user)).metadata.id
    path = cloud.settings.state_dir / "images" / f"{image}.partial"
    half = 3 * CHUNK
    call = cloud.storage.images.UploadImageData(metadata=tuple(project.user), timeout=60)
    await call.write(Upload(start=image_service_pb2.UploadStart(id=image, offset=0)))
    for offset in range(0, half, CHUNK):
        await call.write(Upload(chunk=CONTENT[offset : offset + CHUNK]))
    await until(lambda: path.exists() and path.stat().st_size == half)
    with failing(path):
        await call.write(Upload(chunk=CONTENT[half : half + CHUNK]))

        async def end() -> None:
            with rpc.reraised():
                await call

        error = await refused(end())
    assert (type(error), error.reason) == (errors.Unavailable, "STORE_UNAVAILABLE")
    assert rpc.asked_to_wait_s(error) > 0
    seen = await cloud.get_image(project.user, image)
    assert (seen.status.state, seen.status.uploaded_bytes) == (State.STATE_SAVING, half)
    done = await cloud.upload(project.user, image, CONTENT[half:], offset=half, whole=CONTENT)
    assert done.status.state == State.STATE_ACTIVE
    assert (await download(cloud.storage, project.user, image))[1] == CONTENT


async def test_a_disk_that_cannot_be_read_fails_going_on_with_an_upload(
    cloud: StorageCloud, project: Project
) -> None:
    """What had come before is read again, for its digest."""
    image = (await cloud.create_image(project.user)).metadata.id
    half = 20 << 20
    await refused(cloud.upload(project.user, image, CONTENT[:half], end=False))
    path = cloud.settings.state_dir / "images" / f"{image}.partial"
    opened = await contents.Contents(path.parent).open_partial(image, half)
    assert opened is not None
    with failing(path):
        error = await refused(asyncio.to_thread(opened.hash_some))
        opened.close()
    assert (type(error), error.reason) == (errors.Unavailable, "STORE_UNAVAILABLE")
    done = await cloud.upload(project.user, image, CONTENT[half:], offset=half, whole=CONTENT)
    assert done.status.state == State.STATE_ACTIVE
