"""The rules of server groups, over the scheduler's real channel."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import pytest

from mcloud.scheduler.v1 import placement_pb2
from mcloud_base import errors, ids
from service.compute.host import Host
from service.compute.server_groups import ServerGroups
from service.core.cloud import Client, Rule, refused
from service.core.keys import new_project
from service.scheduler.placement import Placement


class Zone:
    """Hosts of their own, each with room for 16, and server groups."""

    def __init__(self, placement: Placement, hosts: list[Host], groups: ServerGroups) -> None:
        self.placement = placement
        self.hosts = hosts
        self.groups = groups
        self.name = ""

    def request(self, group_id: str, **values: Any) -> Any:
        return self.placement.request(
            server_group_id=group_id, availability_zone=self.name, **values
        )

    async def place(self, group_id: str, count: int = 1, **values: Any) -> Counter[str]:
        """Ask for so many at once; return on which hosts they are."""
        requests = [self.request(group_id, **values) for _ in range(count)]
        answers = await asyncio.gather(*map(self.placement.select, requests))
        return Counter(answer.claim.host_id for answer in answers)

    async def refused(self, group_id: str, **values: Any) -> tuple[str, str]:
        """Return by which filter the last hosts were removed, and the error's text."""
        error = await refused(self.placement.select(self.request(group_id, **values)))
        assert (type(error), error.reason) == (errors.Exhausted, "NO_VALID_HOST")
        explanation = errors.find_detail(error, placement_pb2.PlacementExplanation)
        assert isinstance(explanation, placement_pb2.PlacementExplanation)
        return explanation.filters[-1].name, error.message


@pytest.fixture
async def zone(client: Client) -> AsyncIterator[Zone]:
    async with AsyncExitStack() as stack:
        placement = Placement(client)
        hosts = [await stack.enter_async_context(Host(client, new_project())) for _ in range(3)]
        project = new_project()
        who = await client.make_user(project, Rule.ROLE_MEMBER, project)
        made = Zone(placement, hosts, ServerGroups(client.public, who))
        made.name = await placement.zone(*hosts)
        yield made


async def test_anti_affinity_takes_no_host_twice(zone: Zone) -> None:
    group_id, other = [await zone.groups.make("ANTI_AFFINITY") for _ in range(2)]
    placed = await zone.place(group_id, 3)
    assert placed == dict.fromkeys((host.id for host in zone.hosts), 1)
    name, message = await zone.refused(group_id)
    assert name == "server_group"
    assert message.endswith(
        f"anti-affinity: 3 host(s) with room for it run 1 or more members of server group "
        f"{group_id} each"
    )
    assert (await zone.refused(group_id, dry_run=True))[0] == "server_group"
    assert len(await zone.place(other, 3)) == 3, "server groups do not know of each other"


async def test_so_many_of_a_server_group_may_share_a_host(zone: Zone) -> None:
    group_id = await zone.groups.make("ANTI_AFFINITY", most=2)
    assert list((await zone.place(group_id, 6)).values()) == [2, 2, 2]
    assert "run 2 or more members" in (await zone.refused(group_id))[1]


async def test_affinity_keeps_to_one_host_and_names_it(zone: Zone) -> None:
    group_id = await zone.groups.make("AFFINITY")
    placed = await zone.place(group_id, 12)
    assert list(placed.values()) == [12]
    assert await zone.place(group_id, 4) == {id_: 4 for id_ in placed}
    (host,) = (host for host in zone.hosts if host.id in placed)
    for values in ({}, {"excluded_host_ids": [host.id]}, {"vcpus": 2}):
        name, message = await zone.refused(group_id, **values)
        assert name == "server_group"
        assert message.endswith(
            f"affinity: server group {group_id} runs on {host.name}, which does not take it"
        )
    elsewhere = next(each for each in zone.hosts if each is not host)
    assert (await zone.refused(group_id, host_id=elsewhere.id))[0] == "server_group"


async def test_soft_rules_are_kept_while_there_is_room(zone: Zone) -> None:
    apart = await zone.groups.make("SOFT_ANTI_AFFINITY")
    assert sorted((await zone.place(apart, 7)).values()) == [2, 2, 3]
    together = await zone.groups.make("SOFT_AFFINITY")
    first = await zone.place(together, 8)
    assert list(first.values()) == [8]
    (host_id,) = first
    placed = await zone.place(together, 10)
    assert placed[host_id] in (5, 6), "until it is full"
    assert placed.total() == 10


async def test_a_dry_run_and_a_repeat_are_no_members(zone: Zone) -> None:
    group_id = await zone.groups.make("ANTI_AFFINITY")
    only = {"host_id": zone.hosts[0].id}
    for _ in range(2):
        await zone.placement.select(zone.request(group_id, dry_run=True, **only))
    request = zone.request(group_id, **only)
    answers = [await zone.placement.select(request) for _ in range(2)]
    assert answers[0].claim == answers[1].claim
    assert (await zone.refused(group_id, **only))[0] == "server_group"


async def test_a_server_group_that_is_gone_is_named(zone: Zone) -> None:
    group_id = await zone.groups.make("AFFINITY")
    await zone.groups.delete(group_id)
    for id_ in (group_id, ids.new("grp")):
        error = await refused(zone.placement.select(zone.request(id_)))
        assert (type(error), error.reason) == (errors.NotFound, "SERVER_GROUP_NOT_FOUND")
    alone = zone.placement.request(availability_zone=zone.name)
    assert (await zone.placement.select(alone)).claim.host_id
