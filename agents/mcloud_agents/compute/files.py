"""Files that only root reads, and that are there whole or not at all."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


async def in_thread(function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Run `function` in a thread; a caller who is cancelled is kept until it has ended.

    Otherwise whoever comes next would find the files still changing.
    """
    call = asyncio.ensure_future(asyncio.to_thread(function, *args, **kwargs))
    try:
        return await asyncio.shield(call)
    except asyncio.CancelledError:
        await asyncio.wait({call})
        raise


def make_private_directory(directory: Path) -> None:
    """Have a directory with mode 0700; parents are made with it."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    directory.chmod(0o700)


def open_private(path: Path) -> BinaryIO:
    """Open a file for reading and writing, made with mode 0600 if it is not there; unbuffered."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    os.fchmod(descriptor, 0o600)
    return os.fdopen(descriptor, "r+b", buffering=0)


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file's content, with mode 0600; after a crash it is the old or the new one."""
    new = path.with_name(path.name + ".new")
    new.unlink(missing_ok=True)
    with open_private(new) as file:
        file.write(content)
    rename_durably(new, path)


def rename_durably(source: Path, target: Path) -> None:
    """Rename a file so that both its content and its name survive a crash of the machine."""
    _sync(source)
    source.replace(target)
    _sync(target.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def trim(path: Path, limit_bytes: int) -> None:
    """Cut a log that somebody appends to down to the end of it, if it is over the limit.

    What is written meanwhile may get lost: it must not be a log that matters.
    """
    try:
        if path.stat().st_size <= limit_bytes:
            return
    except FileNotFoundError:
        return
    with path.open("r+b") as file:
        file.seek(-(limit_bytes // 4), os.SEEK_END)
        end = file.read()
        file.truncate(0)
        file.seek(0)
        file.write(end)
