"""Every rpc refuses whoever its rule does not admit, on both ports, with any credentials."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from mcloud_base import errors, rpc
from service.core.cloud import Client, Rule, new_request, path, refused, rpcs, rule, stub

_REFUSALS = {
    "TOKEN_MISSING", "TOKEN_INVALID", "WRONG_CALLER", "ROLE_REQUIRED", "NO_PROJECT",
    "BAD_CERTIFICATE",
}  # fmt: skip
_OPEN_S = 3.0  # a stream that has not ended by then was let in


@dataclass(frozen=True)
class Who:
    """A caller, and what it is."""

    name: str
    channel: grpc.aio.Channel
    kind: Any
    metadata: rpc.Metadata = ()
    role: Any = Rule.ROLE_UNSPECIFIED
    system: bool = False
    bad_token: bool = False

    def expected(self, of: Rule) -> str:
        """Return the reason of the refusal; empty: let in."""
        if self.bad_token:
            return "TOKEN_INVALID"
        if Rule.CALLER_ANYONE in of.callers:
            return ""
        if self.kind not in of.callers:
            return "TOKEN_MISSING" if self.kind == Rule.CALLER_ANYONE else "WRONG_CALLER"
        if self.kind != Rule.CALLER_USER:
            return ""
        if of.scope == Rule.SCOPE_SYSTEM and not self.system:
            return "ROLE_REQUIRED"
        return "ROLE_REQUIRED" if self.role < of.role else ""


async def ask(who: Who, method: descriptor.MethodDescriptor, tries: int = 5) -> str:
    """Call with an empty message; return the reason of the refusal, or "" if it was let in."""
    call = stub(who.channel, method)
    request = new_request(method)
    try:
        with rpc.reraised():
            if method.client_streaming:
                answer = call(iter([request]), metadata=who.metadata, timeout=_OPEN_S)
            else:
                answer = call(request, metadata=who.metadata, timeout=_OPEN_S)
            if method.server_streaming:
                async for _ in answer:
                    break
                answer.cancel()
            else:
                await answer
    except errors.Error as error:
        late = isinstance(error, errors.DeadlineExceeded | errors.Unavailable)
        if tries and who.bad_token and late:
            return await ask(who, method, tries - 1)  # nobody had time to look at the token
        if isinstance(error, errors.DeadlineExceeded):
            return ""
        if error.reason == "STREAM_BROKEN":
            return await ask(who, method)  # what it was refused for is lost
        if isinstance(error, errors.Internal):
            return str(error)
        return error.reason if error.reason in _REFUSALS else ""
    return ""


async def test_every_rpc_keeps_to_its_rule(client: Client) -> None:
    reader = await client.make_user("gate-reader", Rule.ROLE_READER, "gate")
    member = await client.make_user("gate-member", Rule.ROLE_MEMBER, "gate")
    admin = await client.make_user("gate-admin", Rule.ROLE_ADMIN, "gate")
    watchman = await client.make_user("gate-watchman", Rule.ROLE_READER)
    user, public = Rule.CALLER_USER, client.public
    callers = [
        Who("nobody", public, Rule.CALLER_ANYONE),
        Who("a forger", public, Rule.CALLER_ANYONE, rpc.bearer("e30.e30.e30"), bad_token=True),
        Who("reader", public, user, reader, Rule.ROLE_READER),
        Who("member", public, user, member, Rule.ROLE_MEMBER),
        Who("admin of a project", public, user, admin, Rule.ROLE_ADMIN),
        Who("reader of the system", public, user, watchman, Rule.ROLE_READER, system=True),
        Who("admin", public, user, await client.login(), Rule.ROLE_ADMIN, system=True),
        Who("service", client.as_service(), Rule.CALLER_SERVICE),
        Who("service with a token", client.as_service(), Rule.CALLER_SERVICE, admin),
        Who("host", client.as_host(), Rule.CALLER_HOST),
    ]
    limit = asyncio.Semaphore(24)
    seen: Counter[str] = Counter()
    wrong: list[str] = []

    async def one(who: Who, method: descriptor.MethodDescriptor) -> None:
        async with limit:
            found = await ask(who, method)
        expected = who.expected(rule(method))
        seen[found] += 1
        if found != expected:
            wrong.append(f"{path(method)} by {who.name}: {found or 'let in'}, not {expected!r}")

    await asyncio.gather(*(one(who, method) for who in callers for method in rpcs()))
    print(f"gate: {seen.total()} calls, {dict(seen)}")  # noqa: T201
    assert wrong == []
    # Each was seen, so the walk was not of an empty set.
    assert {"", "TOKEN_MISSING", "TOKEN_INVALID", "WRONG_CALLER", "ROLE_REQUIRED"} <= set(seen)


async def test_a_token_with_a_hosts_certificate_is_another_hosts(client: Client) -> None:
    """A user's token does not make a host a user, nor a delegate."""
    token = await client.login(project="default")
    for method in rpcs():
        if rule(method).callers[:] == [Rule.CALLER_USER] and not method.client_streaming:
            who = Who("host", client.as_host(), Rule.CALLER_HOST, token)
            assert await ask(who, method) == "WRONG_CALLER"
            return
    pytest.fail("there must be one")


async def test_without_a_client_certificate_the_internal_port_does_not_speak(
    client: Client,
) -> None:
    authority = client.plane.authority().certificate
    channel = rpc.channel(client.plane.internal, grpc.ssl_channel_credentials(authority))
    stubs = health_pb2_grpc.HealthStub(channel)
    with pytest.raises(errors.Unavailable):
        await rpc.call(stubs.Check, health_pb2.HealthCheckRequest(), timeout_s=2)
    await channel.close(None)


async def test_health_is_anybodys_and_unknown_methods_are_unimplemented(client: Client) -> None:
    for channel in (client.public, client.as_host()):
        answer = await rpc.call(
            health_pb2_grpc.HealthStub(channel).Check, health_pb2.HealthCheckRequest()
        )
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        for name in ("/mcloud.compute.v1.InstanceService/Nothing", "/mcloud.x.v1.Y/Z", "/a/b"):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channel.unary_unary(name)(b"")
            assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize(
    "value",
    ["", "Bearer", "Bearer ", "bearer x", "Basic YTpi", "Bearer " + "x" * 5000, "Bearer a.b.c"],
)
async def test_odd_credentials_are_refused(client: Client, value: str) -> None:
    method = next(m for m in rpcs() if m.name == "ListInstances")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub(client.public, method)(
            new_request(method), metadata=(("authorization", value),), timeout=10
        )
    assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
    assert rpc.from_rpc_error(caught.value).reason in ("TOKEN_MISSING", "TOKEN_INVALID")


async def test_what_cannot_be_is_said_field_by_field(client: Client) -> None:
    method = next(m for m in rpcs() if m.name == "CreateFlavor")
    request = new_request(method)
    request.request_id = "not a uuid"
    request.spec.vcpu_count = 2000
    error = await refused(
        rpc.call(stub(client.public, method), request, metadata=await client.login())
    )
    assert error.reason == "BAD_REQUEST"
    detail = errors.find_detail(error, error_details_pb2.BadRequest)
    assert isinstance(detail, error_details_pb2.BadRequest)
    assert [violation.field for violation in detail.field_violations] == [
        "request_id", "name", "spec.vcpu_count", "spec.memory_mib", "spec.disk_gib",
    ]  # fmt: skip
    assert error.metadata["field"] == "request_id"
