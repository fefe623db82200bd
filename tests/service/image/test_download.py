"""Downloads: from any offset, by whom it is for, and never of bytes that have changed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mcloud.common.v1 import operation_pb2
from mcloud.image.v1 import image_service_pb2
from mcloud_base import errors, ids, rpc
from service.identity.cloud import refused
from service.image.cloud import Project, StorageCloud, download

CONTENT = os.urandom(3_500_000)


@pytest.mark.parametrize("offset", [0, 1, 1 << 20, len(CONTENT) - 1, len(CONTENT)])
async def test_the_bytes_come_from_the_offset_on(
    cloud: StorageCloud, project: Project, offset: int
) -> None:
    image = await cloud.active_image(project.user, CONTENT)
    seen, content, _ = await download(cloud.storage, project.user, image.metadata.id, offset)
    assert (seen, content) == (image, CONTENT[offset:])


async def test_an_offset_beyond_the_end_is_refused(cloud: StorageCloud, project: Project) -> None:
    image = await cloud.active_image(project.user, CONTENT)
    call = download(cloud.storage, project.user, image.metadata.id, len(CONTENT) + 1)
    refusal = await refused(call)
    assert (type(refusal), refusal.reason) == (errors.OutOfRange, "BAD_OFFSET")


@pytest.mark.parametrize("damage", ["changed", "cut off", "gone"])
async def test_damaged_bytes_are_told(cloud: StorageCloud, project: Project, damage: str) -> None:
    image = await cloud.active_image(project.user, CONTENT)
    path: Path = cloud.settings.state_dir / "images" / image.metadata.id
    if damage == "gone":
        path.unlink()
    elif damage == "cut off":
        os.truncate(path, 100)
    else:
        with path.open("r+b") as file:
            file.seek(2_000_000)
            file.write(bytes([CONTENT[2_000_000] ^ 1]))

    refusal = await refused(download(cloud.storage, project.user, image.metadata.id))

    assert (type(refusal), refusal.reason) == (errors.DataLoss, "IMAGE_CORRUPT")


async def test_bytes_that_change_between_two_downloads_are_told(
    cloud: StorageCloud, project: Project
) -> None:
    image = await cloud.active_image(project.user, CONTENT)
    id_ = image.metadata.id
    path: Path = cloud.settings.state_dir / "images" / id_
    written = path.stat()
    for _ in range(2):
        assert (await download(cloud.storage, project.user, id_))[1] == CONTENT
    with path.open("r+b") as file:
        file.write(bytes([CONTENT[0] ^ 1]))
    os.utime(path, ns=(written.st_atime_ns, written.st_mtime_ns))  # as if nobody had written
    for _ in range(2):
        refusal = await refused(download(cloud.storage, project.user, id_))
        assert (type(refusal), refusal.reason) == (errors.DataLoss, "IMAGE_CORRUPT")
    path.write_bytes(CONTENT)
    for _ in range(2):
        assert (await download(cloud.storage, project.user, id_))[1] == CONTENT


async def test_a_host_gets_what_its_token_names_and_row_eleven_of_the_trace(
    cloud: StorageCloud, project: Project
) -> None:
    image = await cloud.active_image(project.user, CONTENT)
    other = await cloud.active_image(project.user, b"other")
    host = cloud.host()
    token = await cloud.delegate(host, project, image_ids=[image.metadata.id])

    _, content, trailing = await download(host.stubs, token, image.metadata.id)

    assert content == CONTENT
    step = operation_pb2.OperationStep.FromString(trailing["mcloud-step-bin"])
    assert (step.number, step.name, step.service) == (11, "image authorizes", "image")
    assert 0 < step.start_time.ToMicroseconds() <= step.end_time.ToMicroseconds()
    request = image_service_pb2.GetImageRequest(id=image.metadata.id)
    assert await rpc.call(host.stubs.images.GetImage, request, metadata=token) == image
    for id_ in (other.metadata.id, ids.new("img")):
        assert (await refused(download(host.stubs, token, id_))).reason == "NOT_DELEGATED"
    # The token is of no use with another host's certificate, nor the certificate without it.
    stranger = cloud.host()
    assert (await refused(download(stranger.stubs, token, image.metadata.id))).reason == (
        "TOKEN_INVALID"
    )
    assert (await refused(download(host.stubs, (), image.metadata.id))).reason == "WRONG_CALLER"


async def test_a_user_has_no_row_in_the_trailer(cloud: StorageCloud, project: Project) -> None:
    image = await cloud.active_image(project.user, CONTENT)
    _, _, trailing = await download(cloud.storage, project.user, image.metadata.id)
    assert "mcloud-step-bin" not in trailing
