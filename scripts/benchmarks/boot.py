"""A real guest: request to running, beside define and start of the same domain by libvirt alone.

The two alternate, on the same host, with the image cached and another guest on the network, so
that the host has that network already. The same domain: its XML is libvirt's own description of
a guest that mcloud made, with another name, UUID, MAC address, tap, disk and console log.
"""

from __future__ import annotations

import asyncio
import statistics
import subprocess
import time
import uuid
from collections import defaultdict
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from xml.etree import ElementTree

from benchmarks import cloud, images, report
from benchmarks.client import Client
from benchmarks.cloud import Host
from benchmarks.plan import Plan
from benchmarks.report import Figure
from mcloud.common.v1 import operation_pb2
from mcloud.compute.v1 import (
    flavor_pb2,
    flavor_service_pb2,
    flavor_service_pb2_grpc,
    host_pb2,
    host_service_pb2,
    host_service_pb2_grpc,
    instance_pb2,
    instance_service_pb2,
    instance_service_pb2_grpc,
)
from mcloud.network.v1 import (
    network_pb2,
    network_service_pb2,
    network_service_pb2_grpc,
    subnet_pb2,
    subnet_service_pb2,
    subnet_service_pb2_grpc,
)
from mcloud_base import ids

HOST_UP_S = 120.0
GUEST_MEMORY_MIB = 128
# Without an operating system: what the guest does after its start is not measured.
IMAGE_BYTES = 1 << 20
DEFINE_AND_START = 16  # the step that the bare measurement has as well


@dataclass
class Boot:
    """One boot through mcloud. Times in seconds."""

    accepted: float  # request sent to operation received
    total: float  # request sent to instance ACTIVE
    # (start after the request's arrival, duration) of each step by (number, name).
    steps: dict[tuple[int, str], tuple[float, float]]

    @property
    def share(self) -> float:
        """What everything but define and start took."""
        return self.total - sum(
            took for (number, _), (_, took) in self.steps.items() if number == DEFINE_AND_START
        )


@dataclass
class Samples:
    """What has been measured."""

    boots: list[Boot] = field(default_factory=list)
    bare: list[float] = field(default_factory=list)


def run(plan: Plan) -> list[Figure]:
    """Measure; print where the time goes."""
    with cloud.private_cloud(plan) as (plane, host):
        samples = asyncio.run(_measure(plane, host, plan.repeats))
    print(_steps_table(samples.boots))
    total, bare = [boot.total for boot in samples.boots], samples.bare
    ratios = [one / other for one, other in zip(total, bare, strict=True)]
    return [
        report.figure("boot_request_to_running", total, "s", yardstick=bare),
        report.figure("boot_bare_libvirt", bare, "s"),
        report.figure("boot_ratio", ratios, "x"),
        report.figure(
            "boot_control_plane_share", [boot.share * 1000 for boot in samples.boots], "ms"
        ),
        report.figure("boot_accepted", [boot.accepted * 1000 for boot in samples.boots], "ms"),
    ]


async def _measure(plane: cloud.ControlPlane, host: Host, repeats: int) -> Samples:
    samples = Samples()
    async with Client(plane) as client:
        await _until_host_is_up(client)
        guests = Guests(client)
        await guests.prepare()
        await guests.boot("neighbour")
        model, _ = await guests.boot("model")
        bare = await asyncio.to_thread(Bare, host, model.metadata.name)
        await guests.delete(model)
        for number in range(repeats):
            turns = [partial(_boot, guests, number), partial(_start_bare, bare)]
            for turn in turns if number % 2 else reversed(turns):
                await turn(samples)
    return samples


async def _boot(guests: Guests, number: int, samples: Samples) -> None:
    instance, boot = await guests.boot(f"guest-{number}")
    samples.boots.append(boot)
    await guests.delete(instance)


async def _start_bare(bare: Bare, samples: Samples) -> None:
    samples.bare.append(await asyncio.to_thread(bare.define_and_start))
    await asyncio.to_thread(bare.remove)


