"""The interceptor in front of every rpc: who calls, may they, is it sound, is there a place for it.

Everything it enforces stands in the contract's options; a method reads as what it does.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import grpc
import structlog
from google.protobuf import descriptor
from google.protobuf.message import DecodeError, Message

from mcloud.common.v1 import options_pb2
from mcloud_base import errors, rpc
from mcloud_controlplane.core import admission, auth, contract, database, slow_reader, tokens

log = structlog.get_logger()

Rule = options_pb2.Rule

# Offered to anyone, without a rule of ours.
_OPEN = ("/grpc.health.v1.Health/", "/grpc.reflection.")
_STATUS_BYTES = 4500  # clients take 8 KiB of trailing metadata, in which it is not all there is
_MOST_USERS = 10_000  # that are not worked out anew at each call
_NOBODY = auth.Caller(kind=Rule.CALLER_ANYONE)
_CHANGING = (Rule.KIND_MUTATE, Rule.KIND_ISSUE, Rule.KIND_STREAM)


@dataclass(frozen=True)
class Limits:
    """What a call may take. Seconds."""

    default_deadline_s: float = 60.0  # of a call that comes without one
    slow_reader_s: float = 30.0  # for a stream's client to take a message


class Gate(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Guards one port.

    Args:
        checker: of bearer tokens.
        internal: the port asks for client certificates.
        is_revoked: tells whether a certificate's serial has been revoked.
        places: of this process, for both its ports.
    """

    def __init__(
        self,
        checker: tokens.TokenChecker,
        *,
        internal: bool,
        is_revoked: Callable[[str], bool],
        places: admission.Admission,
        limits: Limits,
    ) -> None:
        self._checker = checker
        self._places = places
        self._limits = limits
        self._internal = internal
        self._is_revoked = is_revoked
        self._guarded_handlers: dict[str, Any] = {}  # by method; each is made once
        self._users: dict[str, tuple[dict[str, Any], auth.Caller]] = {}  # by token

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        details: grpc.HandlerCallDetails,
    ) -> Any:
        """Wrap the method's handler."""
        known = self._guarded_handlers.get(details.method)
        if known is not None:
            return known
        handler = await continuation(details)
        if handler is None:
            return handler
        if details.method.startswith(_OPEN):
            return self._bounded(handler) if handler.response_streaming else handler
        method = contract.method(details.method)
        if method is None:
            return handler
        found = self._guarded(handler, method, details.method.lstrip("/"))
        self._guarded_handlers[details.method] = found
        return found

    def _bounded(self, handler: Any) -> Any:
        """Bound the streams of what is offered to anyone: health, reflection."""

        async def stream(request: Any, context: auth.Context) -> AsyncIterator[Any]:
            serve = handler.stream_stream if handler.request_streaming else handler.unary_stream
            try:
                async with self._places.place(_NOBODY, context.peer, stays=True):
                    async for answer in self._read(serve(request, context), context, "open"):
                        yield answer
            except errors.Error as error:
                await _refuse(context, error, "open")

        return _HANDLERS[handler.request_streaming, True](
            stream,
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )

    def _guarded(self, handler: Any, method: descriptor.MethodDescriptor, path: str) -> Any:
        policy = _policy(contract.rule(method))
        stays = contract.stays(method)

        async def unary(request: Any, context: auth.Context) -> Any:
            try:
                await self._enter(context, policy, path)
                if not handler.request_streaming:
                    self._check(request)
                async with self._worked_on(context, stays=stays):
                    if handler.request_streaming:
                        answer = await handler.stream_unary(self._checked(request), context)
                    else:
                        answer = await handler.unary_unary(request, context)
                if trailing := auth.call().trailing:
                    context.set_trailing_metadata(tuple(trailing))
                return answer
            except Exception as error:
                await _refuse(context, error, path)

        async def stream(request: Any, context: auth.Context) -> AsyncIterator[Any]:
            try:
                await self._enter(context, policy, path)
                if not handler.request_streaming:
                    self._check(request)
                async with self._worked_on(context, stays=True):
                    if handler.request_streaming:
                        answers = handler.stream_stream(self._checked(request), context)
                    else:
                        answers = handler.unary_stream(request, context)
                    async for answer in self._read(answers, context, path):
                        yield answer
                if auth.call().trailing:
                    context.set_trailing_metadata(tuple(auth.call().trailing))
            except Exception as error:
                await _refuse(context, error, path)

        return _HANDLERS[handler.request_streaming, handler.response_streaming](
            stream if handler.response_streaming else unary,
            request_deserializer=_reader(handler.request_deserializer),
            response_serializer=handler.response_serializer,
        )

    def _check(self, request: Any) -> None:
        """Refuse a request that is not sound.

        What no field of ours stands for is dropped: it could not be masked where it is kept.
        """
        if request is None:
            raise errors.InvalidArgument(
                "BAD_MESSAGE", "the request cannot be read as the message that this call takes"
            )
        if not self._internal:
            request.DiscardUnknownFields()
        contract.validate(request)

    async def _checked(self, requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
        async for request in requests:
            self._check(request)
            yield request

    def _worked_on(
        self, context: auth.Context, *, stays: bool
    ) -> AbstractAsyncContextManager[None]:
        """Hold a place for the call; end it at the default deadline if it has none.

        (At its own, gRPC cancels it.)
        """
        place = self._places.place(auth.caller(), context.peer, stays=stays)
        if stays or database.deadline.get() is not None:
            return place
        return self._ended_by_default(place)

    @asynccontextmanager
    async def _ended_by_default(
        self, place: AbstractAsyncContextManager[None]
    ) -> AsyncIterator[None]:
        allowed_s = self._limits.default_deadline_s
        database.deadline.set(time.monotonic() + allowed_s)
        try:
            async with asyncio.timeout(allowed_s) as bound, place:
                yield
        except TimeoutError as error:
            if not bound.expired():
                raise
            raise errors.DeadlineExceeded(
                "DEADLINE_EXCEEDED",
                f"it took longer than the {allowed_s:g} s of calls that set no deadline",
            ) from error

    def _read(
        self, answers: AsyncIterator[Any], context: auth.Context, path: str
    ) -> AsyncIterator[Any]:
        async def end(error: errors.Error) -> None:
            log.info("slow reader disconnected", method=path, reason=error.reason)
            await _refuse(context, error, path)

        return slow_reader.disconnected(answers, end, self._limits.slow_reader_s)

    async def _enter(self, context: auth.Context, policy: _Policy, path: str) -> None:
        """Authenticate and authorize; then `auth.caller` and `auth.call` tell who and what."""
        metadata = dict(context.invocation_metadata() or ())
        call = auth.Call(
            method=path,
            request_id=str(metadata.get("x-request-id") or _request_id())[:64],
            receive_time=database.now(),
            trace_id=_trace_id(str(metadata.get("traceparent", ""))),
        )
        left = context.time_remaining()
        database.deadline.set(None if left is None else time.monotonic() + left)
        structlog.contextvars.bind_contextvars(request=call.request_id)
        call.authorize_start_time = database.now()
        caller = await self._authenticate(context, metadata, policy)
        _authorize(caller, policy)
        call.authorize_end_time = database.now()
        auth.set_current(caller, call)

    async def _authenticate(
        self, context: auth.Context, metadata: dict[str, Any], policy: _Policy
    ) -> auth.Caller:
        token = str(metadata.get("authorization", ""))
        token = token.removeprefix("Bearer ") if token.startswith("Bearer ") else ""
        if self._internal:
            (pem,) = context.auth_context()["x509_pem_cert"]
            certificate = _certificate(pem)
            if self._is_revoked(certificate.serial):
                raise errors.Unauthenticated(
                    "CERTIFICATE_REVOKED", "this certificate has been revoked; enrol again"
                )
            if policy.delegates and certificate.host_id and token:
                claims = await self._checker.check(token, mutates=False)
                if claims["typ"] == "delegated":
                    return tokens.delegate_from_claims(claims, certificate)
            kind = Rule.CALLER_HOST if certificate.host_id else Rule.CALLER_SERVICE
            name = certificate.host_id or certificate.service
            return auth.Caller(kind=kind, principal_id=name, certificate=certificate)
        if not token:
            return auth.Caller(kind=Rule.CALLER_ANYONE)
        claims = await self._checker.check(token, mutates=policy.changes)
        if claims["typ"] != "user":
            raise errors.Unauthenticated("TOKEN_INVALID", "this token is not for this port")
        known = self._users.get(token)
        if known is None or known[0] is not claims:
            if len(self._users) > _MOST_USERS:
                self._users.clear()
            known = self._users[token] = claims, tokens.caller_from_claims(claims)
        return known[1]


class _Policy(NamedTuple):
    """A rule of the contract as each call asks for it; to read the message takes much longer."""

    callers: frozenset[int]
    anyone: bool
    delegates: bool
    changes: bool
    scope: int
    role: Rule.Role.ValueType


def _policy(rule: Rule) -> _Policy:
    return _Policy(
        callers=frozenset(rule.callers),
        anyone=Rule.CALLER_ANYONE in rule.callers,
        delegates=Rule.CALLER_DELEGATE in rule.callers,
        changes=rule.kind in _CHANGING,
        scope=rule.scope,
        role=rule.role,
    )


def _authorize(caller: auth.Caller, policy: _Policy) -> None:
    """Refuse a caller that the rule does not admit."""
    if policy.anyone:
        return
    if caller.kind not in policy.callers:
        if caller.kind == Rule.CALLER_ANYONE:
            raise errors.Unauthenticated("TOKEN_MISSING", "log in first: mcloud login")
        raise errors.PermissionDenied("WRONG_CALLER", "this call is not for this kind of caller")
    if caller.kind != Rule.CALLER_USER:
        return
    if policy.scope == Rule.SCOPE_SYSTEM:
        caller.require_system(policy.role, "this call")
    elif policy.scope == Rule.SCOPE_PROJECT and not caller.system and not caller.project_id:
        raise errors.PermissionDenied("NO_PROJECT", "log in to a project first")
    if caller.role < policy.role:
        needed = Rule.Role.Name(policy.role).removeprefix("ROLE_").lower()
        raise errors.PermissionDenied("ROLE_REQUIRED", f"this call needs the role {needed}")


def for_caller(error: errors.Error) -> errors.Error:
    """Return the error as the caller is to see it.

    A deadline that passed while the caller's has not was that of a call which this one made: to
    the caller it says no more than that it may try again.
    """
    end = database.deadline.get()
    ours = end is None or end > time.monotonic()
    if error.reason != "DEADLINE_EXCEEDED" or not ours:
        return error
    return errors.Unavailable(
        "SERVICE_SILENT",
        "a service that this call needs does not answer; try again in a moment",
        details=(errors.retry_after(1),),
    )


async def _refuse(context: auth.Context, error: Exception, path: str) -> NoReturn:
    """End the call with the error's status."""
    if isinstance(error, asyncio.CancelledError | grpc.aio.AbortError):
        raise error
    if not isinstance(error, errors.Error):
        log.exception("rpc failed unexpectedly", method=path)
        request_id = structlog.contextvars.get_contextvars().get("request", "")
        error = errors.Internal(
            "INTERNAL",
            f"internal error; tell the operator request {request_id}",
            request=request_id,
        )
    error = for_caller(error)
    if isinstance(error, errors.Unavailable | errors.Internal | errors.DataLoss):
        log.warning("rpc refused", method=path, reason=error.reason)
    status = errors.to_status(error)
    while status.ByteSize() > _STATUS_BYTES and len(status.details) > 1:
        # The ErrorInfo is the first; of the others, the largest goes.
        sizes = [detail.ByteSize() for detail in status.details]
        del status.details[sizes.index(max(sizes[1:]), 1)]
    await context.abort(error.code, error.message, ((rpc.STATUS_KEY, status.SerializeToString()),))


def _reader(parse: Callable[[bytes], Message]) -> Callable[[bytes], Message | None]:
    """Return a parser that answers None to what is no such message, for a method to refuse."""

    def read(raw: bytes) -> Message | None:
        try:
            return parse(raw)
        except DecodeError:
            return None

    return read


def _request_id() -> str:
    return f"{random.getrandbits(64):016x}"  # noqa: S311 (for logs, and no secret)


def _trace_id(traceparent: str) -> str:
    """Return the trace id of a W3C traceparent, if it is one."""
    if not traceparent:
        return ""
    parts = traceparent.split("-")
    if len(parts) == 4 and len(parts[1]) == 32 and set(parts[1]) <= set("0123456789abcdef"):
        return parts[1]
    return ""


_certificates: dict[bytes, auth.Certificate] = {}


def _certificate(pem: bytes) -> auth.Certificate:
    """Return what a certificate says; parsed once for each (hosts call often, with the same)."""
    if pem not in _certificates:
        if len(_certificates) > 20_000:
            _certificates.clear()
        _certificates[pem] = auth.read_certificate(pem)
    return _certificates[pem]


_HANDLERS = {
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}
