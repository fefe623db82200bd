"""A control plane that looks twice within a tenth of a second; everybody else is quick there."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio

from service.core.cloud import ControlPlane
from service.core.plane import postgresql_server, started  # noqa: F401

pytest.register_assert_rewrite("service.conductor.faults", "service.conductor.world")

from service.conductor.world import World  # noqa: E402 (rewritten first)


@pytest.fixture(scope="module", params=["sqlite", pytest.param("pg", marks=pytest.mark.postgres)])
def plane(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ControlPlane]:
    settings = getattr(request.module, "SETTINGS", {"verify_confirm_s": 0.1})
    yield from started(request, tmp_path_factory, **settings)


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def world(plane: ControlPlane) -> AsyncIterator[World]:
    """One instance that is in order, on one host; tests leave it so."""
    async with World(plane) as made:
        yield made
