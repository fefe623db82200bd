"""Desired domains to test with."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

from mcloud.conductor.v1 import domain_pb2
from mcloud.network.v1 import dataplane_pb2
from mcloud.volume.v1 import attachment_pb2
from mcloud_agents.compute.driver import ResolvedDisk, ResolvedDomain, ResolvedNic, RootDisk
from mcloud_base import ids

EPOCH = "epoch-1"


def spec(instance_id: str = "", **fields: Any) -> domain_pb2.DomainSpec:
    """A small domain that is to run."""
    instance_id = instance_id or ids.new("i")
    values: dict[str, Any] = {
        "domain_id": ids.new("d"),
        "instance_id": instance_id,
        "project_id": "p-00000000000000000000",
        "epoch": EPOCH,
        "generation": 1,
        "power_state": domain_pb2.POWER_STATE_RUNNING,
        "boot_number": 1,
        "uuid": ids.libvirt_uuid(instance_id),
        "name": "stack_testvm",
        "hostname": "stack-testvm",
        "vcpu_count": 1,
        "memory_mib": 64,
        "root_disk": domain_pb2.RootDisk(image_format="qcow2", size_gib=1),
    }
    return domain_pb2.DomainSpec(**(values | fields))


def resolved(directory: Path, wanted: domain_pb2.DomainSpec, **fields: Any) -> ResolvedDomain:
    """The domain with its disks made, empty as they are."""
    base, overlay = directory / "base.qcow2", directory / f"{wanted.domain_id}.qcow2"
    if not base.exists():
        _create(base)
    if not overlay.exists():
        _create(overlay, "-b", str(base), "-F", "qcow2")
    values: dict[str, Any] = {
        "root_disk": RootDisk(overlay, base, "qcow2"),
        "console_log": directory / f"{wanted.domain_id}.log",
    }
    return ResolvedDomain(wanted, **(values | fields))


def nic(number: int = 1, bridge: str = "mcbr101") -> ResolvedNic:
    """A NIC on a bridge."""
    binding = dataplane_pb2.PortBinding(
        port_id=f"port-{number:020}",
        mac=f"fa:16:3e:00:00:{number:02x}",
        device_name=f"tap{number:08}",
    )
    return ResolvedNic(binding, bridge, 1450)


def disk(
    device: str = "vdb", volume_id: str = "vol-00000000000000000001", port: int = 10809
) -> ResolvedDisk:
    """A volume's disk."""
    nbd = attachment_pb2.NbdConnection(
        address="127.0.0.1", port=port, export_name=volume_id, size_bytes=1 << 30
    )
    return ResolvedDisk(device, volume_id, nbd)


def _create(path: Path, *options: str) -> None:
    command = ["qemu-img", "create", "-q", "-f", "qcow2", *options, str(path), "64M"]
    subprocess.run(command, check=True, timeout=60)
