"""What the machine does without mcloud, measured in the same run as what stands beside it."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import psycopg

from benchmarks import load
from benchmarks.cloud import ADDRESS, SCRIPTS, START_S, ControlPlane, end
from benchmarks.load import Load
from mcloud_base import rpc

_ports = itertools.count(7800)  # none twice: another control plane's authority signs the next
_MESSAGE = bytes(512)  # about as long as an instance
_TABLE = "CREATE TABLE bench (id BIGINT PRIMARY KEY, name TEXT, value TEXT)"


@asynccontextmanager
async def bare_server(plane: ControlPlane) -> AsyncIterator[grpc.aio.Channel]:
    """Run a bare server (echo.py) over the control plane's TLS; give a channel to it."""
    where = f"{ADDRESS}:{next(_ports)}"
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.echo", where, plane.directory],
        cwd=SCRIPTS,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        credentials = grpc.ssl_channel_credentials(plane.authority.read_bytes())
        async with rpc.channel(where, credentials) as channel:
            method = channel.unary_unary("/bench.Echo/Echo")
            await method(_MESSAGE, timeout=START_S, wait_for_ready=True)
            yield channel
    finally:
        end(process)


@asynccontextmanager
async def echo(plane: ControlPlane) -> AsyncIterator[grpc.aio.UnaryUnaryMultiCallable]:
    """Run a bare server; give the method that returns what it gets."""
    async with bare_server(plane) as channel:
        yield channel.unary_unary("/bench.Echo/Echo")


async def echoes(plane: ControlPlane, callers: int, seconds: float) -> Load:
    """Call a bare server for a while."""
    async with echo(plane) as method:

        async def one() -> None:
            await method(_MESSAGE, timeout=30)

        return await load.for_seconds(one, callers, seconds)


def transactions(plane: ControlPlane, place: Path, count: int) -> list[float]:
    """Return how long bare transactions took, in seconds: insert, select, update, commit.

    In a database that is the control plane's neighbour, and as durable.
    """
    if plane.database == "sqlite":
        connection = sqlite3.connect(place / "bench.db", isolation_level=None)
        for pragma in ("journal_mode = wal", "synchronous = full"):
            connection.execute(f"PRAGMA {pragma}")
        connection.execute(_TABLE.replace("CREATE TABLE", "CREATE TABLE IF NOT EXISTS"))
        connection.execute("DELETE FROM bench")
        try:
            return _transactions(connection.execute, "BEGIN IMMEDIATE", "?", count)
        finally:
            connection.close()
    url = plane.database.replace("{name}", "postgres")
    with psycopg.connect(url, autocommit=True) as server:
        server.execute("DROP TABLE IF EXISTS bench")
        server.execute(_TABLE.encode())
        return _transactions(
            lambda sql, *rest: server.execute(sql.encode(), *rest), "BEGIN", "%s", count
        )


def _transactions(execute: Callable[..., object], begin: str, mark: str, count: int) -> list[float]:
    took = []
    for number in range(count):
        start = time.perf_counter()
        execute(begin)
        execute(f"INSERT INTO bench VALUES ({mark}, {mark}, {mark})", (number, "name", "value"))
        execute(f"SELECT * FROM bench WHERE id = {mark}", (number,))
        execute(f"UPDATE bench SET value = {mark} WHERE id = {mark}", ("other", number))
        execute("COMMIT")
        took.append(time.perf_counter() - start)
    return took


async def accepted(plane: ControlPlane, place: Path, count: int) -> list[float]:
    """Return what a recorded request cannot be without, in seconds: an echo and a transaction."""
    bare = await asyncio.to_thread(transactions, plane, place, count)
    async with echo(plane) as method:

        async def one() -> None:
            await method(_MESSAGE, timeout=30)

        calls = await load.calls(one, 1, count)
    return [one + other for one, other in zip(calls.latencies, bare, strict=True)]


async def stream(channel: grpc.aio.Channel, count: int, length: int, target: Path) -> float:
    """Return how long it took to bring messages of a bare server into a file, in seconds."""
    begin = time.perf_counter()
    with target.open("wb") as file:
        request = b"%d %d" % (count, length)
        async for chunk in channel.unary_stream("/bench.Echo/Stream")(request, timeout=600):
            file.write(chunk)
    return time.perf_counter() - begin


def copy(source: Path, target: Path) -> float:
    """Return how long `cp` took, in seconds."""
    begin = time.perf_counter()
    subprocess.run(["cp", "--", source, target], check=True)
    return time.perf_counter() - begin


def copy_and_digest(source: Path, target: Path) -> float:
    """Return how long `cp` and then SHA-256 of the same file took, in seconds."""
    begin = time.perf_counter()
    copy(source, target)
    with target.open("rb") as file:
        hashlib.file_digest(file, "sha256")
    return time.perf_counter() - begin
