"""Fixtures of the tests on a real host."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fakes.host_cloud import HostCloud, running_cloud

CASES = pytest.StashKey[list[str]]()


@pytest.fixture(scope="module")
def host_cloud(request: pytest.FixtureRequest) -> Iterator[HostCloud]:
    """A control plane and one host, for all tests of a module; killed, it comes back quickly."""
    with running_cloud(operation_lease_s=2) as cloud:
        failed = request.session.testsfailed
        yield cloud
        if request.session.testsfailed > failed:
            print(cloud.logs())


@pytest.fixture(scope="session")
def case_table(pytestconfig: pytest.Config) -> list[str]:
    """Lines that are printed when all is done."""
    return pytestconfig.stash.setdefault(CASES, [])


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Print what came of each case of failure."""
    lines = config.stash.get(CASES, [])
    if lines:
        terminalreporter.section("cases of failure")
        for line in lines:
            terminalreporter.write_line(line)
