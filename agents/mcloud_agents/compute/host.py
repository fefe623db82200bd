"""What a host can run: the choice of acceleration, its traits, its disk."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")
_KVM = Path("/dev/kvm")

# Of those that guests ask for by name; only worth telling where guests see the host's CPU.
_TOLD_FLAGS = ("aes", "avx", "avx2", "avx512f", "sse4_2", "svm", "vmx")


def choose_hypervisor_type(
    wanted: str = "auto", *, cpuinfo: Path = _CPUINFO, kvm: Path = _KVM
) -> str:
    """Return "kvm" or "qemu" (TCG).

    Both signs are needed: there are virtual machines in which /dev/kvm opens, though the CPU does
    not advertise virtualization, and stock guest kernels hang under it. What an operator has set
    instead of "auto" is not questioned.
    """
    if wanted != "auto":
        return wanted
    flags = _cpu_flags(cpuinfo)
    return "kvm" if flags & {"vmx", "svm"} and _opens(kvm) else "qemu"


def traits(hypervisor_type: str, *, cpuinfo: Path = _CPUINFO) -> tuple[str, ...]:
    """Return what the scheduler may match images and flavors against."""
    if hypervisor_type != "kvm":
        return ("HYPERVISOR_TCG",)
    flags = _cpu_flags(cpuinfo)
    return ("HYPERVISOR_KVM", *(f"CPU_{flag.upper()}" for flag in _TOLD_FLAGS if flag in flags))


def disk_gib(directory: Path) -> int:
    """Return the size of the file system under a directory, in GiB."""
    return shutil.disk_usage(directory).total >> 30


def boot_id() -> str:
    """Return the kernel's name for the time since it started."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _cpu_flags(cpuinfo: Path) -> set[str]:
    for line in cpuinfo.read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "flags":
            return set(value.split())
    return set()


def _opens(device: Path) -> bool:
    try:
        descriptor = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    os.close(descriptor)
    return True
