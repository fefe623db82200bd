"""What of a workflow's faults meets other locks and another clock, over PostgreSQL."""

from __future__ import annotations

import asyncio

import psycopg
import pytest

from fakes.acts import ACTS
from fixtures_postgresql import Server
from flow.databases import new_schema
from flow.fault_cloud import Operation
from flow.fault_world import World
from flow.trial import Case, cases, try_out

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.postgres]

AT_DO = {"delete": ("before", "after")}
AT_UNDO = {"delete": ("before",)}


@pytest.fixture(scope="module")
def module_database(postgresql_server: Server) -> str:
    return new_schema(postgresql_server)


@pytest.mark.parametrize("case", list(cases(AT_DO, AT_UNDO)), ids=str)
async def test_nothing_is_stuck_and_nothing_is_left(world: World, case: Case) -> None:
    await try_out(world, case)


async def test_a_deletion_locks_in_the_order_of_runners(world: World) -> None:
    """The operation before the instance: the other way around they would meet in a deadlock."""
    await world.prepare("create_instance")
    begun = asyncio.Event()
    going_on = asyncio.Event()

    async def hold(operation_id: str) -> None:
        begun.set()
        await going_on.wait()

    world.saboteur.plan = {("create_instance", 2, "do", "before"): hold}
    creating = await world.begin("create_instance")
    await begun.wait()
    url = world.database("compute").url
    async with await psycopg.AsyncConnection.connect(url) as runner:
        locked = await runner.execute(
            "SELECT id FROM operation WHERE id = %s FOR UPDATE", [creating.id]
        )
        assert locked.rowcount == 1
        method = ACTS["delete_instance"].method
        deleting = asyncio.create_task(world.mutate(method, id=creating.resource.id))

        async def waits() -> bool:
            query = "SELECT pg_backend_pid() = ANY(pg_blocking_pids(pid)) FROM pg_stat_activity"
            return any(blocked for (blocked,) in await (await runner.execute(query)).fetchall())

        await world.until(waits)
        # As the runner's unit goes on; it fails where the deletion has locked this before.
        await runner.execute(
            "SELECT id FROM instance WHERE id = %s FOR UPDATE NOWAIT", [creating.resource.id]
        )
    going_on.set()
    assert (await world.ended(await deleting)).state == Operation.STATE_SUCCEEDED
    assert (await world.ended(creating)).state == Operation.STATE_CANCELLED
    await world.prepare("create_instance")
    await world.require_clean()


async def test_nothing_has_met_in_a_deadlock(world: World) -> None:
    """Runs after all cases: PostgreSQL resolves a deadlock, but only after a second."""
    assert not await world.deadlocks()
