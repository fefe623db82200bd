"""Getting one instance: by 64 callers, and alone.

The yardstick is as many callers of a bare gRPC server over the same TLS, which return as many
bytes. The callers are one process with an event loop, so both rates are bounded by it as well.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from benchmarks import load, report, simulated, yardsticks
from benchmarks.client import Client
from benchmarks.plan import Plan
from benchmarks.report import Curve, Figure
from benchmarks.simulated import Cloud
from benchmarks.storm import Storm
from mcloud.compute.v1 import instance_service_pb2, instance_service_pb2_grpc

CALLERS = 64


@dataclass
class Samples:
    """One a repeat."""

    rate: list[float] = field(default_factory=list)
    echo_rate: list[float] = field(default_factory=list)
    alone_ms: list[float] = field(default_factory=list)
    echo_alone_ms: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)  # of the control plane, a call


def run(plan: Plan) -> list[Figure]:
    """Measure."""
    with simulated.running(plan, 1) as cloud:
        samples = asyncio.run(_measure(plan, cloud))
    return [
        report.figure("get_rate", samples.rate, "/s", yardstick=samples.echo_rate),
        report.figure("get_p50", samples.alone_ms, "ms", yardstick=samples.echo_alone_ms),
        report.figure("get_cpu", samples.cpu_ms, "ms"),
    ]


def growth(plan: Plan) -> list[Curve]:
    """Measure with ever more callers."""
    points = []
    with simulated.running(plan, 1) as cloud:
        for callers in (1, 4, 16, 64, 256):
            samples = asyncio.run(_measure(Plan(1, plan.quick), cloud, callers))
            points.append((callers, samples.rate[0]))
    return [Curve("get_rate", "/s", "callers", points)]


async def _measure(plan: Plan, cloud: Cloud, callers: int = CALLERS) -> Samples:
    samples, plane = Samples(), cloud.plane
    seconds = plan.size(5.0, 1.0)
    async with Client(plane) as client, yardsticks.echo(plane) as echo:
        storm = Storm(client)
        await storm.prepare()
        await storm.create(1, clients=1)
        (instance,) = (await storm.instances())[:1]
        stub = instance_service_pb2_grpc.InstanceServiceStub(client.channel)
        request = instance_service_pb2.GetInstanceRequest(id=instance.metadata.id)
        metadata, message = client.metadata(), bytes(instance.ByteSize())

        async def get() -> None:
            await stub.GetInstance(request, metadata=metadata, timeout=30)

        async def bare() -> None:
            await echo(message, timeout=30)

        await load.calls(get, callers, callers)  # connections, caches
        for _ in range(plan.repeats):
            samples.echo_rate.append((await load.for_seconds(bare, callers, seconds)).rate)
            begin = cloud.plane.processes.cpu_s()
            found = await load.for_seconds(get, callers, seconds)
            used = cloud.plane.processes.cpu_s() - begin
            samples.rate.append(found.rate)
            samples.cpu_ms.append(1000 * used / len(found.latencies))
            samples.echo_alone_ms.append((await load.for_seconds(bare, 1, seconds / 2)).median_ms)
            samples.alone_ms.append((await load.for_seconds(get, 1, seconds / 2)).median_ms)
    return samples
