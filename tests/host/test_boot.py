"""The whole way: a real guest of a real image on a real host, through the contract alone.

One cloud and one instance for all tests of this file; they build on each other in this order.
"""

from __future__ import annotations

import secrets

import pytest

from fakes import secrecy
from fakes.host_cloud import HostCloud, _request
from fakes.real_guest import Guest, allow, boot, build
from fakes.secrecy import Secret
from mcloud.common.v1 import operation_pb2
from mcloud.compute.v1 import flavor_pb2, instance_pb2, instance_service_pb2
from mcloud.identity.v1 import user_pb2
from mcloud.network.v1 import security_group_service_pb2
from mcloud_base import errors, ids

pytestmark = pytest.mark.host

Step = operation_pb2.OperationStep
State = instance_pb2.InstanceStatus.State
USER_DATA_SECRET = b"only-for-the-guest-5e1f09"


@pytest.fixture(scope="module")
def guest(host_cloud: HostCloud, tmp_path_factory: pytest.TempPathFactory) -> Guest:
    return boot(
        host_cloud,
        build("guest-image", "guest.qcow2", timeout_s=300),
        tmp_path_factory.mktemp("keys"),
        flavor=flavor_pb2.FlavorSpec(vcpu_count=1, memory_mib=128, disk_gib=1),
        user_data=b"#!/bin/sh\n# " + USER_DATA_SECRET + b"\necho told by user data > /root/told\n",
    )


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


def test_secrets_are_only_where_they_must_be(guest: Guest) -> None:
    cloud = guest.cloud
    password = secrets.token_urlsafe(24)
    user = cloud.make(
        *_request("identity.UserService/CreateUser", name="ada", spec={}, password=password),
        user_pb2.User,
        system=True,
    )
    wrong = secrets.token_urlsafe(24)
    for given in (wrong, password):  # one fails, and is logged; the other has no project yet
        with pytest.raises(errors.Error):
            cloud.call(
                *_request(
                    "identity.TokenService/CreateToken",
                    password={"user_name": user.metadata.name, "password": given},
                )
            )
    credential = cloud.call(
        *_request(
            "identity.ApplicationCredentialService/CreateApplicationCredential",
            request_id=ids.request_id(),
            name="robot",
        )
    )
    join = cloud.call(
        *_request(
            "identity.EnrolmentService/CreateJoinToken", request_id=ids.request_id(), name="h2"
        ),
        system=True,
    )
    admin = (cloud.state_dir / "admin-password").read_text().strip()
    known = [
        Secret("the administrator's password", admin.encode(), ("cp/admin-password",)),
        Secret("a user's password", password.encode()),
        Secret("a wrong password", wrong.encode()),
        Secret("an application credential", credential.secret.encode()),
        Secret("a join token", join.secret.encode()),
        # Of the instance's row, and what its host gives the guest.
        Secret("user data", USER_DATA_SECRET, ("cp/compute.db*", "*/guest_data/*")),
    ]
    assert not secrecy.shown_by_processes(known)
    assert not secrecy.found_in_files(cloud.root, known)


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
