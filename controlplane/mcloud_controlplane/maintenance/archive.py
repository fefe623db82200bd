"""The file of a backup: a tar archive whose last member says what the others are.

    databases/NAME.db             SQLite: the file
    databases/NAME/TABLE.copy     PostgreSQL: COPY's text format
    pki/…  admin-password         the authority, the first password
    images/ID                     image store
    manifest.json                 release, time, schemas, and every other member's size and SHA-256

It holds every secret of the control plane and is made 0600.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any

from mcloud_base import errors

FORMAT = 1
_MANIFEST = "manifest.json"
_CHUNK = 1 << 20


@dataclass
class Manifest:
    """What is in a backup."""

    release: str
    kind: str  # of the databases: "sqlite", "postgresql"
    time: int  # microseconds since 1970
    schemas: dict[str, list[int]]  # numbers of the migrations that had run, by database
    tables: dict[str, dict[str, list[str]]]  # PostgreSQL: columns by database and table
    images: bool  # whether the image store is in it
    files: dict[str, tuple[int, str]] = field(default_factory=dict)  # size and SHA-256, by member


class Writer:
    """An archive that is being written."""

    def __init__(self, tar: tarfile.TarFile, manifest: Manifest) -> None:
        self._tar = tar
        self._manifest = manifest

    def add(self, name: str, source: Path) -> str:
        """Add a file as it is now; return its SHA-256."""
        with source.open("rb") as file:
            info = tarfile.TarInfo(name)
            info.size = os.fstat(file.fileno()).st_size
            info.mode = 0o600
            info.mtime = int(time.time())
            reader = _Hashing(file)
            self._tar.addfile(info, reader)
        digest = reader.digest.hexdigest()
        self._manifest.files[name] = (info.size, digest)
        return digest

    def finish(self) -> None:
        """Add the manifest."""
        text = json.dumps({"format": FORMAT, **vars(self._manifest)}, indent=1).encode()
        info = tarfile.TarInfo(_MANIFEST)
        info.size, info.mode, info.mtime = len(text), 0o600, int(time.time())
        self._tar.addfile(info, io.BytesIO(text))


@contextmanager
def writing(path: Path, manifest: Manifest) -> Iterator[Writer]:
    """Write an archive; it has its name only once it is whole and on the disk.

    Raises:
        errors.AlreadyExists: BACKUP_EXISTS.
    """
    if path.exists():
        raise errors.AlreadyExists("BACKUP_EXISTS", f"{path} is there already; choose another name")
    partial = path.with_name(f"{path.name}.partial")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(file.fileno(), 0o600)
            with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
                writer = Writer(tar, manifest)
                yield writer
                writer.finish()
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)


class Reader:
    """An archive that has been checked."""

    def __init__(self, tar: tarfile.TarFile, manifest: Manifest) -> None:
        self._tar = tar
        self.manifest = manifest

    def names(self, prefix: str) -> list[str]:
        """Return the members below a folder."""
        return [name for name in self.manifest.files if name.startswith(f"{prefix}/")]

    def has(self, name: str) -> bool:
        """Whether there is such a member."""
        return name in self.manifest.files

    def chunks(self, name: str) -> Iterator[bytes]:
        """Yield a member's bytes."""
        member = self._tar.extractfile(name)
        assert member is not None
        while chunk := member.read(_CHUNK):
            yield chunk

    def extract(self, name: str, path: Path) -> None:
        """Write a member to a new file, 0600, and have it on the disk."""
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            for chunk in self.chunks(name):
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())


@contextmanager
def reading(path: Path) -> Iterator[Reader]:
    """Open an archive, once every byte of it has been checked.

    Raises:
        errors.DataLoss: BACKUP_DAMAGED.
        errors.NotFound: BACKUP_NOT_FOUND.
        errors.WrongState: BACKUP_UNKNOWN, of a newer format.
    """
    try:
        with tarfile.open(path, "r:") as tar:
            manifest = _check(path, tar)
            yield Reader(tar, manifest)
    except FileNotFoundError as error:
        raise errors.NotFound("BACKUP_NOT_FOUND", f"there is no {path}") from error
    except tarfile.TarError as error:
        raise _damaged(path, str(error)) from error


def _check(path: Path, tar: tarfile.TarFile) -> Manifest:
    digests: dict[str, tuple[int, str]] = {}
    for member in tar:
        if not member.isfile() or _is_unsafe(member.name) or member.name in digests:
            raise _damaged(path, f"{member.name!r} is no file that a backup has")
        digests[member.name] = (member.size, _sha256(tar.extractfile(member)))
    if digests.pop(_MANIFEST, None) is None:
        raise _damaged(path, "it has no manifest; was writing it broken off?")
    file = tar.extractfile(_MANIFEST)
    assert file is not None
    try:
        values: dict[str, Any] = json.loads(file.read())
        if values.pop("format") != FORMAT:
            raise errors.WrongState(
                "BACKUP_UNKNOWN", f"{path} is of another release, {values.get('release')}; use that"
            )
        manifest = Manifest(**values)
        manifest.files = {name: (size, sha) for name, (size, sha) in manifest.files.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, "its manifest cannot be read") from error
    wrong = {name for name, value in manifest.files.items() if digests.get(name) != value}
    wrong |= digests.keys() - manifest.files.keys()
    if wrong:
        raise _damaged(path, f"not as its manifest says: {', '.join(sorted(wrong)[:5])}")
    return manifest


def _is_unsafe(name: str) -> bool:
    path = PurePosixPath(name)
    return path.is_absolute() or ".." in path.parts


def _sha256(file: IO[bytes] | None) -> str:
    assert file is not None
    digest = hashlib.sha256()
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
    return digest.hexdigest()


def _damaged(path: Path, why: str) -> errors.DataLoss:
    return errors.DataLoss("BACKUP_DAMAGED", f"{path}: {why}; take another one")


class _Hashing:
    """A file that is hashed as it is read."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.digest = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        """Read, and hash, so many bytes."""
        chunk = self._file.read(size)
        self.digest.update(chunk)
        return chunk
