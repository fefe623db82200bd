"""The fixtures `plane` and `client`, over SQLite and PostgreSQL; imported by conftests."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

import ports
from fixtures_postgresql import DATABASES, postgresql_server  # noqa: F401
from service.core.cloud import Client, ControlPlane, run

_schemas = itertools.count(1)


@pytest.fixture(scope="module", params=["sqlite", pytest.param("pg", marks=pytest.mark.postgres)])
def plane(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ControlPlane]:
    """A control plane for the tests of a module; they keep to projects of their own."""
    yield from started(request, tmp_path_factory)


def started(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, **settings: Any
) -> Iterator[ControlPlane]:
    """Start one over the database of the fixture's parameter, for a fixture of a module's own."""
    database = "sqlite"
    if request.param == "pg":
        server = request.getfixturevalue("postgresql_server")
        schema = f"plane{next(_schemas)}"
        for name in DATABASES:
            server.execute(f"CREATE SCHEMA {schema}", name)
        database = server.url("{name}", schema)
    yield from run(tmp_path_factory.mktemp("plane"), free_ports(), database, **settings)


@pytest.fixture
async def client(plane: ControlPlane) -> AsyncIterator[Client]:
    made = Client(plane)
    yield made
    await made.close()


def free_ports() -> list[int]:
    return [ports.free(), ports.free()]
