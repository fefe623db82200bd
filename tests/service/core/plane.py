"""The fixtures `plane` and `client`, over SQLite and PostgreSQL; imported by conftests."""

from __future__ import annotations

import itertools
import socket
from collections.abc import AsyncIterator, Iterator

import pytest

from fixtures_postgresql import DATABASES, postgresql_server  # noqa: F401
from service.core.cloud import Client, ControlPlane, run

_schemas = itertools.count(1)


@pytest.fixture(scope="module", params=["sqlite", pytest.param("pg", marks=pytest.mark.postgres)])
def plane(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ControlPlane]:
    """A control plane for the tests of a module; they keep to projects of their own."""
    database = "sqlite"
    if request.param == "pg":
        server = request.getfixturevalue("postgresql_server")
        schema = f"plane{next(_schemas)}"
        for name in DATABASES:
            server.execute(f"CREATE SCHEMA {schema}", name)
        database = server.url("{name}", schema)
    yield from run(tmp_path_factory.mktemp("plane"), _free_ports(), database)


@pytest.fixture
async def client(plane: ControlPlane) -> AsyncIterator[Client]:
    made = Client(plane)
    yield made
    await made.close()


def _free_ports() -> list[int]:
    found = [socket.socket() for _ in range(2)]
    for each in found:
        each.bind(("127.0.0.1", 0))
    ports = [int(each.getsockname()[1]) for each in found]
    for each in found:
        each.close()
    return ports
