"""Whatever is sent: an answer, or a refusal that says why. Never INTERNAL, never UNKNOWN."""

from __future__ import annotations

import asyncio
import string
from collections import Counter
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mcloud.common.v1 import operation_pb2, options_pb2
from mcloud.network.v1 import (
    network_service_pb2,
    network_service_pb2_grpc,
    subnet_service_pb2,
    subnet_service_pb2_grpc,
)
from mcloud_base import ids, rpc
from mcloud_controlplane.core import pki
from service.core.cloud import (
    Client,
    ControlPlane,
    Rule,
    new_request,
    path,
    refused,
    rpcs,
    rule,
    stub,
)

_EXAMPLES = 800
_OPEN_S = 0.3

_TEXTS = st.sampled_from(
    [
        "", " ", "x", "0", "-1", "\0", "a\0b", "\n", "\r\n", "\t", "\u2028", "\ufeff", "\u202e",
        "é", "e\u0301", "日本", "🙂", "%", "_", "\\", "'", '"', "'; DROP TABLE instance; --",
        '" OR 1=1', "../../etc/passwd", "/etc/passwd", "${HOME}", "$(id)", "{}", "[]", "null",
        "<script>", "name=", 'name="', 'name="x" AND', 'labels.a="b"', 'state="ACTIVE"',
        'labels.%="_"', "name desc", "create_time desc", "create_time asc", "id; --", "NaN",
        "10.0.0.0/8", "10.0.0.1/8", "0.0.0.0/0", "::/0", "fe80::1%eth0", "255.255.255.255",
        "52:54:00:00:00:01", "999999999999999999999999", "9" * 18, "x" * 255, "x" * 256,
        "x" * 1024, "é" * 4096, "x" * 4097, "W10=", "WyJhIiwxLCJiIl0=", "%s%n", "\x7f", "\x85",
    ]
)  # fmt: skip
_NUMBERS = [0, 1, -1, 7, 65_535, 65_536, 2**31 - 1, -(2**31), 2**32 - 1, 2**63 - 1, -(2**63)]
_RANGES = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}
_PATHS = ["name", "labels", "spec", "spec.description", "spec.disabled", "", "x" * 4096, "é" * 999]
_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIFL+PBUWRwLpJsk0qZCz0ytS6RbVKMuHBbU2ZQKrCd5W me"


class Author:
    """Writes requests; every second is careful, so that it gets past the gate and the checks.

    Args:
        known: ids of what exists, by prefix.
    """

    def __init__(self, data: st.DataObject, known: dict[str, list[str]]) -> None:
        self._draw = data.draw
        self._known = known
        self._careful = self._draw(st.booleans())

    def fill(self, message: Any, depth: int = 0) -> None:
        for field in message.DESCRIPTOR.fields:
            rules = field.GetOptions().Extensions[options_pb2.rules]
            inner = field.message_type
            if not rules.required and not self._draw(st.booleans()):
                continue
            if inner is not None and inner.GetOptions().map_entry:
                if inner.fields_by_name["value"].message_type is None:
                    key = "env" if self._careful else self._draw(_TEXTS)
                    getattr(message, field.name)[key] = self._draw(_TEXTS)
            elif field.is_repeated:
                self._fill_many(getattr(message, field.name), field, depth)
            elif inner is None:
                setattr(message, field.name, self._value(field))
            elif depth < 5:
                getattr(message, field.name).SetInParent()
                self.fill(getattr(message, field.name), depth + 1)

    def _fill_many(self, many: Any, field: FieldDescriptor, depth: int) -> None:
        counts = [1, 1, 2] if self._careful or depth > 1 else [0, 1, 2, 40]
        for _ in range(self._draw(st.sampled_from(counts))):
            if field.message_type is not None:
                self.fill(many.add(), depth + 1)
            elif field.name == "paths":
                many.append(self._draw(st.sampled_from(_PATHS)))
            else:
                many.append(self._value(field))

    def _value(self, field: FieldDescriptor) -> Any:
        kind, draw = field.cpp_type, self._draw
        rules = field.GetOptions().Extensions[options_pb2.rules]
        if kind == FieldDescriptor.CPPTYPE_BOOL:
            return draw(st.booleans())
        if kind == FieldDescriptor.CPPTYPE_ENUM:
            known = list(field.enum_type.values_by_number)
            return draw(st.sampled_from(known[1:] if self._careful else [*known, 77]))
        if kind in (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE):
            return draw(st.sampled_from([0.0, 1.5, -1.0, 1e308, float("inf"), float("nan")]))
        if kind in _RANGES:
            low, high = _RANGES[kind]
            bounds = [rules.min, rules.max]
            if not self._careful:
                bounds += [rules.max + 1, rules.min - 1, *_NUMBERS]
            return draw(st.sampled_from([n for n in bounds if low <= n <= high]))
        if field.type == FieldDescriptor.TYPE_BYTES:
            return draw(st.sampled_from([b"", b"\0", b"x", b"\xff\xfe", b"x" * 70_000]))
        return self._text(rules)

    def _text(self, rules: options_pb2.FieldRules) -> str:
        draw = self._draw
        if not self._careful and draw(st.integers(0, 3)) == 0:
            return str(draw(st.one_of(_TEXTS, st.text(max_size=20))))
        if rules.id:
            # The draw itself must not depend on what earlier requests made.
            known = self._known.get(rules.id) or [rules.id + "-" + "0" * 20]
            return known[-1 - draw(st.integers(0, 4)) % len(known)]
        if rules.uuid:
            return ids.request_id()
        if rules.name:
            return str(draw(st.text(string.printable.strip(), min_size=1, max_size=20)))
        for asked, values in (
            (rules.cidr, ["10.0.0.0/24", "0.0.0.0/0", "10.0.0.0/32", "fd00::/64", "10.1.0.0/16"]),
            (rules.ip, ["10.0.0.7", "0.0.0.0", "fd00::1", "255.255.255.255", "10.0.0.255"]),
            (rules.mac, ["52:54:00:00:00:01", "ff:ff:ff:ff:ff:ff"]),
            (rules.pattern == "[0-9a-f]{64}", ["0" * 64]),
            (self._careful, ["", "x", _KEY]),
        ):
            if asked:
                return str(draw(st.sampled_from(values)))
        return str(draw(_TEXTS))


