"""Many creations on simulated hosts, while each second a process of the control plane is killed."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
from benchmarks.client import Client
from benchmarks.storm import Storm

from faults.processes import Copies, Postgresql, Program, send
from faults.run import await_hosts, supervise
from mcloud.compute.v1 import instance_pb2, instance_service_pb2, instance_service_pb2_grpc
from mcloud_base import errors, ids

HOSTS = 50
CLIENTS = 16
WORKERS = 2  # of each copy, besides its first process
ANSWER_S = 300.0  # within which a creation that is repeated is accepted
SETTLE_S = 60.0  # after the last kill
KILL_EVERY_S = 1.0

State = instance_pb2.InstanceStatus


class Simulator:
    """`mcloud-agent simulate`, and what it knows of domains."""

    def __init__(self, directory: Path, copies: Copies) -> None:
        self._directory = directory
        self._copies = copies
        self.program = Program("simulator", self._start)

    def _start(self) -> int:
        plane = self._copies.plane
        return subprocess.Popen(
            [sys.executable, "-m", "mcloud_agents", "simulate", "--hosts", str(HOSTS)]
            + ["--control-plane", plane.public, "--ca", plane.authority]
            + ["--state-dir", self._directory, "-o", "json"],
            env={**os.environ, "MCLOUD_PASSWORD": plane.password},
            stdin=subprocess.DEVNULL,
            stdout=(self._directory.parent / "simulator.json").open("wb"),
            stderr=(self._directory.parent / "simulator.log").open("ab"),
            start_new_session=True,
        ).pid


async def go(
    place: Path,
    seed: int,
    count: int,
    server: Postgresql,
    copies: Copies,
    say: Callable[[str], object],
) -> dict[str, Any]:
    """Do it; return the counts."""
    drawn = random.Random(f"{seed} storm")  # noqa: S311 (not a secret)
    simulator = Simulator(place / "simulator", copies)
    wrong: list[str] = []
    async with Client(copies.plane) as client:
        simulator.program.start()
        try:
            storm = Storm(client)
            await storm.prepare()
            await await_hosts(client, HOSTS)
            watching = asyncio.create_task(supervise([server.program, *copies.programs], {}, say))
            kills = 0
            began = time.monotonic()
            creating = asyncio.create_task(_create_all(client, storm.specs[0], count))
            while not creating.done():
                await asyncio.wait({creating}, timeout=KILL_EVERY_S)
                if not creating.done():
                    processes = [pid for copy in copies.programs for pid in copy.pids()]
                    if processes:  # or all of them have been killed, and none is back
                        send([drawn.choice(processes)], signal.SIGKILL)
                        kills += 1
            created = creating.result()
            accepted_s = time.monotonic() - began
            say(f"{count} creations accepted after {accepted_s:.0f} s and {kills} kills")
            last_kill = time.monotonic()
            states: Counter[str] = Counter()
            reasons: Counter[str] = Counter()
            while time.monotonic() - last_kill < SETTLE_S:
                states, reasons = await _states(client)
                if states["STATE_ACTIVE"] == count:
                    break
                await asyncio.sleep(2.0)  # looked at as a person would, again and again
            settled_s = time.monotonic() - last_kill
            watching.cancel()
        finally:
            send(simulator.program.pids(), signal.SIGTERM)
    if states != Counter({"STATE_ACTIVE": count}):
        wrong.append(f"instances: {dict(states)}")
    if len(set(created)) != count:
        wrong.append(f"{len(set(created))} instances for {count} requests")
    with psycopg.connect(server.url.format(name="compute")) as connection:
        query = "SELECT COUNT(*), COUNT(DISTINCT instance_id) FROM domain WHERE absent_time IS NULL"
        row = connection.execute(query).fetchone()
    if row != (count, count):
        wrong.append(f"domains, of different instances: {row}")
    return {
        "seed": seed,
        "faults": {"killed: control plane": kills},
        "outcomes": {f"instances {state}": number for state, number in states.items()},
        "reasons": dict(reasons),
        "accepted_s": round(accepted_s, 1),
        "settled_s": round(settled_s, 1),
        "wrong": wrong,
    }


async def _create_all(client: Client, spec: instance_pb2.InstanceSpec, count: int) -> list[str]:
    """Ask for every instance with one request id, until it is accepted; return their ids."""
    create = instance_service_pb2_grpc.InstanceServiceStub(client.channel).CreateInstance
    numbers = iter(range(count))
    found: list[str] = []

    async def one() -> None:
        for number in numbers:
            request = instance_service_pb2.CreateInstanceRequest(
                request_id=ids.request_id(),
                name=f"storm-{number}",
                spec=spec,
            )
            operation = await client.call(create, request, timeout_s=ANSWER_S)
            found.append(operation.resource.id)

    async with asyncio.TaskGroup() as group:
        for _ in range(CLIENTS):
            group.create_task(one())
    return found


async def _states(client: Client) -> tuple[Counter[str], Counter[str]]:
    """Return how many instances are in each state, and the reasons of faults.

    Nothing while nobody answers.
    """
    stub = instance_service_pb2_grpc.InstanceServiceStub(client.channel)
    states: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    token = ""
    try:
        while True:
            request = instance_service_pb2.ListInstancesRequest(page_size=500, page_token=token)
            answer = await client.call(stub.ListInstances, request)
            states.update(State.State.Name(each.status.state) for each in answer.instances)
            faults = [
                each.status.fault for each in answer.instances if each.status.HasField("fault")
            ]
            reasons.update(f"{fault.reason}: {fault.message}" for fault in faults)
            if not (token := answer.next_page_token):
                return states, reasons
    except errors.Unavailable:
        return Counter(), Counter()
