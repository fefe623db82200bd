"""The whole way: a real guest of a real image on a real host, through the contract alone.

One cloud and one instance for all tests of this file; they build on each other in this order.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fakes.host_cloud import EXTERNAL, HostCloud, _request
from mcloud.common.v1 import operation_pb2
from mcloud.compute.v1 import (
    flavor_pb2,
    instance_pb2,
    instance_service_pb2,
    key_pair_pb2,
)
from mcloud.image.v1 import image_pb2, image_service_pb2
from mcloud.network.v1 import (
    floating_ip_pb2,
    network_pb2,
    router_pb2,
    router_service_pb2,
    security_group_pb2,
    security_group_service_pb2,
    subnet_pb2,
)

pytestmark = pytest.mark.host

ROOT = Path(__file__).parents[2]
GUEST_S = 180  # a guest's boot, on a machine that has other work
Step = operation_pb2.OperationStep
Operation = operation_pb2.Operation
State = instance_pb2.InstanceStatus.State


@dataclass
class Guest:
    """The instance that the tests share."""

    cloud: HostCloud
    key: Path
    instance_id: str
    operation: Operation
    address: str
    security_group: security_group_pb2.SecurityGroup

    def ssh(self, command: str, timeout_s: int = 5) -> subprocess.CompletedProcess[str]:
        options = ["StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "BatchMode=yes"]
        options += ["LogLevel=ERROR", f"ConnectTimeout={timeout_s}"]
        flags = [part for option in options for part in ("-o", option)]
        return subprocess.run(
            [
                "timeout",
                str(timeout_s + 10),
                "ssh",
                "-i",
                str(self.key),
                *flags,
                f"root@{self.address}",
                command,
            ],
            capture_output=True,
            text=True,
            check=False,
        )

    def says(self, command: str, deadline_s: float = GUEST_S) -> str:
        """Return what a command prints in the guest, once it can be reached."""

        def run() -> str | None:
            result = self.ssh(command)
            return result.stdout.strip() or "-" if result.returncode == 0 else None

        return str(self.cloud.until(run, deadline_s))

    def instance(self) -> instance_pb2.Instance:
        found = self.cloud.instance(self.instance_id)
        assert found is not None
        return found

    def verb(self, name: str, **fields: Any) -> Operation:
        """Call a verb of the instance, and wait for its end."""
        method = f"compute.InstanceService/{name}"
        operation = self.cloud.mutate(*_request(method, id=self.instance_id, **fields))
        ended = self.cloud.ended(operation, GUEST_S)
        assert ended.state == Operation.STATE_SUCCEEDED, ended.error
        return ended


@pytest.fixture(scope="module")
def guest(host_cloud: HostCloud, tmp_path_factory: pytest.TempPathFactory) -> Guest:
    """Boot the instance as the quickstart does."""
    cloud = host_cloud
    key = tmp_path_factory.mktemp("key") / "my_key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    image_id = upload(cloud, guest_image())
    flavor = cloud.make(
        *_request(
            "compute.FlavorService/CreateFlavor",
            name="m1.small",
            spec=flavor_pb2.FlavorSpec(vcpu_count=1, memory_mib=128, disk_gib=1),
        ),
        flavor_pb2.Flavor,
        system=True,
    )
    pair = cloud.make(
        *_request(
            "compute.KeyPairService/CreateKeyPair",
            name="my_key",
            spec=key_pair_pb2.KeyPairSpec(public_key=key.with_suffix(".pub").read_text()),
        ),
        key_pair_pb2.KeyPair,
    )
    external = way_out(cloud)
    group = cloud.make(
        *_request("network.SecurityGroupService/CreateSecurityGroup", name="norprod_sec_grp",
                  spec=security_group_pb2.SecurityGroupSpec(description="ssh")),
        security_group_pb2.SecurityGroup,
    )  # fmt: skip
    allow(cloud, group, "tcp", 22)
    spec = instance_pb2.InstanceSpec(
        flavor_id=flavor.metadata.id,
        image_id=image_id,
        nics=[instance_pb2.InstanceNic(network_id=cloud.network_id)],
        volumes=[instance_pb2.InstanceVolume(volume_id=cloud.volume_ids[0])],
        security_group_ids=[group.metadata.id],
        key_pair_id=pair.metadata.id,
        user_data=b"#!/bin/sh\necho told by user data > /root/told\n",
    )
    operation = cloud.ended(
        cloud.mutate(
            *_request("compute.InstanceService/CreateInstance", name="stack_testvm", spec=spec)
        )
    )
    assert operation.state == Operation.STATE_SUCCEEDED, operation
    instance = cloud.instance(operation.resource.id)
    assert instance is not None
    floating = cloud.make(
        *_request(
            "network.FloatingIpService/CreateFloatingIp",
            name="way in",
            spec=floating_ip_pb2.FloatingIpSpec(
                external_network_id=external, port_id=instance.status.addresses[0].port_id
            ),
        ),
        floating_ip_pb2.FloatingIp,
    )
    return Guest(
        cloud,
        key,
        instance.metadata.id,
        operation,
        floating.status.floating_ip_address,
        group,
    )


def guest_image() -> Path:
    """Build the guest image, or find it built."""
    path = ROOT / "build" / "guest.qcow2"
    path.parent.mkdir(exist_ok=True)
    command = [sys.executable, str(ROOT / "scripts" / "guest-image"), str(path)]
    subprocess.run([*command, "--cache", str(path.parent / "debs")], check=True, timeout=300)
    return path


def upload(cloud: HostCloud, path: Path) -> str:
    """Upload an image in chunks."""
    spec = image_pb2.ImageSpec(disk_format=image_pb2.DISK_FORMAT_QCOW2)
    image = cloud.make(
        *_request("image.ImageService/CreateImage", name="guest", spec=spec), image_pb2.Image
    )
    content = path.read_bytes()
    kind = image_service_pb2.UploadImageDataRequest

    def parts() -> Iterator[image_service_pb2.UploadImageDataRequest]:
        yield kind(start=image_service_pb2.UploadStart(id=image.metadata.id, offset=0))
        for start in range(0, len(content), 1 << 20):
            yield kind(chunk=content[start : start + (1 << 20)])
        yield kind(end=image_service_pb2.UploadEnd(sha256=hashlib.sha256(content).hexdigest()))

    cloud.call("image.ImageService/UploadImageData", parts(), timeout_s=60)
    return str(image.metadata.id)


def way_out(cloud: HostCloud) -> str:
    """Make the external network and the router; return the network's id."""
    network = cloud.make(
        *_request(
            "network.NetworkService/CreateNetwork",
            name="public",
            spec=network_pb2.NetworkSpec(external=True, shared=True, physical_network="external"),
        ),
        network_pb2.Network,
        system=True,
    )
    base = EXTERNAL.rpartition(".")[0]
    cloud.make(
        *_request(
            "network.SubnetService/CreateSubnet",
            name="public",
            spec=subnet_pb2.SubnetSpec(
                network_id=network.metadata.id,
                cidr=EXTERNAL,
                gateway_ip=f"{base}.1",
                dhcp_disabled=True,
                allocation_pools=[
                    subnet_pb2.AllocationPool(first_ip=f"{base}.100", last_ip=f"{base}.199")
                ],
            ),
        ),
        subnet_pb2.Subnet,
        system=True,
    )
    router = cloud.make(
        *_request(
            "network.RouterService/CreateRouter",
            name="router",
            spec=router_pb2.RouterSpec(external_network_id=network.metadata.id),
        ),
        router_pb2.Router,
    )
    private = cloud.call(
        "network.NetworkService/GetNetwork",
        _request("network.NetworkService/GetNetwork", id=cloud.network_id)[1],
    )
    join = router_service_pb2.AddRouterInterfaceRequest(
        id=router.metadata.id, subnet_id=private.status.subnet_ids[0]
    )
    cloud.make("network.RouterService/AddRouterInterface", join, router_pb2.Router)
    return str(network.metadata.id)


