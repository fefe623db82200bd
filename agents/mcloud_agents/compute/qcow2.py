"""Reading a disk image's header ourselves, before any program opens it on the image's word.

Source: https://gitlab.com/qemu-project/qemu/-/blob/master/docs/interop/qcow2.txt
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

from mcloud_base.errors import InvalidArgument

MAGIC = b"QFI\xfb"
_FIXED = struct.Struct(">4sIQIIQIIQQIIQ")  # version 2: 72 bytes
_FEATURES = struct.Struct(">QQQII")  # version 3 goes on with these

# Incompatible features that are harmless: bit 0 "dirty" (lazy reference counts: repaired on
# opening), bit 3 another compression, bit 4 extended L2 entries. Bit 1 says corrupt, bit 2 that the
# data are in a file that the image names.
_ALLOWED_INCOMPATIBLE = 1 << 0 | 1 << 3 | 1 << 4


@dataclass(frozen=True)
class Header:
    """What matters of a qcow2 header."""

    version: int
    virtual_size_bytes: int


def check(path: Path, image_format: str) -> int:
    """Refuse an image that is not what it is said to be, or that names other files.

    Returns:
        The size of its disk, in bytes.

    Raises:
        InvalidArgument: IMAGE_REFUSED.
    """
    if image_format == "raw":
        return path.stat().st_size
    if image_format == "qcow2":
        return read_header(path).virtual_size_bytes
    raise _refused(path, f"format {image_format!r} is not supported")


def read_header(path: Path) -> Header:
    """Read a qcow2 header.

    Raises:
        InvalidArgument: IMAGE_REFUSED: it is none, or it names a backing or data file, is
            encrypted, corrupt, or of a kind not known.
    """
    with path.open("rb") as file:
        start = file.read(_FIXED.size + _FEATURES.size)
    if len(start) < _FIXED.size or not start.startswith(MAGIC):
        raise _refused(path, "no qcow2 header")
    _, version, backing_offset, _, cluster_bits, size, encryption, *_ = _FIXED.unpack_from(start)
    if version not in (2, 3):
        raise _refused(path, f"qcow2 version {version} is not known")
    if backing_offset:
        raise _refused(path, "it names a backing file")
    if encryption:
        raise _refused(path, "it is encrypted")
    if not 9 <= cluster_bits <= 21:
        raise _refused(path, f"cluster bits {cluster_bits} are out of range")
    if version == 3:
        if len(start) < _FIXED.size + _FEATURES.size:
            raise _refused(path, "the header is cut off")
        incompatible, *_ = _FEATURES.unpack_from(start, _FIXED.size)
        if incompatible & ~_ALLOWED_INCOMPATIBLE:
            raise _refused(path, f"incompatible features {incompatible:#x}")
    return Header(version, size)


def read_backing(path: Path) -> Path | None:
    """Return what an overlay of our own making lies on; None if nothing, or if it is not one."""
    with path.open("rb") as file:
        start = file.read(_FIXED.size)
        if len(start) < _FIXED.size or not start.startswith(MAGIC):
            return None
        _, _, backing_offset, backing_length, *_ = _FIXED.unpack(start)
        if not backing_offset:
            return None
        file.seek(backing_offset)
        return Path(file.read(min(backing_length, 1023)).decode(errors="surrogateescape"))


def _refused(path: Path, why: str) -> InvalidArgument:
    return InvalidArgument("IMAGE_REFUSED", f"image {path.stem} is refused: {why}", why=why)
