"""Flows run over SQLite and over PostgreSQL."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

import ports
from fixtures_postgresql import postgresql_server, postgresql_url  # noqa: F401
from flow import fault_cloud
from flow.databases import new_schema
from flow.fault_world import World

BOTH = ("sqlite", pytest.param("postgresql", marks=pytest.mark.postgres))


@pytest.fixture(scope="module", params=BOTH)
def module_database(request: pytest.FixtureRequest) -> str:
    """Return what settings.database is to be for all tests of a module."""
    if request.param == "sqlite":
        return "sqlite"
    return new_schema(request.getfixturevalue("postgresql_server"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(module_database: str) -> AsyncIterator[World]:
    """A cloud for the tests of a module, which leave it as they have found it."""
    # In memory where there is any: nothing here is about the machine's power.
    memory = Path("/dev/shm")
    directory = Path(
        tempfile.mkdtemp(prefix="mcloud-flow-", dir=memory if memory.is_dir() else None)
    )
    settings = fault_cloud.settings(directory, [ports.free(), ports.free()], module_database)
    made = World(settings)
    try:
        await made.start()
        yield made
    finally:
        await made.stop()
        shutil.rmtree(directory)
