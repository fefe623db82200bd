"""A process of its own that races another one: `python -m flow.race_worker SCENARIO URL ARGUMENTS`.

It opens the database, says "ready", waits for a line on its standard input (the other process gets
it at the same time), does its part, and prints what came of it as one line of JSON.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from mcloud.common.v1 import metadata_pb2, options_pb2
from mcloud.compute.v1 import (
    flavor_pb2,
    flavor_service_pb2,
    instance_service_pb2,
    server_group_service_pb2,
)
from mcloud.scheduler.v1 import placement_pb2, placement_service_pb2
from mcloud_base import errors, ids, logs
from mcloud_controlplane.compute import (
    flavor_store,
    instance_store,
    model,
    server_group_store,
)
from mcloud_controlplane.conductor import store as conductor_store
from mcloud_controlplane.core import auth, database, listing
from mcloud_controlplane.core.database import Database
from mcloud_controlplane.core.mutation import Frame
from mcloud_controlplane.core.workflow import Job, Runner, Step, Workflow
from mcloud_controlplane.scheduler.decisions import Decisions
from mcloud_controlplane.scheduler.view import View
from mcloud_controlplane.settings import Settings

PROJECT = "p-race"
Part = Callable[[Database, dict[str, Any]], Awaitable[dict[str, Any]]]
_AT_A_TIME = 8


def say(word: str) -> None:
    print(word, flush=True)


async def told() -> str:
    """Return the next line of the standard input."""
    return (await asyncio.to_thread(sys.stdin.readline)).strip()


async def outcomes(
    work: list[Coroutine[Any, Any, Any]], *, at_a_time: int = _AT_A_TIME
) -> list[Any]:
    """Do it all, some at a time; of what was refused, return the reason."""
    limit = asyncio.Semaphore(at_a_time)

    async def one(part: Coroutine[Any, Any, Any]) -> Any:
        async with limit:
            try:
                return await part
            except errors.Error as error:
                return error.reason

    return await asyncio.gather(*map(one, work))


async def end(*tasks: asyncio.Task[None]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def enter(method: str) -> None:
    """Be a member of the project who calls a method."""
    caller = auth.Caller(
        kind=options_pb2.Rule.CALLER_USER,
        principal_id="u-race",
        project_id=PROJECT,
        role=options_pb2.Rule.ROLE_ADMIN,
        system=True,
    )
    auth.set_current(caller, auth.Call(method, request_id="", receive_time=database.now()))


@asynccontextmanager
async def scheduler(opened: Database) -> AsyncIterator[Decisions]:
    """Run this process's scheduler."""
    settings = Settings.model_validate({})
    view = View(opened, settings)
    decisions = Decisions(opened, settings, view)
    tasks = [asyncio.create_task(view.follow()), asyncio.create_task(decisions.work())]
    try:
        await view.loaded.wait()
        yield decisions
        _, different = await view.compare()
        assert not different, "the hosts in memory are not as recorded"
    finally:
        await end(*tasks)


async def place(decisions: Decisions, **values: Any) -> str:
    request = placement_service_pb2.SelectDestinationsRequest(
        **{"domain_id": ids.new("d"), "instance_id": ids.new("i"), "project_id": PROJECT, **values},
        resources=placement_pb2.Resources(vcpu_count=1, memory_mib=64, disk_gib=1),
    )
    answer = await decisions.decide(request)
    return str(answer.claim.host_id)


async def claim(opened: Database, arguments: dict[str, Any]) -> dict[str, Any]:
    """Ask this process's scheduler for room, many times."""
    async with scheduler(opened) as decisions:
        found = await outcomes([place(decisions) for _ in range(arguments["count"])])
    return {"outcomes": found}


async def claim_together(opened: Database, arguments: dict[str, Any]) -> dict[str, Any]:
    """Ask this process's scheduler for room for all requests at once."""
    async with scheduler(opened) as decisions:
        asked = [place(decisions, **values) for values in arguments["requests"]]
        found = await outcomes(asked, at_a_time=len(asked))
    return {"outcomes": found}


async def create(opened: Database, arguments: dict[str, Any]) -> dict[str, Any]:
    """Create instances; `request_ids` as given, or new ones."""
    enter("mcloud.compute.v1.InstanceService/CreateInstance")
    frame = Frame(opened, model.shared, "cop")
    me = os.getpid()

    async def one(number: int, request_id: str) -> str:
        request = instance_service_pb2.CreateInstanceRequest(
            request_id=request_id or ids.request_id(),
            name=f"r{number}" if request_id else f"r{me}-{number}",
        )
        request.spec.flavor_id = arguments["flavor_id"]
        request.spec.image_id = ids.new("img") if not request_id else arguments["image_id"]
        if "server_group_ids" in arguments:
            request.spec.placement.server_group_id = arguments["server_group_ids"][number]
        return (await frame.mutate(request, instance_store.create)).id

    given = arguments.get("request_ids") or [""] * arguments["count"]
    return {"outcomes": await outcomes([one(n, given_id) for n, given_id in enumerate(given)])}


async def delete_server_groups(opened: Database, arguments: dict[str, Any]) -> dict[str, Any]:
    """Delete server groups that the other process puts instances into."""
    enter("mcloud.compute.v1.ServerGroupService/DeleteServerGroup")
    frame = Frame(opened, model.shared, "cop")

    async def one(id_: str) -> str:
        request = server_group_service_pb2.DeleteServerGroupRequest(
            request_id=ids.request_id(), id=id_
        )
        return (await frame.mutate(request, server_group_store.delete)).id

    return {"outcomes": await outcomes([one(id_) for id_ in arguments["server_group_ids"]])}


