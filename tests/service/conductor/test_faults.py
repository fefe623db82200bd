"""Each fault alone is found, and nothing else, and mended. Together: test_verify.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from service.conductor import faults
from service.conductor.world import World
from service.core.cloud import ControlPlane
from service.core.plane import started

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module", params=["sqlite"])
def plane(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ControlPlane]:
    """Over SQLite only: the rules are the same, and over PostgreSQL they are tested together."""
    yield from started(request, tmp_path_factory, verify_confirm_s=0.05)


@pytest.mark.parametrize("plant", faults.TOGETHER, ids=lambda plant: plant.__name__)
async def test_a_fault_is_found_and_mended(world: World, plant: faults.Plant) -> None:
    await faults.check(world, plant)
    assert await world.verify() == []
