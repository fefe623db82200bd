"""`mcloud-agent simulate`: thousands of hosts in one process, over the real contract."""

from __future__ import annotations

import asyncio
import gc
import resource
from collections.abc import Callable

import structlog

from mcloud_agents.simulate import keep
from mcloud_agents.simulate.administrator import Administrator, Login
from mcloud_agents.simulate.host import Host
from mcloud_agents.simulate.hypervisor import GUEST
from mcloud_agents.simulate.settings import Settings
from mcloud_agents.simulate.state_file import StateFile
from mcloud_agents.simulate.tally import Tally

log = structlog.get_logger()

ENROLLING_AT_ONCE = 8
CONNECTING_AT_ONCE = 16
_FILES_BESIDE_CONNECTIONS = 200
# Objects made between two collections: those of thousands of hosts stay, and are many to look at.
_COLLECTIONS = (50_000, 20, 50)

# Is told how many hosts of how many are connected.
Progress = Callable[[int, int], object]


async def run(
    settings: Settings, login: Login, stop: asyncio.Event, progress: Progress
) -> dict[str, object]:
    """Play hosts until `stop` is set; return what they have done.

    Raises:
        WrongState: SIMULATOR_RUNNING, SIMULATOR_STATE_UNKNOWN.
        errors.Error: a host could not be enrolled.
    """
    gc.set_threshold(*_COLLECTIONS)
    _allow_files(settings.host_count + _FILES_BESIDE_CONNECTIONS)
    file = StateFile(settings.state_dir)
    try:
        tally = Tally()
        hosts = [
            Host(settings, file, number, tally) for number in range(1, settings.host_count + 1)
        ]
        async with Administrator(login) as administrator:
            await _play(hosts, administrator, stop, progress)
        started = sum(host.hypervisor.started_count for host in hosts)
        removed = sum(host.hypervisor.removed_count for host in hosts)
        return {
            "hosts": len(hosts),
            "domains": file.count(GUEST),
            "domains_started": started,
            "domains_removed": removed,
            **tally.summary(),
        }
    finally:
        file.close()


async def _play(
    hosts: list[Host], administrator: Administrator, stop: asyncio.Event, progress: Progress
) -> None:
    enrolling = asyncio.Semaphore(ENROLLING_AT_ONCE)
    connecting = asyncio.Semaphore(CONNECTING_AT_ONCE)
    connected = 0

    def opened() -> None:
        nonlocal connected
        connected += 1
        progress(connected, len(hosts))

    async def live(host: Host) -> None:
        async with enrolling:
            await host.enrol(administrator.join_token)
        await host.run(connecting, opened)

    tasks = [asyncio.create_task(live(host)) for host in hosts]
    stopping = asyncio.create_task(stop.wait())
    try:
        # The first that ends has failed: hosts live for ever.
        await asyncio.wait({stopping, *tasks}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (stopping, *tasks):
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
    for result in results:
        if isinstance(result, Exception):
            raise result


async def remove(settings: Settings, login: Login) -> tuple[int, int]:
    """Remove every host of the state from the control plane, and from the state.

    Returns:
        How many are gone, and how many carry domains still: they are disabled and stay known.

    Raises:
        WrongState: SIMULATOR_RUNNING, SIMULATOR_STATE_UNKNOWN.
    """
    file = StateFile(settings.state_dir)
    try:
        removing = asyncio.Semaphore(ENROLLING_AT_ONCE)
        async with Administrator(login) as administrator:

            async def remove_one(number: int) -> bool:
                async with removing:
                    known = keep.Keep(file, number).load()
                    if known and not await administrator.delete_host(known[1].host_id):
                        return False
                    file.forget(number)
                    return True

            async with asyncio.TaskGroup() as group:
                numbers = file.hosts(keep.IDENTITY)
                tasks = [group.create_task(remove_one(number)) for number in numbers]
        gone = sum(task.result() for task in tasks)
        return gone, len(tasks) - gone
    finally:
        file.close()


def _allow_files(count: int) -> None:
    """Have room for so many open files, as far as the machine's administrator allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    if wanted < count:
        log.warning("too few open files are allowed", allowed=wanted, wanted=count)
