"""`verify` finds one planted leak of each kind on a host, and nothing else; `repair` mends it.

What no row and no tombstone names is not touched until it is named.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fakes.host_cloud import ENDED, HostCloud
from mcloud.common.v1 import operation_pb2, session_pb2
from mcloud.conductor.v1 import verify_service_pb2
from mcloud.volume.v1 import attachment_pb2
from mcloud_agents.compute import domain_xml
from mcloud_base import ids

pytestmark = [
    pytest.mark.host,
    pytest.mark.skipif(os.geteuid() != 0, reason="namespaces need root"),
]

Finding = verify_service_pb2.Finding
Repair = verify_service_pb2.Repair
Artifact = session_pb2.Artifact
Key = tuple[int, str, int]  # kind, subject, kind of artifact

DOMAIN = """
<domain type='qemu'>
  <name>planted</name>
  <metadata>
    <mcloud:domain xmlns:mcloud='{namespace}' id='{id}' instance-id='{instance}' epoch='{epoch}'
      generation='1' boot-number='1'/>
  </metadata>
  <memory unit='MiB'>16</memory>
  <os><type arch='x86_64' machine='pc'>hvm</type></os>
  <devices><emulator>/usr/bin/qemu-system-x86_64</emulator></devices>
</domain>
"""


@dataclass
class Scene:
    """A cloud with one instance that is in order, and what is known of it."""

    cloud: HostCloud
    instance_id: str
    domain_id: str
    host_id: str

    @property
    def top(self) -> Path:
        return self.cloud.host.state / "hosts" / "h1" / "mcloud"

    def sql(self, name: str, statement: str, *values: object) -> list[Any]:
        connection = sqlite3.connect(self.cloud.state_dir / f"{name}.db", timeout=30)
        try:
            with connection:
                return connection.execute(statement, values).fetchall()
        finally:
            connection.close()

    @contextmanager
    def row(self, name: str, table: str, **changes: object) -> Iterator[None]:
        """Have a copy of the instance's row in a table, with some columns changed."""
        cursor = self.sql(name, f"SELECT name FROM pragma_table_info('{table}')")
        columns = [column for (column,) in cursor]
        values = dict(zip(columns, self.sql(name, f"SELECT * FROM {table}")[0], strict=True))
        values |= changes
        marks = ", ".join("?" * len(columns))
        (last,) = self.sql(name, f"SELECT max(rowid) FROM {table}")[0]
        self.sql(name, f"INSERT INTO {table} VALUES ({marks})", *values.values())
        yield
        self.sql(name, f"DELETE FROM {table} WHERE rowid > ?", last)

    def repair(self, *resources: str) -> dict[str, str]:
        """Repair, naming these or nothing; return what became of each subject."""
        method = "conductor.VerifyService/Repair"
        request = verify_service_pb2.RepairRequest(resources=resources)
        request.request_id = ids.request_id()
        operation = self.cloud.until(
            lambda: self.cloud.call(method, request, system=True, timeout_s=60)
        )
        request = operation_pb2.GetOperationRequest(id=operation.id)
        while operation.state not in ENDED:
            operation = self.cloud.until(
                lambda: self.cloud.call(
                    "compute.OperationService/GetOperation", request, system=True
                )
            )
        report = verify_service_pb2.RepairReport()
        assert operation.response.Unpack(report), operation
        return {
            each.finding.subject: Repair.State.Name(each.state).removeprefix("STATE_")
            for each in report.repairs
        }

    def until_clean(self) -> None:
        self.cloud.until(lambda: self.findings() == set(), 120)

    def findings(self) -> set[Key]:
        found: list[Finding] = self.cloud.until(lambda: [self.cloud.verify()])[0]
        return {(f.kind, f.subject, f.artifact_kind) for f in found}


@pytest.fixture(scope="module")
def scene(host_cloud: HostCloud) -> Scene:
    operation = host_cloud.ended(host_cloud.create("in-order"))
    assert operation.state == operation_pb2.Operation.STATE_SUCCEEDED, operation.error
    instance = host_cloud.instance(operation.resource.id)
    assert instance is not None
    status = instance.status
    scene = Scene(host_cloud, instance.metadata.id, status.domain_id, status.host_id)
    assert scene.findings() == set()
    return scene


