"""Tokens: issuing one, and checking one within a service that knows of 10,000 revocations.

The check is the services' own (core/tokens.py), in this process, following the real feed; CPU time
of its thread. Its yardstick is one bare verification of an Ed25519 signature, which a token that
was seen before does not need any more. That of issuing one for a password is its Argon2 hash.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from benchmarks import fixtures, load, report, services, simulated
from benchmarks.client import Client
from benchmarks.cloud import ControlPlane
from benchmarks.plan import Plan
from benchmarks.report import Curve, Figure
from mcloud.identity.v1 import (
    application_credential_service_pb2,
    application_credential_service_pb2_grpc,
    token_service_pb2,
    token_service_pb2_grpc,
)
from mcloud_base import ids, rpc
from mcloud_controlplane.core.tokens import TokenChecker
from mcloud_controlplane.identity import passwords

REVOCATIONS = 10_000
CALLERS = 16


@dataclass
class Samples:
    """Milliseconds, but for the rate; one a repeat."""

    seen: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    verification: list[float] = field(default_factory=list)
    issue: list[float] = field(default_factory=list)
    issue_rate: list[float] = field(default_factory=list)
    argon2: list[float] = field(default_factory=list)


def run(plan: Plan) -> list[Figure]:
    """Measure."""
    with simulated.running(plan) as cloud:
        fixtures.revoke(cloud.plane, plan.size(REVOCATIONS, 500))
        samples = asyncio.run(_measure(plan, cloud.plane, plan.size(REVOCATIONS, 500)))
    figure = report.figure
    return [
        figure("token_check_cpu", samples.seen, "ms", yardstick=samples.verification),
        figure("token_check_cpu_first", samples.first, "ms", yardstick=samples.verification),
        figure("token_issue_p50", samples.issue, "ms", yardstick=samples.argon2),
        figure(
            "token_issue_rate",
            samples.issue_rate,
            "/s",
            yardstick=[1000 / each for each in samples.argon2],
        ),
    ]


def growth(plan: Plan) -> list[Curve]:
    """Measure with ever more revocations."""
    points, there = [], 0
    with simulated.running(plan) as cloud:
        for count in (10, 100, 1_000, plan.size(10_000, 2_000)):
            fixtures.revoke(cloud.plane, count - there)
            there = count
            samples = asyncio.run(_measure(Plan(1, plan.quick), cloud.plane, count))
            points.append((count, samples.seen[0]))
    return [Curve("token_check_cpu", "ms", "revocations", points)]


async def _measure(plan: Plan, plane: ControlPlane, revocations: int) -> Samples:
    samples = Samples()
    tokens_each, checks = plan.size(100, 20), plan.size(20_000, 2_000)
    async with Client(plane) as client, _checker(plane, revocations) as checker:
        credential = await credential_of(client)
        for _ in range(plan.repeats):
            fresh = [await token_of(client, credential) for _ in range(tokens_each)]
            for found, tokens in (
                (samples.first, fresh),
                (samples.seen, fresh * (checks // tokens_each)),
            ):
                begin = time.thread_time()
                for token in tokens:
                    await checker.check(token, mutates=True)
                found.append(1000 * (time.thread_time() - begin) / len(tokens))
            samples.verification.append(_verification_ms())
            samples.argon2 += [_argon2_ms() for _ in range(5)]

            async def issue() -> None:
                await Client(plane, channel=client.channel).log_in(system=False)

            samples.issue.append((await load.calls(issue, 1, plan.size(30, 5))).median_ms)
            found_rate = await load.for_seconds(issue, CALLERS, plan.size(5.0, 1.0))
            samples.issue_rate.append(found_rate.rate)
    return samples


class _Feed:
    """Identity as a checker sees it; notes how many revocations have come."""

    def __init__(self, stub: Any) -> None:
        self.ListSigningKeys = stub.ListSigningKeys
        self.CheckToken = stub.CheckToken
        self._stub = stub
        self.received = 0
        self.complete = asyncio.Event()

    async def WatchRevocations(  # noqa: N802
        self, request: token_service_pb2.WatchRevocationsRequest
    ) -> AsyncIterator[token_service_pb2.WatchRevocationsResponse]:
        """Pass on."""
        async for message in self._stub.WatchRevocations(request):
            yield message
            self.received += len(message.revocations)
            if message.revision:
                self.complete.set()


@asynccontextmanager
async def _checker(plane: ControlPlane, revocations: int) -> AsyncIterator[TokenChecker]:
    """Run a checker that knows all revocations."""
    async with services.channel(plane) as channel:
        feed = _Feed(token_service_pb2_grpc.TokenServiceStub(channel))
        checker = TokenChecker(feed)  # type: ignore[arg-type]
        following = asyncio.create_task(checker.follow())
        try:
            async with asyncio.timeout(30):
                await feed.complete.wait()
            assert feed.received >= revocations, feed.received
            yield checker
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)


async def credential_of(client: Client) -> token_service_pb2.ApplicationCredentialSecret:
    """Make an application credential of the administrator: tokens for it need no Argon2."""
    stub = application_credential_service_pb2_grpc.ApplicationCredentialServiceStub(client.channel)
    request = application_credential_service_pb2.CreateApplicationCredentialRequest(
        request_id=ids.request_id(), name=f"bench-{ids.request_id()}"
    )
    made = await client.call(stub.CreateApplicationCredential, request)
    return token_service_pb2.ApplicationCredentialSecret(
        id=made.application_credential.metadata.id, secret=made.secret
    )


async def token_of(
    client: Client, credential: token_service_pb2.ApplicationCredentialSecret
) -> str:
    """Return a token that nobody has seen."""
    stub = token_service_pb2_grpc.TokenServiceStub(client.channel)
    request = token_service_pb2.CreateTokenRequest(application_credential=credential)
    answer = await rpc.call(stub.CreateToken, request, timeout_s=30)
    return str(answer.token)


def _verification_ms() -> float:
    key = Ed25519PrivateKey.generate()
    message = bytes(500)
    signature, public = key.sign(message), key.public_key()
    begin = time.thread_time()
    for _ in range(200):
        public.verify(signature, message)
    return 1000 * (time.thread_time() - begin) / 200


def _argon2_ms() -> float:
    begin = time.perf_counter()
    passwords.hash_now("password")
    return 1000 * (time.perf_counter() - begin)
