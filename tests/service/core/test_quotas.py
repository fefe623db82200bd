"""The quotas that every package has: read, set, enforced, and whose they are."""

from __future__ import annotations

import importlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import pytest

from mcloud.image.v1 import image_pb2, image_service_pb2, image_service_pb2_grpc
from mcloud.network.v1 import (
    network_service_pb2,
    network_service_pb2_grpc,
    port_service_pb2,
    port_service_pb2_grpc,
    subnet_service_pb2,
    subnet_service_pb2_grpc,
)
from mcloud.volume.v1 import volume_service_pb2, volume_service_pb2_grpc
from mcloud_base import errors, ids, rpc
from service.core.cloud import Client, Rule, refused, unpack
from service.core.keys import Keys, new_project


class Quotas:
    """The QuotaService of one package."""

    def __init__(self, client: Client, package: str) -> None:
        self.client = client
        self.messages: Any = importlib.import_module(f"mcloud.{package}.v1.quota_service_pb2")
        self.quota: Any = importlib.import_module(f"mcloud.{package}.v1.quota_pb2").Quota
        grpc_module = importlib.import_module(f"mcloud.{package}.v1.quota_service_pb2_grpc")
        self.stub: Any = grpc_module.QuotaServiceStub(client.public)

    async def get(self, who: rpc.Metadata, project_id: str = "") -> Any:
        request = self.messages.GetQuotaRequest(project_id=project_id)
        return await rpc.call(self.stub.GetQuota, request, metadata=who)

    async def set(self, project_id: str, *paths: str, who: rpc.Metadata = (), **limits: int) -> Any:
        request = self.messages.UpdateQuotaRequest(
            request_id=ids.request_id(), project_id=project_id, limits=limits
        )
        request.limits.SetInParent()
        request.update_mask.paths.extend(paths or limits)
        who = who or await self.client.login()
        operation = await rpc.call(self.stub.UpdateQuota, request, metadata=who)
        return unpack(operation, self.quota)


@dataclass(frozen=True)
class Member:
    """Somebody with a project of their own."""

    client: Client
    who: rpc.Metadata
    project_id: str

    async def call(self, stub: Any, method: str, request: Any, **spec: Any) -> Any:
        request.request_id = ids.request_id()
        request.name = ids.request_id()
        request.spec.SetInParent()
        request.spec.MergeFrom(type(request.spec)(**spec))
        return await rpc.call(getattr(stub(self.client.public), method), request, metadata=self.who)


async def new_member(client: Client) -> Member:
    project = new_project()
    who = await client.make_user(project, Rule.ROLE_MEMBER, project)
    operation = await Keys(client.public, who).create("one")
    return Member(client, who, operation.project_id)


async def add_port(member: Member) -> None:
    """On a network that is made if there is none."""
    networks = network_service_pb2_grpc.NetworkServiceStub
    found = await rpc.call(
        networks(member.client.public).ListNetworks,
        network_service_pb2.ListNetworksRequest(),
        metadata=member.who,
    )
    if found.networks:
        network_id = found.networks[0].metadata.id
    else:
        request = network_service_pb2.CreateNetworkRequest()
        network_id = (await member.call(networks, "CreateNetwork", request)).resource.id
        await member.call(
            subnet_service_pb2_grpc.SubnetServiceStub,
            "CreateSubnet",
            subnet_service_pb2.CreateSubnetRequest(),
            network_id=network_id,
            cidr="10.0.0.0/24",
        )
    await member.call(
        port_service_pb2_grpc.PortServiceStub,
        "CreatePort",
        port_service_pb2.CreatePortRequest(),
        network_id=network_id,
    )


async def add_volume(member: Member) -> None:
    """Nothing stores volumes here: one that the quota allows is refused for that."""
    request = volume_service_pb2.CreateVolumeRequest()
    stub = volume_service_pb2_grpc.VolumeServiceStub
    error = await refused(member.call(stub, "CreateVolume", request, size_gib=2))
    if error.reason != "NO_STORAGE":
        raise error


