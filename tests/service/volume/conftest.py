"""A control plane of identity and volume, and a host that stores volumes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import ports
from fixtures_postgresql import postgresql_server, postgresql_url  # noqa: F401
from mcloud_controlplane.__main__ import serve
from mcloud_controlplane.core import workflow
from mcloud_controlplane.settings import Settings
from service.image.cloud import Project
from service.volume.cloud import VolumeCloud
from service.volume.storage_host import StorageHost


@pytest.fixture
def database_url(request: pytest.FixtureRequest) -> str:
    """A value for Settings.database: SQLite, unless the test asks for `both_databases`."""
    if getattr(request, "param", "sqlite") == "sqlite":
        return "sqlite"
    return str(request.getfixturevalue("postgresql_url"))


@pytest.fixture
def settings(tmp_path: Path, database_url: str) -> Settings:
    return Settings(
        state_dir=tmp_path / "state",
        services=("identity", "volume"),
        public_listen=f"127.0.0.1:{ports.free()}",
        internal_listen=f"127.0.0.1:{ports.free()}",
        database=database_url,
    )


@pytest.fixture
def probe() -> workflow.Probe:
    return workflow.no_probe


@pytest.fixture
async def cloud(settings: Settings, probe: workflow.Probe) -> AsyncIterator[VolumeCloud]:
    runtime = await serve(settings, probe=probe)
    made = VolumeCloud(settings, runtime)
    yield made
    await made.close()
    await runtime.stop(0)


@pytest.fixture
async def project(cloud: VolumeCloud) -> Project:
    return await cloud.project("demo")


@pytest.fixture
async def storage(cloud: VolumeCloud) -> AsyncIterator[StorageHost]:
    host = StorageHost(cloud.host())
    await host.start()
    yield host
    await host.stop()
