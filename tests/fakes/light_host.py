"""A host without a hypervisor: the agent's own parts over a driver in memory, no packets.

The compute part is the real one, with its sessions, image cache, records and reports. The network
is a document that is kept, volumes are entries in a dictionary.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fakes.driver import FakeDriver
from mcloud.common.v1 import session_pb2
from mcloud.conductor.v1 import domain_service_pb2_grpc
from mcloud.network.v1 import dataplane_pb2
from mcloud.network.v1 import session_service_pb2_grpc as network_grpc
from mcloud.scheduler.v1 import placement_pb2, placement_service_pb2, placement_service_pb2_grpc
from mcloud.volume.v1 import export_pb2
from mcloud.volume.v1 import session_service_pb2_grpc as volume_grpc
from mcloud_agents import handlers
from mcloud_agents.compute import agent as compute
from mcloud_agents.compute import services, workflow
from mcloud_agents.link import Links
from mcloud_agents.network.dataplane import InPlace
from mcloud_agents.report import HostReport
from mcloud_agents.session import Handler, HostSession, Limits
from mcloud_base import tls

_HELLO = {"boot_id": "light", "agent_version": "test", "underlay_ip": "127.0.0.1"}


class Gate:
    """The probe of the host's steps: keeps the guest that it is told to from being started."""

    def __init__(self) -> None:
        self.shut = False
        self.reached, self.open = asyncio.Event(), asyncio.Event()

    async def __call__(self, step: str, moment: str) -> None:
        if self.shut and (step, moment) == ("16", "before"):
            self.reached.set()
            await self.open.wait()


