"""A private PostgreSQL server for tests, from Debian's package.

In a conftest: `from fixtures_postgresql import postgresql_server, postgresql_url  # noqa: F401`.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import psycopg
import pytest

BINARIES = Path("/usr/lib/postgresql/15/bin")
# Of every service: a process that runs several has a database for each.
DATABASES = ("identity", "compute", "image", "network", "volume")
_START_S = 60
_numbers = count(1)


@dataclass(frozen=True)
class Server:
    user: str
    port: int

    def url(self, database: str) -> str:
        return f"postgresql://{self.user}@127.0.0.1:{self.port}/{database}"

    def execute(self, statement: str) -> None:
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(statement)  # type: ignore[call-overload]


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[Server]:
    """Start a server for the session: nothing is synced to disk, nothing outlives it."""
    if not (BINARIES / "postgres").exists():
        pytest.skip("Debian's postgresql package is not installed")
    user = _unprivileged_user()
    directory = Path(tempfile.mkdtemp(prefix="mcloud-postgresql-"))
    shutil.chown(directory, user)
    data = directory / "data"
    as_user = {"user": user} if os.geteuid() == 0 else {}
    subprocess.run(
        [BINARIES / "initdb", "-D", data, "-U", user, "--auth=trust", "--no-sync"],
        check=True,
        cwd=directory,
        stdout=subprocess.DEVNULL,
        **as_user,
    )
    port = _free_port()
    options = {
        "listen_addresses": "127.0.0.1",
        "port": port,
        "unix_socket_directories": directory,
        "fsync": "off",
        "synchronous_commit": "off",
        "full_page_writes": "off",
        "max_connections": 200,
        "shared_buffers": "32MB",
    }
    arguments = [f"--{name}={value}" for name, value in options.items()]
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(
            [BINARIES / "postgres", "-D", data, *arguments],
            cwd=directory,
            stdout=log,
            stderr=log,
            **as_user,
        )
    server = Server(user, port)
    try:
        _await_start(server, process, directory / "log")
        yield server
    finally:
        process.send_signal(signal.SIGINT)  # fast: clients are disconnected
        process.wait(timeout=_START_S)
        shutil.rmtree(directory)


@pytest.fixture
def postgresql_url(postgresql_server: Server) -> Iterator[str]:
    """A value for Settings.database: "{name}" stands for the service; fresh for each test."""
    prefix = f"t{next(_numbers)}"
    names = [f"{prefix}_{name}" for name in DATABASES]
    for name in names:
        postgresql_server.execute(f'CREATE DATABASE "{name}"')
    yield postgresql_server.url(f"{prefix}_{{name}}")
    for name in names:
        postgresql_server.execute(f'DROP DATABASE "{name}" WITH (FORCE)')


def _unprivileged_user() -> str:
    """The server refuses to run as root."""
    if os.geteuid() != 0:
        return pwd.getpwuid(os.geteuid()).pw_name
    known = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in known else "nobody"


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _await_start(server: Server, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + _START_S
    while True:
        try:
            server.execute("SELECT 1")
            return
        except psycopg.OperationalError:
            if process.poll() is not None or time.monotonic() > end:
                raise AssertionError(log.read_text()) from None
            time.sleep(0.05)  # nothing tells when it accepts connections but trying
