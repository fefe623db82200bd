"""What a host's compute part asks, in memory: conductor, images, ports, attachments, dataplane."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Collection
from dataclasses import dataclass, field

from mcloud.common.v1 import operation_pb2, session_pb2
from mcloud.conductor.v1 import domain_pb2
from mcloud.image.v1 import image_pb2
from mcloud.network.v1 import dataplane_pb2, port_service_pb2
from mcloud.volume.v1 import attachment_pb2, attachment_service_pb2
from mcloud_agents.compute.services import Collect
from mcloud_base.errors import NotFound, PermissionDenied, Unavailable

TOKEN = "delegated-secret"  # noqa: S105 (nobody's)


def step(number: int, service: str) -> operation_pb2.OperationStep:
    """A row as a service returns it."""
    row = operation_pb2.OperationStep(
        number=number, name="authorize, answer", service=service, attempt=1,
        state=operation_pb2.OperationStep.STATE_DONE,
    )  # fmt: skip
    row.start_time.GetCurrentTime()
    row.end_time.GetCurrentTime()
    return row


@dataclass
class Gate:
    """Where a test can stop a caller, and make it fail."""

    errors: list[Exception] = field(default_factory=list)
    open: asyncio.Event = field(default_factory=asyncio.Event)
    waiting: asyncio.Event = field(default_factory=asyncio.Event)
    calls: int = 0

    def __post_init__(self) -> None:
        self.open.set()

    async def passed(self) -> None:
        self.calls += 1
        self.waiting.set()
        await self.open.wait()
        if self.errors:
            raise self.errors.pop(0)


class FakeConductor:
    """A Conductor."""

    def __init__(self) -> None:
        self.specs: dict[str, domain_pb2.DomainSpec] = {}
        self.gate = Gate()

    async def get_domain_spec(
        self, domain_id: str, epoch: str, collect: Collect
    ) -> domain_pb2.DomainSpec:
        await self.gate.passed()
        if domain_id not in self.specs:
            raise NotFound("DOMAIN_NOT_FOUND", domain_id)
        answer = domain_pb2.DomainSpec()
        answer.CopyFrom(self.specs[domain_id])
        answer.delegated_token = TOKEN
        answer.epoch = epoch
        return answer


class FakeImages:
    """Images, one of them."""

    def __init__(self, content: bytes, chunk: int = 1 << 16) -> None:
        self.content = content
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.chunk = chunk
        self.gate = Gate()
        self.offsets: list[int] = []
        self.break_at: int | None = None

    async def get(self, image_id: str, token: str, collect: Collect) -> image_pb2.Image:
        _check(token)
        await self.gate.passed()
        return image_pb2.Image(
            spec=image_pb2.ImageSpec(disk_format=image_pb2.DISK_FORMAT_QCOW2),
            status=image_pb2.ImageStatus(
                state=image_pb2.ImageStatus.STATE_ACTIVE,
                size_bytes=len(self.content),
                sha256=self.sha256,
            ),
        )

    async def download(
        self, image_id: str, token: str, offset: int, collect: Collect
    ) -> AsyncIterator[bytes]:
        _check(token)
        self.offsets.append(offset)
        while offset < len(self.content):
            if self.break_at is not None and offset >= self.break_at:
                self.break_at = None
                raise Unavailable("STREAM_BROKEN", "the image service went away")
            chunk = self.content[offset : offset + self.chunk]
            yield chunk
            offset += len(chunk)
        collect(step(11, "image"))


class FakePorts:
    """Ports on a network, and the dataplane that they get into."""

    def __init__(self) -> None:
        self.gate = Gate()
        self.waited: list[int] = []

    async def bind(
        self, port_id: str, domain_id: str, generation: int, token: str, collect: Collect
    ) -> port_service_pb2.BindPortResponse:
        _check(token)
        await self.gate.passed()
        collect(step(13, "network"))
        number = int(port_id[-2:])
        return port_service_pb2.BindPortResponse(
            binding=dataplane_pb2.PortBinding(
                port_id=port_id,
                network_id="net-1",
                domain_id=domain_id,
                mac=f"fa:16:3e:00:00:{number:02x}",
                device_name=f"tap{number:08}",
                fixed_ips=[
                    dataplane_pb2.FixedIp(
                        subnet_id="sub-1", ip_address=f"10.0.0.{number}", prefix_len=24
                    )
                ],
            ),
            network=dataplane_pb2.NetworkSegment(
                network_id="net-1",
                vni=101,
                mtu=1450,
                subnets=[
                    dataplane_pb2.SubnetBinding(
                        subnet_id="sub-1",
                        cidr="10.0.0.0/24",
                        gateway_ip="10.0.0.254",
                        dhcp_enabled=True,
                        dns_servers=["9.9.9.9"],
                    )  # fmt: skip
                ],
            ),
            dataplane_generation=40 + number,
        )

    async def wait_ports(
        self, port_ids: Collection[str], generation: int, deadline_s: float
    ) -> None:
        self.waited.append(generation)


class FakeAttachments:
    """Attachments."""

    def __init__(self, address: str = "10.99.0.1") -> None:
        self.gate = Gate()
        self.address = address

    async def connect(
        self, attachment_id: str, domain_id: str, generation: int, token: str, collect: Collect
    ) -> attachment_service_pb2.ConnectAttachmentResponse:
        _check(token)
        await self.gate.passed()
        collect(step(15, "volume"))
        return attachment_service_pb2.ConnectAttachmentResponse(
            nbd=attachment_pb2.NbdConnection(
                address=self.address, port=10809, export_name=attachment_id, size_bytes=1 << 30
            )
        )


class Reports:
    """What the control plane was told, to wait for."""

    def __init__(self) -> None:
        self.all: list[session_pb2.Observed] = []
        self._more = asyncio.Event()

    def __call__(self, observed: session_pb2.Observed) -> None:
        self.all.append(observed)
        self._more.set()

    async def until(
        self, wanted: Callable[[session_pb2.Observed, domain_pb2.DomainStatus], bool]
    ) -> tuple[session_pb2.Observed, domain_pb2.DomainStatus]:
        """Wait for a report from now on, or that was not waited for yet."""
        async with asyncio.timeout(60):
            while True:
                self._more.clear()
                while self.all:
                    observed = self.all.pop(0)
                    status = domain_pb2.DomainStatus()
                    observed.status.Unpack(status)
                    if wanted(observed, status):
                        return observed, status
                await self._more.wait()


def _check(token: str) -> None:
    if token != TOKEN:
        raise PermissionDenied("NOT_DELEGATED", "no token")
