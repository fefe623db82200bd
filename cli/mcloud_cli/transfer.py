"""Bytes of images on their way; what was interrupted goes on where it was."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mcloud_base import errors
from mcloud_cli import kinds, output

if TYPE_CHECKING:
    from mcloud_cli.session import Session

_CHUNK = 1 << 20  # the largest message that the service takes
_SLOWEST = 128 * 1024  # bytes per second; slower ends at the deadline, and can be taken up again
_ATTEMPTS = 5


def upload(session: Session, image_id: str, path: Path) -> Any:
    """Bring a file's bytes to an image, from where the last attempt got to; return the image.

    Raises:
        errors.InvalidArgument: IMAGE_REFUSED, DIGEST_MISMATCH.
        errors.OutOfRange: BAD_OFFSET, more has arrived than the file has.
    """
    size = path.stat().st_size
    known = 0  # bytes that the service says have arrived, where the image does not say it yet
    for attempt in range(1, _ATTEMPTS + 1):
        image = session.call(kinds.IMAGE.rpc("Get"), id=image_id)
        if output.state(image.status) == "ACTIVE":
            return image  # the answer to the attempt before was lost
        offset = max(image.status.uploaded_bytes, known)
        try:
            return _upload_from(session, image, path, offset, size)
        except (errors.Unavailable, errors.Conflict) as error:
            # Also while the service still finishes with a connection that broke.
            if attempt == _ATTEMPTS:
                raise _interrupted(error, image_id, path) from error
        except errors.OutOfRange as error:
            if attempt == _ATTEMPTS or not error.metadata.get("offset", "").isdigit():
                raise
            known = int(error.metadata["offset"])
        except KeyboardInterrupt:
            click.echo(f"\nInterrupted. Go on with: {_resume(image_id, path)}", err=True)
            raise click.exceptions.Exit(130) from None
        time.sleep(min(0.5 * 2**attempt, 5))
    raise AssertionError("the last attempt returns or raises")


def _upload_from(session: Session, image: Any, path: Path, offset: int, size: int) -> Any:
    if offset > size:
        raise errors.InvalidArgument(
            "WRONG_FILE",
            f"{offset} bytes have arrived, {path} has only {size}: it is another file; "
            "delete the image and make it anew",
        )
    with path.open("rb") as file, _bar(f"Uploading {path.name}", size) as advance:
        digest = hashlib.sha256()
        while file.tell() < offset:
            chunk = file.read(min(_CHUNK, offset - file.tell()))
            digest.update(chunk)
            advance(len(chunk))

        def parts() -> Iterator[dict[str, Any]]:
            yield {"start": {"id": image.metadata.id, "offset": offset}}
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                yield {"chunk": chunk}
                advance(len(chunk))
            yield {"end": {"sha256": digest.hexdigest()}}

        return session.send(
            "image.ImageService/UploadImageData",
            parts(),
            timeout_s=600 + size / _SLOWEST,
            as_system=kinds.IMAGE.is_of_system(image),
        )


def _interrupted(error: errors.Error, image_id: str, path: Path) -> errors.Error:
    return type(error)(
        error.reason, f"{error.message}; go on with: {_resume(image_id, path)}", image_id=image_id
    )


def _resume(image_id: str, path: Path) -> str:
    return f"mcloud image upload {image_id} --file {path}"


def download(session: Session, image_id: str, path: Path) -> int:
    """Write an image's bytes to a file and check them; return how many there are.

    They are gathered in FILE.partial, which the next attempt continues.

    Raises:
        errors.DataLoss: IMAGE_CORRUPT, the bytes are not the image's.
    """
    image = session.call(kinds.IMAGE.rpc("Get"), id=image_id)
    size = image.status.size_bytes
    partial = path.with_name(f"{path.name}.partial")
    digest = hashlib.sha256()
    with partial.open("a+b") as file, _bar(f"Saving {path.name}", size) as advance:
        file.seek(0)
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            advance(len(chunk))
        answers = session.stream(
            "image.ImageService/DownloadImage",
            id=image_id,
            offset=file.tell(),
            timeout_s=600 + size / _SLOWEST,
        )
        for answer in answers:
            if answer.chunk:
                file.write(answer.chunk)
                digest.update(answer.chunk)
                advance(len(answer.chunk))
    if digest.hexdigest() != image.status.sha256:
        partial.unlink()
        raise errors.DataLoss(
            "IMAGE_CORRUPT", f"what arrived of image {image_id} is not what it says; try again"
        )
    partial.replace(path)
    return int(size)


@contextmanager
def _bar(title: str, size: int) -> Iterator[Callable[[int], None]]:
    """Show how far it is, on a terminal."""
    if not sys.stderr.isatty():
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(title, total=size)
        yield lambda count: progress.advance(task, count)
