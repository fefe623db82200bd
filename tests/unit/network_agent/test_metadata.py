"""The metadata service over a real socket."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcloud_agents.network.metadata import MetadataServer, Request, answer, list_children, parse

DOCUMENTS = {
    "openstack/latest/meta_data.json": b"{}",
    "openstack/2018-08-27/meta_data.json": b"{}",
    "latest/meta-data/instance-id": b"i-1",
    "latest/meta-data/placement/availability-zone": b"nova",
    "latest/user-data": b"\x00\xff",
}


def test_directories_are_listed_as_each_form_has_it() -> None:
    assert list_children("", DOCUMENTS) == ["latest", "openstack"]
    assert list_children("openstack", DOCUMENTS) == ["2018-08-27", "latest"]
    assert list_children("latest/meta-data", DOCUMENTS) == ["instance-id", "placement/"]
    assert list_children("lat", DOCUMENTS) == []


@pytest.mark.parametrize(
    ("head", "path"),
    [
        (b"GET / HTTP/1.1", ""),
        (b"GET //latest//user-data HTTP/1.0", "latest/user-data"),
        (b"GET /latest/meta-data/?recursive=true HTTP/1.1", "latest/meta-data/"),
        (b"GET http://169.254.169.254/latest HTTP/1.1", "latest"),
        (b"GET /latest/user%2Ddata HTTP/1.1\r\nHost: x", "latest/user-data"),
    ],
)
def test_paths(head: bytes, path: str) -> None:
    request = parse(head)
    assert request is not None
    assert request.path == path


@given(st.binary(max_size=300))
def test_no_request_breaks_the_parser(head: bytes) -> None:
    answer(parse(head), DOCUMENTS)


def test_a_proxy_is_refused() -> None:
    assert answer(Request("GET", "latest", True), DOCUMENTS).status == 403
    head = b"GET /latest HTTP/1.1\r\nX-Forwarded-For: 10.0.0.1"
    assert answer(parse(head), DOCUMENTS).status == 403


@pytest.fixture
async def address() -> AsyncIterator[tuple[str, int]]:
    server = MetadataServer({"port-1": DOCUMENTS}.get, timeout_s=0.5)
    listener = socket.create_server(("127.0.0.1", 0))
    await server.serve("net-1", 1, listener, {"127.0.0.1": "port-1"}.get)
    assert server.serves("net-1", 1)
    assert not server.serves("net-1", 2)
    yield listener.getsockname()
    await server.close()


async def ask(address: tuple[str, int], request: bytes) -> bytes:
    async with asyncio.timeout(30):
        reader, writer = await asyncio.open_connection(*address)
        writer.write(request)
        reply = await reader.read()
        writer.close()
        return reply


async def test_over_the_wire(address: tuple[str, int]) -> None:
    reply = await ask(address, b"GET /latest/user-data HTTP/1.1\r\n\r\n")
    head, _, body = reply.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"Content-Length: 2" in head
    assert b"application/octet-stream" in head
    assert body == b"\x00\xff"
    reply = await ask(address, b"HEAD /latest/user-data HTTP/1.1\r\n\r\n")
    assert reply.endswith(b"\r\n\r\n")


async def test_a_guest_cannot_fill_the_service(address: tuple[str, int]) -> None:
    assert await ask(address, b"GET /" + b"x" * 100_000) == b""
    silent = [await asyncio.open_connection(*address) for _ in range(20)]
    async with asyncio.timeout(30):  # the first ones time out, the others are refused at once
        for reader, _ in silent:
            assert await reader.read() == b""
    for _, writer in silent:
        writer.close()
    reply = await ask(address, b"GET / HTTP/1.1\r\n\r\n")
    assert reply.endswith(b"latest\nopenstack")
