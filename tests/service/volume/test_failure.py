"""The volume's workflows with a failure at each moment, each step and each undo done twice."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from mcloud_base import errors
from mcloud_controlplane.volume import model, volume_workflow
from service.identity.cloud import eventually
from service.image.cloud import Project
from service.volume.cloud import Operation, State, VolumeCloud, assert_clean, write
from service.volume.storage_host import StorageHost


class Saboteur:
    """Makes one moment of one workflow fail, once or always, or ends its runner there."""

    def __init__(self) -> None:
        self.at: tuple[str, int, str, str] | None = None
        self.act: Callable[[], Awaitable[None]] | None = None
        self.visited: list[tuple[str, int, str, str]] = []

    async def __call__(self, workflow: str, index: int, act: str, moment: str) -> None:
        here = (workflow, index, act, moment)
        self.visited.append(here)
        if here == self.at and self.act is not None:
            await self.act()


@pytest.fixture
def probe() -> Saboteur:
    return Saboteur()


async def fail() -> None:
    raise errors.Internal("INJECTED", "injected")


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("index", range(3))
async def test_a_failure_at_any_step_of_the_creation_leaves_nothing(
    cloud: VolumeCloud,
    project: Project,
    storage: StorageHost,
    probe: Saboteur,
    index: int,
    moment: str,
) -> None:
    probe.at, probe.act = ("create_volume", index, "do", moment), fail
    operation = await cloud.begin_create(project)

    ended = await cloud.end_of(project, operation.id)

    assert ended.state == Operation.STATE_FAILED
    assert errors.from_status(ended.error).reason == "INJECTED"
    assert probe.at in probe.visited
    volume = await cloud.get_volume(project, operation.resource.id)
    assert (volume.status.state, volume.status.fault) == (State.STATE_ERROR, "injected")
    await assert_clean(cloud, project, storage)


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("index", range(2))
async def test_a_failure_at_any_step_of_the_deletion_still_lets_it_go(
    cloud: VolumeCloud,
    project: Project,
    storage: StorageHost,
    probe: Saboteur,
    index: int,
    moment: str,
) -> None:
    volume = await cloud.create_volume(project)
    probe.at, probe.act = ("delete_volume", index, "do", moment), fail

    ended = await cloud.delete_volume(project, volume.metadata.id)

    assert ended.state == Operation.STATE_FAILED

    async def gone() -> bool:
        return await cloud.volumes(project) == []

    await eventually(gone)
    assert storage.volumes == {}


@pytest.mark.parametrize("taken_over", [True, False])
@pytest.mark.parametrize(
    ("workflow", "index"),
    [("create_volume", 0), ("create_volume", 1), ("create_volume", 2)]
    + [("delete_volume", 0), ("delete_volume", 1)],
)
async def test_every_step_may_be_done_twice(
    cloud: VolumeCloud,
    project: Project,
    storage: StorageHost,
    probe: Saboteur,
    workflow: str,
    index: int,
    taken_over: bool,
) -> None:
    """A step fails after its work, or its runner ends there and another takes over."""
    probe.at = (workflow, index, "do", "after")

    async def sabotage() -> None:
        probe.act = None
        if not taken_over:
            raise errors.Unavailable("INJECTED", "injected")
        await let_operations_be_taken(cloud)
        raise asyncio.CancelledError

    probe.act = sabotage
    volume = await cloud.create_volume(project)
    ended = await cloud.delete_volume(project, volume.metadata.id)

    assert ended.state == Operation.STATE_SUCCEEDED
    assert probe.visited.count(probe.at) == 2
    assert storage.buried == {volume.metadata.id}
    assert await cloud.volumes(project) == []


@pytest.mark.parametrize("index", range(2))
async def test_every_undo_may_be_done_twice(
    cloud: VolumeCloud, project: Project, storage: StorageHost, probe: Saboteur, index: int
) -> None:
    probe.at = ("create_volume", 2, "do", "after")

    async def fail_then_sabotage_undo() -> None:
        probe.at, probe.act = ("create_volume", index, "undo", "after"), fail_once
        await fail()

    async def fail_once() -> None:
        probe.act = None
        raise errors.Unavailable("INJECTED", "injected")

    probe.act = fail_then_sabotage_undo
    operation = await cloud.begin_create(project)
    ended = await cloud.end_of(project, operation.id)

    assert ended.state == Operation.STATE_FAILED
    assert probe.visited.count(("create_volume", index, "undo", "after")) == 2
    await assert_clean(cloud, project, storage)


async def let_operations_be_taken(cloud: VolumeCloud) -> None:
    """As if the leases of the runners had run out."""
    await write(
        cloud, lambda: model.shared.operation.update(lease_owner="", lease_expire_time=0).execute()
    )


async def test_the_moments_above_are_all_there_are(cloud: VolumeCloud) -> None:
    store = cloud.runtime.database("volume", model.open_database)
    steps = {name: len(table.steps) for name, table in volume_workflow.workflows(store).items()}
    assert steps == {"create_volume": 3, "delete_volume": 2}