def allow(
    cloud: HostCloud, group: security_group_pb2.SecurityGroup, protocol: str, port: int
) -> None:
    """Let traffic in."""
    spec = security_group_pb2.SecurityGroupRuleSpec(
        security_group_id=group.metadata.id,
        direction=security_group_pb2.SecurityGroupRuleSpec.DIRECTION_INGRESS,
        ip_version=4,
        protocol=protocol,
        port_min=port,
        port_max=port,
    )
    method = "network.SecurityGroupService/CreateSecurityGroupRule"
    operation = cloud.mutate(
        method, security_group_service_pb2.CreateSecurityGroupRuleRequest(spec=spec)
    )
    assert operation.state == Operation.STATE_SUCCEEDED


def test_the_sixteen_steps_stand_in_the_trace_in_order(guest: Guest) -> None:
    last = max(step.attempt for step in guest.operation.steps)
    steps = {step.number: step for step in guest.operation.steps if step.attempt == last}
    numbers = sorted(step.number for step in guest.operation.steps if step.attempt == last)
    assert numbers == list(range(1, 17))
    assert all(step.state == Step.STATE_DONE for step in steps.values()), guest.operation.steps
    assert all(step.service and step.host for step in steps.values())

    def start(number: int) -> int:
        return int(steps[number].start_time.ToMicroseconds())

    def end(number: int) -> int:
        return int(steps[number].end_time.ToMicroseconds())

    for earlier, later in [(n, n + 1) for n in range(1, 8)]:
        assert start(earlier) <= start(later), (earlier, later)
    for cause in range(1, 10):
        assert start(cause) <= start(10), cause
    for cause in (10, 12, 14):
        assert end(9) <= start(cause), cause
        assert end(cause) <= start(16), cause
    for inner, outer in ((11, 10), (13, 12), (15, 14)):
        assert start(outer) <= start(inner), (inner, outer)
        assert end(inner) <= end(outer), (inner, outer)


