"""The bytes of images: files in one directory, read and written in bounded threads.

A file that is being uploaded is "ID.partial", locked by its writer; a whole one is "ID". It gets
that name only when its bytes are on the disk.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import fcntl
import hashlib
import os
import stat
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from mcloud_base import errors

T = TypeVar("T")

# What a message carries. Of 1 MiB each, making and writing one took fifteen times as long for as
# many bytes: its memory is the kernel's anew every time.
CHUNK_BYTES = 256 << 10
_READ_CHUNKS = 4  # read at a time, since each change of threads costs as well
_HASH_BYTES = 8 << 20  # hashed at a time when going on with a partial file
_BEGIN_BYTES = 16 << 20
_THREADS = 8
_MOST_PROVEN = 10_000

# Python has no sync_file_range(2). It begins to write pages out, and promises nothing.
_BEGIN_WRITING = 2  # SYNC_FILE_RANGE_WRITE
_libc = ctypes.CDLL(None, use_errno=True)
_libc.sync_file_range.argtypes = [
    ctypes.c_int,
    ctypes.c_int64,
    ctypes.c_int64,
    ctypes.c_uint,
]

Proof = tuple[int, int, int, int, int]  # which file, and since when nobody has written to it


class Partial:
    """The file of an upload. Methods block; run them with `Contents.run`.

    Each is done whole before another begins: a write whose caller was cancelled is still being
    done when the file is closed.
    """

    def __init__(self, path: Path, descriptor: int, size: int) -> None:
        self.path = path
        self.size = size
        self._descriptor = descriptor
        self._digest = hashlib.sha256()
        self._hashed = 0
        self._begun = size  # up to here the kernel has been asked to write
        self._lock = threading.Lock()

    def hash_some(self) -> bool:
        """Hash a piece of what was there before; return whether there is more.

        Raises:
            errors.Unavailable: STORE_UNAVAILABLE.
        """
        with self._lock, _told():
            piece = os.pread(
                self._descriptor, min(_HASH_BYTES, self.size - self._hashed), self._hashed
            )
            self._digest.update(piece)
            self._hashed += len(piece)
            return self._hashed < self.size and bool(piece)

    def write(self, chunks: Iterable[bytes]) -> None:
        """Append to it.

        Raises:
            errors.Exhausted: STORE_FULL.
            errors.Unavailable: STORE_UNAVAILABLE.
        """
        with self._lock, _told():
            for chunk in chunks:
                view = memoryview(chunk)
                while view:
                    written = os.pwrite(self._descriptor, view, self.size)
                    self._digest.update(view[:written])
                    self.size += written
                    self._hashed = self.size
                    view = view[written:]
            if self.size - self._begun >= _BEGIN_BYTES:
                # What is on its way to the disk early is not waited for at the end.
                length = self.size - self._begun
                _libc.sync_file_range(self._descriptor, self._begun, length, _BEGIN_WRITING)
                self._begun = self.size

    def sha256(self) -> str:
        """Return the digest of its bytes, hexadecimal."""
        with self._lock:
            assert self._hashed == self.size
            return self._digest.hexdigest()

    def commit(self, path: Path) -> Proof:
        """Give it its final name, once its bytes are on the disk; return what it then is.

        Raises:
            errors.Exhausted: STORE_FULL.
            errors.Unavailable: STORE_UNAVAILABLE.
        """
        with self._lock, _told():
            os.fsync(self._descriptor)
            self.path.replace(path)
            _sync_directory(path.parent)
            return _proof(self._descriptor)

    def discard(self) -> None:
        """Remove it, while it is still locked."""
        with self._lock, _told():
            self.path.unlink(missing_ok=True)

    def close(self) -> int:
        """Unlock it; return its size."""
        with self._lock:
            os.close(self._descriptor)
            return self.size


class Contents:
    """The directory.

    Args:
        directory: made if missing; only its owner may enter it.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._directory = directory.absolute()
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="image-contents")
        self._proven: dict[str, Proof] = {}  # by image: the file whose digest was right

    async def run(self, function: Callable[..., T], *args: object) -> T:
        """Run what blocks."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *args)

    def path(self, image_id: str) -> Path:
        """Return where the bytes of an image are once they have been accepted."""
        return self._directory / image_id

    async def open_partial(self, image_id: str, known_bytes: int) -> Partial | None:
        """Open, or make, the file of an upload; None if another process has it.

        Args:
            known_bytes: what is beyond was written but never noted, and is cut off.

        Raises:
            errors.Exhausted: STORE_FULL.
            errors.Unavailable: STORE_UNAVAILABLE.
        """
        path = self._directory / f"{image_id}.partial"
        return await self.run(_open_partial, path, known_bytes)

    async def commit(self, partial: Partial, image_id: str) -> None:
        """Accept an upload whose digest was right. Raises as `Partial.commit` does."""
        self._prove(image_id, await self.run(partial.commit, self.path(image_id)))

    async def remove(self, image_id: str) -> None:
        """Remove what there is of an image."""
        self._proven.pop(image_id, None)
        await self.run(self.path(image_id).unlink, True)
        await self.run((self._directory / f"{image_id}.partial").unlink, True)

    async def read(
        self, image_id: str, offset: int, size_bytes: int, sha256: str
    ) -> AsyncIterator[bytes]:
        """Yield the bytes from an offset on; the next are read while these are sent.

        Read from the beginning they are checked against the digest as well, unless they were and
        nobody has written to the file since: hashing is most of the work of a download, and who
        downloads checks the digest of what arrives.

        Raises:
            errors.DataLoss: IMAGE_CORRUPT.
            errors.Unavailable: STORE_UNAVAILABLE.
        """
        descriptor = await self.run(_open_content, self.path(image_id))
        position = offset
        ahead: Future[list[bytes]] | None = None
        try:
            proof = await self.run(_proof, descriptor)
            if proof[2] != size_bytes:
                raise _corrupt(image_id)
            proves = offset == 0 and self._proven.get(image_id) != proof
            digest = hashlib.sha256() if proves else None
            ahead = self._threads.submit(_read, descriptor, position, digest)
            while chunks := await asyncio.wrap_future(ahead):
                position += sum(map(len, chunks))
                ahead = self._threads.submit(_read, descriptor, position, digest)
                for chunk in chunks:
                    yield chunk
            if position != size_bytes or (digest and digest.hexdigest() != sha256):
                raise _corrupt(image_id)
            if digest and await self.run(_proof, descriptor) == proof:
                self._prove(image_id, proof)
        finally:
            # The reading thread must have left the file before it is closed.
            if ahead is None:
                os.close(descriptor)
            else:
                ahead.add_done_callback(lambda _: os.close(descriptor))

    def _prove(self, image_id: str, proof: Proof) -> None:
        if len(self._proven) >= _MOST_PROVEN:
            self._proven.clear()
        self._proven[image_id] = proof

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown(wait=True, cancel_futures=True)


def _open_partial(path: Path, known_bytes: int) -> Partial | None:
    while True:
        with _told():
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            descriptor = os.open(path, flags, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its former writer may have given it its final name between our opening and locking.
            if not path.exists() or path.stat().st_ino != os.fstat(descriptor).st_ino:
                os.close(descriptor)
                continue
            if os.fstat(descriptor).st_size > known_bytes:
                os.ftruncate(descriptor, known_bytes)
            return Partial(path, descriptor, os.fstat(descriptor).st_size)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError as error:
            os.close(descriptor)
            raise _store_error(error) from error


def _open_content(path: Path) -> int:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP):
            raise _corrupt(path.name) from error
        raise _store_error(error) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _corrupt(path.name)
    return descriptor


def _proof(descriptor: int) -> Proof:
    found = os.fstat(descriptor)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _read(descriptor: int, position: int, digest: hashlib._Hash | None) -> list[bytes]:
    """Return the next chunks, hashed if there is a digest; none at the end."""
    chunks = []
    for _ in range(_READ_CHUNKS):
        with _told():
            chunk = os.pread(descriptor, CHUNK_BYTES, position)
        if not chunk:
            break
        if digest:
            digest.update(chunk)
        position += len(chunk)
        chunks.append(chunk)
    return chunks


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _corrupt(image_id: str) -> errors.DataLoss:
    return errors.DataLoss(
        "IMAGE_CORRUPT",
        f"the stored bytes of image {image_id} have changed; upload it anew as another image",
        id=image_id,
    )


@contextmanager
def _told() -> Iterator[None]:
    """Turn what the file system refuses into its error."""
    try:
        yield
    except OSError as error:
        raise _store_error(error) from error


def _store_error(error: OSError) -> errors.Error:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return errors.Exhausted(
            "STORE_FULL", "the image store is full; the operator has to make room"
        )
    return errors.Unavailable(
        "STORE_UNAVAILABLE",
        f"the image store does not work: {error.strerror}; the operator has to look",
        details=(errors.retry_after(5),),
    )
