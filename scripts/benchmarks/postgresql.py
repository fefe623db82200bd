"""A private PostgreSQL server, from Debian's package, that keeps what it has committed."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psycopg

# Of the services: a process that runs several has a database for each.
DATABASES = ("identity", "compute", "image", "network", "volume")
_BINARIES = Path("/usr/lib/postgresql/15/bin")
_START_S = 60.0


@dataclass(frozen=True)
class Server:
    """A running server, on the port that it usually has."""

    pid: int

    @property
    def url(self) -> str:
        """For the settings: {name} stands for a database."""
        return "postgresql://postgres@127.0.0.1:5432/{name}"


@contextmanager
def running(directory: Path) -> Iterator[Server]:
    """Run a server with its defaults, but for more connections, in a private network."""
    if not (_BINARIES / "postgres").exists():
        raise RuntimeError("Debian's postgresql package is not installed")
    account = pwd.getpwnam("postgres")  # the server refuses to run as root
    directory.mkdir()
    for path in (directory.parent, directory):
        shutil.chown(path, account.pw_uid, account.pw_gid)
    # (Not by subprocess's `user`, with which it forks, and with it whatever runs gRPC.)
    ids = ["--reuid", str(account.pw_uid), "--regid", str(account.pw_gid), "--clear-groups"]
    arguments = ["-D", directory / "data", "-U", "postgres", "--auth=trust"]
    subprocess.run(
        ["setpriv", *ids, _BINARIES / "initdb", *arguments],
        check=True,
        cwd=directory,
        stdout=subprocess.DEVNULL,
    )
    options = {
        "listen_addresses": "127.0.0.1",
        "unix_socket_directories": directory,
        "max_connections": 200,
    }
    settings = [f"--{name}={value}" for name, value in options.items()]
    with (directory / "log").open("ab") as log:
        process = subprocess.Popen(
            ["setpriv", *ids, _BINARIES / "postgres", "-D", directory / "data", *settings],
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    server = Server(process.pid)
    try:
        _await_start(server, process, directory / "log")
        with psycopg.connect(server.url.format(name="postgres"), autocommit=True) as connection:
            for name in DATABASES:
                connection.execute(f"CREATE DATABASE {name}".encode())
        yield server
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()
        shutil.chown(directory.parent, os.geteuid(), os.getegid())


def _await_start(server: Server, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + _START_S
    while True:
        try:
            psycopg.connect(server.url.format(name="postgres")).close()
            return
        except psycopg.OperationalError:
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(log.read_text()) from None
            time.sleep(0.05)  # nothing tells when it accepts connections but trying
