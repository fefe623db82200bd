"""Refuses images that are not what they are said to be, or that would open other files.

The qcow2 header is read here first, so that no program opens anything on an image's word; then
qemu-img, which has no library, looks at the rest under limits on memory, time and files.
Source: https://gitlab.com/qemu-project/qemu/-/blob/master/docs/interop/qcow2.txt
"""

from __future__ import annotations

import asyncio
import json
import shutil
import struct
from pathlib import Path
from typing import Any

import structlog

from mcloud_base import errors

log = structlog.get_logger()

_MAGIC = b"QFI\xfb"
_FIXED = struct.Struct(">4sIQIIQIIQQIIQ")  # version 2: 72 bytes
_FEATURES = struct.Struct(">QQQII")  # version 3 goes on with these
_EXTENSION = struct.Struct(">II")

# Incompatible features that are harmless: bit 0 "dirty" (lazy reference counts: only read here),
# bit 3 another compression, bit 4 extended L2 entries. Bit 1 says corrupt, bit 2 that the data are
# in a file that the image names.
_ALLOWED_INCOMPATIBLE = 1 << 0 | 1 << 3 | 1 << 4
_DATA_FILE_EXTENSION = 0x44415441
_ENCRYPTION_EXTENSION = 0x0537BE77
_END_EXTENSION = 0
_LARGEST_DISK = 65536 << 30

_LIMITS = ("--as=1073741824", "--cpu=10", "--nofile=64", "--fsize=0", "--core=0")
_QEMU_IMG_DEADLINE_S = 30
_OUTPUT_LIMIT = 4 << 20


async def inspect(path: Path, disk_format: str) -> int:
    """Accept an image or refuse it.

    Args:
        disk_format: what it was declared as, QCOW2 or RAW; raw ones are never probed, whatever
            they look like, and are given to guests as raw always.

    Returns:
        The size of its disk in bytes.

    Raises:
        errors.InvalidArgument: IMAGE_REFUSED.
    """
    size = await asyncio.to_thread(_inspect_header, path, disk_format)
    if disk_format == "RAW":
        return size
    program, limiter = shutil.which("qemu-img"), shutil.which("prlimit")
    if program is None or limiter is None:
        log.warning("image's header checked only: qemu-img or prlimit is not installed")
        return size
    told = await _ask_qemu_img(limiter, program, path, disk_format.lower())
    _check_told(told, disk_format.lower(), size)
    return size


def _inspect_header(path: Path, disk_format: str) -> int:
    size = path.stat().st_size
    if not size:
        raise _refused("it has no bytes")
    if disk_format == "RAW":
        return -(-size // 512) * 512  # QEMU counts in sectors
    with path.open("rb") as file:
        head = file.read(4096)
        virtual_size, header_length, cluster_size = _read_header(head, size)
        if header_length:
            file.seek(header_length)
            _check_extensions(file.read(cluster_size - header_length))
    return virtual_size


def _read_header(head: bytes, file_size: int) -> tuple[int, int, int]:
    """Return the disk's size, the header's length (0: version 2) and the cluster size."""
    if len(head) < _FIXED.size or not head.startswith(_MAGIC):
        raise _refused("it is not qcow2")
    _, version, backing_offset, _, cluster_bits, size, encryption, l1_count, l1_offset, *_ = (
        _FIXED.unpack_from(head)
    )
    if version not in (2, 3):
        raise _refused(f"qcow2 version {version} is not known")
    if backing_offset:
        raise _refused("it names a backing file; flatten it: qemu-img convert -O qcow2 OLD NEW")
    if encryption:
        raise _refused("it is encrypted")
    if not 9 <= cluster_bits <= 21:
        raise _refused(f"cluster bits {cluster_bits} are out of range")
    if not 0 < size <= _LARGEST_DISK:
        raise _refused(f"a disk of {size} bytes is out of range")
    if l1_count * 8 > 32 << 20 or l1_offset + l1_count * 8 > file_size:
        raise _refused("its table of contents lies outside of it")
    if version == 2:
        return size, 0, 1 << cluster_bits
    if len(head) < _FIXED.size + _FEATURES.size:
        raise _refused("its header is cut off")
    incompatible, _, _, _, header_length = _FEATURES.unpack_from(head, _FIXED.size)
    if incompatible & ~_ALLOWED_INCOMPATIBLE:
        raise _refused(f"it has incompatible features {incompatible:#x}")
    if not _FIXED.size + _FEATURES.size <= header_length <= 1 << cluster_bits:
        raise _refused(f"a header of {header_length} bytes is out of range")
    return size, header_length, 1 << cluster_bits


def _check_extensions(text: bytes) -> None:
    position = 0
    while position + _EXTENSION.size <= len(text):
        kind, length = _EXTENSION.unpack_from(text, position)
        if kind == _END_EXTENSION:
            return
        if kind == _DATA_FILE_EXTENSION:
            raise _refused("its data are in another file")
        if kind == _ENCRYPTION_EXTENSION:
            raise _refused("it is encrypted")
        position += _EXTENSION.size + -(-length // 8) * 8


async def _ask_qemu_img(limiter: str, program: str, path: Path, disk_format: str) -> Any:
    process = await asyncio.create_subprocess_exec(
        limiter,
        *_LIMITS,
        "--",
        program,
        "info",
        "-U",
        "-f",
        disk_format,
        "--output=json",
        str(path),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        cwd="/",
        env={"LC_ALL": "C", "PATH": "/usr/bin:/bin"},
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(_QEMU_IMG_DEADLINE_S):
            output = await _read_all(process.stdout)
            code = await process.wait()
    except TimeoutError as error:
        raise _refused("qemu-img could not read it in time") from error
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if code in (126, 127):
        raise errors.Internal("INSPECTION_FAILED", "qemu-img could not be run; tell the operator")
    if code:
        raise _refused("qemu-img cannot read it")
    try:
        return json.loads(output)
    except ValueError as error:
        raise _refused("qemu-img says nothing sensible about it") from error


async def _read_all(stream: asyncio.StreamReader) -> bytes:
    try:
        await stream.readexactly(_OUTPUT_LIMIT)
    except asyncio.IncompleteReadError as error:
        return error.partial
    raise _refused("qemu-img says too much about it")


def _check_told(told: dict[str, Any], disk_format: str, size: int) -> None:
    """Check what qemu-img says; it reports all of this with exit status 0."""
    if told.get("format") != disk_format:
        raise _refused(f"it is {told.get('format')}, not {disk_format}")
    for key in ("backing-filename", "full-backing-filename", "backing-image"):
        if key in told:
            raise _refused("it names a backing file")
    if told.get("encrypted"):
        raise _refused("it is encrypted")
    specific = told.get("format-specific", {}).get("data", {})
    if "data-file" in specific:
        raise _refused("its data are in another file")
    if specific.get("corrupt"):
        raise _refused("it is marked as corrupt")
    if told.get("virtual-size") != size:
        raise _refused("its size is not what its header says")


def _refused(why: str) -> errors.InvalidArgument:
    return errors.InvalidArgument("IMAGE_REFUSED", f"the image is refused: {why}", why=why)
