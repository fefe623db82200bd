"""Fixtures for every test: a control plane on free ports, and who talks to it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import hypothesis
import pytest
import structlog

import ports
from mcloud_base import logs, rpc
from mcloud_controlplane.core import statements


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write what is seen as expected")


# How long an example takes says nothing on a machine that has other work.
hypothesis.settings.register_profile(
    "mcloud", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("mcloud")


def pytest_configure(config: pytest.Config) -> None:
    logs.configure()
    statements.checking = True
    structlog.configure(cache_logger_on_first_use=False)  # so that tests can look at what is said


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compare a text with tests/golden/NAME, or write it with --update-golden."""

    def compare(name: str, text: str) -> None:
        path = Path(__file__).parent / "golden" / name
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        assert text == path.read_text(), f"{name} differs; see it with --update-golden and git diff"

    return compare


@pytest.fixture
def free_ports() -> Callable[[int], list[int]]:
    """Return ports that nobody listens on."""

    return lambda count: [ports.free() for _ in range(count)]


@pytest.fixture
def database_url(tmp_path: Path) -> str:
    """Return what settings.database is to be; a test module may say otherwise."""
    return "sqlite"


class Cloud:
    """A control plane, and stubs with the administrator's token."""

    def __init__(self, public: str, state_dir: Path) -> None:
        self.public = public
        self.state_dir = state_dir
        self.authority = (state_dir / "pki" / "ca.pem").read_bytes()
        self.password = (state_dir / "admin-password").read_text().strip()
        self.channel = rpc.channel(public, grpc.ssl_channel_credentials(self.authority))
        self._tokens: dict[bool, str] = {}

    async def token(self, *, system: bool = False) -> str:
        """Log in as the administrator, to the project or the system."""
        from mcloud.identity.v1 import token_service_pb2, token_service_pb2_grpc

        if system not in self._tokens:
            answer = await rpc.call(
                token_service_pb2_grpc.TokenServiceStub(self.channel).CreateToken,
                token_service_pb2.CreateTokenRequest(
                    password=token_service_pb2.PasswordCredential(
                        user_name="admin", password=self.password
                    ),
                    project="" if system else "default",
                    system=system,
                ),
            )
            self._tokens[system] = answer.token
        return self._tokens[system]

    async def call(
        self, method: Any, request: Any, *, system: bool = False, timeout_s: float = 30
    ) -> Any:
        """Call a method of a stub over `channel` as the administrator."""
        token = await self.token(system=system)
        return await rpc.call(method, request, timeout_s=timeout_s, metadata=rpc.bearer(token))


@pytest.fixture
async def cloud(
    tmp_path: Path, free_ports: Callable[[int], list[int]], database_url: str
) -> AsyncIterator[Cloud]:
    """A whole control plane in this process."""
    from mcloud_controlplane.__main__ import serve
    from mcloud_controlplane.settings import Settings

    public, internal = free_ports(2)
    settings = Settings.model_validate(
        {
            "state_dir": tmp_path / "controlplane",
            "public_listen": f"127.0.0.1:{public}",
            "internal_listen": f"127.0.0.1:{internal}",
            "database": database_url,
        }
    )
    runtime = await serve(settings)
    running = Cloud(settings.public_listen, settings.state_dir)
    yield running
    await running.channel.close()
    await runtime.stop(0)
