"""What a host's own programs do wrong: libvirtd hangs or dies, QEMU is killed, the disk is full.

What the driver makes of a libvirtd that hangs or dies is in test_libvirt_driver.py.
"""

from __future__ import annotations

import os
import signal

import pytest

from fakes.host_cloud import HostCloud, _request
from mcloud.common.v1 import operation_pb2
from mcloud.compute.v1 import instance_pb2, instance_service_pb2
from mcloud.volume.v1 import volume_pb2
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


def qemu_pid(cloud: HostCloud, id_: str) -> int:
    """As the host counts."""
    return int(cloud.host.run("cat", f"/run/libvirt/qemu/{libvirt_name(id_)}.pid"))


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
    host_cloud.ended(host_cloud.delete(instance_id))
    host_cloud.gone(instance_id)
    host_cloud.host.run("mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", _DISKS)
    try:
        operation = host_cloud.ended(host_cloud.create("no-room"), 120)
        assert operation.state == Operation.STATE_FAILED
        assert errors.from_status(operation.error).reason == "HOST_DISK_FULL"
        host_cloud.ended(host_cloud.delete(operation.resource.id))
        host_cloud.gone(operation.resource.id)
    finally:
        host_cloud.host.run("umount", "--lazy", _DISKS)
    assert host_cloud.until(lambda: host_cloud.verify() == [])

    # There is room again, once the host has said so.
    def made() -> Operation | None:
        operation = host_cloud.ended(host_cloud.create("room"))
        if operation.state == Operation.STATE_SUCCEEDED:
            return operation
        assert errors.from_status(operation.error).reason == "NO_VALID_HOST"
        host_cloud.ended(host_cloud.delete(operation.resource.id))
        return None

    host_cloud.until(made)
