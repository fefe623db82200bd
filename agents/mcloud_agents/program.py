"""mcloud-agent's parts, put together: what runs on one host for as long as the agent does."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from importlib import metadata

import structlog

from mcloud.common.v1 import session_pb2
from mcloud.conductor.v1 import domain_service_pb2_grpc
from mcloud.network.v1 import session_service_pb2_grpc as network_grpc
from mcloud.scheduler.v1 import placement_pb2, placement_service_pb2, placement_service_pb2_grpc
from mcloud.volume.v1 import session_service_pb2_grpc as volume_grpc
from mcloud_agents import enrolment, handlers
from mcloud_agents.compute import agent as compute
from mcloud_agents.compute import host, services, threaded_driver, workflow
from mcloud_agents.compute.libvirt_driver import LibvirtDriver
from mcloud_agents.enrolment import Files
from mcloud_agents.link import Links
from mcloud_agents.network import dataplane
from mcloud_agents.network import settings as network_settings
from mcloud_agents.report import HostReport
from mcloud_agents.session import Handler, HostSession, Stream
from mcloud_agents.settings import Settings
from mcloud_agents.state import State
from mcloud_agents.volume import host as volume
from mcloud_base import errors, tls

log = structlog.get_logger()


async def run(
    settings: Settings,
    files: Files,
    state: State,
    stop: asyncio.Event,
    *,
    probe: workflow.Probe = workflow.no_probe,
) -> None:
    """Run the agent until `stop` is set. Guests, their networks and volumes outlive it.

    Args:
        probe: called around each step of the work on a domain; for tests of failure.

    Raises:
        WrongState: NOT_ENROLLED, AGENT_RUNNING.
    """
    known = files.load()
    if known is None:
        raise errors.WrongState(
            "NOT_ENROLLED", "this machine is not a host yet; first: mcloud-agent enrol"
        )
    identity, membership = known
    state.lock()
    try:
        files.publish(identity)
        async with AsyncExitStack() as stack:
            program = _Program(settings, files, state, identity, membership, probe)
            stack.push_async_callback(program.close)
            await program.start()
            await program.work(stop)
    finally:
        state.unlock()
    log.info("agent ends; guests run on")


class _Program:
    def __init__(
        self,
        settings: Settings,
        files: Files,
        state: State,
        identity: tls.Identity,
        membership: enrolment.Membership,
        probe: workflow.Probe,
    ) -> None:
        self._settings = settings
        self._probe = probe
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
        )
        self._dataplane = dataplane.Dataplane(
            network_settings.Settings(
                underlay_ip=settings.underlay_ip,
                underlay_device=settings.underlay_device,
                physical_networks=settings.physical_networks,
                state_dir=settings.state_dir / "network",
                runtime_dir=settings.run_dir / "network",
            ),
            self._documents,
        )
        network = handlers.DataplaneHandler(self._dataplane)
        self._compute = self._make_compute(network)
        self._volumes = self._make_volumes() if settings.storage_enabled else None
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
        self._changes = handlers.StateChanges(self._domains.report, self._report.changed)

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

    def _make_compute(self, network: services.Dataplane) -> compute.ComputeAgent:
        settings, state_dir = self._settings, self._settings.state_dir / "compute"
        driver = LibvirtDriver(
            threaded_driver.Settings(
                instances_dir=state_dir / "instances",
                uri=settings.libvirt_uri,
                hypervisor_type=settings.hypervisor,
            )
        )
        return compute.ComputeAgent(
            compute.Settings(
                host_name=settings.name,
                state_dir=state_dir,
                cache_limit_bytes=settings.image_cache_gib << 30,
                physical_bridges=settings.physical_networks,
            ),
            driver,
            conductor=services.GrpcConductor(self._links.to("conductor")),
            images=services.GrpcImages(self._links.to("image")),
            ports=services.GrpcPorts(self._links.to("network")),
            attachments=services.GrpcAttachments(self._links.to("volume")),
            dataplane=network,
            report=lambda observed: self._changes.report(observed),
            probe=self._probe,
        )

    def _make_volumes(self) -> volume.VolumeHost:
        return volume.VolumeHost(
            volume.Settings(
                directory=self._settings.state_dir / "volumes",
                run_dir=self._settings.run_dir / "volumes",
                pki_dir=self._settings.pki_dir,
                address=self._settings.underlay_ip,
                port_first=self._settings.nbd_port_first,
                port_last=self._settings.nbd_port_last,
            )
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
        report = handlers.host_report(facts, reserved, await self._compute.observe_all())
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
