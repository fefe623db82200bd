"""Images on the host, by the SHA-256 of their bytes, and the overlays that guests write to."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import re
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakValueDictionary

import structlog

from mcloud_agents.compute import files, qcow2
from mcloud_base.errors import DataLoss, Exhausted, InvalidArgument, Unavailable

log = structlog.get_logger()

# Brings an image's bytes from an offset on. It is called again, further on, if it fails.
ByteSource = Callable[[int], AsyncIterator[bytes]]

_DIGEST = re.compile("[0-9a-f]{64}")
_SUFFIXES = {"qcow2": ".qcow2", "raw": ".raw"}
_PARTIAL = ".part"

# qemu-img reads what strangers have made: little memory, time, and no big files. `--as` has to
# cover the mapped libraries as well.
_LIMITS = ("prlimit", "--as=2147483648", "--cpu=60", "--nofile=64", "--core=0", "--")
_QEMU_IMG_DEADLINE_S = 120.0


@dataclass(frozen=True)
class CachedImage:
    """A whole image, checked."""

    path: Path
    format: str
    virtual_size_bytes: int


class ImageCache:
    """The cache in one directory.

    Args:
        directory: of the images; its file system must know O_DIRECTORY and O_DIRECT.
        limit_bytes: the least recently used go until the rest is not more than this.
        max_age_s: unused images go after this time.
    """

    def __init__(
        self, directory: Path, *, limit_bytes: int = 50 << 30, max_age_s: float = 7 * 86400.0
    ) -> None:
        self._directory = directory
        self._limit_bytes = limit_bytes
        self._max_age_s = max_age_s
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        files.make_private_directory(directory)

    # --- images ---------------------------------------------------------------------------------

    async def find(self, digest: str, image_format: str) -> CachedImage | None:
        """Return an image that is here, and mark it as used."""
        path = self._path(digest, image_format)
        try:
            os.utime(path)  # its age counts from its last use
        except FileNotFoundError:
            return None
        return CachedImage(path, image_format, qcow2.check(path, image_format))

    async def ensure(
        self, digest: str, image_format: str, size_bytes: int, source: ByteSource
    ) -> CachedImage:
        """Have the image here: whole, of this digest, and safe to open.

        Of several callers one downloads and the others wait for it; if it fails, the next goes on
        from where it stopped, with its own source.

        Raises:
            DataLoss: IMAGE_CORRUPT: the bytes are not those of the digest; they are thrown away.
            InvalidArgument: IMAGE_REFUSED.
            OSError: as of the file system.
        """
        lock = self._locks.setdefault(digest, asyncio.Lock())
        async with lock:
            found = await self.find(digest, image_format)
            if found:
                return found
            path = self._path(digest, image_format)
            partial = path.with_suffix(_PARTIAL)
            await self._download(partial, digest, size_bytes, source)
            virtual_size = qcow2.check(partial, image_format)
            files.rename_durably(partial, path)
            log.info("image cached", sha256=digest, size_bytes=size_bytes)
            return CachedImage(path, image_format, virtual_size)

    async def _download(
        self, partial: Path, digest: str, size_bytes: int, source: ByteSource
    ) -> None:
        hasher = hashlib.sha256()
        with files.open_private(partial) as file:
            # What a former attempt has brought is hashed like what comes now.
            while chunk := await files.in_thread(file.read, 4 << 20):
                hasher.update(chunk)
            offset = file.tell()
            if offset < size_bytes:
                async for chunk in source(offset):
                    offset += len(chunk)
                    if offset > size_bytes:
                        break
                    await files.in_thread(_write, file.fileno(), hasher.update, chunk)
            if offset < size_bytes:
                raise Unavailable("IMAGE_CUT_OFF", f"the image ended at {offset} of {size_bytes}")
            await files.in_thread(os.fsync, file.fileno())
        if offset > size_bytes or hasher.hexdigest() != digest:
            partial.unlink()
            raise DataLoss(
                "IMAGE_CORRUPT", f"the image's bytes are not those of {digest}", sha256=digest
            )

    async def age(self, in_use: frozenset[Path]) -> list[Path]:
        """Remove images that are too old, then the least recently used that are too many.

        `in_use` are bases of overlays, which stay whatever their age.

        Returns:
            What was removed.
        """
        entries = []
        for path in self._directory.iterdir():
            lock = self._locks.get(path.stem)
            if path not in in_use and not (lock and lock.locked()):
                stat = path.stat()
                entries.append((stat.st_mtime, stat.st_blocks * 512, path))
        kept_bytes = sum(
            path.stat().st_blocks * 512 for path in self._directory.iterdir() if path in in_use
        )
        total_bytes = kept_bytes + sum(size for _, size, _ in entries)
        oldest_kept = time.time() - self._max_age_s
        removed = []
        for used, size, path in sorted(entries):
            if used >= oldest_kept and total_bytes <= self._limit_bytes:
                break
            path.unlink()
            total_bytes -= size
            removed.append(path)
            log.info("image removed from the cache", path=str(path), size_bytes=size)
        return removed

    def _path(self, digest: str, image_format: str) -> Path:
        if not _DIGEST.fullmatch(digest):
            raise InvalidArgument("BAD_DIGEST", "the image's SHA-256 is not 64 hexadecimal digits")
        suffix = _SUFFIXES.get(image_format)
        if suffix is None:
            raise InvalidArgument(
                "IMAGE_REFUSED", f"image format {image_format!r} is not supported"
            )
        return self._directory / (digest + suffix)


# --- overlays -----------------------------------------------------------------------------------


async def ensure_overlay(overlay: Path, base: CachedImage, size_gib: int) -> None:
    """Have a root disk of this size on top of the base; an existing one is not touched.

    Raises:
        InvalidArgument: FLAVOR_TOO_SMALL: the image's disk is larger.
        Exhausted: HOST_DISK_FULL, qemu-img says so.
        OSError: as of the file system.
    """
    if overlay.exists():
        return
    size_bytes = size_gib << 30
    if base.virtual_size_bytes > size_bytes:
        raise InvalidArgument(
            "FLAVOR_TOO_SMALL",
            f"the image's disk has {base.virtual_size_bytes} bytes, the flavor's {size_bytes}",
        )
    new = overlay.with_suffix(".new")
    new.unlink(missing_ok=True)
    os.close(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    await _qemu_img(
        "create", "-q", "-f", "qcow2", "-b", str(base.path), "-F", base.format,
        "-o", "lazy_refcounts=off,preallocation=off", str(new), str(size_bytes),
    )  # fmt: skip
    files.rename_durably(new, overlay)


async def _qemu_img(*arguments: str) -> None:
    """Run qemu-img under limits: there is no library of it.

    Raises:
        Unavailable: QEMU_IMG_FAILED, with its own words.
    """
    process = await asyncio.create_subprocess_exec(
        *_LIMITS,
        "qemu-img",
        *arguments,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(_QEMU_IMG_DEADLINE_S):
            _, output = await process.communicate()
    except TimeoutError as error:
        raise Unavailable("QEMU_IMG_FAILED", "qemu-img has not ended in time") from error
    finally:
        if process.returncode is None:  # late, or the caller was cancelled
            process.kill()
            await process.wait()
    if process.returncode:
        text = output.decode(errors="replace").strip()[-500:]
        if os.strerror(errno.ENOSPC) in text:
            raise Exhausted("HOST_DISK_FULL", f"qemu-img: {text}")
        raise Unavailable("QEMU_IMG_FAILED", f"qemu-img: {text}")


def _write(descriptor: int, hash_too: Callable[[bytes], None], chunk: bytes) -> None:
    hash_too(chunk)
    view = memoryview(chunk)
    while view:
        view = view[os.write(descriptor, view) :]
