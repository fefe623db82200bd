"""Every workflow, made to fail, repeated, interrupted, overtaken, cancelled and pre-empted at each
of its steps and at their undos: it ends in a state that says what it is, and nothing is left.

The cases come from the program's own registry of workflows: a workflow or a step that is added is
tried here. How a workflow is begun, and how it must end, stands in fakes/acts.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from fakes.acts import ACTS, registered
from flow.fault_cloud import Operation
from flow.fault_world import World
from flow.trial import Case, Trial, cases, try_out
from mcloud_agents.compute import workflow as agent_workflow
from mcloud_base import errors

pytestmark = pytest.mark.asyncio(loop_scope="module")

# What happens at a "do", and at an "undo" after the last step has failed; and at which moments.
# A "repeat" and an ended runner are worst after the effect, before it is saved; who is overtaken
# before it, is in test_zombies.py.
AT_DO = {
    "fail": ("before", "after"),
    "repeat": ("after",),
    "die": ("after",),
    "overtake": ("after",),
    "cancel": ("before",),
    "delete": ("before",),
}
AT_UNDO = {
    "fail": ("after",),
    "die": ("before", "after"),
    "overtake": ("after",),
    "delete": ("before",),
}


@pytest.fixture(scope="module")
def module_database() -> str:
    """What meets locks is tried on PostgreSQL, in test_workflow_races.py; the rest is the same."""
    return "sqlite"


@pytest.mark.parametrize("case", list(cases(AT_DO, AT_UNDO)), ids=str)
async def test_nothing_is_stuck_and_nothing_is_left(world: World, case: Case) -> None:
    await try_out(world, case)


# --- the agent's steps ----------------------------------------------------------------------------


def failures() -> Iterator[tuple[str, int]]:
    """Return steps, and how often each fails; -1: always. A removal is tried until it is done."""
    for step in agent_workflow.STEPS:
        yield step, 1
        if not step.startswith("remove"):
            yield step, -1


@pytest.mark.parametrize("case", list(failures()), ids=str)
async def test_a_step_of_the_agent_fails(world: World, case: tuple[str, int]) -> None:
    step, times = case
    removal = step.startswith("remove")
    name = "delete_instance" if removal else "create_instance"
    await world.prepare(name)
    error = errors.Internal("INJECTED_FAILURE", "made to fail")
    if times > 0:
        error = errors.Unavailable("INJECTED_REPEAT", "to be repeated")
    world.agent_saboteur.plan = {(step, "after"): (error, times)}
    ended = await world.ended(await world.begin(name))
    world.agent_saboteur.plan = {}
    assert (ended.state == Operation.STATE_SUCCEEDED) == (times > 0), ended
    if times < 0:
        assert errors.from_status(ended.error).reason == "INJECTED_FAILURE"
    await world.prepare("create_instance")
    await world.require_clean()


# --- volumes that go with their instance ----------------------------------------------------------


def deletions() -> Iterator[Case]:
    for name in ("delete_instance", "delete_volume"):
        for index in range(len(registered()[name].steps)):
            for what in ("fail", "die", "overtake"):
                yield Case((name, index, "do", "after"), what)


@pytest.mark.parametrize("case", list(deletions()), ids=str)
async def test_a_volume_goes_with_its_instance(world: World, case: Case) -> None:
    await world.prepare("create_instance")
    doomed = await world.make_volume("doomed")
    await world.run("create_instance", doomed=doomed)
    trial = Trial(world, Case(("delete_instance", 0, "do", "before"), case.what))
    world.saboteur.plan = {case.place: getattr(trial, case.what)}
    await world.ended(await world.begin("delete_instance"))
    await world.until(lambda: world.is_gone("instance", world.subjects["instance"]))
    await world.until(lambda: world.is_gone("volume", doomed))
    await world.until(lambda: asyncio.sleep(0, not world.saboteur.plan))
    if trial.zombie is not None:
        await asyncio.wait({trial.zombie}, timeout=60)
    await world.prepare("create_instance")
    assert doomed not in world.host.volumes.stored
    await world.require_clean()


async def test_a_volume_stays_when_its_instance_was_never_made(world: World) -> None:
    await world.prepare("create_instance")
    kept = await world.make_volume("kept")
    trial = Trial(world, Case(("create_instance", 2, "do", "after"), "fail"))
    world.saboteur.plan = {trial.case.place: trial.fail}
    ended = await world.ended(await world.begin("create_instance", doomed=kept))
    assert ended.state == Operation.STATE_FAILED
    await world.prepare("create_instance")
    assert not await world.is_gone("volume", kept)
    await world.ended(await world.mutate("volume.VolumeService/DeleteVolume", id=kept))
    await world.until(lambda: world.is_gone("volume", kept))
    await world.require_clean()


# --- the whole ------------------------------------------------------------------------------------


async def test_nothing_was_left_out(world: World) -> None:
    """Runs after all cases: every workflow has an act, and every do and undo was visited."""
    assert set(world.tables) == set(registered())
    unknown = sorted(set(world.tables) - set(ACTS))
    assert not unknown, f"say in tests/fakes/acts.py how these are begun and end: {unknown}"
    assert set(ACTS) == set(world.tables), "acts of workflows that are no more"
    wanted = set()
    for name, table in world.tables.items():
        for index, step in enumerate(table.steps):
            acts = ("do", "undo") if step.undo is not None else ("do",)
            wanted |= {(name, index, act, moment) for act in acts for moment in ("before", "after")}
    assert set(world.saboteur.visited) == wanted
    steps = {(step, moment) for step in agent_workflow.STEPS for moment in ("before", "after")}
    assert world.agent_saboteur.visited == steps
    await world.prepare("create_instance")
    await world.require_clean()
