"""mcloud-agent's parts, as they are on a real host; they run for as long as the program does."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import structlog

from mcloud_agents.agent import Agent, Documents, Parts
from mcloud_agents.compute import threaded_driver, workflow
from mcloud_agents.compute.libvirt_driver import LibvirtDriver
from mcloud_agents.enrolment import Files
from mcloud_agents.network import dataplane
from mcloud_agents.network import settings as network_settings
from mcloud_agents.settings import Settings
from mcloud_agents.state import State
from mcloud_agents.volume import host as volume
from mcloud_base import errors

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
            agent = Agent(settings, files, state, identity, membership, _parts(settings, probe))
            stack.push_async_callback(agent.close)
            await agent.start()
            await agent.work(stop)
    finally:
        state.unlock()
    log.info("agent ends; guests run on")


def _parts(settings: Settings, probe: workflow.Probe) -> Parts:
    driver = LibvirtDriver(
        threaded_driver.Settings(
            instances_dir=settings.state_dir / "compute" / "instances",
            uri=settings.libvirt_uri,
            hypervisor_type=settings.hypervisor,
        )
    )
    volumes = _volumes(settings) if settings.storage_enabled else None

    def network(documents: Documents) -> dataplane.Dataplane:
        return dataplane.Dataplane(
            network_settings.Settings(
                underlay_ip=settings.underlay_ip,
                underlay_device=settings.underlay_device,
                physical_networks=settings.physical_networks,
                state_dir=settings.state_dir / "network",
                runtime_dir=settings.run_dir / "network",
            ),
            documents,
        )

    return Parts(driver, network, volumes, probe=probe)


def _volumes(settings: Settings) -> volume.VolumeHost:
    return volume.VolumeHost(
        volume.Settings(
            directory=settings.state_dir / "volumes",
            run_dir=settings.run_dir / "volumes",
            pki_dir=settings.pki_dir,
            address=settings.underlay_ip,
            port_first=settings.nbd_port_first,
            port_last=settings.nbd_port_last,
        )
    )