class Guests:
    """Instances, all alike."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._stub = instance_service_pb2_grpc.InstanceServiceStub(client.channel)
        self._spec = instance_pb2.InstanceSpec()

    async def prepare(self) -> None:
        """Make what an instance needs."""
        client, channel = self._client, self._client.channel
        flavor = await client.mutate(
            flavor_service_pb2_grpc.FlavorServiceStub(channel).CreateFlavor,
            flavor_service_pb2.CreateFlavorRequest(
                name="bench",
                spec=flavor_pb2.FlavorSpec(vcpu_count=1, memory_mib=GUEST_MEMORY_MIB, disk_gib=1),
            ),
            flavor_pb2.Flavor,
            system=True,
        )
        network = await client.mutate(
            network_service_pb2_grpc.NetworkServiceStub(channel).CreateNetwork,
            network_service_pb2.CreateNetworkRequest(name="bench", spec=network_pb2.NetworkSpec()),
            network_pb2.Network,
        )
        await client.mutate(
            subnet_service_pb2_grpc.SubnetServiceStub(channel).CreateSubnet,
            subnet_service_pb2.CreateSubnetRequest(
                name="bench",
                spec=subnet_pb2.SubnetSpec(network_id=network.metadata.id, cidr="10.10.0.0/24"),
            ),
            subnet_pb2.Subnet,
        )
        image_id = await images.make(client, "bench", bytes(IMAGE_BYTES))
        self._spec = instance_pb2.InstanceSpec(
            flavor_id=flavor.metadata.id,
            image_id=image_id,
            nics=[instance_pb2.InstanceNic(network_id=network.metadata.id)],
        )

    async def boot(self, name: str) -> tuple[instance_pb2.Instance, Boot]:
        """Make an instance and wait until it is ACTIVE."""
        request = instance_service_pb2.CreateInstanceRequest(
            request_id=ids.request_id(), name=name, spec=self._spec
        )
        sent = time.perf_counter()
        operation = await self._client.call(self._stub.CreateInstance, request)
        accepted = time.perf_counter() - sent
        operation = await self._client.ended(operation)
        total = time.perf_counter() - sent
        instance = instance_pb2.Instance()
        operation.response.Unpack(instance)
        if instance.status.state != instance_pb2.InstanceStatus.STATE_ACTIVE:
            raise RuntimeError(f"{name} is not ACTIVE: {instance.status}")
        return instance, Boot(accepted, total, _steps_of(operation))

    async def delete(self, instance: instance_pb2.Instance) -> None:
        """Delete one, and wait until its host has removed it."""
        request = instance_service_pb2.DeleteInstanceRequest(id=instance.metadata.id)
        await self._client.mutate(self._stub.DeleteInstance, request, instance_pb2.Instance)


def _steps_of(operation: operation_pb2.Operation) -> dict[tuple[int, str], tuple[float, float]]:
    rows = [step for step in operation.steps if step.number > 1]  # 1 was the client's login
    begin = min(row.start_time.ToMicroseconds() for row in rows)
    return {
        (row.number, row.name): (
            (row.start_time.ToMicroseconds() - begin) / 1e6,
            (row.end_time.ToMicroseconds() - row.start_time.ToMicroseconds()) / 1e6,
        )
        for row in rows
    }


class Bare:
    """The same domain, again and again, by libvirt alone."""

    def __init__(self, host: Host, model: str) -> None:
        import libvirt  # only hosts have it

        libvirt.registerErrorHandler(lambda _context, _error: None, None)  # they are raised as well
        self._connection = libvirt.open(host.uri)
        self._library = host.library
        definitions = (
            domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
            for domain in self._connection.listAllDomains()
        )
        (self._model,) = (text for text in definitions if f"<title>{model}</title>" in text)
        self._number = 0
        self._domain: Any = None

    def define_and_start(self) -> float:
        """Make the next one; return how long libvirt took, in seconds."""
        text = self._next()
        start = time.perf_counter()
        self._domain = self._connection.defineXML(text)
        self._domain.create()
        return time.perf_counter() - start

    def remove(self) -> None:
        """Remove it."""
        self._domain.destroy()
        self._domain.undefine()

    def _next(self) -> str:
        """Return the definition of the next one, whose disk is there."""
        self._number += 1
        name = f"bare-{self._number}"
        root = ElementTree.fromstring(self._model)
        _find(root, "name").text = name
        _find(root, "uuid").text = new = str(uuid.uuid4())
        for entry in root.iterfind("sysinfo//entry[@name='uuid']"):
            entry.text = new
        root.remove(_find(root, "metadata"))  # it says that the domain is mcloud's
        nic = _find(root, "devices/interface")
        _find(nic, "mac").set("address", f"52:54:00:00:00:{self._number % 256:02x}")
        _find(nic, "target").set("dev", f"bare{self._number}")
        for log in root.iterfind("devices//log"):
            log.set("file", f"/var/lib/mcloud/{name}.log")
        disk = _find(root, "devices/disk")
        _find(disk, "source").set("file", f"/var/lib/mcloud/{name}.qcow2")
        base = _find(disk, "backingStore/source").get("file", "")
        base_format = _find(disk, "backingStore/format").get("type", "")
        # Unsafe is only that the base is not looked at: its path is the host's.
        overlay = str(self._library / f"{name}.qcow2")
        command = ["qemu-img", "create", "-q", "-f", "qcow2", "-u", "-b", base, "-F", base_format]
        subprocess.run([*command, overlay, "1G"], check=True)
        return ElementTree.tostring(root, encoding="unicode")


def _find(root: ElementTree.Element, path: str) -> ElementTree.Element:
    element = root.find(path)
    assert element is not None, f"the definition has no {path}"
    return element


async def _until_host_is_up(client: Client) -> None:
    stub = host_service_pb2_grpc.HostServiceStub(client.channel)
    async with asyncio.timeout(HOST_UP_S):
        while True:
            request = host_service_pb2.ListHostsRequest()
            answer = await client.call(stub.ListHosts, request, system=True)
            for host in answer.hosts:
                if (
                    host.status.state == host_pb2.HostStatus.STATE_UP
                    and host.status.total.vcpu_count
                ):
                    return
            await asyncio.sleep(0.1)


def _steps_table(boots: list[Boot]) -> str:
    """Return where the time between request and running went."""
    starts, lengths = defaultdict(list), defaultdict(list)
    for boot in boots:
        for step, (start, took) in boot.steps.items():
            starts[step].append(start * 1000)
            lengths[step].append(took * 1000)
    rows = [("#", "STEP", "START", "TOOK", "SPREAD")]
    for number, name in sorted(starts):
        took = lengths[number, name]
        rows.append(
            (
                str(number),
                name,
                f"{statistics.median(starts[number, name]):.1f} ms",
                f"{statistics.median(took):.1f} ms",
                f"±{report.spread(took) / 2:.1f}",
            )
        )
    return report.aligned(rows)