def row_leak(scene: Scene, what: str) -> tuple[set[Key], Any]:
    """Return what should be found, and what plants it."""
    id_ = {"port": "port", "attachment": "att"}.get(what, "i")
    new = ids.new(id_)
    match what:
        case "claim":
            new = ids.new("d")
            found = {
                (Finding.KIND_CLAIM_WITHOUT_DOMAIN, new, 0),
                (Finding.KIND_HOST_VIEW_DIFFERS, scene.host_id, 0),  # nobody told the scheduler
            }
            return found, scene.row("compute", "claim", domain_id=new)
        case "port":
            mac = "fa:16:3e:ff:ff:01"
            changes = {"id": new, "owner_id": ids.new("i"), "mac": mac, "host_id": ""}
            plant = scene.row("network", "port", owner_type="instance", **changes)
            return {(Finding.KIND_PORT_WITHOUT_INSTANCE, new, 0)}, plant
        case "attachment":
            changes = {"id": new, "volume_id": ids.new("vol"), "instance_id": ids.new("i")}
            free = {"state": "RESERVED", "host_id": "", "domain_id": ""}
            plant = scene.row("volume", "attachment", **changes, **free)
            found = {
                (Finding.KIND_ATTACHMENT_WITHOUT_INSTANCE, new, 0),
                (Finding.KIND_ATTACHMENT_WITHOUT_VOLUME, new, 0),
            }
            return found, plant
        case "image use":
            plant = scene.row("image", "image_use", instance_id=new)
            return {(Finding.KIND_IMAGE_USE_WITHOUT_INSTANCE, scene.cloud.image_id, 0)}, plant
        case "overdue operation":
            new = ids.new("cop")
            hour = int((time.time() - 3600) * 1e6)
            plant = scene.row(
                "compute", "operation", id=new, state="RUNNING", workflow="forgotten",
                deadline=hour, resource_id=ids.new("i"), request_id=new,
            )  # fmt: skip
            return {(Finding.KIND_OPERATION_OVERDUE, new, 0)}, plant
        case _:
            raise AssertionError(what)


@pytest.mark.parametrize("what", ["claim", "port", "attachment", "image use", "overdue operation"])
def test_a_row_without_an_owner_is_found(scene: Scene, what: str) -> None:
    expected, plant = row_leak(scene, what)
    with plant:
        assert scene.findings() == expected
    assert scene.findings() == set()


def test_a_connection_that_no_host_has_is_found_and_taken_back(scene: Scene) -> None:
    """The row says that the domain has a second disk; neither it nor any server knows of it."""
    new, volume_id = ids.new("att"), scene.cloud.volume_ids[1]
    spec = attachment_pb2.AttachmentSpec(volume_id=volume_id, instance_id=scene.instance_id)
    changes = {"id": new, "volume_id": volume_id, "spec": spec.SerializeToString()}
    with scene.row("volume", "attachment", **changes):
        assert scene.findings() == {
            (Finding.KIND_ATTACHMENT_WITHOUT_INSTANCE, new, 0),
            (Finding.KIND_VOLUME_DIFFERS, volume_id, 0),
            (Finding.KIND_MISSING_ARTIFACT, volume_id, Artifact.KIND_DISK),
            (Finding.KIND_MISSING_ARTIFACT, volume_id, Artifact.KIND_EXPORT),
        }
        scene.repair()
        scene.repair()  # what the first has shown
        scene.until_clean()


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (Artifact.KIND_OVERLAY, "root.qcow2"),
        (Artifact.KIND_CONFIG_DRIVE, "config-drive.iso"),
    ],
)
def test_a_file_without_an_owner_is_found(scene: Scene, kind: int, name: str) -> None:
    directory = scene.top / "lib/compute/instances" / ids.new("d")
    directory.mkdir()
    (directory / name).touch()
    path = f"/var/lib/mcloud/compute/instances/{directory.name}/{name}"
    assert scene.findings() == {(Finding.KIND_UNKNOWN_ARTIFACT, path, kind)}
    assert scene.repair() == {path: "LEFT"}
    assert (directory / name).exists()
    assert scene.repair(directory.name) == {path: "DONE"}
    assert not directory.exists()
    assert scene.findings() == set()


