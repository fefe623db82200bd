"""A host is verified whichever process of the control plane it is connected to."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mcloud_base import ids
from service.compute.host import artifact
from service.conductor.world import Artifact, World, keys
from service.core.cloud import Client, ControlPlane, run
from service.core.plane import free_ports

SETTINGS = {"verify_confirm_s": 0.1, "verify_host_wait_s": 5}

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module")
def other(plane: ControlPlane) -> Iterator[ControlPlane]:
    """Another process over the same databases."""
    directory = plane.state_dir.parent / "other"
    directory.mkdir()
    settings = {**SETTINGS, "state_dir": str(plane.state_dir)}
    yield from run(directory, free_ports(), plane.database, **settings)


async def test_verify_on_the_process_that_has_no_session(world: World, other: ControlPlane) -> None:
    elsewhere = Client(other)
    findings, summary = await world.verify_all(elsewhere)
    assert keys(findings) == set()
    assert not summary.silent_host_ids
    foreign = artifact(Artifact.KIND_DOMAIN, ids.new("d"), "foreign")
    world.host.artifacts.append(foreign)
    findings, summary = await world.verify_all(elsewhere)
    assert keys(findings) == {("UNKNOWN_ARTIFACT", "foreign")}
    world.host.artifacts.remove(foreign)
    await elsewhere.close()


async def test_a_host_that_does_not_answer_is_named(world: World) -> None:
    """Of it nothing is said to be missing, and of the rest everything is known."""
    world.host.answers = False
    findings, summary = await world.verify_all()
    assert keys(findings) == set()
    assert list(summary.silent_host_ids) == [world.host.id]
    world.host.answers = True
    assert await world.verify() == []
