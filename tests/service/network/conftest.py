"""A control plane of identity and network, over SQLite and PostgreSQL."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import ports
from fixtures_postgresql import postgresql_server, postgresql_url  # noqa: F401
from mcloud_controlplane.__main__ import serve
from mcloud_controlplane.settings import Settings
from service.network.cloud import Cloud


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def database_url(request: pytest.FixtureRequest) -> str:
    """A value for Settings.database."""
    if request.param == "sqlite":
        return "sqlite"
    return str(request.getfixturevalue("postgresql_url"))


@pytest.fixture
def settings(tmp_path: Path, database_url: str) -> Settings:
    return Settings(
        state_dir=tmp_path / "state",
        services=("identity", "network"),
        public_listen=f"127.0.0.1:{ports.free()}",
        internal_listen=f"127.0.0.1:{ports.free()}",
        database=database_url,
    )


@pytest.fixture
async def cloud(settings: Settings) -> AsyncIterator[Cloud]:
    runtime = await serve(settings)
    made = Cloud(settings, runtime)
    yield made
    for stubs in made.opened:
        await stubs.channel.close(None)
    await runtime.stop(0)
