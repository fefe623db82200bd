"""The scheduler over its real channel: hosts that report, claims, explanations, capacity."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import AsyncExitStack

import pytest

from mcloud.scheduler.v1 import placement_pb2
from mcloud_base import errors
from service.compute.host import Host
from service.core.cloud import Client, refused
from service.core.keys import new_project
from service.scheduler.placement import Placement


@pytest.fixture
def placement(client: Client) -> Placement:
    return Placement(client)


async def test_claims_fill_the_hosts_and_then_the_reason_names_what_is_exhausted(
    placement: Placement,
) -> None:
    async with AsyncExitStack() as stack:
        hosts = [
            await stack.enter_async_context(Host(placement.client, new_project())) for _ in range(2)
        ]
        zone = await placement.zone(*hosts)
        # 4 vCPUs, overcommitted four times.
        assert await placement.capacity(1, zone) == (32, 2)
        assert await placement.capacity(5, zone) == (6, 2)
        assert await placement.capacity(17, zone) == (0, 0)
        burst = [placement.request(availability_zone=zone) for _ in range(32)]
        answers = await asyncio.gather(*map(placement.select, burst))
        assert set(Counter(answer.claim.host_id for answer in answers).values()) == {16}
        assert answers[0].explanation.top_hosts
        assert [step.number for step in answers[0].steps] == [6, 7]
        error = await refused(placement.select(placement.request(availability_zone=zone)))
        assert (type(error), error.reason) == (errors.Exhausted, "NO_VALID_HOST")
        assert error.message.endswith("no host has 1 vcpus free (largest: 0)")
        explanation = errors.find_detail(error, placement_pb2.PlacementExplanation)
        assert isinstance(explanation, placement_pb2.PlacementExplanation)
        assert explanation.filters[-1].name == "vcpu"
        assert explanation.filters[-1].removed_count == 2
        await placement.until(1, zone, lambda found: found == (0, 0))
        for host in hosts:
            status = (await placement.host(host)).status
            assert (status.claimed.vcpu_count, status.instance_count) == (16, 16)


async def test_a_repeat_returns_the_same_claim(placement: Placement) -> None:
    async with Host(placement.client, new_project()) as host:
        request = placement.request(availability_zone=await placement.zone(host))
        first = await placement.select(request)
        again = await asyncio.gather(*(placement.select(request) for _ in range(4)))
        assert {answer.claim.create_time.ToMicroseconds() for answer in again} == {
            first.claim.create_time.ToMicroseconds()
        }
        assert (await placement.host(host)).status.instance_count == 1


async def test_a_dry_run_claims_nothing(placement: Placement) -> None:
    async with Host(placement.client, new_project()) as host:
        zone = await placement.zone(host)
        answer = await placement.select(placement.request(availability_zone=zone, dry_run=True))
        assert not answer.HasField("claim")
        assert [item.host_id for item in answer.explanation.top_hosts] == [host.id]
        assert (await placement.host(host)).status.instance_count == 0
        error = await refused(
            placement.select(placement.request(17, availability_zone=zone, dry_run=True))
        )
        assert error.reason == "NO_VALID_HOST"


async def test_a_disabled_host_takes_nothing_until_it_is_enabled(placement: Placement) -> None:
    async with Host(placement.client, new_project()) as host:
        zone = await placement.zone(host)
        await host.disable()
        await placement.until(1, zone, lambda found: found == (0, 0))
        error = await refused(placement.select(placement.request(host_id=host.id)))
        assert error.reason == "NO_VALID_HOST"
        await host.disable(False)
        await placement.until(1, zone, lambda found: found == (16, 1))
        answer = await placement.select(placement.request(host_id=host.id))
        assert answer.claim.host_name == host.name


async def test_two_hosts_cannot_have_one_name(placement: Placement) -> None:
    name = new_project()
    async with Host(placement.client, name):
        error = await refused(Host(placement.client, name).report_once())
        assert (type(error), error.reason) == (errors.AlreadyExists, "HOST_NAME_TAKEN")


async def test_a_newer_report_stream_ends_the_older(placement: Placement) -> None:
    async with Host(placement.client, new_project()) as host:
        await host.report_once()
        error = await refused(host.reported())
        assert (type(error), error.reason) == (errors.Conflict, "SESSION_SUPERSEDED")
