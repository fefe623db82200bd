"""The parts of an agent put together: what runs for one host, whatever its parts are made of."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Protocol

import structlog

from mcloud.common.v1 import session_pb2
from mcloud.conductor.v1 import domain_service_pb2_grpc
from mcloud.network.v1 import session_service_pb2_grpc as network_grpc
from mcloud.scheduler.v1 import placement_pb2, placement_service_pb2, placement_service_pb2_grpc
from mcloud.volume.v1 import session_service_pb2_grpc as volume_grpc
from mcloud_agents import enrolment, handlers
from mcloud_agents.compute import agent as compute
from mcloud_agents.compute import host, services, workflow
from mcloud_agents.compute.disks import Disks
from mcloud_agents.compute.driver import Driver
from mcloud_agents.compute.record import Records
from mcloud_agents.link import Links, Told
from mcloud_agents.report import HostReport
from mcloud_agents.session import Handler, HostSession, Stream
from mcloud_agents.settings import Settings
from mcloud_base import tls

log = structlog.get_logger()

# Metadata of the guest with a port, by their names; None if no such guest is here.
Documents = Callable[[str], Mapping[str, bytes] | None]


class State(Protocol):
    """What an agent keeps about itself."""

    def next_incarnation(self) -> int:
        """Return a number higher than at every start before; kept before it is returned."""

    def epoch(self, session: str) -> str:
        """Return the epoch that was last remembered for a session, or the empty string."""

    def remember_epoch(self, session: str, epoch: str) -> None:
        """Keep a session's epoch."""


class Dataplane(handlers.Dataplane, Protocol):
    """The host's network."""

    async def start(self) -> None:
        """Take over what is on the host."""

    async def close(self) -> None:
        """Let go of it; touch nothing."""


class Volumes(Handler, Protocol):
    """The host's volumes."""

    async def start(self) -> None:
        """Take over what is on the host."""

    async def close(self) -> None:
        """Let go of it; touch nothing."""


@dataclass(frozen=True)
class Parts:
    """What an agent works with on its host.

    `disks` and `records` are in the settings' directory if not given; `told` is told of each call.
    """

    driver: Driver
    dataplane: Callable[[Documents], Dataplane]
    volumes: Volumes | None  # None: it stores none
    disks: Disks | None = None
    records: Records | None = None
    probe: workflow.Probe = workflow.no_probe
    told: Told | None = None


