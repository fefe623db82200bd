"""Calling: channels with the settings both ends agree on, deadlines, retries, errors by type."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import grpc
from google.rpc import error_details_pb2, status_pb2

from mcloud_base import endpoints, errors

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
    # Each call goes to the next of the addresses that answer.
    ("grpc.service_config", '{"loadBalancingConfig": [{"round_robin": {}}]}'),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 5_000),
)

# google.rpc.Status of a failed call, in its trailing metadata.
STATUS_KEY = "grpc-status-details-bin"

# Rows of an operation's trace that a service gives to a host, in the trailing metadata of its
# answer; the host reports them with its own.
STEP_KEY = "mcloud-step-bin"

# What grpc.aio's client says where a message cannot be sent because the server has just ended the
# call; what the server said is lost with it.
_TORN = "Internal error from Core"

# Refusals of RESOURCE_EXHAUSTED that are of the moment: nothing was begun.
_BUSY = frozenset({"TOO_MANY_REQUESTS", "DATABASE_BUSY"})

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
    where: str, credentials: grpc.ChannelCredentials, *, server_name: str = ""
) -> grpc.aio.Channel:
    """Open an asynchronous channel.

    Args:
        where: host:port, or several that answer alike, with commas (endpoints.py).
        credentials: TLS always; a client certificate for the internal port.
        server_name: what the server's certificate must say, if not the host of `where`.

    Raises:
        errors.InvalidArgument: BAD_ENDPOINT.
    """
    options = channel_options(where, server_name)
    return grpc.aio.secure_channel(endpoints.target(where), credentials, options=options)


def channel_options(where: str, server_name: str = "") -> list[tuple[str, Any]]:
    """Return the options of a channel; of several addresses the certificate's common name counts.

    Args: as `channel` takes them.
    """
    if not server_name and "," in where:
        server_name = endpoints.SERVICE_NAME
    named = [("grpc.ssl_target_name_override", server_name)] if server_name else []
    return [*CHANNEL_OPTIONS, *named]


def bearer(token: str) -> Metadata:
    """Return the metadata that carries a token."""
    return (("authorization", f"Bearer {token}"),)


# Of a try: one that is cut off says nothing, and hides why those before it were refused.
_LEAST_S = 0.1


async def call(
    method: UnaryCall[RequestT, ResponseT],
    request: RequestT,
    *,
    timeout_s: float = 10,
    metadata: Metadata | Callable[[], Metadata] = (),
) -> ResponseT:
    """Call a unary method; try again while the server is unavailable or busy, until the deadline.

    With back-off and jitter, and not before the server's RetryInfo says.
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
            if not _passes(reason):
                raise reason from error
            wait = max(pause, asked_to_wait_s(reason)) * random.uniform(0.8, 1.2)  # noqa: S311
            if time.monotonic() + wait + _LEAST_S >= end:
                raise reason from error
        await asyncio.sleep(wait)
        pause = min(pause * 2, 2.0)


def asked_to_wait_s(error: errors.Error) -> float:
    """Return how long the server asks a caller to wait before the next try; 0 if it does not."""
    info = errors.find_detail(error, error_details_pb2.RetryInfo)
    if not isinstance(info, error_details_pb2.RetryInfo):
        return 0.0
    return float(info.retry_delay.ToMilliseconds()) / 1000


def _passes(error: errors.Error) -> bool:
    """Tell whether the same call may succeed a little later."""
    return isinstance(error, errors.Unavailable) or error.reason in _BUSY


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
