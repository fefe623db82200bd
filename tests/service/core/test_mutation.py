"""Every change: once for each request id, with a receipt, and dry where that was asked."""

from __future__ import annotations

import asyncio

import pytest
from google.rpc import error_details_pb2

from mcloud.common.v1 import operation_pb2
from mcloud.compute.v1 import (
    key_pair_pb2,
    key_pair_service_pb2,
    operation_service_pb2_grpc,
    quota_service_pb2,
    quota_service_pb2_grpc,
)
from mcloud_base import errors, ids, rpc
from service.core.cloud import Client, Rule, refused, unpack
from service.core.keys import Keys, create_request, new_project


@pytest.fixture
async def keys(client: Client) -> Keys:
    project = new_project()
    return Keys(client.public, await client.make_user(project, Rule.ROLE_MEMBER, project))


async def test_a_repeat_returns_the_first_operation(keys: Keys) -> None:
    request = create_request("one")
    first = await keys.send(request)
    again = await asyncio.gather(*(keys.send(request) for _ in range(5)))
    assert {operation.id for operation in again} == {first.id}
    assert again[0] == first
    assert await keys.names() == ["one"]
    assert first.state == operation_pb2.Operation.STATE_SUCCEEDED
    assert first.method == "mcloud.compute.v1.KeyPairService/CreateKeyPair"
    assert first.resource.name == "one"
    made = unpack(first, key_pair_pb2.KeyPair)
    assert made.metadata.id == first.resource.id


async def test_a_repeat_returns_it_also_when_the_resource_is_gone(keys: Keys) -> None:
    request = create_request("one")
    first = await keys.send(request)
    await keys.delete(first.resource.id)
    assert await keys.send(request) == first
    assert await keys.names() == []


async def test_a_request_id_is_for_one_request(keys: Keys) -> None:
    request = create_request("one")
    await keys.send(request)
    request.name = "two"
    error = await refused(keys.send(request))
    assert (type(error), error.reason) == (errors.InvalidArgument, "REQUEST_ID_REUSED")
    assert error.metadata == {"request_id": request.request_id}


async def test_a_request_id_is_its_callers_own(client: Client, keys: Keys) -> None:
    request = create_request("one")
    first = await keys.send(request)
    other = Keys(client.public, await client.make_user(ids.request_id(), Rule.ROLE_MEMBER, "other"))
    second = await other.send(request)
    assert second.id != first.id


async def test_what_failed_may_be_sent_again(keys: Keys) -> None:
    """A refusal leaves no trace: the same request succeeds once nothing is in its way."""
    first = await keys.create("one")
    request = create_request("one")
    assert (await refused(keys.send(request))).reason == "KEY_PAIR_NAME_TAKEN"
    await keys.delete(first.resource.id)
    made = await keys.send(request)
    assert made.state == operation_pb2.Operation.STATE_SUCCEEDED


async def test_validate_only_writes_nothing(client: Client, keys: Keys) -> None:
    before = await keys.list()
    request = create_request("one", validate_only=True)
    dry = await keys.send(request)
    assert dry.id == ""
    assert unpack(dry, key_pair_pb2.KeyPair).metadata.name == "one"
    after = await keys.list()
    assert list(after.key_pairs) == []
    assert after.revision == before.revision
    operations = operation_service_pb2_grpc.OperationServiceStub(client.public)
    listed = await rpc.call(
        operations.ListOperations, operation_pb2.ListOperationsRequest(), metadata=keys.who
    )
    assert list(listed.operations) == []
    # Nor is its request id used up.
    request.validate_only = False
    assert (await keys.send(request)).id


async def test_validate_only_says_what_would_be_refused(client: Client, keys: Keys) -> None:
    await keys.create("one")
    error = await refused(keys.create("one", validate_only=True))
    assert error.reason == "KEY_PAIR_NAME_TAKEN"


async def test_a_deletion_that_is_dry_deletes_nothing(keys: Keys) -> None:
    made = await keys.create("one")
    request = key_pair_service_pb2.DeleteKeyPairRequest(
        request_id=ids.request_id(), id=made.resource.id, validate_only=True
    )
    await rpc.call(keys.stub.DeleteKeyPair, request, metadata=keys.who)
    assert await keys.names() == ["one"]


async def test_a_version_that_is_over_is_refused(keys: Keys) -> None:
    made = await keys.create("one")
    request = key_pair_service_pb2.DeleteKeyPairRequest(
        request_id=ids.request_id(), id=made.resource.id, resource_version="77"
    )
    error = await refused(rpc.call(keys.stub.DeleteKeyPair, request, metadata=keys.who))
    assert (type(error), error.reason) == (errors.Conflict, "VERSION_CONFLICT")


async def test_a_quota_says_what_is_used_and_allowed(client: Client, keys: Keys) -> None:
    await keys.create("one")
    project_id = (await keys.list()).key_pairs[0].metadata.project_id
    request = quota_service_pb2.UpdateQuotaRequest(
        request_id=ids.request_id(), project_id=project_id
    )
    request.limits.key_pair_count = 2
    request.update_mask.paths.append("limits.key_pair_count")
    quotas = quota_service_pb2_grpc.QuotaServiceStub(client.public)
    await rpc.call(quotas.UpdateQuota, request, metadata=await client.login())
    found = await asyncio.gather(
        *(keys.create(f"more-{number}") for number in range(8)), return_exceptions=True
    )
    refusals = [each for each in found if isinstance(each, errors.Exhausted)]
    assert len(refusals) == 7
    detail = errors.find_detail(refusals[0], error_details_pb2.QuotaFailure)
    assert isinstance(detail, error_details_pb2.QuotaFailure)
    assert detail.violations[0].subject == f"project:{project_id}"
    assert detail.violations[0].description == "key_pair_count: 2 used, 1 asked, 2 allowed"


async def test_another_projects_things_are_not_found(client: Client, keys: Keys) -> None:
    made = await keys.create("secret")
    stranger = Keys(
        client.public, await client.make_user(ids.request_id(), Rule.ROLE_ADMIN, new_project())
    )
    get = key_pair_service_pb2.GetKeyPairRequest(id=made.resource.id)
    absent = key_pair_service_pb2.GetKeyPairRequest(id=ids.new("key"))
    error = await refused(rpc.call(stranger.stub.GetKeyPair, get, metadata=stranger.who))
    other = await refused(rpc.call(stranger.stub.GetKeyPair, absent, metadata=stranger.who))
    assert error.reason == other.reason == "KEY_PAIR_NOT_FOUND"
    assert error.message.replace(get.id, "") == other.message.replace(absent.id, "")
    assert isinstance(await refused(stranger.delete(made.resource.id)), errors.NotFound)
    assert await stranger.names() == []
    operations = operation_service_pb2_grpc.OperationServiceStub(client.public)
    wanted = operation_pb2.GetOperationRequest(id=made.id)
    error = await refused(rpc.call(operations.GetOperation, wanted, metadata=stranger.who))
    assert error.reason == "OPERATION_NOT_FOUND"
    listed = await rpc.call(
        operations.ListOperations, operation_pb2.ListOperationsRequest(), metadata=stranger.who
    )
    assert list(listed.operations) == []
    # The system's reader sees it, and only so is every project listed.
    assert (await refused(stranger.list(all_projects=True))).reason == "ROLE_REQUIRED"
    system = Keys(client.public, await client.login())
    assert "secret" in await system.names(all_projects=True, page_size=1000)