def test_the_guest_is_what_was_asked_for(guest: Guest) -> None:
    instance = guest.instance()
    assert instance.status.state == State.STATE_ACTIVE
    assert guest.says("hostname") == "stack-testvm"
    assert instance.status.addresses[0].ip_address in guest.says("ip -4 addr show dev eth0")
    assert guest.says("cat /sys/block/vdb/size") == str((1 << 30) // 512)
    assert guest.says("cat /root/told") == "told by user data"


def test_the_guest_reaches_its_metadata(guest: Guest) -> None:
    request = "GET /openstack/latest/meta_data.json HTTP/1.0\\r\\n\\r\\n"
    answer = guest.says(f"printf '{request}' | timeout 10 nc 169.254.169.254 80")
    assert " 200 " in answer.splitlines()[0]
    assert '"hostname"' in answer
    assert "stack-testvm" in answer


def test_the_guest_survives_its_agent_and_is_adopted(guest: Guest) -> None:
    pids = qemu_pids(guest)
    assert len(pids) == 1
    guest.cloud.kill_agent()
    assert guest.says("hostname") == "stack-testvm"
    guest.cloud.start_agent()
    reboots = guest.says("cat /proc/uptime")
    assert float(reboots.split()[0]) > 0
    assert qemu_pids(guest) == pids
    guest.cloud.until(lambda: not guest.cloud.verify())


def test_a_detached_disk_is_gone_and_an_attached_one_is_there(guest: Guest) -> None:
    first, second = guest.cloud.volume_ids[:2]
    guest.verb("DetachVolume", volume_id=first)
    assert guest.says("ls /sys/block | grep -c vdb || true") == "0"
    guest.verb("AttachVolume", volume_id=second)
    assert guest.says("cat /sys/block/vdb/size") == str((1 << 30) // 512)
    assert [volume.volume_id for volume in guest.instance().status.volumes] == [second]


def test_stop_start_and_reboot(guest: Guest) -> None:
    guest.verb("StopInstance")
    assert guest.instance().status.state == State.STATE_SHUTOFF
    assert not qemu_pids(guest)
    guest.verb("StartInstance")
    assert guest.instance().status.state == State.STATE_ACTIVE
    assert guest.says("cat /root/told") == "told by user data"
    before = guest.says("cat /proc/sys/kernel/random/boot_id")
    guest.verb("RebootInstance", hard=True)
    assert guest.says("cat /proc/sys/kernel/random/boot_id") != before


def test_a_removed_rule_closes_the_door(guest: Guest) -> None:
    group = guest.cloud.call(
        "network.SecurityGroupService/GetSecurityGroup",
        _request(
            "network.SecurityGroupService/GetSecurityGroup", id=guest.security_group.metadata.id
        )[1],
    )
    for rule in group.status.rules:
        if rule.spec.protocol == "tcp":
            guest.cloud.mutate(
                "network.SecurityGroupService/DeleteSecurityGroupRule",
                security_group_service_pb2.DeleteSecurityGroupRuleRequest(id=rule.metadata.id),
            )
    guest.cloud.until(lambda: guest.ssh("true").returncode != 0)
    allow(guest.cloud, guest.security_group, "tcp", 22)
    assert guest.says("hostname") == "stack-testvm"


def test_delete_leaves_nothing(guest: Guest) -> None:
    operation = guest.cloud.mutate(
        "compute.InstanceService/DeleteInstance",
        instance_service_pb2.DeleteInstanceRequest(id=guest.instance_id),
    )
    guest.cloud.ended(operation)
    guest.cloud.gone(guest.instance_id)
    assert not qemu_pids(guest)
    guest.cloud.until(lambda: not guest.cloud.verify())
    instances = guest.cloud.root / "lab/hosts/h1/mcloud/lib/compute/instances"
    assert not list(instances.iterdir())


def qemu_pids(guest: Guest) -> list[str]:
    """Return the QEMU processes of the host."""
    found = guest.cloud.host.run("sh", "-c", "pidof qemu-system-x86_64 || true")
    return found.split()
