"""Calls every rpc, as everybody, with whatever can be sent; counts what comes back."""

from __future__ import annotations

import asyncio
import itertools
import re
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import grpc
from google.protobuf import descriptor, message_factory

from fakes import hostile
from mcloud.common.v1 import operation_pb2
from mcloud.conductor.v1 import verify_service_pb2, verify_service_pb2_grpc
from mcloud.identity.v1 import token_service_pb2, token_service_pb2_grpc
from mcloud_base import errors, ids, rpc, tls
from mcloud_controlplane.core import contract, pki
from service.core.cloud import Client, ControlPlane, Rule, path, rpcs, rule

PUBLIC = ("anonymous", "user", "operator", "forger")
EVERYBODY = (*PUBLIC, "service", "host", "delegate")
_AT_ONCE = 16
_CALL_S = 30.0
_STREAM_S = 0.2  # a stream that has not ended by then is left
_BATCHES = 10
# What would end the tokens that all this goes with, or stop the rest from being checked.
_LEFT_OUT = re.compile(r"Revoke|ChangePassword|Repair")
_KINDS = {
    "anonymous": Rule.CALLER_ANYONE, "user": Rule.CALLER_USER, "operator": Rule.CALLER_USER,
    "service": Rule.CALLER_SERVICE, "host": Rule.CALLER_HOST, "delegate": Rule.CALLER_DELEGATE,
}  # fmt: skip
# Said by gRPC itself, which knows no reasons: at the client's deadline, of what is too large.
_BARE = {"DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "CANCELLED"}
_NEVER = {"INTERNAL", "UNKNOWN", "UNIMPLEMENTED"}


@dataclass
class Result:
    """What a run has seen."""

    seed: int
    cases: int = 0
    codes: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    methods: Counter[str] = field(default_factory=Counter)
    callers: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    rss_kib: list[int] = field(default_factory=list)  # of the control plane, after each batch
    findings: list[str] = field(default_factory=list)  # of Verify, at the end
    tracebacks: int = 0

    def trend_kib(self) -> float:
        """Return by how much memory grew over the second half of the batches."""
        half = self.rss_kib[len(self.rss_kib) // 2 :]
        third = max(len(half) // 3, 1)
        return sum(half[-third:]) / third - sum(half[:third]) / third

    def as_json(self) -> dict[str, Any]:
        """Return everything, for machines."""
        counters = ("codes", "reasons", "methods", "callers")
        values = {
            **vars(self),
            **{name: dict(getattr(self, name).most_common()) for name in counters},
        }
        return {**values, "rpcs": len(self.methods), "trend_kib": self.trend_kib()}


class Fuzz:
    """One run against a control plane.

    Args:
        seed: names it.
        callers: of EVERYBODY, who calls.
    """

    def __init__(
        self, plane: ControlPlane, client: Client, seed: int, callers: Sequence[str]
    ) -> None:
        self._plane = plane
        self._client = client
        self._callers = callers
        self._known: dict[str, list[str]] = {}
        self._ways: dict[str, tuple[grpc.aio.Channel, rpc.Metadata]] = {}
        self._methods = [m for m in rpcs() if not _LEFT_OUT.search(m.name)]
        self.result = Result(seed)

    async def run(self, cases: int) -> Result:
        """Send that many requests; then see whether all is well."""
        await self._log_in()
        numbers = iter(range(cases))
        size = max(cases // _BATCHES, 1)
        while True:
            batch = list(itertools.islice(numbers, size))
            if not batch:
                break
            left = iter(batch)
            await asyncio.gather(*(self._work(left) for _ in range(_AT_ONCE)))
            self.result.rss_kib.append(rss_kib(self._plane.pids[-1]))
        self.result.tracebacks = self._plane.log.read_text().count("Traceback")
        if set(self._callers) <= set(PUBLIC):  # services and hosts may say of things what is not so
            await self._verify()
        return self.result

    async def _log_in(self) -> None:
        client, public = self._client, self._client.public
        service = client.as_service()
        host_id, key = ids.new("h"), tls.new_key()
        authority = self._plane.authority()
        pem = pki._pem(
            authority.issue_host(tls.signing_request(key, host_id), host_id, "127.0.0.1")
        )
        host = client._internal(tls.Identity(key, pem, authority.certificate))
        delegated = await rpc.call(
            token_service_pb2_grpc.TokenServiceStub(service).CreateDelegatedToken,
            token_service_pb2.CreateDelegatedTokenRequest(
                host_id=host_id,
                certificate_sha256=tls.fingerprint(pem),
                project_id="default",
                domain_id=ids.new("d"),
            ),
        )
        self._ways = {
            "anonymous": (public, ()),
            "user": (public, await client.login(project="default")),
            "operator": (public, await client.login()),
            "forger": (public, rpc.bearer("e30.e30.e30")),
            "service": (service, ()),
            "host": (host, ()),
            "delegate": (host, rpc.bearer(delegated.token)),
        }
        self._known["h"] = [host_id]

    async def _work(self, numbers: Any) -> None:
        for number in numbers:
            random = Random(f"{self.result.seed}:{number}")
            method = random.choice(self._methods)
            admitted = [w for w in self._callers if _KINDS.get(w) in rule(method).callers]
            who = random.choice(admitted if admitted and random.random() < 0.8 else self._callers)
            outcome = await self._call(random, method, who)
            code, _, reason = outcome.partition(" ")
            result = self.result
            result.cases += 1
            result.codes[code] += 1
            result.reasons[reason or "OK"] += 1
            result.methods[path(method)] += 1
            result.callers[who] += 1
            if code in _NEVER or (reason == code and code not in _BARE):
                result.wrong.append(f"case {number}: {path(method)} by {who}: {outcome}")

    async def _call(self, random: Random, method: descriptor.MethodDescriptor, who: str) -> str:
        """Return the code and, after a refusal, the reason: without ErrorInfo the code again."""
        channel, metadata = self._ways[who]
        stays = contract.stays(method)
        call = _stub(channel, method)
        timeout = _STREAM_S if stays else _CALL_S
        try:
            if method.client_streaming:
                asked: Any = call(
                    self._messages(random, method), metadata=metadata, timeout=timeout
                )
            else:
                _, raw = hostile.written(random, method, self._known)
                asked = call(raw, metadata=metadata, timeout=timeout)
            if method.server_streaming:
                async for _ in asked:
                    if random.random() < 0.5:
                        break
                asked.cancel()
                return "OK"
            answer = await asked
        except grpc.aio.AioRpcError as error:
            found = rpc.from_rpc_error(error)
            if stays and isinstance(found, errors.DeadlineExceeded):
                return "OK"
            return f"{found.code.name} {found.reason}"
        except asyncio.CancelledError:
            if (task := asyncio.current_task()) is not None and task.cancelling():
                raise
            return "CANCELLED CANCELLED"  # gRPC says it so when a stream's call has ended
        if isinstance(answer, operation_pb2.Operation) and answer.resource.id:
            self._known.setdefault(ids.prefix_of(answer.resource.id), []).append(answer.resource.id)
        return "OK"

    async def _messages(
        self, random: Random, method: descriptor.MethodDescriptor
    ) -> AsyncIterator[bytes]:
        """Yield messages of a stream in any order, also after what is its end."""
        for _ in range(random.choice([0, 1, 2, 6])):
            _, raw = hostile.written(random, method, self._known)
            yield raw

    async def _verify(self) -> None:
        stub = verify_service_pb2_grpc.VerifyServiceStub(self._client.public)
        stream = stub.Verify(
            verify_service_pb2.VerifyRequest(),
            metadata=tuple(await self._client.login()),
            timeout=120,
        )
        async for answer in rpc.received(aiter(stream)):
            if answer.HasField("finding"):
                self.result.findings.append(str(answer.finding))


def _stub(channel: Any, method: descriptor.MethodDescriptor) -> Any:
    """Return the callable for an rpc that takes bytes."""
    forms = {
        (False, False): channel.unary_unary,
        (False, True): channel.unary_stream,
        (True, False): channel.stream_unary,
        (True, True): channel.stream_stream,
    }
    answer: Any = message_factory.GetMessageClass(method.output_type)
    return forms[method.client_streaming, method.server_streaming](
        path(method), request_serializer=None, response_deserializer=answer.FromString
    )


def rss_kib(pid: int) -> int:
    """Return the memory that a process holds."""
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1])
