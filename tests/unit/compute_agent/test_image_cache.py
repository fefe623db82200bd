"""The image cache: one download, checked bytes, nothing opened on an image's word."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import struct
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcloud_agents.compute import image_cache, qcow2
from mcloud_agents.compute.image_cache import CachedImage, ImageCache
from mcloud_base.errors import DataLoss, InvalidArgument, Unavailable


class Source:
    """Bytes that arrive when the test says so."""

    def __init__(self, content: bytes, break_after: int | None = None) -> None:
        self.content = content
        self.break_after = break_after
        self.offsets: list[int] = []
        self.open = asyncio.Event()
        self.open.set()

    async def __call__(self, offset: int) -> AsyncIterator[bytes]:
        self.offsets.append(offset)
        await self.open.wait()
        for start in range(offset, len(self.content), 1000):
            if self.break_after is not None and start >= self.break_after:
                raise Unavailable("STREAM_BROKEN", "broken")
            yield self.content[start : start + 1000]


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def qemu_img(*arguments: object) -> None:
    subprocess.run(["qemu-img", *map(str, arguments)], check=True, timeout=60)


@pytest.fixture
async def cache(tmp_path: Path) -> ImageCache:
    return ImageCache(tmp_path / "images")


async def test_many_callers_make_one_download(cache: ImageCache) -> None:
    source = Source(os.urandom(50_000))
    source.open.clear()
    key = digest(source.content)
    callers = [
        asyncio.create_task(cache.ensure(key, "raw", len(source.content), source))
        for _ in range(10)
    ]
    await asyncio.wait(callers, timeout=0.05)
    source.open.set()
    images = await asyncio.gather(*callers)
    assert source.offsets == [0]
    assert {image.path for image in images} == {images[0].path}
    assert images[0].path.read_bytes() == source.content
    assert images[0].path.stat().st_mode & 0o777 == 0o600


async def test_a_broken_download_is_gone_on_with_by_the_next(cache: ImageCache) -> None:
    content = os.urandom(50_000)
    broken, whole = Source(content, break_after=20_000), Source(content)
    broken.open.clear()
    first = asyncio.create_task(cache.ensure(digest(content), "raw", len(content), broken))
    second = asyncio.create_task(cache.ensure(digest(content), "raw", len(content), whole))
    await asyncio.wait({first, second}, timeout=0.05)
    broken.open.set()
    with pytest.raises(Unavailable, match="STREAM_BROKEN"):
        await first
    assert (await second).path.read_bytes() == content
    assert (broken.offsets, whole.offsets) == ([0], [20_000])


async def test_a_cancelled_download_leaves_what_came(cache: ImageCache) -> None:
    content = os.urandom(50_000)
    source = Source(content)
    source.open.clear()
    caller = asyncio.create_task(cache.ensure(digest(content), "raw", len(content), source))
    await asyncio.wait({caller}, timeout=0.05)
    caller.cancel()
    await asyncio.wait({caller})
    source.open.set()
    await cache.ensure(digest(content), "raw", len(content), source)


@pytest.mark.parametrize(
    ("arrived", "size"),
    [(b"x" * 5000, 5000), (b"", 5000), (b"x" * 6000, 5000)],
    ids=["other bytes", "too few", "too many"],
)
async def test_wrong_bytes_are_never_kept(
    cache: ImageCache, tmp_path: Path, arrived: bytes, size: int
) -> None:
    expected = digest(b"y" * 5000)
    with pytest.raises((DataLoss, Unavailable)):
        await cache.ensure(expected, "raw", size, Source(arrived))
    assert await cache.find(expected, "raw") is None
    good = Source(b"y" * 5000)
    assert (await cache.ensure(expected, "raw", 5000, good)).path.exists()


@pytest.mark.parametrize("bad", ["", "../../../etc/passwd", "A" * 64, "a" * 63])
async def test_a_digest_is_no_path(cache: ImageCache, bad: str) -> None:
    with pytest.raises(InvalidArgument, match="BAD_DIGEST"):
        await cache.ensure(bad, "raw", 1, Source(b"x"))


async def test_images_that_name_files_are_refused(cache: ImageCache, tmp_path: Path) -> None:
    hostile = []
    path = tmp_path / "backing.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-u", "-b", "/etc/passwd", "-F", "raw", path, "1M")
    hostile.append(path.read_bytes())
    (tmp_path / "data.raw").touch()
    path = tmp_path / "data.qcow2"
    option = f"data_file={tmp_path / 'data.raw'},data_file_raw=on"
    qemu_img("create", "-q", "-f", "qcow2", "-o", option, path, "1M")
    hostile.append(path.read_bytes())
    path = tmp_path / "plain.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "1M")
    plain = path.read_bytes()
    hostile.append(plain[:72])
    hostile.append(plain[:32] + struct.pack(">I", 1) + plain[36:])  # encrypted
    hostile.append(plain[:72] + struct.pack(">Q", 1 << 40) + plain[80:])  # unknown feature
    hostile.append(b"KDMV" + bytes(1000))  # vmdk
    for content in hostile:
        with pytest.raises(InvalidArgument, match="IMAGE_REFUSED"):
            await cache.ensure(digest(content), "qcow2", len(content), Source(content))
        assert await cache.find(digest(content), "qcow2") is None
    image = await cache.ensure(digest(plain), "qcow2", len(plain), Source(plain))
    assert image.virtual_size_bytes == 1 << 20


@given(st.binary(max_size=200))
def test_any_header_is_read_or_refused(tail: bytes) -> None:
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:
        file.write(qcow2.MAGIC + tail)
        file.flush()
        with contextlib.suppress(InvalidArgument):  # and nothing else
            assert qcow2.read_header(Path(file.name)).version in (2, 3)


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
async def test_an_overlay_is_made_once(tmp_path: Path, image_format: str) -> None:
    base = tmp_path / f"base.{image_format}"
    qemu_img("create", "-q", "-f", image_format, base, "1M")
    image = CachedImage(base, image_format, 1 << 20)
    overlay = tmp_path / "root.qcow2"
    await image_cache.ensure_overlay(overlay, image, 2)
    before = overlay.stat()
    await image_cache.ensure_overlay(overlay, image, 2)
    assert overlay.stat().st_ino == before.st_ino
    assert before.st_mode & 0o777 == 0o600
    assert qcow2.read_backing(overlay) == base
    info = subprocess.run(
        ["qemu-img", "info", "-f", "qcow2", str(overlay)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "virtual size: 2 GiB" in info
    assert f"backing file format: {image_format}" in info


async def test_a_flavor_must_hold_the_image(tmp_path: Path) -> None:
    image = CachedImage(tmp_path / "base", "raw", 2 << 30)
    with pytest.raises(InvalidArgument, match="FLAVOR_TOO_SMALL"):
        await image_cache.ensure_overlay(tmp_path / "root.qcow2", image, 1)
    assert list(tmp_path.iterdir()) == []


async def test_ageing_spares_what_is_in_use(tmp_path: Path) -> None:
    cache = ImageCache(tmp_path / "images", limit_bytes=40_000, max_age_s=3600)
    paths = []
    for index in range(6):
        content = bytes([index + 1]) * 16_384
        image = await cache.ensure(digest(content), "raw", len(content), Source(content))
        age_s = 7200 if index < 2 else 60 - index
        os.utime(image.path, (time.time() - age_s,) * 2)
        paths.append(image.path)
    removed = await cache.age(frozenset({paths[0]}))
    # The second is too old; of the others the least recently used go, down to the limit.
    assert set(removed) == {paths[1], paths[2], paths[3], paths[4]}
    assert paths[0].exists()
    assert paths[5].exists()
