"""A private PostgreSQL server for tests, from Debian's package.

In a conftest: `from fixtures_postgresql import postgresql_server, postgresql_url  # noqa: F401`.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import psycopg
import pytest

import ports

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


class Running:
    """A server in a process; nothing is synced to disk. It can be stopped and started again.

    Args:
        directory: for its files.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        user = _unprivileged_user()
        account = pwd.getpwnam(user)
        # (Not by subprocess's `user`, with which it forks, and with it whatever runs gRPC.)
        ids = ["--reuid", str(account.pw_uid), "--regid", str(account.pw_gid), "--clear-groups"]
        self._setpriv: list[str] = ["setpriv", *(ids if os.geteuid() == 0 else [])]
        self.server = Server(user, ports.free())
        shutil.chown(directory, user)
        options = ["-D", directory / "data", "-U", user, "--auth=trust", "--no-sync"]
        subprocess.run(
            [*self._setpriv, BINARIES / "initdb", *options],
            check=True,
            cwd=directory,
            stdout=subprocess.DEVNULL,
        )
        self.start()
        for name in DATABASES:
            self.server.execute(f"CREATE DATABASE {name}")

    def start(self) -> None:
        """Start it, and wait until it accepts connections."""
        options = {
            "listen_addresses": "127.0.0.1",
            "port": self.server.port,
            "unix_socket_directories": self._directory,
            # The machine does not crash, the server does, in tests: what it has committed stays.
            "fsync": "off",
            "full_page_writes": "off",
            "max_connections": 200,
            "shared_buffers": "32MB",
        }
        arguments = [f"--{name}={value}" for name, value in options.items()]
        program = [BINARIES / "postgres", "-D", self._directory / "data", *arguments]
        with (self._directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                # Ends, fast, with the process that tests, however that ends.
                [*self._setpriv, "--pdeathsig", "INT", *program],
                cwd=self._directory,
                stdout=log,
                stderr=log,
            )
        _await_start(self.server, self._process, self._directory / "log")

    def stop(self, *, immediately: bool = False) -> None:
        """Stop it; clients are disconnected.

        Args:
            immediately: as a crash does; the next start recovers.
        """
        self._process.send_signal(signal.SIGQUIT if immediately else signal.SIGINT)
        self._process.wait(timeout=_START_S)

    def freeze(self, *, frozen: bool = True) -> None:
        """Have it, and who serves each client, answer nothing; or go on."""
        pid = self._process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        for each in (pid, *map(int, children)):
            with suppress(ProcessLookupError):
                os.kill(each, signal.SIGSTOP if frozen else signal.SIGCONT)


@contextmanager
def running() -> Iterator[Running]:
    """Start a server in a directory of its own; remove both at the end."""
    if not (BINARIES / "postgres").exists():
        pytest.skip("Debian's postgresql package is not installed")
    directory = Path(tempfile.mkdtemp(prefix="mcloud-postgresql-"))
    try:
        made = Running(directory)
        try:
            yield made
        finally:
            made.stop()
    finally:
        shutil.rmtree(directory)


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[Server]:
    """Start a server for the session: nothing is synced to disk, nothing outlives it."""
    with running() as made:
        yield made.server


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
