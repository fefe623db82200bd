"""The metadata service, 169.254.169.254, in the forms of OpenStack and EC2.

A listener in each network's service namespace; all of them belong to the agent's event loop. Who
asks is told by the network that the listener is in and by the source address, which the filter
keeps honest; so a port without port security, whose address may be anybody's, is told nothing.

It is a small server of its own: GET and HEAD of documents that are in memory, one a connection,
with every wait and size bounded, since those who ask are strangers.

Source: https://docs.openstack.org/nova/latest/user/metadata.html,
    https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/instancedata-data-retrieval.html
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from urllib.parse import unquote

import structlog

_log = structlog.get_logger(__name__)

# Bodies by path without leading slash; None if nothing is known of the port.
Documents = Callable[[str], Mapping[str, bytes] | None]
# Port id by source address; None if nobody on this host has it, or nobody who may ask.
Finder = Callable[[str], str | None]

_HEAD_LIMIT = 8192
_CONNECTIONS_PER_GUEST = 8


@dataclass(frozen=True)
class Request:
    """What matters of a request's head."""

    method: str
    path: str  # without leading slash
    forwarded: bool


@dataclass(frozen=True)
class Answer:
    """A response."""

    status: HTTPStatus
    body: bytes = b""
    content_type: str = "text/plain; charset=utf-8"


def parse(head: bytes) -> Request | None:
    """Read a request's head; None if it is none.

    Source: RFC 9112, section 3.
    """
    lines = head.decode("latin-1").split("\r\n")
    words = lines[0].split(" ")
    if len(words) != 3 or not words[2].startswith("HTTP/1."):
        return None
    target = words[1].partition("?")[0]
    if target.lower().startswith("http://"):
        target = "/" + target[7:].partition("/")[2]
    if not target.startswith("/"):
        return None
    headers = {line.partition(":")[0].strip().lower() for line in lines[1:]}
    path = "/".join(part for part in unquote(target).split("/") if part)
    slash = "/" if path and target.endswith("/") else ""
    return Request(words[0], path + slash, "x-forwarded-for" in headers)


def answer(request: Request | None, documents: Mapping[str, bytes] | None) -> Answer:
    """Answer a request of a guest.

    Args:
        request: None if it could not be read.
        documents: of the guest; None if it is unknown.
    """
    if request is None:
        return Answer(HTTPStatus.BAD_REQUEST)
    if request.method not in ("GET", "HEAD"):
        return Answer(HTTPStatus.METHOD_NOT_ALLOWED)
    if request.forwarded:  # a proxy in the guest, asking for somebody who should not know
        return Answer(HTTPStatus.FORBIDDEN)
    if documents is None:
        return Answer(HTTPStatus.NOT_FOUND)
    bare = request.path.rstrip("/")
    # A document may itself be a listing, as EC2's "public-keys/" is: "0=name".
    for path in (request.path, bare + "/"):
        if path in documents:
            kind = "application/json" if path.endswith(".json") else "text/plain; charset=utf-8"
            if path.rpartition("/")[2] in ("user_data", "user-data"):
                kind = "application/octet-stream"
            return Answer(HTTPStatus.OK, documents[path], kind)
    children = list_children(bare, documents)
    if not children:
        return Answer(HTTPStatus.NOT_FOUND)
    return Answer(HTTPStatus.OK, "\n".join(children).encode())


def list_children(directory: str, documents: Mapping[str, bytes]) -> list[str]:
    """Return what stands directly below a path.

    EC2 marks directories with a slash, below meta-data only; versions have none in either form.
    """
    prefix = f"{directory}/" if directory else ""
    children: dict[str, bool] = {}
    for path in documents:
        if path.startswith(prefix):
            name, deeper, _ = path[len(prefix) :].partition("/")
            if name:
                children[name] = children.get(name, False) or bool(deeper)
    marked = "meta-data" in directory.split("/")
    return sorted(f"{name}/" if marked and deep else name for name, deep in children.items())


class MetadataServer:
    """Listeners by network id.

    Args:
        documents: of the guest with a port id.
        timeout_s: in which a guest has to ask and to read.
    """

    def __init__(self, documents: Documents, timeout_s: float = 10.0) -> None:
        self._timeout_s = timeout_s
        self._documents = documents
        self._servers: dict[str, tuple[int, asyncio.Server]] = {}
        self._connections: Counter[tuple[str, str]] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()

    def serves(self, network_id: str, identity: int) -> bool:
        """Tell whether there is a listener in this namespace of a network."""
        return network_id in self._servers and self._servers[network_id][0] == identity

    def networks(self) -> set[str]:
        """Return the networks that have a listener."""
        return set(self._servers)

    async def serve(
        self, network_id: str, identity: int, listener: socket.socket, find: Finder
    ) -> None:
        """Answer a network's guests on a listening socket, which is the server's from now on.

        Args:
            network_id: whose guests they are.
            identity: of the namespace that the socket is in.
            listener: bound.
            find: tells whose an address is.
        """

        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            peer = writer.get_extra_info("peername")
            key = (network_id, peer[0] if peer else "")
            task = asyncio.current_task()
            assert task is not None
            self._tasks.add(task)
            self._connections[key] += 1
            try:
                if self._connections[key] <= _CONNECTIONS_PER_GUEST:
                    async with asyncio.timeout(self._timeout_s):
                        await self._converse(reader, writer, find(key[1]))
            except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
                pass  # a guest that says nothing, too much, or goes away: its own affair
            finally:
                self._tasks.discard(task)
                self._connections[key] -= 1
                if not self._connections[key]:
                    del self._connections[key]
                writer.close()

        server = await asyncio.start_server(connected, sock=listener, limit=_HEAD_LIMIT)
        self._servers[network_id] = (identity, server)

    async def _converse(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, port_id: str | None
    ) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        request = parse(head[:-4])
        documents = self._documents(port_id) if port_id else None
        reply = answer(request, documents)
        _log.debug("metadata asked", port=port_id, status=reply.status.value)
        fields = [
            f"HTTP/1.1 {reply.status.value} {reply.status.phrase}",
            f"Content-Type: {reply.content_type}",
            f"Content-Length: {len(reply.body)}",
            "Connection: close",
        ]
        writer.write("\r\n".join([*fields, "", ""]).encode())
        if request is None or request.method != "HEAD":
            writer.write(reply.body)
        await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()
            await reader.read(1)  # let the guest read to the end before the socket closes

    async def stop(self, network_id: str) -> None:
        """End a network's listener."""
        found = self._servers.pop(network_id, None)
        if found is not None:
            found[1].close()
            await found[1].wait_closed()

    async def close(self) -> None:
        """End all listeners and conversations."""
        for network_id in list(self._servers):
            await self.stop(network_id)
        for task in list(self._tasks):
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*self._tasks, return_exceptions=True)
