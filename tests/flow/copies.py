"""Copies of the control plane over one database, each with every service, which may be killed."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from conftest import Cloud
from mcloud_base import rpc

_START_S = 120


class Copies:
    """`public` and `internal` name all of them, as settings do."""

    def __init__(
        self, directory: Path, ports: list[int], database_url: str, **settings: object
    ) -> None:
        self.state_dir = directory / "state"
        self._directory = directory
        addresses = [f"127.0.0.1:{port}" for port in ports]
        self.public, self.internal = ",".join(addresses[::2]), ",".join(addresses[1::2])
        self.running: list[subprocess.Popen[bytes] | None] = [None] * (len(ports) // 2)
        for number in range(len(self.running)):
            values = {
                "state_dir": str(self.state_dir),
                "public_listen": self.public.split(",")[number],
                "internal_listen": self.internal.split(",")[number],
                "internal_advertise": self.internal,
                "database": database_url,
                **settings,
            }
            lines = [f"{key} = {json.dumps(value)}" for key, value in values.items()]
            self._config(number).write_text("\n".join(lines))

    def _config(self, number: int) -> Path:
        return self._directory / f"copy-{number}.toml"

    def log(self, number: int) -> str:
        return self._config(number).with_suffix(".log").read_text()

    def start(self, number: int) -> None:
        with self._config(number).with_suffix(".log").open("ab") as log:
            self.running[number] = subprocess.Popen(
                [sys.executable, "-m", "mcloud_controlplane", "--config", self._config(number)],
                stdout=log,
                stderr=log,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            )

    def kill(self, number: int) -> None:
        process = self.running[number]
        assert process is not None
        assert process.poll() is None, self.log(number)
        process.kill()
        process.wait()

    def freeze(self, number: int, *, frozen: bool = True) -> None:
        process = self.running[number]
        assert process is not None
        process.send_signal(signal.SIGSTOP if frozen else signal.SIGCONT)

    async def serves(self, number: int) -> None:
        """Wait until one answers."""
        process = self.running[number]
        assert process is not None
        ca = self.state_dir / "pki" / "ca.pem"
        async with asyncio.timeout(_START_S):
            while not ((self.state_dir / "admin-password").exists() and ca.exists()):
                assert process.poll() is None, self.log(number)
                await asyncio.sleep(0.05)  # nothing tells when a file is there but looking
        channel = rpc.channel(
            self.public.split(",")[number], grpc.ssl_channel_credentials(ca.read_bytes())
        )
        check = health_pb2_grpc.HealthStub(channel).Check
        answer = await rpc.call(check, health_pb2.HealthCheckRequest(), timeout_s=_START_S)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING, self.log(number)
        await channel.close(None)

    def end(self) -> None:
        for process in self.running:
            if process is not None and process.poll() is None:
                process.kill()
                process.wait()


@asynccontextmanager
async def running_copies(
    directory: Path,
    free_ports: Callable[[int], list[int]],
    database_url: str,
    count: int = 2,
    **settings: object,
) -> AsyncIterator[tuple[Copies, Cloud]]:
    """Run copies, started at once; and a client of all of them."""
    copies = Copies(directory, free_ports(2 * count), database_url, **settings)
    try:
        for number in range(count):
            copies.start(number)
        for number in range(count):
            await copies.serves(number)
        cloud = Cloud(copies.public, copies.state_dir)
        yield copies, cloud
        await cloud.channel.close(None)
    finally:
        copies.end()
