"""Hostile and broken images, made by qemu-img itself, and what becomes of them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import struct
from pathlib import Path

import pytest

from mcloud.image.v1 import image_pb2
from mcloud_base import errors
from mcloud_controlplane.image import inspection
from service.identity.cloud import refused
from service.image.cloud import Project, StorageCloud, download

_HEADER_LENGTH_AT = 100
_EXTENSIONS_AT = 112


async def qemu_img(*arguments: str) -> None:
    process = await asyncio.create_subprocess_exec(
        "qemu-img", *arguments, stdout=asyncio.subprocess.DEVNULL
    )
    assert await process.wait() == 0


@pytest.fixture
async def plain(tmp_path: Path) -> Path:
    path = tmp_path / "plain.qcow2"
    await qemu_img("create", "-q", "-f", "qcow2", str(path), "64M")
    return path


async def refusal_of(path: Path, disk_format: str = "QCOW2") -> str:
    with pytest.raises(errors.InvalidArgument) as caught:
        await inspection.inspect(path, disk_format)
    assert caught.value.reason == "IMAGE_REFUSED"
    return str(caught.value.metadata["why"])


@pytest.mark.parametrize(
    "options",
    ["compat=0.10", "compat=1.1", "cluster_size=2M", "extended_l2=on", "compression_type=zstd"],
)
async def test_a_sound_image_is_accepted(tmp_path: Path, options: str) -> None:
    path = tmp_path / "image.qcow2"
    await qemu_img("create", "-q", "-f", "qcow2", "-o", options, str(path), "64M")
    assert await inspection.inspect(path, "QCOW2") == 64 << 20


@pytest.mark.parametrize(
    "backing", ["/etc/passwd", 'json:{"driver":"nbd","host":"192.0.2.1","port":"1"}']
)
async def test_a_backing_file_is_refused(tmp_path: Path, backing: str) -> None:
    path = tmp_path / "image.qcow2"
    await qemu_img("create", "-q", "-f", "qcow2", "-u", "-b", backing, "-F", "raw", str(path), "8M")
    assert "backing" in await refusal_of(path)


async def test_a_data_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    options = f"data_file={tmp_path / 'data.raw'},data_file_raw=on"
    await qemu_img("create", "-q", "-f", "qcow2", "-o", options, str(path), "1M")
    await qemu_img("amend", "-f", "qcow2", "-o", "data_file=/etc/passwd", str(path))
    assert "incompatible" in await refusal_of(path)
    # The same without the feature's bit: the header's extension still names the file.
    with path.open("r+b") as file:
        file.seek(72)
        file.write(struct.pack(">Q", 0))
    assert "another file" in await refusal_of(path)


async def test_an_encrypted_image_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    # AES, as qemu-img makes LUKS only where it can time its own key derivation.
    await qemu_img(
        "create", "-q", "-f", "qcow2", "--object", "secret,id=s,data=x",
        "-o", "encrypt.format=aes,encrypt.key-secret=s", str(path), "1M",
    )  # fmt: skip
    assert "encrypted" in await refusal_of(path)


async def test_luks_is_refused_by_its_extension_too(plain: Path) -> None:
    with plain.open("r+b") as file:
        file.seek(_EXTENSIONS_AT)
        file.write(struct.pack(">II", 0x0537BE77, 16))
    assert "encrypted" in await refusal_of(plain)


@pytest.mark.parametrize(
    ("position", "value", "why"),
    [
        (0, b"QFI\x00", "not qcow2"),
        (4, struct.pack(">I", 4), "version"),
        (20, struct.pack(">I", 30), "cluster bits"),
        (20, struct.pack(">I", 1), "cluster bits"),
        (24, struct.pack(">Q", 0), "out of range"),
        (24, struct.pack(">Q", 1 << 62), "out of range"),
        (32, struct.pack(">I", 1), "encrypted"),  # AES
        (32, struct.pack(">I", 2), "encrypted"),  # LUKS
        (36, struct.pack(">I", 1 << 30), "table of contents"),
        (40, struct.pack(">Q", 1 << 60), "table of contents"),
        (72, struct.pack(">Q", 1 << 1), "incompatible"),
        (72, struct.pack(">Q", 1 << 63), "incompatible"),
        (_HEADER_LENGTH_AT, struct.pack(">I", 8), "header"),
        (_HEADER_LENGTH_AT, struct.pack(">I", 1 << 31), "header"),
        (96, struct.pack(">I", 99), "qemu-img"),  # of reference counts: left to qemu-img
    ],
)
async def test_a_broken_header_is_refused(
    plain: Path, position: int, value: bytes, why: str
) -> None:
    with plain.open("r+b") as file:
        file.seek(position)
        file.write(value)
    assert why in await refusal_of(plain)


@pytest.mark.parametrize("size", [0, 3, 71, 100, 4096])
async def test_a_cut_off_image_is_refused(plain: Path, size: int) -> None:
    os.truncate(plain, size)
    assert await refusal_of(plain)


async def test_another_format_is_refused_as_qcow2(tmp_path: Path) -> None:
    path = tmp_path / "image.vmdk"
    await qemu_img("create", "-q", "-f", "vmdk", str(path), "8M")
    assert "not qcow2" in await refusal_of(path)


async def test_random_bytes_never_break_the_inspection(plain: Path) -> None:
    original = plain.read_bytes()
    for _ in range(300):
        mangled = bytearray(original[:70_000])
        for _ in range(8):
            mangled[int.from_bytes(os.urandom(2)) % 120] = os.urandom(1)[0]
        plain.write_bytes(mangled)
        with contextlib.suppress(errors.InvalidArgument):
            inspection._inspect_header(plain, "QCOW2")


async def test_raw_stays_raw_whatever_it_looks_like(
    cloud: StorageCloud, project: Project, plain: Path
) -> None:
    content = plain.read_bytes()
    image = await cloud.active_image(project.user, content)
    assert image.spec.disk_format == image_pb2.DISK_FORMAT_RAW
    # Not the 64 MiB that the header in it tells of.
    assert image.status.virtual_size_bytes == -(-len(content) // 512) * 512


async def test_a_refused_image_says_why_and_leaves_no_bytes(
    cloud: StorageCloud, project: Project, tmp_path: Path, plain: Path
) -> None:
    path = tmp_path / "image.qcow2"
    await qemu_img(
        "create", "-q", "-f", "qcow2", "-u", "-b", "/etc/passwd", "-F", "raw", str(path), "8M"
    )
    image = await cloud.create_image(project.user, disk_format=image_pb2.DISK_FORMAT_QCOW2)

    refusal = await refused(cloud.upload(project.user, image.metadata.id, path.read_bytes()))

    assert refusal.reason == "IMAGE_REFUSED"
    seen = await cloud.get_image(project.user, image.metadata.id)
    assert seen.status.state == image_pb2.ImageStatus.STATE_ERROR
    assert "backing" in seen.status.fault
    assert list((cloud.settings.state_dir / "images").iterdir()) == []
    done = await cloud.upload(project.user, image.metadata.id, plain.read_bytes())
    assert done.status.virtual_size_bytes == 64 << 20
    assert (await download(cloud.storage, project.user, image.metadata.id))[1] == (
        plain.read_bytes()
    )
