"""A storm: 32 clients create 1,000 instances with a NIC on 100 simulated hosts, then delete them.

The clients are this process. Its CPU time, the simulator's and that of the database's server are
given beside the control plane's. And 500 instances by one request.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks import report, simulated, yardsticks
from benchmarks.client import Client
from benchmarks.plan import Plan
from benchmarks.report import Curve, Figure
from benchmarks.simulated import Cloud
from benchmarks.storm import Outcome, Storm
from mcloud.compute.v1 import host_service_pb2, host_service_pb2_grpc

CLIENTS = 32


@dataclass
class Result:
    """What one storm came to. CPU times in milliseconds a boot."""

    created: Outcome
    deleted: Outcome
    unevenness: int  # the instances of the fullest host, less those of the emptiest
    cpu: dict[str, float]  # of the control plane ("") and of what is beside it
    delete_cpu: float
    memory_mib: float  # of the control plane, when all were there
    at_once: Outcome  # by one request


def run(plan: Plan) -> list[Figure]:
    """Measure."""
    with simulated.running(plan, plan.size(100, 10)) as cloud:
        results, bare = asyncio.run(_measure(plan, cloud, plan.size(1000, 60)))
    return _figures(results, bare)


def growth(plan: Plan) -> list[Curve]:
    """Measure with ever more instances there, and with ever more hosts."""
    counts = plan.size((100, 200, 400, 800), (10, 20, 30, 40))
    with simulated.running(plan, plan.size(100, 10)) as cloud:
        curves = asyncio.run(_by_instances(cloud, counts))
    by_hosts = []
    for count in plan.size((10, 50, 100, 400), (2, 4, 8, 16)):
        with simulated.running(plan, count) as cloud:
            ((result,), _) = asyncio.run(_measure(Plan(1, plan.quick), cloud, counts[1]))
            by_hosts.append((count, result.cpu[""]))
    return [*curves, Curve("boot_cpu", "ms", "hosts", by_hosts)]


async def _by_instances(cloud: Cloud, counts: Sequence[int]) -> list[Curve]:
    """Create more and more; nothing is deleted in between."""
    cpu, seconds, there = [], [], 0
    async with Client(cloud.plane) as client:
        storm = Storm(client)
        await storm.prepare()
        for count in counts:
            begin = cloud.cpu_s()
            created = await storm.create(count - there, clients=CLIENTS, first=there, listed=False)
            used = cloud.cpu_since(begin)[""]
            assert not created.failed, created.failed
            cpu.append((count, 1000 * used / (count - there)))
            seconds.append((count, 1000 * created.seconds / (count - there)))
            there = count
    of = "instances"
    return [Curve("boot_cpu", "ms", of, cpu), Curve("storm_time_each", "ms", of, seconds)]


async def _measure(plan: Plan, cloud: Cloud, count: int) -> tuple[list[Result], list[float]]:
    results: list[Result] = []
    async with Client(cloud.plane) as client:
        storm = Storm(client)
        await storm.prepare()
        for number in range(plan.repeats):
            results.append(await _storm(client, storm, cloud, count, first=number * count))
        bare = await asyncio.to_thread(yardsticks.transactions, cloud.plane, cloud.place, 200)
    return results, bare


async def _storm(client: Client, storm: Storm, cloud: Cloud, count: int, *, first: int) -> Result:
    before, own = cloud.cpu_s(), time.process_time()
    created = await storm.create(count, clients=CLIENTS, first=first, listed=False)
    cpu = {**cloud.cpu_since(before), "_client": time.process_time() - own}
    counts = await _instance_counts(client)
    memory = cloud.plane.processes.pss_mib()
    before = cloud.cpu_s()
    deleted = await storm.delete(clients=CLIENTS, listed=False)
    delete = cloud.cpu_since(before)[""]
    at_once = await storm.create_at_once(count // 2)
    await storm.delete(clients=CLIENTS, listed=False)
    return Result(
        created,
        deleted,
        max(counts) - min(counts),
        {name: 1000 * used / max(len(created.succeeded), 1) for name, used in cpu.items()},
        1000 * delete / max(len(deleted.succeeded), 1),
        memory,
        at_once,
    )


async def _instance_counts(client: Client) -> list[int]:
    """Return how many instances each host has."""
    request = host_service_pb2.ListHostsRequest(page_size=1000)
    stub = host_service_pb2_grpc.HostServiceStub(client.channel)
    answer = await client.call(stub.ListHosts, request, system=True)
    return [host.status.instance_count for host in answer.hosts]


def _figures(results: list[Result], bare: list[float]) -> list[Figure]:
    failed = [
        sum(sum(each.failed.values()) for each in (r.created, r.deleted, r.at_once))
        for r in results
    ]
    for result in results:
        for what in ("created", "deleted", "at_once"):
            if found := getattr(result, what).failed:
                print(f"failed, {what}: {dict(found)}")
    unevenness = max(each.unevenness for each in results)
    sound = not any(failed) and unevenness <= 1
    figure = report.figure
    return [
        figure(
            "storm_rate",
            [len(each.created.succeeded) / each.created.seconds for each in results],
            "/s",
            yardstick=[1 / each for each in bare],
            holds=sound,
        ),
        figure(
            "storm_at_once_rate",
            [len(each.at_once.succeeded) / each.at_once.seconds for each in results],
            "/s",
            yardstick=[1 / each for each in bare],
        ),
        figure("storm_failed", failed, "instances"),
        figure("storm_unevenness", [unevenness], "instances"),
        figure(
            "storm_active_p50",
            [1000 * report.percentile(each.created.succeeded, 50) for each in results],
            "ms",
        ),
        figure(
            "storm_active_p99",
            [1000 * report.percentile(each.created.succeeded, 99) for each in results],
            "ms",
        ),
        figure(
            "storm_delete_rate",
            [len(each.deleted.succeeded) / each.deleted.seconds for each in results],
            "/s",
        ),
        *(
            figure(f"boot_cpu{name}", [each.cpu[name] for each in results], "ms", holds=sound)
            for name in results[0].cpu
        ),
        figure("storm_memory", [each.memory_mib for each in results], "MiB"),
        figure("delete_cpu", [each.delete_cpu for each in results], "ms"),
    ]
