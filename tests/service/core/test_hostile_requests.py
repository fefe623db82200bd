"""Whatever is sent: an answer, or a refusal that says why. Never INTERNAL, never UNKNOWN."""

from __future__ import annotations

import pytest

from mcloud.network.v1 import (
    network_service_pb2,
    network_service_pb2_grpc,
    security_group_service_pb2,
    security_group_service_pb2_grpc,
    subnet_service_pb2,
    subnet_service_pb2_grpc,
)
from mcloud_base import ids, rpc
from service.core import fuzz
from service.core.cloud import Client, ControlPlane, refused

_SEED = 3
_CASES = 700
_GROWTH_KIB = 48 << 10  # of a process that warms up


@pytest.mark.parametrize("callers", [fuzz.PUBLIC, fuzz.EVERYBODY], ids=["public", "everybody"])
async def test_whatever_is_sent(
    plane: ControlPlane, client: Client, callers: tuple[str, ...]
) -> None:
    result = await fuzz.Fuzz(plane, client, _SEED, callers).run(_CASES)
    print(f"hostile: {result.as_json()}")  # noqa: T201
    assert result.wrong == []
    assert result.tracebacks == 0
    assert result.cases == _CASES
    assert len(result.methods) > 100
    assert result.reasons["OK"] > _CASES / 10
    assert result.trend_kib() < _GROWTH_KIB
    assert result.findings == []


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


async def test_a_pattern_holds_for_numbers_too(client: Client) -> None:
    who = await client.login(project="default")
    request = security_group_service_pb2.CreateSecurityGroupRuleRequest(request_id=ids.request_id())
    request.spec.security_group_id = ids.new("sg")
    request.spec.direction, request.spec.ip_version = 1, 5
    stub = security_group_service_pb2_grpc.SecurityGroupServiceStub(client.public)
    error = await refused(rpc.call(stub.CreateSecurityGroupRule, request, metadata=who))
    assert (error.reason, error.metadata["field"]) == ("BAD_REQUEST", "spec.ip_version")
