"""One request for many instances: all are recorded or none, each is built by itself."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from google.rpc import error_details_pb2

from mcloud.common.v1 import operation_pb2
from mcloud.compute.v1 import (
    instance_pb2,
    instance_service_pb2,
    quota_pb2,
    quota_service_pb2,
    quota_service_pb2_grpc,
)
from mcloud_base import errors, ids, rpc
from service.compute.host import Host
from service.compute.instances import Instances, State
from service.core.cloud import Client, refused, unpack

Operation = operation_pb2.Operation


@pytest.fixture
async def instances(client: Client) -> Instances:
    return await Instances(client).prepare()


async def names(instances: Instances) -> list[str]:
    request = instance_service_pb2.ListInstancesRequest(page_size=1000)
    listed = await instances.call("ListInstances", request)
    return sorted(each.metadata.name for each in listed.instances)


async def parts(instances: Instances, id_: str) -> list[Operation]:
    request = operation_pb2.ListOperationsRequest(
        filter=f'parent_id="{id_}"', page_size=1000, order_by="create_time"
    )
    listed = await rpc.call(instances.operations.ListOperations, request, metadata=instances.who)
    return list(listed.operations)


def counts(operation: Operation) -> tuple[int, int, int, int, int]:
    found = operation.parts
    return (
        found.count, found.running_count, found.succeeded_count, found.failed_count,
        found.cancelled_count,
    )  # fmt: skip


async def nowhere(instances: Instances, name: str, count: int) -> Operation:
    """Ask for instances that no host can take."""
    request = instances.request(name, count=count)
    request.spec.placement.availability_zone = "nowhere"
    begun: Operation = await instances.call("CreateInstance", request)
    return begun


async def limit(instances: Instances, **limits: int) -> None:
    """Set what the project may have."""
    instance = await instances.wait(await nowhere(instances, "limited", 1))
    request = quota_service_pb2.UpdateQuotaRequest(
        request_id=ids.request_id(),
        project_id=instance.project_id,
        limits=quota_pb2.QuotaLimits(**limits),
    )
    request.update_mask.paths.extend(limits)
    quotas = quota_service_pb2_grpc.QuotaServiceStub(instances.client.public)
    await rpc.call(quotas.UpdateQuota, request, metadata=await instances.client.login())


async def test_many_are_built_by_one_request(instances: Instances) -> None:
    async with Host(instances.client, instances.project, vcpu_count=100) as host:
        host.eager = True
        begun = await instances.create("vm", count=12, labels={"a": "b"})
        assert (begun.resource.type, begun.resource.id) == ("instance", "")
        assert begun.resource.name == "vm"
        assert begun.cancellable
        assert counts(begun) == (12, 12, 0, 0, 0)

        ended = await instances.wait(begun)
        assert ended.state == Operation.STATE_SUCCEEDED, ended.error
        assert counts(ended) == (12, 0, 12, 0, 0)
        assert ended.progress_percent == 100

        found = await parts(instances, begun.id)
        built = [unpack(each, instance_pb2.Instance) for each in found]
        assert {each.metadata.name for each in built} == {f"vm-{n}" for n in range(1, 13)}
        assert len({each.metadata.id for each in built}) == 12
        for part, instance in zip(found, built, strict=True):
            assert part.parent_id == begun.id
            assert part.request_id == begun.request_id
            assert not part.HasField("request")  # the whole one has it
            assert {step.number for step in part.steps} >= {1, 2, 3, 4, 5, 6, 7}
            assert instance.status.state == State.STATE_ACTIVE
            assert instance.metadata.labels == {"a": "b"}
            assert instance.status.hostname == instance.metadata.name


async def test_a_watch_shows_how_far_the_parts_are(instances: Instances) -> None:
    async with Host(instances.client, instances.project) as host:
        begun = await instances.create("vm", count=2)
        first, second = await parts(instances, begun.id)
        seen: list[Operation] = []
        one_ended = asyncio.Event()

        async def watch() -> None:
            request = operation_pb2.WatchOperationRequest(id=begun.id)
            stream = instances.operations.WatchOperation(request, metadata=tuple(instances.who))
            async for message in rpc.received(stream):
                seen.append(message.operation)
                if message.operation.parts.succeeded_count:
                    one_ended.set()

        async with asyncio.timeout(60):
            watching = asyncio.create_task(watch())
            host.run(await host.wanted(second.resource.id))
            await one_ended.wait()
            assert (counts(seen[-1]), seen[-1].progress_percent) == ((2, 1, 1, 0, 0), 50)
            assert seen[-1].state == Operation.STATE_RUNNING
            host.run(await host.wanted(first.resource.id))
            await watching
        assert (counts(seen[-1]), seen[-1].state) == ((2, 0, 2, 0, 0), Operation.STATE_SUCCEEDED)


async def test_a_repeat_makes_no_more_of_them(instances: Instances) -> None:
    request = instances.request("vm", count=3)
    request.spec.placement.availability_zone = "nowhere"
    first = await instances.call("CreateInstance", request)
    second = await instances.call("CreateInstance", request)
    assert first.id == second.id
    assert counts(second)[0] == 3
    await instances.wait(first)
    assert await names(instances) == ["vm-1", "vm-2", "vm-3"]
    request.count = 4
    assert (await refused(instances.call("CreateInstance", request))).reason == "REQUEST_ID_REUSED"


async def test_all_are_recorded_or_none(instances: Instances) -> None:
    taken = instances.request("vm-2")
    taken.spec.placement.availability_zone = "nowhere"
    await instances.wait(await instances.call("CreateInstance", taken))
    error = await refused(instances.create("vm", count=3))
    assert (error.reason, error.metadata) == ("INSTANCE_NAME_TAKEN", {"name": "vm-2"})

    await limit(instances, instance_count=3)
    error = await refused(instances.create("other", count=3))
    assert error.reason == "QUOTA_EXCEEDED"
    assert "2 used, 3 asked, 3 allowed" in error.message
    assert await names(instances) == ["limited", "vm-2"]
    assert (await instances.wait(await nowhere(instances, "other", 1))).parts.count == 0


async def test_what_only_one_can_have_is_refused(instances: Instances) -> None:
    async def field(name: str = "vm", count: int = 2, **nic: Any) -> str:
        request = instances.request(name, count=count)
        if nic:
            request.spec.nics.add(**nic)
        error = await refused(instances.call("CreateInstance", request))
        assert error.reason in ("BAD_FIELD", "BAD_REQUEST")
        detail = errors.find_detail(error, error_details_pb2.BadRequest)
        assert isinstance(detail, error_details_pb2.BadRequest)
        return detail.field_violations[0].field

    assert await field(port_id=ids.new("port")) == "spec.nics[0]"
    assert await field(network_id=ids.new("net"), ip_address="10.0.0.7") == "spec.nics[0]"
    request = instances.request("vm", count=2)
    request.spec.volumes.add(volume_id=ids.new("vol"))
    error = await refused(instances.call("CreateInstance", request))
    assert error.metadata["field"] == "spec.volumes"
    assert await field(name="n" * 254) == "name"  # -1 fits, and so does none of -10 and more
    assert await field(count=501) == "count"
    assert await field(count=-1) == "count"
    assert await names(instances) == []


async def test_those_that_can_be_built_stay(instances: Instances) -> None:
    async with Host(instances.client, instances.project) as host:
        host.eager = True
        instances.flavor_id = await instances.make_flavor(memory_mib=2000)  # two fit
        ended = await instances.wait(await instances.create("vm", count=5))
        assert ended.state == Operation.STATE_FAILED
        assert counts(ended) == (5, 0, 2, 3, 0)
        error = errors.from_status(ended.error)
        assert error.reason == "NO_VALID_HOST"
        assert error.message.startswith("3 of 5 could not be done; the first, vm-")
        states = [
            (await instances.get(part.resource.id)).status.state
            for part in await parts(instances, ended.id)
        ]
        assert sorted(states) == sorted([State.STATE_ACTIVE] * 2 + [State.STATE_ERROR] * 3)


async def test_cancelling_undoes_those_that_are_not_there_yet(instances: Instances) -> None:
    async with Host(instances.client, instances.project) as host:
        begun = await instances.create("vm", count=3)
        first, *others = await parts(instances, begun.id)
        host.run(await host.wanted(first.resource.id))
        await instances.wait(first)
        for part in others:
            await host.wanted(part.resource.id)
        dry = await instances.cancel(begun.id, validate_only=True)
        assert dry.cancellable
        assert counts(await instances.cancel(begun.id))[0] == 3
        ended = await instances.wait(begun)
        assert ended.state == Operation.STATE_CANCELLED
        assert errors.from_status(ended.error).reason == "OPERATION_CANCELLED"
        assert counts(ended) == (3, 0, 1, 0, 2)
        assert (await instances.get(first.resource.id)).status.state == State.STATE_ACTIVE


async def test_one_that_is_deleted_meanwhile_is_no_longer_waited_for(instances: Instances) -> None:
    async with Host(instances.client, instances.project) as host:
        begun = await instances.create("vm", count=2)
        first, second = await parts(instances, begun.id)
        await host.wanted(first.resource.id)
        await instances.wait(await instances.change("Delete", first.resource.id))
        host.run(await host.wanted(second.resource.id))
        ended = await instances.wait(begun)
        assert counts(ended) == (2, 0, 1, 0, 1)
        assert ended.state == Operation.STATE_FAILED  # nobody has cancelled the whole
        assert "1 of 2 could not be done" in ended.error.message


async def test_a_dry_run_of_many_writes_nothing(instances: Instances) -> None:
    async with Host(instances.client, instances.project):
        instances.flavor_id = await instances.make_flavor(memory_mib=2000)  # two fit
        dry = await instances.create("vm", count=2, validate_only=True)
        assert dry.id == ""
        error = await refused(instances.create("vm", count=3, validate_only=True))
        assert error.reason == "NO_VALID_HOST"
        assert error.message == "2 of the 3 instances fit, on 1 host(s)"
    assert await names(instances) == []


async def test_more_than_are_worked_on_at_a_time(instances: Instances) -> None:
    await limit(instances, instance_count=-1, vcpu_count=-1, memory_mib=-1)
    ended = await instances.wait(await nowhere(instances, "vm", 300))
    assert counts(ended) == (300, 0, 0, 300, 0)
    assert ended.error.message.startswith("300 of 300 could not be done; the first, vm-1: ")