class Caller:
    """Calls over synchronous channels, with the credentials that an rpc asks for."""

    def __init__(self, plane: ControlPlane, project: rpc.Metadata, system: rpc.Metadata) -> None:
        authority = plane.authority()
        service = authority.issue_service("compute", ())
        options = (("grpc.ssl_target_name_override", pki.INTERNAL_NAME), *rpc.CHANNEL_OPTIONS)
        self._public = grpc.secure_channel(
            plane.public,
            grpc.ssl_channel_credentials(authority.certificate),
            options=rpc.CHANNEL_OPTIONS,
        )
        self._internal = grpc.secure_channel(
            plane.internal, service.channel_credentials(), options=options
        )
        self._project, self._system = project, system

    def close(self) -> None:
        self._public.close()
        self._internal.close()

    def call(self, method: descriptor.MethodDescriptor, request: Message) -> tuple[str, Any]:
        """Return the code and the reason of the answer, and the answer itself if there is one."""
        of = rule(method)
        public = Rule.CALLER_USER in of.callers or Rule.CALLER_ANYONE in of.callers
        who: rpc.Metadata = ()
        if Rule.CALLER_USER in of.callers:
            who = self._system if of.scope == Rule.SCOPE_SYSTEM else self._project
        call = stub(self._public if public else self._internal, method)
        timeout = _OPEN_S if method.server_streaming else 20
        answer = None
        try:
            answer = call(request, metadata=tuple(who), timeout=timeout)
            if method.server_streaming:
                for _ in answer:
                    break
                answer.cancel()
        except grpc.RpcError as error:
            code = error.code()  # type: ignore[attr-defined]
            if method.server_streaming and code == grpc.StatusCode.DEADLINE_EXCEEDED:
                return "OK", None
            # (Without an ErrorInfo it is the code's name.)
            return f"{code.name} {rpc.from_rpc_error(error).reason}", None
        return "OK", answer


@pytest.fixture
async def caller(plane: ControlPlane, client: Client) -> Any:
    made = Caller(plane, await client.login(project="default"), await client.login())
    yield made
    made.close()


async def test_no_request_is_an_internal_error(caller: Caller) -> None:
    walk = [m for m in rpcs() if not m.client_streaming and _callable(m)]
    seen: Counter[str] = Counter()
    methods: set[str] = set()
    known: dict[str, list[str]] = {}
    wrong: list[tuple[str, str, Message]] = []

    @settings(
        max_examples=_EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def send(data: st.DataObject) -> None:
        method = data.draw(st.sampled_from(walk))
        request = new_request(method)
        Author(data, known).fill(request)
        outcome, answer = caller.call(method, request)
        seen[outcome] += 1
        methods.add(path(method))
        code, _, reason = outcome.partition(" ")
        if code in ("INTERNAL", "UNKNOWN", "UNIMPLEMENTED", "DATA_LOSS") or code == reason:
            wrong.append((path(method), outcome, request))
        if isinstance(answer, operation_pb2.Operation):
            known.setdefault(ids.prefix_of(answer.resource.id), []).append(answer.resource.id)

    await asyncio.to_thread(send)
    ordered = dict(seen.most_common())
    print(f"hostile: {seen.total()} requests to {len(methods)} rpcs: {ordered}")  # noqa: T201
    assert wrong == []
    assert len(methods) > len(walk) * 0.8
    assert seen["OK"] > _EXAMPLES / 10


@pytest.mark.parametrize("cidr", ["10.9.0.0/32", "10.9.0.0/31", "fd00:9::/128"])
async def test_a_subnet_of_no_address(client: Client, cidr: str) -> None:
    """Found by the test above."""
    who = await client.login(project="default")
    networks = network_service_pb2.CreateNetworkRequest(request_id=ids.request_id(), name=cidr)
    networks.spec.SetInParent()
    stubs = network_service_pb2_grpc.NetworkServiceStub(client.public)
    network = await rpc.call(stubs.CreateNetwork, networks, metadata=who)
    request = subnet_service_pb2.CreateSubnetRequest(request_id=ids.request_id(), name="s")
    request.spec.network_id, request.spec.cidr = network.resource.id, cidr
    subnets = subnet_service_pb2_grpc.SubnetServiceStub(client.public)
    error = await refused(rpc.call(subnets.CreateSubnet, request, metadata=who))
    assert error.reason == "BAD_FIELD"
    assert error.metadata["field"] == "spec.cidr"


def _callable(method: descriptor.MethodDescriptor) -> bool:
    """Leave out what only hosts call, and what would end the token that all this goes with."""
    callers = rule(method).callers
    if method.name.startswith("Revoke"):
        return False
    return any(
        kind in callers for kind in (Rule.CALLER_USER, Rule.CALLER_ANYONE, Rule.CALLER_SERVICE)
    )
