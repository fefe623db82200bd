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
# Of the services: a process that runs several has a database for each.
DATABASES = ("identity", "compute", "image", "network", "volume")
_START_S = 60
_END_OTHERS = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid()
"""
_numbers = count(1)


@dataclass(frozen=True)
class Server:
    user: str
    port: int

    def url(self, database: str, schema: str = "public") -> str:
        path = f"options=-csearch_path%3D{schema}"
        return f"postgresql://{self.user}@127.0.0.1:{self.port}/{database}?{path}"

    def execute(self, statement: str, database: str = "postgres") -> None:
        with psycopg.connect(self.url(database), autocommit=True) as connection:
            connection.execute(statement.encode())


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[Server]:
    """Start a server for the session: nothing is synced to disk, nothing outlives it."""
    if not (BINARIES / "postgres").exists():
        pytest.skip("Debian's postgresql package is not installed")
    user = _unprivileged_user()
    directory = Path(tempfile.mkdtemp(prefix="mcloud-postgresql-"))
    shutil.chown(directory, user)
    data = directory / "data"
    as_root = os.geteuid() == 0
    account = pwd.getpwnam(user)
    uid, gid = (account.pw_uid, account.pw_gid) if as_root else (None, None)
    groups: list[int] | None = [] if as_root else None
    subprocess.run(
        [BINARIES / "initdb", "-D", data, "-U", user, "--auth=trust", "--no-sync"],
        check=True,
        cwd=directory,
        stdout=subprocess.DEVNULL,
        user=uid,
        group=gid,
        extra_groups=groups,
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
            # Ends, fast, with the process that tests, however that ends.
            ["setpriv", "--pdeathsig", "INT", BINARIES / "postgres", "-D", data, *arguments],
            cwd=directory,
            stdout=log,
            stderr=log,
            user=uid,
            group=gid,
            extra_groups=groups,
        )
    server = Server(user, port)
    try:
        _await_start(server, process, directory / "log")
        for name in DATABASES:
            server.execute(f"CREATE DATABASE {name}")
        yield server
    finally:
        process.send_signal(signal.SIGINT)  # fast: clients are disconnected
        process.wait(timeout=_START_S)
        shutil.rmtree(directory)


@pytest.fixture
def postgresql_url(postgresql_server: Server) -> Iterator[str]:
    """A value for Settings.database: "{name}" stands for the service.

    The databases are the session's, which saves seconds; a schema in each is the test's own.
    """
    schema = f"t{next(_numbers)}"
    for name in DATABASES:
        postgresql_server.execute(f"CREATE SCHEMA {schema}", name)
    yield postgresql_server.url("{name}", schema)
    for name in DATABASES:
        # Those of processes that were killed hold locks.
        postgresql_server.execute(_END_OTHERS, name)
        postgresql_server.execute(f"DROP SCHEMA {schema} CASCADE", name)


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
