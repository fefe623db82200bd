"""A volume's data: a sparse qcow2 file.

qcow2 rather than raw: space is taken as it is written and given back on discard with either, but
only qcow2 can be an overlay, which is how a snapshot is taken under I/O and how a clone shares
what it was made from.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import struct
from pathlib import Path

from mcloud_base import errors

COMMAND_TIMEOUT_S = 60.0
PARTIAL = ".partial"  # of files that are not whole yet; left over if an agent was killed

_MAGIC = b"QFI\xfb"


async def ensure(path: Path, size_bytes: int, *, expected: bool) -> None:
    """Make the file, of this virtual size, unless it is there.

    Args:
        path: appears at once and complete, or not at all.
        size_bytes: positive; a multiple of 512.
        expected: it has been made before, so that its absence is a loss.

    Raises:
        DataLoss: VOLUME_DATA_MISSING. VOLUME_DATA_DAMAGED: it is no qcow2 file.
        InvalidArgument: BAD_VOLUME_SIZE.
        Unavailable: STORAGE_COMMAND_FAILED: no room, for example.
    """
    if size_bytes <= 0 or size_bytes % 512:
        raise errors.InvalidArgument(
            "BAD_VOLUME_SIZE",
            f"{size_bytes} bytes is no size of a disk: it takes whole sectors of 512 bytes",
            size_bytes=size_bytes,
        )
    if path.exists():
        return
    if expected:
        raise errors.DataLoss(
            "VOLUME_DATA_MISSING",
            f"{path} is gone; restore it: an empty one in its place would hide the loss",
            path=path,
        )
    # A name of its own: a qemu-img that a killed agent has left must not write to this one.
    partial = path.with_suffix(f".{secrets.token_hex(4)}{PARTIAL}")
    try:
        await run("qemu-img", "create", "-q", "-f", "qcow2", str(partial), str(size_bytes))
        await asyncio.to_thread(_publish, partial, path)
    finally:
        partial.unlink(missing_ok=True)


def virtual_size(path: Path) -> int:
    """Return the size of the disk in the file, in bytes, from its header.

    Source: https://www.qemu.org/docs/master/interop/qcow2.html
    """
    with path.open("rb") as file:
        header = file.read(32)
    if len(header) < 32 or header[:4] != _MAGIC:
        raise errors.DataLoss("VOLUME_DATA_DAMAGED", f"{path} is no qcow2 file", path=path)
    (size,) = struct.unpack(">Q", header[24:32])
    return int(size)


async def grow(path: Path, size_bytes: int) -> None:
    """Enlarge the disk in a file that no process has open; an equal size is left as it is.

    Raises:
        InvalidArgument: VOLUME_SHRINK: what lies beyond the new end would be lost.
    """
    now = await asyncio.to_thread(virtual_size, path)
    if now > size_bytes:
        raise errors.InvalidArgument(
            "VOLUME_SHRINK",
            f"the volume has {now} bytes and cannot be made smaller ({size_bytes})",
            size_bytes=now,
        )
    if now < size_bytes:
        await run("qemu-img", "resize", "-q", "-f", "qcow2", str(path), str(size_bytes))


def allocated_bytes(path: Path) -> int:
    """Return the space that the file takes on the host."""
    return path.stat().st_blocks * 512


async def run(*command: str) -> None:
    """Run one of QEMU's tools to its end.

    Raises:
        Unavailable: STORAGE_COMMAND_FAILED with what it printed, or that it took too long.
    """
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,  # a signal to the agent's group is not for it
    )
    try:
        async with asyncio.timeout(COMMAND_TIMEOUT_S):
            _, output = await process.communicate()
    except BaseException as error:
        process.kill()
        await process.wait()
        if isinstance(error, TimeoutError):
            raise _failed(command, f"did not end within {COMMAND_TIMEOUT_S:.0f} s") from error
        raise
    if process.returncode:
        raise _failed(command, output.decode(errors="replace").strip()[-2000:])


def _failed(command: tuple[str, ...], why: str) -> errors.Unavailable:
    return errors.Unavailable(
        "STORAGE_COMMAND_FAILED", f"{command[0]}: {why}", command=command[0], output=why
    )


def _publish(partial: Path, path: Path) -> None:
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
