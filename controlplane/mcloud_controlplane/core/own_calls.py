"""Calls between services of one process: through the gate and the servicer, not over the network.

A call over TLS to oneself costs as much as a step of a workflow does. What is kept of it: messages
are copied, the callee's gate sees the certificate of the caller, deadlines and errors are those of
a call. Streams go over the network.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import grpc

from mcloud_base import tls
from mcloud_controlplane.core import gate

Handlers = Mapping[str, Any]  # by the name of the method


@dataclass(frozen=True)
class _Details:
    """Of a call, for an interceptor."""

    method: str
    invocation_metadata: Any = ()


class Registry:
    """What the process serves: takes servicers as a server does.

    Args:
        guard: of the internal port.
        identity: of this process.
    """

    def __init__(self, guard: gate.Gate, identity: tls.Identity) -> None:
        self._guard = guard
        self._certificate = identity.certificate
        self._handlers: dict[str, Any] = {}
        self._guarded: dict[str, Any] = {}

    def add_generic_rpc_handlers(self, handlers: object) -> None:
        """Take what the generated code says twice."""

    def add_registered_method_handlers(self, service: str, handlers: Handlers) -> None:
        """Take the methods of a service."""
        self._handlers |= {f"/{service}/{name}": handler for name, handler in handlers.items()}

    async def call(self, method: str, request: bytes, timeout_s: float | None, sent: Any) -> bytes:
        """Serve a unary call.

        Raises:
            grpc.aio.AioRpcError: as the call over the network would.
        """
        if method not in self._guarded:

            async def found(_: grpc.HandlerCallDetails) -> Any:
                return self._handlers.get(method)

            details: Any = _Details(method)
            self._guarded[method] = await self._guard.intercept_service(found, details)
        handler = self._guarded[method]
        if handler is None:
            raise _failure(grpc.StatusCode.UNIMPLEMENTED, f"{method} is not served here")
        context = _Context(self._certificate, timeout_s, sent)
        message = handler.request_deserializer(request)
        try:
            async with asyncio.timeout(timeout_s):
                # A task: what the gate sets for it alone is not seen by the caller.
                answer = await asyncio.create_task(handler.unary_unary(message, context))
        except TimeoutError as error:
            raise _failure(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded") from error
        return bytes(handler.response_serializer(answer))


class _Context:
    """What a servicer and its gate ask of the context of a unary call."""

    def __init__(self, certificate: bytes, timeout_s: float | None, sent: Any) -> None:
        self._certificate = certificate
        self._end = None if timeout_s is None else time.monotonic() + timeout_s
        self._sent = tuple(sent or ())

    def invocation_metadata(self) -> Any:
        return self._sent

    def auth_context(self) -> Mapping[str, list[bytes]]:
        return {"x509_pem_cert": [self._certificate]}

    def peer(self) -> str:
        return "own"

    def time_remaining(self) -> float | None:
        return None if self._end is None else max(self._end - time.monotonic(), 0.0)

    def set_trailing_metadata(self, metadata: object) -> None:
        """Nobody asks for it here."""

    async def abort(
        self, code: grpc.StatusCode, details: str = "", trailing_metadata: Any = ()
    ) -> NoReturn:
        raise _failure(code, details, trailing_metadata)


def _failure(code: grpc.StatusCode, text: str, trailing: Any = ()) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(
        code, grpc.aio.Metadata(), grpc.aio.Metadata(*trailing), text, debug_error_string=text
    )


class Channel:
    """A channel for stubs: unary calls to what the registry has, all others to the network."""

    def __init__(self, registry: Registry, network: grpc.aio.Channel) -> None:
        self._registry = registry
        self._network = network

    def unary_unary(
        self,
        method: str,
        request_serializer: Callable[[Any], bytes],
        response_deserializer: Callable[[bytes], Any],
        _registered_method: bool = False,
    ) -> Callable[..., Awaitable[Any]]:
        """Return what a stub calls."""

        async def call(request: Any, *, timeout: float | None = None, metadata: Any = None) -> Any:
            sent = request_serializer(request)
            return response_deserializer(await self._registry.call(method, sent, timeout, metadata))

        return call

    def __getattr__(self, name: str) -> Any:
        return getattr(self._network, name)