async def add_image(member: Member) -> None:
    request = image_service_pb2.CreateImageRequest()
    await member.call(
        image_service_pb2_grpc.ImageServiceStub,
        "CreateImage",
        request,
        disk_format=image_pb2.DISK_FORMAT_RAW,
    )


@dataclass(frozen=True)
class Case:
    """A package, its defaults, and a limit that the test reaches."""

    package: str
    defaults: dict[str, int]
    limit: str
    first: int  # of the limit, which does not allow one more
    add: Callable[[Member], Awaitable[None]]
    counted: dict[str, int]  # once one was added


CASES = [
    Case(
        "network",
        {
            "network_count": 100,
            "subnet_count": 100,
            "port_count": 500,
            "security_group_count": 100,
            "security_group_rule_count": 1000,
            "router_count": 10,
            "floating_ip_count": 50,
        },
        "port_count",
        1,
        add_port,
        {
            "network_count": 1,
            "subnet_count": 1,
            "port_count": 1,
            "security_group_count": 1,  # the default one, with its rules
            "security_group_rule_count": 4,
        },
    ),
    Case("volume", {"volume_count": 100, "volume_gib": 10_240}, "volume_gib", 1, add_volume, {}),
    Case(
        "image",
        {"image_count": 100, "image_bytes": 1 << 40},
        "image_count",
        1,
        add_image,
        {"image_count": 1},
    ),
]


@pytest.fixture(params=CASES, ids=lambda case: case.package)
def case(request: pytest.FixtureRequest) -> Case:
    found: Case = request.param
    return found


@pytest.fixture
def quotas(client: Client, case: Case) -> Quotas:
    return Quotas(client, case.package)


def values(message: Any) -> dict[str, int]:
    return {field.name: value for field, value in message.ListFields()}


async def test_limits_are_read_set_and_hold(client: Client, quotas: Quotas, case: Case) -> None:
    member = await new_member(client)
    found = await quotas.get(member.who)
    assert found.project_id == member.project_id
    assert values(found.limits) == case.defaults
    assert values(found.usage) == {}

    await case.add(member)
    assert values((await quotas.get(member.who)).usage) == case.counted

    made = await quotas.set(member.project_id, f"limits.{case.limit}", **{case.limit: case.first})
    assert values(made.limits) == {**case.defaults, case.limit: case.first}
    assert await quotas.get(member.who) == made
    error = await refused(case.add(member))
    assert (type(error), error.reason) == (errors.Exhausted, "QUOTA_EXCEEDED")

    for more in (case.first + 1, -1, 0):
        await quotas.set(member.project_id, **{case.limit: more})
        if more:
            await case.add(member)
        else:
            assert (await refused(case.add(member))).reason == "QUOTA_EXCEEDED"


async def test_a_mask_names_limits_and_nothing_else(
    client: Client, quotas: Quotas, case: Case
) -> None:
    member = await new_member(client)
    for path in ("project_id", "limits", f"usage.{case.limit}", "key_pair_count"):
        error = await refused(quotas.set(member.project_id, case.limit, path, **{case.limit: 7}))
        assert (type(error), error.reason) == (errors.InvalidArgument, "BAD_UPDATE_MASK")
    error = await refused(quotas.set(member.project_id, **{case.limit: -2}))
    assert isinstance(error, errors.InvalidArgument)
    assert values((await quotas.get(member.who)).limits) == case.defaults


async def test_a_member_reads_its_own_and_sets_none(
    client: Client, quotas: Quotas, case: Case
) -> None:
    member, other = await new_member(client), await new_member(client)
    assert (await quotas.get(member.who, member.project_id)).project_id == member.project_id
    error = await refused(quotas.get(member.who, other.project_id))
    assert (type(error), error.reason) == (errors.NotFound, "PROJECT_NOT_FOUND")
    for project_id in (member.project_id, other.project_id):
        error = await refused(quotas.set(project_id, who=member.who, **{case.limit: 7}))
        assert isinstance(error, errors.PermissionDenied)
    found = await quotas.get(await client.login(), other.project_id)
    assert values(found.limits) == case.defaults