class LightHost:
    """Use `async with`.

    Args:
        endpoint: the control plane's internal port.
        identity: a host's certificate, of `host_id`.
        probe: of the compute part's steps.
    """

    def __init__(
        self,
        directory: Path,
        endpoint: str,
        identity: tls.Identity,
        host_id: str,
        *,
        name: str = "light",
        probe: workflow.Probe = workflow.no_probe,
    ) -> None:
        self.id = host_id
        self.name = name
        self.directory = directory
        self.dataplane = LightDataplane()
        self.volumes = LightVolumes()
        self.links = Links(endpoint, {}, identity)
        # libvirt's test driver cannot attach a disk to a guest that runs.
        self.driver = FakeDriver()
        self.ports = RememberedPorts(services.GrpcPorts(self.links.to("network")))
        self.attachments = RememberedAttachments(services.GrpcAttachments(self.links.to("volume")))
        network = handlers.DataplaneHandler(self.dataplane)
        self.agent = compute.ComputeAgent(
            compute.Settings(name, directory / "compute", longest_pause_s=0.5),
            self.driver,
            conductor=services.GrpcConductor(self.links.to("conductor")),
            images=services.GrpcImages(self.links.to("image")),
            ports=self.ports,
            attachments=self.attachments,
            dataplane=network,
            report=lambda observed: self.domains.report(observed),
            probe=probe,
        )
        conductor = domain_service_pb2_grpc.SessionServiceStub(self.links.to("conductor"))
        networks = network_grpc.SessionServiceStub(self.links.to("network"))
        storage = volume_grpc.SessionServiceStub(self.links.to("volume"))
        whole = handlers.WholeHost(self.agent, [network, self.volumes])
        self.domains = _session("conductor", conductor, whole)
        self.sessions = [
            self.domains,
            _session("network", networks, network),
            _session("volume", storage, self.volumes, "storage"),
        ]
        reports = placement_service_pb2_grpc.HostReportServiceStub(self.links.to("scheduler"))
        self._report = HostReport(lambda: reports.ReportHost(None), self._look, 2.0)
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> LightHost:
        await self.agent.start()
        self._tasks = [asyncio.create_task(each.run()) for each in (*self.sessions, self._report)]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._end()
        await self.agent.close()
        await self.links.close()

    async def _end(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def inventory(self, domains: Sequence[Any]) -> set[str]:
        """Return everything that guests have left here, a line each; `domains` as listed."""
        found = {f"host domain {domain.name}" for domain in domains}
        instances = self.directory / "compute" / "instances"
        found |= {f"host file {path.relative_to(instances)}" for path in instances.rglob("*")}
        found |= {f"host port {port.port_id}" for port in self.dataplane.document.ports}
        for id_, volume in self.volumes.stored.items():
            found.add(f"host volume {id_}")
            found |= {f"host export {id_} {client.attachment_id}" for client in volume.clients}
        return found

    async def _look(self) -> placement_service_pb2.ReportHostRequest:
        facts = await self.agent.host_facts()
        reserved = placement_pb2.Resources()
        report = handlers.host_report(facts, reserved, self.agent.states())
        report.incarnation, report.name, report.underlay_ip = 1, self.name, "127.0.0.1"
        report.total.vcpu_count = 64
        return report


class RememberedPorts:
    """Ports at the end of a channel, and every call: a test makes one again, late."""

    def __init__(self, ports: services.GrpcPorts) -> None:
        self._ports = ports
        self.calls: list[tuple[Any, ...]] = []

    async def bind(self, *call: Any) -> Any:
        self.calls.append(call)
        return await self._ports.bind(*call)


class RememberedAttachments:
    """The same for attachments."""

    def __init__(self, attachments: services.GrpcAttachments) -> None:
        self._attachments = attachments
        self.calls: list[tuple[Any, ...]] = []

    async def connect(self, *call: Any) -> Any:
        self.calls.append(call)
        return await self._attachments.connect(*call)


class LightDataplane:
    """Has at once what the document says."""

    def __init__(self) -> None:
        self.document = dataplane_pb2.HostDataplane()

    async def apply(
        self, desired: dataplane_pb2.HostDataplane, in_place: InPlace
    ) -> dataplane_pb2.HostDataplaneStatus:
        self.document = desired
        await in_place([port.port_id for port in desired.ports])
        return dataplane_pb2.HostDataplaneStatus()

    async def artifacts(self) -> list[session_pb2.Artifact]:
        return [
            session_pb2.Artifact(
                kind=session_pb2.Artifact.KIND_TAP, name=port.device_name, owner_id=port.port_id
            )
            for port in self.document.ports
        ]


class LightVolumes:
    """Stores and serves at once what is desired; remembers who was ever let in."""

    def __init__(self) -> None:
        self.stored: dict[str, export_pb2.VolumeDesired] = {}

    async def apply(self, desired: session_pb2.Desired) -> session_pb2.Observed:
        observed = session_pb2.Observed(
            id=desired.id, epoch=desired.epoch, generation=desired.generation
        )
        if desired.absent:
            self.stored.pop(desired.id, None)
            observed.absent = True
            return observed
        spec = export_pb2.VolumeDesired()
        assert desired.spec.Unpack(spec)
        self.stored[desired.id] = spec
        status = export_pb2.VolumeOnHost(allocated_bytes=4096)
        for client in spec.clients:
            status.endpoints.add(
                attachment_id=client.attachment_id,
                address="127.0.0.1",
                port=10809,
                export_name=client.attachment_id,
            )
        observed.status.Pack(status)
        return observed

    async def observe_all(self) -> list[session_pb2.Observed]:
        return []

    async def artifacts(self) -> list[session_pb2.Artifact]:
        kinds = session_pb2.Artifact
        found = [(kinds.KIND_VOLUME, id_) for id_ in self.stored]
        found += [(kinds.KIND_EXPORT, id_) for id_, each in self.stored.items() if each.clients]
        return [kinds(kind=kind, name=id_, owner_id=id_) for kind, id_ in found]


def _session(name: str, stub: Any, handler: Handler, *capabilities: str) -> HostSession:
    hello = session_pb2.Hello(incarnation=1, capabilities=capabilities, **_HELLO)
    # What could not be done is tried again soon: tests make it fail on purpose.
    limits = Limits(first_retry_s=0.1, longest_retry_s=1.0)
    return HostSession(name, lambda: stub.OpenSession(None), handler, hello, limits=limits)
