"""One instance with a NIC: until it is accepted, until it is ACTIVE, until it is gone.

Alone, and accepted also for 64 callers at once, who ask again as soon as they are answered while
what they have asked for is being built. On simulated hosts that do their steps at once, so what is
left is mcloud. The yardstick is one bare call and one bare transaction.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from benchmarks import load, report, simulated, yardsticks
from benchmarks.client import Client
from benchmarks.plan import Plan
from benchmarks.report import Figure
from benchmarks.simulated import Cloud
from benchmarks.storm import Storm
from mcloud.common.v1 import operation_pb2
from mcloud.compute.v1 import instance_pb2, instance_service_pb2, instance_service_pb2_grpc
from mcloud_base import ids

CALLERS = 64


@dataclass
class Samples:
    """Milliseconds."""

    accepted: list[float] = field(default_factory=list)
    active: list[float] = field(default_factory=list)
    deleted: list[float] = field(default_factory=list)
    accepted_p99: list[float] = field(default_factory=list)  # one a repeat
    bare: list[float] = field(default_factory=list)
    echo_p99: list[float] = field(default_factory=list)


def run(plan: Plan) -> list[Figure]:
    """Measure."""
    with simulated.running(plan, plan.size(100, 10)) as cloud:
        samples = asyncio.run(_measure(plan, cloud))
    figure = report.figure
    return [
        figure("create_accepted_p50", samples.accepted, "ms", yardstick=samples.bare),
        figure("create_accepted_p99_64", samples.accepted_p99, "ms", yardstick=samples.echo_p99),
        figure("create_active_p50", samples.active, "ms", yardstick=samples.bare),
        figure("delete_p50", samples.deleted, "ms", yardstick=samples.bare),
    ]


async def _measure(plan: Plan, cloud: Cloud) -> Samples:
    samples = Samples()
    async with Client(cloud.plane) as client:
        storm = Storm(client)
        await storm.prepare()
        for _ in range(plan.size(5, 2)):  # connections, caches
            await _one(client, storm.specs[0], Samples())
        for _ in range(plan.repeats):
            for _ in range(plan.size(20, 3)):
                await _one(client, storm.specs[0], samples)
            bare = await yardsticks.accepted(cloud.plane, cloud.place, plan.size(200, 50))
            samples.bare += [1000 * each for each in bare]
            echoes = await yardsticks.echoes(cloud.plane, CALLERS, plan.size(3.0, 0.5))
            samples.echo_p99.append(echoes.at_ms(99))
            at_once = await _at_once(client, storm.specs[0], plan.size(320, CALLERS))
            samples.accepted_p99.append(at_once.at_ms(99))
            deleted = await storm.delete()
            assert not deleted.failed, deleted.failed
    return samples


async def _one(client: Client, spec: instance_pb2.InstanceSpec, samples: Samples) -> None:
    """Create one and delete it."""
    stub = instance_service_pb2_grpc.InstanceServiceStub(client.channel)
    sent = time.perf_counter()
    operation = await client.call(stub.CreateInstance, _request(spec))
    samples.accepted.append(1000 * (time.perf_counter() - sent))
    operation = await client.ended(operation)
    samples.active.append(1000 * (time.perf_counter() - sent))
    instance = instance_pb2.Instance()
    operation.response.Unpack(instance)
    assert instance.status.state == instance_pb2.InstanceStatus.STATE_ACTIVE, instance.status
    sent = time.perf_counter()
    request = instance_service_pb2.DeleteInstanceRequest(id=instance.metadata.id)
    await client.mutate(stub.DeleteInstance, request, instance_pb2.Instance)
    samples.deleted.append(1000 * (time.perf_counter() - sent))


async def _at_once(client: Client, spec: instance_pb2.InstanceSpec, count: int) -> load.Load:
    """Let 64 callers ask for instances; wait until all are there."""
    stub = instance_service_pb2_grpc.InstanceServiceStub(client.channel)
    asked: list[operation_pb2.Operation] = []

    async def one() -> None:
        asked.append(await client.call(stub.CreateInstance, _request(spec), timeout_s=120))

    found = await load.calls(one, CALLERS, count)
    for operation in asked:
        await client.ended(operation)
    return found


def _request(spec: instance_pb2.InstanceSpec) -> instance_service_pb2.CreateInstanceRequest:
    name = f"storm-{ids.request_id()}"  # so that the storm deletes it
    return instance_service_pb2.CreateInstanceRequest(
        request_id=ids.request_id(), name=name, spec=spec
    )
