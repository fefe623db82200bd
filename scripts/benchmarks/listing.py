"""A page of 100 of 50,000 instances, and how many statements that takes.

All 50,000 are of the caller's project and ACTIVE: copies of one that was made through the API. The
pages follow each other, so most begin deep inside. The yardstick is as many bytes over a bare gRPC
server. `list_more_statements` is what a page of 100 takes more than one of 10.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks import fixtures, load, report, simulated, statements, yardsticks
from benchmarks.client import Client
from benchmarks.plan import Plan
from benchmarks.report import Curve, Figure
from benchmarks.simulated import Cloud
from benchmarks.storm import Storm
from mcloud.compute.v1 import instance_service_pb2, instance_service_pb2_grpc

PAGE = 100


@dataclass
class Samples:
    """Milliseconds; one a repeat."""

    p99: list[float] = field(default_factory=list)
    p50: list[float] = field(default_factory=list)
    echo_p99: list[float] = field(default_factory=list)
    statements: list[float] = field(default_factory=list)  # of a page of 100
    more_statements: list[float] = field(default_factory=list)


def run(plan: Plan) -> list[Figure]:
    """Measure."""
    with simulated.running(plan, 1, counted=True) as cloud:
        samples = asyncio.run(_measure(plan, cloud, [plan.size(50_000, 2_000)]))[0]
    return [
        report.figure("list_p99", samples.p99, "ms", yardstick=samples.echo_p99),
        report.figure("list_p50", samples.p50, "ms"),
        report.figure("list_statements", samples.statements, "statements"),
        report.figure("list_more_statements", samples.more_statements, "statements"),
    ]


def growth(plan: Plan) -> list[Curve]:
    """Measure with ever more instances."""
    counts = plan.size((1_000, 5_000, 20_000, 50_000), (500, 1_000, 2_000, 4_000))
    with simulated.running(plan, 1, counted=True) as cloud:
        found = asyncio.run(_measure(Plan(1, plan.quick), cloud, counts))
    points = [(count, each.p50[0]) for count, each in zip(counts, found, strict=True)]
    return [Curve("list_p50", "ms", "instances", points)]


async def _measure(plan: Plan, cloud: Cloud, counts: Sequence[int]) -> list[Samples]:
    """Measure at each number of instances."""
    found: list[Samples] = []
    async with Client(cloud.plane) as client:
        storm = Storm(client)
        await storm.prepare()
        await storm.create(1, clients=1)
        (instance,) = await storm.instances()
        there = 1
        for count in counts:
            fixtures.copy_instance(cloud.plane, instance.metadata.id, count - there)
            there = count
            found.append(await _list(plan, cloud, client))
    return found


async def _list(plan: Plan, cloud: Cloud, client: Client) -> Samples:
    samples = Samples()
    await _pages(client, 10)
    for _ in range(plan.repeats):
        found, length = await _pages(client, plan.size(200, 20))
        samples.p99.append(found.at_ms(99))
        samples.p50.append(found.median_ms)
        counts = [await _statements(cloud, client, size) for size in (PAGE, PAGE // 10)]
        samples.statements.append(counts[0])
        samples.more_statements.append(counts[0] - counts[1])
        async with yardsticks.echo(cloud.plane) as echo:
            message = bytes(length)

            async def bare(message: bytes = message) -> None:
                await echo(message, timeout=30)

            samples.echo_p99.append((await load.calls(bare, 1, plan.size(200, 20))).at_ms(99))
    return samples


async def _pages(client: Client, count: int) -> tuple[load.Load, int]:
    """List so many pages, one after the other; return that and how long the first answer was."""
    found, token, length = load.Load(), "", 0
    for _ in range(count):
        begin = time.perf_counter()
        answer = await _page(client, PAGE, token)
        found.latencies.append(time.perf_counter() - begin)
        length = length or answer.ByteSize()
        token = answer.next_page_token
    return found, length


async def _statements(cloud: Cloud, client: Client, size: int) -> float:
    """Return how many statements a page takes: the least of some, as others go on meanwhile."""
    found = []
    for _ in range(10):
        begin = statements.run_by(cloud.plane)
        await _page(client, size, "")
        found.append(statements.run_by(cloud.plane) - begin)
    return min(found)


async def _page(
    client: Client, size: int, token: str
) -> instance_service_pb2.ListInstancesResponse:
    stub = instance_service_pb2_grpc.InstanceServiceStub(client.channel)
    request = instance_service_pb2.ListInstancesRequest(page_size=size, page_token=token)
    answer: instance_service_pb2.ListInstancesResponse = await client.call(
        stub.ListInstances, request
    )
    return answer
