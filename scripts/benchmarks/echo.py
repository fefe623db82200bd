"""A bare gRPC server over TLS: returns the bytes that it gets, or streams as many as are asked for.

python -m benchmarks.echo HOST:PORT STATE_DIR_OF_A_CONTROL_PLANE
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc

from mcloud_controlplane.core import pki


async def _echo(request: bytes, _: Any) -> bytes:
    return request


async def _stream(request: bytes, _: Any) -> AsyncIterator[bytes]:
    count, length = map(int, request.split())
    chunk = os.urandom(length)
    for _number in range(count):
        yield chunk


async def main() -> None:
    """Serve until terminated."""
    address, state = sys.argv[1:]
    identity = pki.Authority(Path(state) / "pki").issue_service("echo", ["127.0.0.1"])
    server = grpc.aio.server()
    handlers = {
        "Echo": grpc.unary_unary_rpc_method_handler(_echo),
        "Stream": grpc.unary_stream_rpc_method_handler(_stream),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench.Echo", handlers),))
    credentials = grpc.ssl_server_credentials([(identity.key, identity.certificate)])
    server.add_secure_port(address, credentials)
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(main())
