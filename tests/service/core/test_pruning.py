"""What has been kept long enough goes, in bounded batches; what somebody needs stays."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mcloud_base import errors, ids, rpc
from mcloud_controlplane.compute import model, pruning
from mcloud_controlplane.compute.model import Claim, Domain, Instance, Placement, shared
from mcloud_controlplane.core import tables
from mcloud_controlplane.core.database import Database
from mcloud_controlplane.core.leases import Lease
from mcloud_controlplane.core.pruner import EFFECTS_S, Pruner
from mcloud_controlplane.settings import Settings
from service.core.cloud import Client, ControlPlane, Rule
from service.core.keys import Keys, new_project
from service.core.plane import started

DAY = 86_400
LONG_AGO = 1
_schemas = itertools.count(1)


@pytest.fixture(params=["sqlite", pytest.param("pg", marks=pytest.mark.postgres)])
def compute(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """An empty compute database."""
    url = f"sqlite://{tmp_path}/compute.db"
    if request.param == "pg":
        server = request.getfixturevalue("postgresql_server")
        schema = f"pruning{next(_schemas)}"
        server.execute(f"CREATE SCHEMA {schema}", "compute")
        url = server.url("compute", schema)
    opened = model.open_database(url)
    yield opened
    opened.close()


def pruner(opened: Database, **settings: Any) -> Pruner:
    made = Settings(**settings)
    return Pruner(
        opened, shared, made, still_needed=pruning.needed_operations, also=pruning.prunes(made)
    )


def now(opened: Database) -> int:
    return opened.now()


def operation(resource_id: str = "", **values: Any) -> str:
    id_ = ids.new("cop")
    shared.operation.insert(
        **{
            "id": id_, "project_id": "p", "method": "m", "principal_id": "u", "request_id": id_,
            "state": "SUCCEEDED", "create_time": LONG_AGO, "end_time": LONG_AGO,
            "resource_id": resource_id, **values,
        }
    ).execute()  # fmt: skip
    shared.operation_step.insert(
        operation_id=id_, number=1, attempt=1, name="n", service="s", state="DONE",
        start_time=LONG_AGO,
    ).execute()  # fmt: skip
    return id_


def request_of(operation_id: str, time: int) -> None:
    shared.request.insert(
        project_id="p", principal_id="u", method="m", request_id=ids.request_id(), hash="h",
        operation_id=operation_id, time=time,
    ).execute()  # fmt: skip


def instance(**values: Any) -> str:
    id_ = ids.new("i")
    Instance.insert(
        **{
            "id": id_, "name": id_, "project_id": "p", "create_time": 1, "update_time": 1,
            "delete_time": LONG_AGO, "state": "DELETED", "flavor_id": "f", "flavor_name": "f",
            "image_id": "m", "vcpu_count": 1, "memory_mib": 1, "disk_gib": 1, "hostname": "h",
            **values,
        }
    ).execute()  # fmt: skip
    return id_


def domain(instance_id: str, **values: Any) -> str:
    id_ = ids.new("d")
    about = {"instance_id": instance_id, "project_id": "p", "host_id": "h", "generation": 1}
    Domain.insert(**{"id": id_, "create_time": 1, "absent_time": 2, **about, **values}).execute()
    explanation = {"explanation": b"", "time": 1, "attempt": 1}
    Placement.insert(domain_id=id_, instance_id=instance_id, **explanation).execute()
    return id_


async def living(opened: Database, table: Any) -> set[str]:
    return await opened.read(lambda: {row.id for row in table.select(table.id)})


async def change(opened: Database, count: int) -> None:
    """Log changes: each of them a revision."""
    for _ in range(count):
        await opened.write(tables.changed, "thing", ids.request_id(), "p")


async def change_twice(opened: Database, count: int) -> None:
    """Log changes as they once were: each revision with two rows."""

    def unit() -> None:
        head = shared.revision()
        for revision in range(head + 1, head + count + 1):
            for number in range(2):
                shared.change.create(
                    revision=revision,
                    number=number,
                    type="thing",
                    resource_id=ids.request_id(),
                    project_id="p",
                    change="MODIFIED",
                    time=LONG_AGO,
                )
        shared.deployment.update(revision=head + count).execute()

    await opened.write(unit)


async def test_changes_go_but_for_the_newest(compute: Database) -> None:
    await change(compute, 30)
    await compute.write(lambda: shared.change.update(time=LONG_AGO).execute())
    assert (await pruner(compute, keep_revisions=10).prune())["change"] == 20
    head = await compute.read(shared.revision)
    kept = await compute.read(lambda: [row.revision for row in shared.change.select()])
    assert sorted(kept) == list(range(head - 9, head + 1))


async def test_young_changes_stay_however_many(compute: Database) -> None:
    await change(compute, 30)
    assert (await pruner(compute, keep_revisions=1).prune())["change"] == 0


async def test_a_batch_never_cuts_a_revision(
    compute: Database,
) -> None:
    await change_twice(compute, 10)
    one = Pruner(compute, shared, Settings(keep_revisions=1), batch=5, rounds=1)
    for left in (16, 12, 8, 4):
        await one.prune()
        rows = await compute.read(lambda: [row.revision for row in shared.change.select()])
        assert len(rows) == left
        assert all(rows.count(revision) == 2 for revision in rows)


async def test_requests_go_when_no_client_repeats_them_any_more(compute: Database) -> None:
    moment = now(compute)

    def plant() -> dict[str, str]:
        found = {"old": operation(), "young": operation(), "runs": operation(state="RUNNING")}
        request_of(found["old"], LONG_AGO)
        request_of(found["young"], moment)
        request_of(found["runs"], LONG_AGO)
        return found

    planted = await compute.write(plant)
    pruned = await pruner(compute).prune()
    assert pruned["request"] == 1
    table = shared.request
    kept = await compute.read(lambda: {row.operation_id for row in table.select()})
    assert kept == {planted["young"], planted["runs"]}
    # The operation went with its request; the others answer repeats, or run.
    assert await living(compute, shared.operation) == kept


async def test_operations_go_with_their_steps_unless_something_needs_them(
    compute: Database,
) -> None:
    moment = now(compute)

    def plant() -> set[str]:
        operation()
        operation(instance())
        return {
            operation(end_time=moment),
            operation(state="UNDOING", end_time=None),
            # The reclaimer goes on with its lease number.
            operation(instance(state="ERROR", delete_time=None)),
            operation(instance(state="ACTIVE")),
        }

    kept = await compute.write(plant)
    assert (await pruner(compute).prune())["operation"] == 2
    assert await living(compute, shared.operation) == kept
    steps = shared.operation_step
    found = await compute.read(lambda: {row.operation_id for row in steps.select()})
    assert found == kept


async def test_only_retired_effects_go_and_only_when_nothing_comes_so_late(
    compute: Database,
) -> None:
    moment = now(compute)
    old = moment - int((EFFECTS_S + 60) * 1_000_000)

    def plant() -> None:
        for id_, retired, time in (
            ("gone", True, old), ("young", True, moment), ("in use", False, old),
        ):  # fmt: skip
            shared.effect.insert(id=id_, lease_number=7, retired=retired, time=time).execute()

    await compute.write(plant)
    assert (await pruner(compute).prune())["effect"] == 1
    assert await living(compute, shared.effect) == {"young", "in use"}


async def test_deleted_instances_go_unless_something_is_held_for_them(compute: Database) -> None:
    def plant() -> tuple[set[str], set[str]]:
        gone = instance()
        domain(gone)
        placed, claimed = instance(), instance()
        living_domain = domain(placed, absent_time=None)
        Claim.insert(
            domain_id=domain(claimed), instance_id=claimed, host_id="h", vcpu_count=1,
            memory_mib=1, disk_gib=1, create_time=1,
        ).execute()  # fmt: skip
        young = instance(delete_time=now(compute))
        going = instance(state="ERROR")
        return {placed, claimed, young, going}, {living_domain}

    kept, domains = await compute.write(plant)
    assert (await pruner(compute).prune())["instance"] == 1
    assert await living(compute, Instance) == kept
    assert domains <= await living(compute, Domain)
    assert await compute.read(Placement.select().count) == 2


async def test_a_tick_is_bounded_and_goes_on_where_it_was(
    compute: Database,
) -> None:
    needed = await compute.write(lambda: {operation(instance(state="ACTIVE")) for _ in range(15)})
    await compute.write(lambda: [operation() for _ in range(45)])
    needed_too = pruning.needed_operations
    one = Pruner(compute, shared, Settings(), still_needed=needed_too, batch=10, rounds=2)
    ticks = 0
    while await living(compute, shared.operation) != needed:
        assert (await one.prune())["operation"] <= 20
        ticks += 1
        assert ticks < 20, "what has to stay is not in the way of the rest"


async def test_one_process_at_a_time(compute: Database) -> None:
    one, two = Lease(shared, "work", 60), Lease(shared, "work", 60)
    assert await compute.write(one.take)
    assert not await compute.write(two.take)
    assert await compute.write(one.take), "whoever has it keeps it"
    assert await compute.write(Lease(shared, "another", 60).take)
    await compute.write(lambda: shared.lease.update(expire_time=1).execute())
    assert await compute.write(two.take), "a process that fell silent loses it"
    assert not await compute.write(one.take)
    await compute.write(two.give_up)
    assert await compute.write(one.take)


# -- a whole control plane ---------------------------------------------------------------------


@pytest.fixture(scope="module", params=["sqlite", pytest.param("pg", marks=pytest.mark.postgres)])
def plane(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ControlPlane]:
    settings = {"prune_interval_s": 0.2, "keep_changes_s": 0, "keep_revisions": 20}
    yield from started(request, tmp_path_factory, **settings)


async def test_a_watch_from_before_is_told_to_list_again(client: Client) -> None:
    project = new_project()
    keys = Keys(client.public, await client.make_user(project, Rule.ROLE_MEMBER, project))
    begin = (await keys.list()).revision
    for number in range(15):
        made = await keys.create(f"k{number}")
        await keys.delete(made.resource.id)

    async def first(revision: str) -> Any:
        async for event in rpc.received(aiter(keys.watch(from_revision=revision))):
            return event
        return None

    async def compacted() -> str:
        while True:
            try:
                await first(begin)
            except errors.OutOfRange as error:
                return error.reason
            await asyncio.sleep(0.05)  # nobody is told when the pruner has had its turn

    assert await asyncio.wait_for(compacted(), 60) == "REVISION_COMPACTED"
    now_ = (await keys.list()).revision
    await keys.create("last")
    event = await asyncio.wait_for(first(now_), 60)
    assert event.key_pair.metadata.name == "last"