async def write_and_watch(opened: Database, arguments: dict[str, Any]) -> dict[str, Any]:
    """Make flavors while following all that are made, here and in the other process."""
    enter("mcloud.compute.v1.FlavorService/CreateFlavor")
    frame = Frame(opened, model.shared, "cop")
    me, seen = os.getpid(), []

    async def make(number: int) -> str:
        request = flavor_service_pb2.CreateFlavorRequest(
            request_id=ids.request_id(), name=f"f{me}-{number}"
        )
        request.spec.vcpu_count = 1
        return (await frame.mutate(request, flavor_store.create)).resource.id

    async def follow() -> None:
        request = flavor_service_pb2.WatchFlavorsRequest(from_revision=arguments["revision"])
        async for event in listing.watch(
            opened, model.shared, "flavor", flavor_pb2.Flavor, request, auth.caller(),
            flavor_store.load, everybody=True,
        ):  # fmt: skip
            if event.type == metadata_pb2.CHANGE_TYPE_ADDED:
                seen.append([int(event.revision), event.resource_id])
            if len(seen) >= arguments["expected"]:
                return

    watching = asyncio.create_task(follow())
    made = await outcomes([make(number) for number in range(arguments["count"])])
    async with asyncio.timeout(60):
        await watching
    return {"made": made, "seen": seen}


async def run_workflows(opened: Database, arguments: dict[str, Any]) -> dict[str, Any]:
    """Run whatever operations there are until none is left; tell which steps ran here."""
    ran: list[list[Any]] = []

    async def act(job: Job) -> None:
        ran.append([job.operation_id, job.lease_number])
        await asyncio.sleep(0)

    flow = Workflow(
        "race", (Step(1, "act", "test", act),), on_done=lambda job: None, on_failed=lambda job: None
    )
    runner = Runner(opened, model.shared, {"race": flow}, concurrency=4)
    running = asyncio.create_task(runner.run())
    table = model.shared.operation

    def finished() -> bool | None:
        return True if not table.select().where(table.state == "RUNNING").exists() else None

    await opened.until(finished, timeout_s=60)
    await end(running)
    return {"ran": ran}


async def stall(opened: Database, arguments: dict[str, Any]) -> dict[str, Any]:
    """Take an operation and stand still with it, as a stopped process does; then try to go on."""
    result: dict[str, Any] = {"done": False}
    held, left = asyncio.Event(), asyncio.Event()

    async def act(job: Job) -> None:
        result["number"] = job.lease_number
        held.set()
        say("holding")
        sys.stdin.readline()  # the whole process waits: it cannot even see that it lost the lease
        try:
            await opened.write(conductor_store.require_lease, job)
        except errors.Conflict as error:
            result["effect"] = error.reason

    def done(job: Job) -> None:
        result["done"] = True

    flow = Workflow("race", (Step(1, "act", "test", act),), on_done=done, on_failed=done)
    runner = Runner(opened, model.shared, {"race": flow})

    class Watched(Runner):
        async def _hold(self, row: Any, begun: bool) -> None:
            await super()._hold(row, begun)
            left.set()

    runner.__class__ = Watched
    running = asyncio.create_task(runner.run())
    await held.wait()  # and so until it may go on
    async with asyncio.timeout(60):
        await left.wait()
    await end(running)
    return result


async def stop(opened: Database, arguments: dict[str, Any]) -> dict[str, Any]:
    """Stop instances that the other process stops, too."""
    enter("mcloud.compute.v1.InstanceService/StopInstance")
    frame = Frame(opened, model.shared, "cop")

    async def one(id_: str) -> str:
        request = instance_service_pb2.StopInstanceRequest(request_id=ids.request_id(), id=id_)
        return (await frame.mutate(request, instance_store.stop)).id

    return {"outcomes": await outcomes([one(id_) for id_ in arguments["instance_ids"]])}


async def label(opened: Database, arguments: dict[str, Any]) -> dict[str, Any]:
    """Label instances, over and over, while the other process moves them to another state."""
    enter("mcloud.compute.v1.InstanceService/UpdateInstance")
    frame = Frame(opened, model.shared, "cop")

    async def one(number: int, id_: str) -> str:
        request = instance_service_pb2.UpdateInstanceRequest(request_id=ids.request_id(), id=id_)
        request.update_mask.paths.append("labels")
        request.labels["round"] = str(number)
        return (await frame.mutate(request, instance_store.update)).id

    rounds = range(arguments["rounds"])
    found = await outcomes([one(n, id_) for n in rounds for id_ in arguments["instance_ids"]])
    return {"outcomes": found}


async def settle(opened: Database, arguments: dict[str, Any]) -> dict[str, Any]:
    """Count instances' boots, as workflows change what they own."""

    async def one(number: int, id_: str) -> None:
        def change() -> None:
            conductor_store.set_instance(id_, boot_number=model.Instance.boot_number + 1)

        await opened.write(change)

    rounds = range(arguments["rounds"])
    found = await outcomes([one(n, id_) for n in rounds for id_ in arguments["instance_ids"]])
    return {"outcomes": found}


PARTS: dict[str, Part] = {
    part.__name__: part
    for part in (
        claim,
        claim_together,
        create,
        delete_server_groups,
        write_and_watch,
        run_workflows,
        stall,
        stop,
        label,
        settle,
    )
}


async def main(name: str, url: str, arguments: dict[str, Any]) -> None:
    opened = model.open_database(url)
    say("ready")
    await told()
    result = await PARTS[name](opened, arguments)
    say(json.dumps(result))
    await asyncio.to_thread(opened.close)


if __name__ == "__main__":
    logs.configure(level="warning")
    asyncio.run(main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3])))
