"""The compute database alone, over SQLite and PostgreSQL: the fixture `opened`; its statements."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fixtures_postgresql import postgresql_url  # noqa: F401
from mcloud_controlplane.compute import model
from mcloud_controlplane.core.database import Database


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    url = f"sqlite://{tmp_path}/compute.db"
    if request.param == "postgresql":
        url = str(request.getfixturevalue("postgresql_url")).replace("{name}", "compute")
    made = model.open_database(url)
    yield made
    made.close()


@contextmanager
def counted(opened: Database) -> Iterator[list[str]]:
    """Collect the statements that are run."""
    store: Any = opened.peewee
    run, statements = store.execute_sql, []

    def execute_sql(sql: str, *rest: Any) -> Any:
        statements.append(sql)
        return run(sql, *rest)

    store.execute_sql = execute_sql
    try:
        yield statements
    finally:
        del store.execute_sql
