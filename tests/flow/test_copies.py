"""Two copies of the control plane share everything; either may be killed at any time."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from conftest import Cloud
from fixtures_postgresql import postgresql_server, postgresql_url  # noqa: F401
from flow.copies import Copies, running_copies
from mcloud.common.v1 import metadata_pb2
from mcloud.network.v1 import network_pb2, network_service_pb2, network_service_pb2_grpc
from mcloud_base import errors, ids, rpc

_DEADLINE_S = 120
_COUNT = 60  # networks that are made while copies are killed
_KILLS = 4


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def database_url(request: pytest.FixtureRequest) -> str:
    if request.param == "sqlite":
        return "sqlite"
    return str(request.getfixturevalue("postgresql_url"))


@pytest.fixture
async def plane(
    tmp_path: Path, free_ports: Callable[[int], list[int]], database_url: str
) -> AsyncIterator[tuple[Copies, Cloud]]:
    async with running_copies(tmp_path, free_ports, database_url) as running:
        yield running


async def test_users_see_at_most_a_call_that_is_repeated(plane: tuple[Copies, Cloud]) -> None:
    copies, cloud = plane
    networks = network_service_pb2_grpc.NetworkServiceStub(cloud.channel)
    who = rpc.bearer(await cloud.token())
    first = await networks.ListNetworks(
        network_service_pb2.ListNetworksRequest(), metadata=who, timeout=30
    )
    seen: Counter[str] = Counter()
    watching = asyncio.create_task(_watch(networks, who, first.revision, seen))

    async def make(name: str) -> None:
        request = network_service_pb2.CreateNetworkRequest(
            request_id=ids.request_id(), name=name, spec=network_pb2.NetworkSpec()
        )
        await rpc.call(networks.CreateNetwork, request, metadata=who, timeout_s=_DEADLINE_S)

    async def make_some(turn: int, begun: asyncio.Event) -> None:
        for number in range(_COUNT // _KILLS):
            await make(f"net-{turn}-{number}")
            begun.set()

    async def replace(number: int, begun: asyncio.Event) -> None:
        await begun.wait()
        copies.kill(number)
        copies.start(number)
        await copies.serves(number)

    for turn in range(_KILLS):
        begun = asyncio.Event()
        async with asyncio.timeout(_DEADLINE_S), asyncio.TaskGroup() as group:
            group.create_task(make_some(turn, begun))
            group.create_task(replace(turn % 2, begun))

    names = {f"net-{turn}-{number}" for turn in range(_KILLS) for number in range(_COUNT // _KILLS)}
    async with asyncio.timeout(_DEADLINE_S):
        while set(seen) != names:
            await asyncio.wait({watching}, timeout=0.1)
            assert not watching.done(), watching.exception()
    watching.cancel()
    assert set(seen.values()) == {1}  # neither lost nor told twice
    listed = []
    token = ""
    while True:
        page = await networks.ListNetworks(
            network_service_pb2.ListNetworksRequest(page_token=token), metadata=who, timeout=30
        )
        listed += [network.metadata.name for network in page.networks]
        if not (token := page.next_page_token):
            break
    assert sorted(listed) == sorted(names)


async def _watch(
    networks: network_service_pb2_grpc.NetworkServiceStub,
    who: rpc.Metadata,
    revision: str,
    seen: Counter[str],
) -> None:
    """Count what is told of networks, going on elsewhere from the last revision."""
    while True:
        request = network_service_pb2.WatchNetworksRequest(from_revision=revision)
        try:
            async for change in rpc.received(networks.WatchNetworks(request, metadata=who)):
                if change.type == metadata_pb2.CHANGE_TYPE_ADDED:
                    seen[change.network.metadata.name] += 1
                revision = change.revision
        except errors.Unavailable:
            continue
