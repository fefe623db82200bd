"""Calling: channels with the settings both ends agree on, deadlines, retries, errors by type."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import grpc
from google.rpc import status_pb2

from mcloud_base import errors

# Both ends must agree on keep-alive: a server answers pings that are more frequent than it allows
# with GOAWAY. Source: https://grpc.github.io/grpc/cpp/md_doc_keepalive.html
KEEPALIVE_S = 20
CHANNEL_OPTIONS: Sequence[tuple[str, Any]] = (
    ("grpc.keepalive_time_ms", KEEPALIVE_S * 1000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_receive_message_length", 8 << 20),
    ("grpc.max_send_message_length", 8 << 20),
    ("grpc.enable_retries", 0),  # retried here, where the deadline and the error's type are known
)

# google.rpc.Status of a failed call, in its trailing metadata.
STATUS_KEY = "grpc-status-details-bin"

# What grpc.aio's client says where a message cannot be sent because the server has just ended the
# call; what the server said is lost with it.
_TORN = "Internal error from Core"

RequestT = TypeVar("RequestT", contravariant=True)
ResponseT = TypeVar("ResponseT", covariant=True)
Metadata = Sequence[tuple[str, str | bytes]]


class UnaryCall(Protocol[RequestT, ResponseT]):
    """A unary method of an asynchronous stub."""

    def __call__(
        self, request: RequestT, *, timeout: float | None = None, metadata: Any = None
    ) -> Awaitable[ResponseT]:
        """Make the call."""


def channel(
    target: str, credentials: grpc.ChannelCredentials, *, server_name: str = ""
) -> grpc.aio.Channel:
    """Open an asynchronous channel.

    Args:
        target: host:port.
        credentials: TLS always; a client certificate for the internal port.
        server_name: what the server's certificate must say, if not the target's host.
    """
    options = list(CHANNEL_OPTIONS)
    if server_name:
        options.append(("grpc.ssl_target_name_override", server_name))
    return grpc.aio.secure_channel(target, credentials, options=options)


def bearer(token: str) -> Metadata:
    """Return the metadata that carries a token."""
    return (("authorization", f"Bearer {token}"),)


async def call(
    method: UnaryCall[RequestT, ResponseT],
    request: RequestT,
    *,
    timeout_s: float = 10,
    metadata: Metadata | Callable[[], Metadata] = (),
) -> ResponseT:
    """Call a unary method; try again on UNAVAILABLE, with back-off and jitter, until the deadline.

    Safe because mutations carry request ids and internal calls are idempotent.

    Raises:
        errors.Error: by the call's status; DeadlineExceeded (DEADLINE_EXCEEDED) at the deadline.
    """
    end = time.monotonic() + timeout_s
    pause = 0.05
    while True:
        try:
            left = max(end - time.monotonic(), 0.001)
            values = metadata() if callable(metadata) else metadata
            return await method(request, timeout=left, metadata=tuple(values) or None)
        except grpc.RpcError as error:
            reason = from_rpc_error(error)
            if not isinstance(reason, errors.Unavailable) or time.monotonic() + pause >= end:
                raise reason from error
        await asyncio.sleep(pause * random.uniform(0.8, 1.2))  # noqa: S311 (jitter, not a secret)
        pause = min(pause * 2, 2.0)


@contextmanager
def reraised() -> Iterator[None]:
    """Turn the errors of the calls inside into those of `errors`."""
    try:
        yield
    except grpc.RpcError as error:
        raise from_rpc_error(error) from error


async def received(stream: AsyncIterator[ResponseT]) -> AsyncIterator[ResponseT]:
    """Yield what a stream brings; its failure is raised as one of `errors`."""
    with reraised():
        async for message in stream:
            yield message


def from_rpc_error(error: grpc.RpcError) -> errors.Error:
    """Return the typed error that a failed call stands for."""
    metadata: Any = error.trailing_metadata() if hasattr(error, "trailing_metadata") else None
    for key, value in metadata or ():
        if key == STATUS_KEY and isinstance(value, bytes):
            return errors.from_status(status_pb2.Status.FromString(value))
    code = error.code() if hasattr(error, "code") else grpc.StatusCode.UNKNOWN
    text = error.details() if hasattr(error, "details") else str(error)
    if code is grpc.StatusCode.INTERNAL and text == _TORN:
        return errors.Unavailable(
            "STREAM_BROKEN", "the server ended the call while it was sent a message; try again"
        )
    return errors.from_status(status_pb2.Status(code=code.value[0], message=text or code.name))