class Agent:
    """One host's agent, once it is enrolled."""

    def __init__(
        self,
        settings: Settings,
        files: enrolment.Keep,
        state: State,
        identity: tls.Identity,
        membership: enrolment.Membership,
        parts: Parts,
    ) -> None:
        self._settings = settings
        self._files = files
        self._state = state
        self._identity = identity
        self._host_id = membership.host_id
        self._incarnation = state.next_incarnation()
        self._version = _version()
        self._links = Links(
            settings.internal_endpoint or membership.internal_endpoint,
            settings.internal_endpoints,
            identity,
            parts.told,
        )
        self._dataplane = parts.dataplane(self._documents)
        network = handlers.DataplaneHandler(self._dataplane)
        self._compute = self._make_compute(network, parts)
        self._volumes = parts.volumes
        others: list[Handler] = [network]
        if self._volumes is not None:
            others.append(self._volumes)
        conductor = domain_service_pb2_grpc.SessionServiceStub(self._links.to("conductor"))
        self._domains = self._session(
            "conductor",
            lambda: conductor.OpenSession(None),
            handlers.WholeHost(self._compute, others),
        )
        networks = network_grpc.SessionServiceStub(self._links.to("network"))
        self._sessions = [
            self._domains,
            self._session("network", lambda: networks.OpenSession(None), network),
        ]
        if self._volumes is not None:
            volumes = volume_grpc.SessionServiceStub(self._links.to("volume"))
            self._sessions.append(
                self._session("volume", lambda: volumes.OpenSession(None), self._volumes)
            )
        reports = placement_service_pb2_grpc.HostReportServiceStub(self._links.to("scheduler"))
        self._report = HostReport(
            lambda: reports.ReportHost(None), self._look, settings.report_interval_s
        )

    async def start(self) -> None:
        """Take over what is on the host: first what guests need, then the guests."""
        if self._volumes is not None:
            await self._volumes.start()
        await self._dataplane.start()
        await self._compute.start()
        log.info("agent started", host=self._host_id, incarnation=self._incarnation)

    async def work(self, stop: asyncio.Event) -> None:
        """Serve the control plane until told to stop; a fault in any of these ends the program."""
        stopping = asyncio.create_task(stop.wait())
        tasks = [asyncio.create_task(session.run()) for session in self._sessions]
        tasks.append(asyncio.create_task(self._report.run()))
        tasks.append(asyncio.create_task(self._keep_certificate()))
        try:
            await asyncio.wait({stopping, *tasks}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (stopping, *tasks):
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
        for result in results:
            if isinstance(result, Exception):
                raise result

    async def close(self) -> None:
        """Let go of the host; touch nothing on it."""
        await self._compute.close()
        await self._dataplane.close()
        if self._volumes is not None:
            await self._volumes.close()
        await self._links.close()

    async def opened(self) -> None:
        """Return once every session has been opened and the scheduler knows the host."""
        for session in self._sessions:
            await session.opened.wait()
        await self._report.stored.wait()

    def reconnect(self) -> None:
        """Leave every connection and open others, as after a break of the network."""
        self._use(self._identity)

    def _make_compute(self, network: services.Dataplane, parts: Parts) -> compute.ComputeAgent:
        settings = self._settings
        return compute.ComputeAgent(
            compute.Settings(
                host_name=settings.name,
                state_dir=settings.state_dir / "compute",
                cache_limit_bytes=settings.image_cache_gib << 30,
                physical_bridges=settings.physical_networks,
            ),
            parts.driver,
            conductor=services.GrpcConductor(self._links.to("conductor")),
            images=services.GrpcImages(self._links.to("image")),
            ports=services.GrpcPorts(self._links.to("network")),
            attachments=services.GrpcAttachments(self._links.to("volume")),
            dataplane=network,
            report=lambda observed: self._domains.report(observed),
            disks=parts.disks,
            records=parts.records,
            probe=parts.probe,
        )

    def _session(
        self, name: str, open_stream: Callable[[], Stream], handler: Handler
    ) -> HostSession:
        hello = session_pb2.Hello(
            incarnation=self._incarnation,
            boot_id=host.boot_id(),
            agent_version=self._version,
            capabilities=["storage"] if self._settings.storage_enabled else [],
            epoch=self._state.epoch(name),
            underlay_ip=self._settings.underlay_ip,
        )
        return HostSession(
            name,
            open_stream,
            handler,
            hello,
            lambda epoch: self._state.remember_epoch(name, epoch),
        )

    async def _look(self) -> placement_service_pb2.ReportHostRequest:
        settings = self._settings
        reserved = placement_pb2.Resources(
            vcpu_count=settings.reserved_vcpu_count,
            memory_mib=settings.reserved_memory_mib,
            disk_gib=settings.reserved_disk_gib,
        )
        facts = await self._compute.host_facts()
        report = handlers.host_report(facts, reserved, self._compute.states())
        report.incarnation = self._incarnation
        report.name = settings.name
        report.agent_version = self._version
        report.underlay_ip = settings.underlay_ip
        return report

    async def _keep_certificate(self) -> None:
        await enrolment.keep_renewed(
            self._files,
            self._identity,
            self._settings.underlay_ip,
            lambda: self._links.to("identity"),
            self._use,
        )

    def _use(self, identity: tls.Identity) -> None:
        self._identity = identity
        self._links.renew(identity)
        for session in self._sessions:
            session.reconnect()
        self._report.reconnect()

    def _documents(self, port_id: str) -> Mapping[str, bytes] | None:
        return self._compute.documents(port_id)


def _version() -> str:
    try:
        return metadata.version("mcloud")
    except metadata.PackageNotFoundError:  # run from its sources
        return "0"
