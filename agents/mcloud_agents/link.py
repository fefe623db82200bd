"""A channel to one internal port that survives a change of the host's certificate.

gRPC's Python channels keep the certificate that they were opened with. Stubs are made once, from
a Link, which passes each call to the channel of the day.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import grpc

from mcloud_base import endpoints, errors, rpc, tls

# Is told each call that has ended, with its method.
Told = Callable[[str, grpc.aio.Call], object]


class Link(grpc.aio.Channel):
    """The part of a channel that stubs use.

    Args:
        target: host:port, or several that answer alike, with commas.
        told: of each call that has ended.
    """

    def __init__(self, target: str, identity: tls.Identity, told: Told | None = None) -> None:
        self._target = target
        self._told = told
        self._channel = self._open(identity)
        # Calls under way by channel. A former channel is closed with the last of them: closing it
        # earlier would cancel a long download in the midst of somebody's work.
        self._calls: Counter[grpc.aio.Channel] = Counter()
        self._closing: set[asyncio.Task[None]] = set()

    def renew(self, identity: tls.Identity) -> None:
        """Make every further call with this certificate."""
        former, self._channel = self._channel, self._open(identity)
        if not self._calls[former]:
            self._close_former(former)

    def _open(self, identity: tls.Identity) -> grpc.aio.Channel:
        credentials = identity.channel_credentials()
        return rpc.channel(self._target, credentials, server_name=endpoints.SERVICE_NAME)

    def _close_former(self, channel: grpc.aio.Channel) -> None:
        del self._calls[channel]
        closing = asyncio.create_task(channel.close(None))
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)

    async def close(self, grace: float | None = None) -> None:
        """Close it for good."""
        for channel in {self._channel, *self._calls}:
            await channel.close(grace)
        if self._closing:
            await asyncio.wait(self._closing)

    def unary_unary(self, *args: Any, **kwargs: Any) -> Any:
        """Return a callable for a method, as the three below do."""
        return self._method("unary_unary", args, kwargs)

    def unary_stream(self, *args: Any, **kwargs: Any) -> Any:
        """See unary_unary."""
        return self._method("unary_stream", args, kwargs)

    def stream_unary(self, *args: Any, **kwargs: Any) -> Any:
        """See unary_unary."""
        return self._method("stream_unary", args, kwargs)

    def stream_stream(self, *args: Any, **kwargs: Any) -> Any:
        """See unary_unary."""
        return self._method("stream_stream", args, kwargs)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        """See grpc.aio.Channel."""
        return self._channel.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        """See grpc.aio.Channel."""
        await self._channel.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        """See grpc.aio.Channel."""
        await self._channel.channel_ready()

    async def __aenter__(self) -> Link:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def _method(self, kind: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Callable[..., Any]:
        made: tuple[grpc.aio.Channel | None, Any] = (None, None)

        def call(*call_args: Any, **call_kwargs: Any) -> Any:
            nonlocal made
            channel = self._channel
            if made[0] is not channel:
                made = channel, getattr(channel, kind)(*args, **kwargs)
            running = made[1](*call_args, **call_kwargs)
            self._calls[channel] += 1
            running.add_done_callback(lambda ended: self._on_end(channel, args[0], ended))
            return running

        return call

    def _on_end(self, channel: grpc.aio.Channel, method: str, ended: grpc.aio.Call) -> None:
        if self._told is not None:
            self._told(method, ended)
        self._calls[channel] -= 1
        if channel is not self._channel and not self._calls[channel]:
            self._close_former(channel)


class Links:
    """The links to all services; several services may share one.

    Args:
        endpoint: host:port of the services that are not named in `endpoints`.
        endpoints: host:port by service.
        told: of each call that has ended.
    """

    def __init__(
        self,
        endpoint: str,
        endpoints: dict[str, str],
        identity: tls.Identity,
        told: Told | None = None,
    ) -> None:
        self._endpoint = endpoint
        self._endpoints = endpoints
        self._identity = identity
        self._told = told
        self._links: dict[str, Link] = {}

    def to(self, service: str) -> Link:
        """Return the link to a service: "conductor"."""
        target = self._endpoints.get(service, self._endpoint)
        if target not in self._links:
            self._links[target] = Link(target, self._identity, self._told)
        return self._links[target]

    def renew(self, identity: tls.Identity) -> None:
        """Make every further call with this certificate."""
        self._identity = identity
        for link in self._links.values():
            link.renew(identity)

    async def close(self) -> None:
        """Close all of them."""
        for link in self._links.values():
            await link.close()


@contextmanager
def cancelled_call_told() -> Iterator[None]:
    """Turn the cancellation of a call inside into an error.

    grpc.aio raises CancelledError for it, which would end a task that nobody has cancelled.

    Raises:
        Cancelled: CALL_CANCELLED.
    """
    try:
        yield
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise errors.Cancelled("CALL_CANCELLED", "the stream was ended here") from error
