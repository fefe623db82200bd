"""500 watchers of one instance's project: from a change until the last of them has it.

A caller may hold 100 streams, so there are as many application credentials as that takes; all of
them are in this process. The yardstick is as many echoes as there are watchers, by 64 callers.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from google.protobuf.field_mask_pb2 import FieldMask

from benchmarks import load, report, simulated, tokens, yardsticks
from benchmarks.client import Client
from benchmarks.plan import Plan
from benchmarks.report import Curve, Figure
from benchmarks.simulated import Cloud
from benchmarks.storm import Storm
from mcloud.common.v1 import metadata_pb2
from mcloud.compute.v1 import instance_pb2, instance_service_pb2, instance_service_pb2_grpc
from mcloud_base import ids, rpc

WATCHERS = 500
STREAMS_EACH = 100  # the settings' default


@dataclass
class Samples:
    """Milliseconds, one a change."""

    first: list[float] = field(default_factory=list)
    last: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)  # of the control plane
    bare: list[float] = field(default_factory=list)


def run(plan: Plan) -> list[Figure]:
    """Measure."""
    with simulated.running(plan, 1) as cloud:
        samples = asyncio.run(_measure(plan, cloud, plan.size(WATCHERS, 20)))
    return [
        report.figure("watch_last_p50", samples.last, "ms", yardstick=samples.bare),
        report.figure("watch_first_p50", samples.first, "ms"),
        report.figure("watch_cpu", samples.cpu, "ms"),
    ]


def growth(plan: Plan) -> list[Curve]:
    """Measure with ever more watchers."""
    points = []
    with simulated.running(plan, 1) as cloud:
        for count in plan.size((50, 100, 200, 500), (5, 10, 20, 40)):
            samples = asyncio.run(_measure(Plan(1, plan.quick), cloud, count))
            points.append((count, report.percentile(samples.last, 50)))
    return [Curve("watch_last_p50", "ms", "watchers", points)]


class Watchers:
    """Watchers that note when they have heard of a change."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._heard: dict[str, list[float]] = {}  # by label

    async def watch(self, client: Client, token: str, revision: str) -> None:
        """Watch until cancelled."""
        stub = instance_service_pb2_grpc.InstanceServiceStub(client.channel)
        request = instance_service_pb2.WatchInstancesRequest(from_revision=revision)
        stream = stub.WatchInstances(request, metadata=rpc.bearer(token))
        async for change in rpc.received(stream):
            if change.type != metadata_pb2.CHANGE_TYPE_BOOKMARK:
                label = change.instance.metadata.labels.get("bench", "")
                self._heard.setdefault(label, []).append(time.perf_counter())

    async def heard(self, label: str) -> list[float]:
        """Wait until all have heard of a label; return when each did."""
        async with asyncio.timeout(60):
            while len(self._heard.get(label, ())) < self._count:
                await asyncio.sleep(0.002)  # they note times themselves
        return self._heard[label]


@asynccontextmanager
async def _watching(client: Client, count: int, revision: str) -> AsyncIterator[Watchers]:
    watchers, tasks = Watchers(count), []
    for first in range(0, count, STREAMS_EACH):
        token = await tokens.token_of(client, await tokens.credential_of(client))
        for _ in range(min(STREAMS_EACH, count - first)):
            tasks.append(asyncio.create_task(watchers.watch(client, token, revision)))
    try:
        yield watchers
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _measure(plan: Plan, cloud: Cloud, count: int) -> Samples:
    samples = Samples()
    async with Client(cloud.plane) as client:
        storm = Storm(client)
        if not await storm.instances():
            await storm.prepare()
            await storm.create(1, clients=1)
        (instance,) = await storm.instances()
        stub = instance_service_pb2_grpc.InstanceServiceStub(client.channel)
        page = await client.call(stub.ListInstances, instance_service_pb2.ListInstancesRequest())
        async with _watching(client, count, page.revision) as watchers:
            await _change(client, instance, watchers)  # all streams are open
            for _ in range(plan.repeats * plan.size(10, 3)):
                begin, cpu = time.perf_counter(), cloud.plane.processes.cpu_s()
                heard = await _change(client, instance, watchers)
                samples.first.append(1000 * (min(heard) - begin))
                samples.last.append(1000 * (max(heard) - begin))
                samples.cpu.append(1000 * (cloud.plane.processes.cpu_s() - cpu))
        async with yardsticks.echo(cloud.plane) as echo:

            async def bare() -> None:
                await echo(bytes(instance.ByteSize()), timeout=30)

            for _ in range(plan.repeats):
                samples.bare.append(1000 * (await load.calls(bare, 64, count)).seconds)
    return samples


async def _change(
    client: Client, instance: instance_pb2.Instance, watchers: Watchers
) -> list[float]:
    """Label the instance; return when each watcher heard of it."""
    label = ids.request_id()
    request = instance_service_pb2.UpdateInstanceRequest(
        id=instance.metadata.id,
        labels={"bench": label},
        update_mask=FieldMask(paths=["labels"]),
    )
    stub = instance_service_pb2_grpc.InstanceServiceStub(client.channel)
    await client.mutate(stub.UpdateInstance, request, instance_pb2.Instance)
    return await watchers.heard(label)