@contextmanager
def tap(scene: Scene) -> Iterator[str]:
    bridge = scene.cloud.host.run("sh", "-c", "ls /sys/class/net | grep mcbr").split()[0]
    script = "ip tuntap add planted mode tap && ip link set planted master"
    scene.cloud.host.run("sh", "-c", f"{script} {bridge}")
    yield "planted"
    scene.cloud.host.run("ip", "link", "del", "planted")


@contextmanager
def filter_rule(scene: Scene) -> Iterator[str]:
    scene.cloud.host.run("nft", "add", "chain", "inet", "mcloud", "in-planted")
    yield "in-planted"
    table = ("nft", "list", "table", "inet", "mcloud")
    scene.cloud.until(lambda: "planted" not in scene.cloud.host.run(*table))


@contextmanager
def dhcp_entry(scene: Scene) -> Iterator[str]:
    (hosts,) = (scene.top / "run/network/dhcp").glob("*/hosts")
    before = hosts.read_text()
    mac = "fa:16:3e:ff:ff:02"
    hosts.write_text(f"{before}{mac},10.10.0.200,86400\n")
    yield f"{hosts.parent.name}/{mac}"
    scene.cloud.until(lambda: hosts.read_text() == before)


def test_a_tap_without_an_owner_is_for_a_person(scene: Scene) -> None:
    with tap(scene) as name:
        assert scene.findings() == {(Finding.KIND_UNKNOWN_ARTIFACT, name, Artifact.KIND_TAP)}
        assert scene.repair() == {name: "LEFT"}
        assert scene.repair(name) == {name: "LEFT"}
    assert scene.findings() == set()


@pytest.mark.parametrize(
    ("kind", "plant"),
    [(Artifact.KIND_FILTER, filter_rule), (Artifact.KIND_DHCP_ENTRY, dhcp_entry)],
)
def test_a_rule_of_the_network_without_an_owner_is_replaced(
    scene: Scene, kind: int, plant: Any
) -> None:
    # (Every minute the agent goes over its network by itself: it may be quicker, but not twice.)
    for _ in range(2):
        with plant(scene) as name:
            found = scene.findings()
            if found:
                assert scene.repair() in ({name: "DONE"}, {})
            scene.until_clean()
        if found:
            break
    assert found == {(Finding.KIND_UNKNOWN_ARTIFACT, name, kind)}


def test_a_domain_that_nothing_names_runs_on(scene: Scene) -> None:
    """Through listings, an agent that ends and one that is killed, and a delete beside it."""
    cloud = scene.cloud
    ((epoch,),) = scene.sql("compute", "SELECT epoch FROM deployment")
    path = cloud.root / "planted.xml"
    path.write_text(
        DOMAIN.format(
            namespace=domain_xml.NAMESPACE, id=ids.new("d"), instance=ids.new("i"), epoch=epoch
        )
    )
    cloud.host.run("virsh", "create", str(path))
    (pid,) = cloud.host.run("sh", "-c", "cat /run/libvirt/qemu/planted.pid").split()
    expected = (Finding.KIND_UNKNOWN_ARTIFACT, "planted", Artifact.KIND_DOMAIN)

    assert scene.findings() == {expected}
    for _ in range(2):
        cloud.kill_agent()
        cloud.start_agent()
        assert scene.findings() == {expected}
    operation = cloud.delete(scene.instance_id)
    assert cloud.ended(operation).state == operation_pb2.Operation.STATE_SUCCEEDED, operation.error
    assert scene.findings() == {expected}

    assert cloud.host.run("sh", "-c", "cat /run/libvirt/qemu/planted.pid").split() == [pid]
    assert cloud.host.run("virsh", "domstate", "planted").strip() == "running"
    assert scene.repair() == {"planted": "LEFT"}
    assert cloud.host.run("virsh", "domstate", "planted").strip() == "running"
    assert scene.repair("planted") == {"planted": "DONE"}
    assert "planted" not in cloud.host.run("virsh", "list", "--all", "--name")
    assert scene.findings() == set()
