"""What a host's own programs do wrong: libvirtd hangs or dies, QEMU is killed, the disk is full.

What the driver makes of a libvirtd that hangs or dies is in test_libvirt_driver.py.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from fakes.host_cloud import HostCloud, _request
from mcloud.common.v1 import operation_pb2
from mcloud.compute.v1 import instance_pb2, instance_service_pb2
from mcloud.volume.v1 import volume_pb2
from mcloud_agents.compute import image_cache
from mcloud_agents.compute.driver import libvirt_name
from mcloud_base import errors

pytestmark = [
    pytest.mark.host,
    pytest.mark.skipif(os.geteuid() != 0, reason="namespaces need root"),
]

Operation = operation_pb2.Operation
State = instance_pb2.InstanceStatus.State
pb = instance_service_pb2

_DISKS = "/var/lib/mcloud/compute/instances"


@pytest.fixture(scope="module")
def instance_id(host_cloud: HostCloud) -> str:
    """An instance that runs; the tests leave it so."""
    operation = host_cloud.ended(host_cloud.create("faults"))
    assert operation.state == Operation.STATE_SUCCEEDED, operation.error
    return operation.resource.id


def until_state(cloud: HostCloud, id_: str, state: State.ValueType) -> instance_pb2.Instance:
    def look() -> instance_pb2.Instance | None:
        found = cloud.instance(id_)
        return found if found is not None and found.status.state == state else None

    return cloud.until(look)


def begin(cloud: HostCloud, method: str, id_: str, **fields: object) -> Operation:
    request = getattr(pb, f"{method}Request")(id=id_, **fields)
    return cloud.mutate(f"compute.InstanceService/{method}", request)


def change(cloud: HostCloud, method: str, id_: str, **fields: object) -> None:
    operation = cloud.ended(begin(cloud, method, id_, **fields))
    assert operation.state == Operation.STATE_SUCCEEDED, operation.error


def remove(cloud: HostCloud, id_: str) -> None:
    cloud.ended(cloud.delete(id_))
    cloud.gone(id_)


def qemu_pid(cloud: HostCloud, id_: str) -> int:
    """As the host counts."""
    return int(cloud.host.run("cat", f"/run/libvirt/qemu/{libvirt_name(id_)}.pid"))


@contextmanager
def killing_starts(id_: str, count: int) -> Iterator[list[int]]:
    """Kill an instance's QEMU as soon as there is one, so many times; yield those killed."""
    killed: list[int] = []
    ended = threading.Event()
    guest = f"guest={libvirt_name(id_)},".encode()

    def watch() -> None:
        while len(killed) < count and not ended.wait(0.005):
            for entry in os.listdir("/proc"):
                if not entry.isdigit() or int(entry) in killed:
                    continue
                with suppress(OSError):
                    if guest in Path(f"/proc/{entry}/cmdline").read_bytes():
                        os.kill(int(entry), signal.SIGKILL)
                        killed.append(int(entry))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield killed
    finally:
        ended.set()
        thread.join()


def test_a_qemu_that_dies_as_it_starts_is_started_again(
    host_cloud: HostCloud, instance_id: str
) -> None:
    change(host_cloud, "StopInstance", instance_id, force=True)
    with killing_starts(instance_id, 2) as killed:
        change(host_cloud, "StartInstance", instance_id)
    assert len(killed) == 2
    until_state(host_cloud, instance_id, State.STATE_ACTIVE)
    assert qemu_pid(host_cloud, instance_id)


def test_a_killed_qemu_shows_and_the_instance_can_be_started(
    host_cloud: HostCloud, instance_id: str
) -> None:
    host_cloud.host.run("kill", "-KILL", str(qemu_pid(host_cloud, instance_id)))
    until_state(host_cloud, instance_id, State.STATE_SHUTOFF)
    change(host_cloud, "StartInstance", instance_id)
    until_state(host_cloud, instance_id, State.STATE_ACTIVE)
    assert qemu_pid(host_cloud, instance_id)


