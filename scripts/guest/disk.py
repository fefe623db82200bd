"""A bootable disk image, made without loop devices, mounts or a running kernel's help.

The disk is what a BIOS expects: a master boot record with syslinux's boot code, a FAT partition
with syslinux, kernel and initrd, and an ext4 partition with the root file system, last, so that
a guest can grow it. Debian packages: mtools dosfstools syslinux syslinux-common e2fsprogs
qemu-utils.
"""

import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from command import run

MIB = 1 << 20
SECTOR = 512
BOOT_CODE = Path("/usr/lib/syslinux/mbr/mbr.bin")
FAT16, LINUX = 0x06, 0x83
BOOTABLE = 0x80

# Speed under TCG, where a guest with them starts in two thirds of the time: no hardening that
# matters where guests guard secrets, no self-tests, no waiting for grace periods, no patching
# of code that has been translated.
QUICK_BOOT = (
    "mitigations=off nokaslr cryptomgr.notests rcupdate.rcu_expedited=1 noreplace-smp"
    " no_timer_check"
)


@dataclass(frozen=True)
class System:
    """What goes onto the disk."""

    kernel: Path
    initrd: Path
    command_line: str
    root: Path  # the tree that becomes the root file system
    root_label: str
    root_mib: int


@dataclass(frozen=True)
class Partition:
    """A place on the disk, in bytes."""

    start: int
    size: int
    kind: int
    flag: int = 0


def write_image(system: System, out: Path, work: Path) -> None:
    """Make the disk in the directory `work` and put it in the place of `out` in one move.

    Overlays of an image that stood there keep the old file for as long as they hold it open.
    """
    boot_mib = (_size(system.kernel) + _size(system.initrd)) // MIB + 4
    boot = Partition(MIB, boot_mib * MIB, FAT16, BOOTABLE)
    root = Partition(boot.start + boot.size, system.root_mib * MIB, LINUX)
    disk = work / "disk.raw"
    with disk.open("wb") as file:
        file.write(master_boot_record([boot, root]))
        file.truncate(root.start + root.size)
    _write_boot_partition(disk, boot, system, work)
    _write_root_partition(disk, root, system)
    image = work / "disk.qcow2"
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-c", disk, image)
    image.replace(out)


def master_boot_record(partitions: Sequence[Partition]) -> bytes:
    """Make the first sector: boot code, partitions by sector (no CHS), signature."""
    table = b"".join(
        struct.pack("<B3xB3xII", part.flag, part.kind, part.start // SECTOR, part.size // SECTOR)
        for part in partitions
    )
    if not BOOT_CODE.exists():
        raise RuntimeError(f"{BOOT_CODE} is missing (Debian package syslinux-common)")
    disk_id = os.urandom(4) + bytes(2)
    return BOOT_CODE.read_bytes().ljust(440, b"\0") + disk_id + table.ljust(64, b"\0") + b"\x55\xaa"


def _write_boot_partition(disk: Path, boot: Partition, system: System, work: Path) -> None:
    """Make the FAT file system and install syslinux in it."""
    config = work / "syslinux.cfg"
    config.write_text(
        "default linux\nprompt 0\nlabel linux\n  kernel /vmlinuz\n  initrd /initrd\n"
        f"  append {system.command_line}\n"
    )
    start = str(boot.start // SECTOR)
    run("mkfs.fat", "-F", "16", "-n", "BOOT", "--offset", start, disk, str(boot.size // 1024))
    at = f"{disk}@@{boot.start}"
    for source, name in (
        (system.kernel, "vmlinuz"),
        (system.initrd, "initrd"),
        (config, "syslinux.cfg"),
    ):
        run("mcopy", "-i", at, source, f"::/{name}")
    run("syslinux", "--install", "--offset", str(boot.start), disk)


def _write_root_partition(disk: Path, root: Partition, system: System) -> None:
    """Make the ext4 file system from the tree; its files belong to the guest's root."""
    # Someone who is not root builds as root of a user namespace, where his files are root's.
    mapped = () if os.geteuid() == 0 else ("unshare", "--map-root-user")
    run(
        *mapped, "mke2fs", "-q", "-t", "ext4", "-L", system.root_label, "-m", "0",
        "-E", f"offset={root.start},root_owner=0:0", "-d", system.root,
        disk, f"{root.size // 1024}k",
    )  # fmt: skip


def _size(path: Path) -> int:
    return path.stat().st_size
