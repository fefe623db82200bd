"""A real guest on a real host, and what it takes to boot and reach one."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fakes.host_cloud import EXTERNAL, HostCloud, _request
from mcloud.common.v1 import operation_pb2
from mcloud.compute.v1 import flavor_pb2, instance_pb2, key_pair_pb2
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

ROOT = Path(__file__).parents[2]
GUEST_S = 180  # a guest's boot, on a machine that has other work
Operation = operation_pb2.Operation


@dataclass
class Guest:
    """The instance that the tests share."""

    cloud: HostCloud
    key: Path
    instance_id: str
    operation: Operation
    address: str
    security_group: security_group_pb2.SecurityGroup
    user: str = "root"
    patience_s: int = 5  # with one ssh; the next try may be what succeeds

    def ssh(self, command: str) -> subprocess.CompletedProcess[str]:
        options = ["StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "BatchMode=yes"]
        options += ["LogLevel=ERROR", f"ConnectTimeout={self.patience_s}"]
        flags = [part for option in options for part in ("-o", option)]
        return subprocess.run(
            [
                "timeout",
                str(self.patience_s + 10),
                "ssh",
                "-i",
                str(self.key),
                *flags,
                f"{self.user}@{self.address}",
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


def boot(
    cloud: HostCloud,
    image: Path,
    keys: Path,
    *,
    flavor: flavor_pb2.FlavorSpec,
    user_data: bytes,
    user: str = "root",
    patience_s: int = 5,
) -> Guest:
    """Boot an instance as the quickstart does: key, group, volume, floating address.

    Args:
        keys: directory for the key that is let in.
    """
    key = keys / "my_key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    image_id = upload(cloud, image)
    size = cloud.make(
        *_request("compute.FlavorService/CreateFlavor", name="m1.small", spec=flavor),
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
        *_request(
            "network.SecurityGroupService/CreateSecurityGroup",
            name="norprod_sec_grp",
            spec=security_group_pb2.SecurityGroupSpec(description="ssh"),
        ),
        security_group_pb2.SecurityGroup,
    )
    allow(cloud, group, "tcp", 22)
    spec = instance_pb2.InstanceSpec(
        flavor_id=size.metadata.id,
        image_id=image_id,
        nics=[instance_pb2.InstanceNic(network_id=cloud.network_id)],
        volumes=[instance_pb2.InstanceVolume(volume_id=cloud.volume_ids[0])],
        security_group_ids=[group.metadata.id],
        key_pair_id=pair.metadata.id,
        user_data=user_data,
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
    address = floating.status.floating_ip_address
    return Guest(cloud, key, instance.metadata.id, operation, address, group, user, patience_s)


def build(program: str, name: str, timeout_s: float) -> Path:
    """Build an image with a program of scripts/, or find it built."""
    path = ROOT / "build" / name
    path.parent.mkdir(exist_ok=True)
    command = [sys.executable, str(ROOT / "scripts" / program), str(path)]
    subprocess.run([*command, "--cache", str(path.parent / "debs")], check=True, timeout=timeout_s)
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