def test_a_hung_libvirtd_holds_up_only_what_needs_it(
    host_cloud: HostCloud, instance_id: str
) -> None:
    (pid,) = host_cloud.host.libvirtd_pids()
    os.kill(pid, signal.SIGSTOP)
    try:
        stopping = begin(host_cloud, "StopInstance", instance_id, force=True)
        # The agent goes on with whatever else there is to do.
        spec = volume_pb2.VolumeSpec(size_gib=1)
        volume = host_cloud.make(
            *_request("volume.VolumeService/CreateVolume", name="meanwhile", spec=spec),
            volume_pb2.Volume,
        )
        request = operation_pb2.GetOperationRequest(id=stopping.id)
        seen = host_cloud.call("compute.OperationService/GetOperation", request)
        assert seen.state == Operation.STATE_RUNNING
    finally:
        os.kill(pid, signal.SIGCONT)
    assert host_cloud.ended(stopping, 120).state == Operation.STATE_SUCCEEDED
    change(host_cloud, "StartInstance", instance_id)
    until_state(host_cloud, instance_id, State.STATE_ACTIVE)
    delete = _request("volume.VolumeService/DeleteVolume", id=volume.metadata.id)
    assert host_cloud.ended(host_cloud.mutate(*delete)).state == Operation.STATE_SUCCEEDED


def test_a_killed_libvirtd_takes_no_guest_with_it(host_cloud: HostCloud, instance_id: str) -> None:
    before = qemu_pid(host_cloud, instance_id)
    for pid in host_cloud.host.libvirtd_pids():
        os.kill(pid, signal.SIGKILL)
    stopping = begin(host_cloud, "StopInstance", instance_id, force=True)
    assert qemu_pid(host_cloud, instance_id) == before
    host_cloud.host.lab("up")
    assert host_cloud.ended(stopping, 120).state == Operation.STATE_SUCCEEDED
    change(host_cloud, "StartInstance", instance_id)
    until_state(host_cloud, instance_id, State.STATE_ACTIVE)


def test_a_host_without_room_says_so_and_keeps_nothing(
    host_cloud: HostCloud, instance_id: str
) -> None:
    remove(host_cloud, instance_id)
    # As large as a disk, so that the host goes on saying so; but nothing can be made on it, then
    # nothing but the domain's directory.
    for file_count in (1, 2):
        limits = f"size=1000g,nr_inodes={file_count}"
        host_cloud.host.run("mount", "-t", "tmpfs", "-o", limits, "tmpfs", _DISKS)
        try:
            operation = host_cloud.ended(host_cloud.create("no-room"), 120)
            assert operation.state == Operation.STATE_FAILED
            assert errors.from_status(operation.error).reason == "HOST_DISK_FULL"
            remove(host_cloud, operation.resource.id)
        finally:
            host_cloud.host.run("umount", "--lazy", _DISKS)
        assert host_cloud.until(lambda: host_cloud.verify() == [])

    operation = host_cloud.ended(host_cloud.create("room"))
    assert operation.state == Operation.STATE_SUCCEEDED, operation.error
    remove(host_cloud, operation.resource.id)


async def test_an_overlay_for_which_there_is_no_room_says_so(tmp_path: Path) -> None:
    base, small = tmp_path / "base", tmp_path / "small"
    base.write_bytes(bytes(1 << 20))
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", small], check=True)
    image = image_cache.CachedImage(base, "raw", 1 << 20)
    try:
        with pytest.raises(errors.Exhausted, match="HOST_DISK_FULL"):
            await image_cache.ensure_overlay(small / "root.qcow2", image, 1)
        assert not (small / "root.qcow2").exists()
    finally:
        subprocess.run(["umount", small], check=True)


def test_an_instance_whose_qemu_dies_at_its_first_start_becomes_active(
    host_cloud: HostCloud,
) -> None:
    operation = host_cloud.create("died-once", volume=1)
    with killing_starts(operation.resource.id, 1) as killed:
        operation = host_cloud.ended(operation)
    assert len(killed) == 1
    assert operation.state == Operation.STATE_SUCCEEDED, operation.error
    until_state(host_cloud, operation.resource.id, State.STATE_ACTIVE)
    remove(host_cloud, operation.resource.id)


def test_an_instance_whose_qemu_always_dies_says_so_and_keeps_nothing(
    host_cloud: HostCloud,
) -> None:
    operation = host_cloud.create("died-always", volume=1)
    with killing_starts(operation.resource.id, 1000) as killed:
        operation = host_cloud.ended(operation)
    assert len(killed) >= 5
    assert operation.state == Operation.STATE_FAILED
    error = errors.from_status(operation.error)
    assert error.reason == "HYPERVISOR_REFUSED"
    assert "ended at each of 5 starts: libvirt: internal error:" in error.message
    remove(host_cloud, operation.resource.id)
    assert host_cloud.until(lambda: host_cloud.verify() == [])
