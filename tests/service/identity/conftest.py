"""A control plane of identity alone."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import ports
from mcloud_controlplane.__main__ import serve
from mcloud_controlplane.settings import Settings
from service.identity.cloud import Cloud


@pytest.fixture
def settings(tmp_path: Path, database_url: str) -> Settings:
    return Settings(
        state_dir=tmp_path / "state",
        services=("identity",),
        public_listen=f"127.0.0.1:{ports.free()}",
        internal_listen=f"127.0.0.1:{ports.free()}",
        database=database_url,
    )


@pytest.fixture
async def cloud(settings: Settings) -> AsyncIterator[Cloud]:
    runtime = await serve(settings)
    made = Cloud(settings, runtime)
    yield made
    await made.close()
    await runtime.stop(0)
