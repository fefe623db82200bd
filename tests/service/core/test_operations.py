"""Operations: waiting, watching, cancelling."""

from __future__ import annotations

import asyncio
import time

import pytest
from google.protobuf import duration_pb2

from mcloud.common.v1 import operation_pb2
from mcloud_base import errors, ids, rpc
from service.compute.host import Host
from service.compute.instances import Instances
from service.core.cloud import Client, refused

Operation = operation_pb2.Operation


@pytest.fixture
async def instances(client: Client) -> Instances:
    return await Instances(client).prepare()


async def test_waiting_ends_at_the_timeout(instances: Instances) -> None:
    async with Host(instances.client, instances.project):
        begun = await instances.create("vm")
        for seconds in (0, 1, -1):
            request = operation_pb2.WaitOperationRequest(
                id=begun.id, timeout=duration_pb2.Duration(seconds=seconds)
            )
            start = time.monotonic()
            found = await rpc.call(
                instances.operations.WaitOperation, request, metadata=instances.who
            )
            assert found.id == begun.id
            assert found.state == Operation.STATE_RUNNING
            assert time.monotonic() - start >= seconds
        await instances.wait(await instances.change("Delete", begun.resource.id))


async def test_a_watch_shows_the_steps_until_the_end(instances: Instances) -> None:
    async with Host(instances.client, instances.project) as host:
        begun = await instances.create("vm")
        seen: list[Operation] = []

        async def watch() -> None:
            request = operation_pb2.WatchOperationRequest(id=begun.id)
            stream = instances.operations.WatchOperation(request, metadata=tuple(instances.who))
            async for message in rpc.received(stream):
                seen.append(message.operation)

        async with asyncio.timeout(60):
            watching = asyncio.create_task(watch())
            host.run(await host.wanted(begun.resource.id))
            await watching  # it ends with the operation
        assert seen[-1].state == Operation.STATE_SUCCEEDED
        assert seen[-1].HasField("response")
        progress = [operation.progress_percent for operation in seen]
        assert progress == sorted(progress)
        numbers = [step.number for step in seen[-1].steps]
        assert numbers == sorted(numbers)
        assert {1, 2, 3, 4, 5, 6, 7} <= set(numbers)
        await instances.wait(await instances.change("Delete", begun.resource.id))


async def test_a_cancelled_operation_is_undone(instances: Instances) -> None:
    async with Host(instances.client, instances.project) as host:
        begun = await instances.create("vm")
        await host.wanted(begun.resource.id)
        dry = await instances.cancel(begun.id, validate_only=True)
        assert dry.state == Operation.STATE_RUNNING
        assert dry.cancellable
        request_id = ids.request_id()
        cancelled = await instances.cancel(begun.id, request_id=request_id)
        assert not cancelled.cancellable
        await instances.cancel(begun.id, request_id=request_id)  # a repeat does no harm
        ended = await instances.wait(begun)
        assert ended.state == Operation.STATE_CANCELLED
        assert errors.from_status(ended.error).reason == "OPERATION_CANCELLED"
        states = {step.number: step.state for step in ended.steps}
        assert states[5] == operation_pb2.OperationStep.STATE_UNDONE
        assert host.desired
        assert all(each.absent for each in host.desired.values())
        assert (await instances.cancel(begun.id)).state == Operation.STATE_CANCELLED
        await instances.wait(await instances.change("Delete", begun.resource.id))


async def test_what_has_ended_cannot_be_cancelled(instances: Instances) -> None:
    begun = await instances.create("vm")
    await instances.wait(begun)  # no host: it fails
    error = await refused(instances.cancel(begun.id))
    assert (type(error), error.reason) == (errors.WrongState, "OPERATION_NOT_CANCELLABLE")
    deleting = await instances.change("Delete", begun.resource.id)
    await instances.wait(deleting)
    assert (await refused(instances.cancel(deleting.id))).reason == "OPERATION_NOT_CANCELLABLE"


async def test_operations_are_listed_newest_first(instances: Instances) -> None:
    first = await instances.create("one")
    second = await instances.create("two")
    for operation in (first, second):
        await instances.wait(operation)

    async def listed(**values: str) -> list[str]:
        request = operation_pb2.ListOperationsRequest(**values)
        answer = await rpc.call(
            instances.operations.ListOperations, request, metadata=instances.who
        )
        return [operation.id for operation in answer.operations]

    assert await listed() == [second.id, first.id]
    assert await listed(order_by="create_time") == [first.id, second.id]
    assert await listed(filter=f'resource.id="{first.resource.id}"') == [first.id]
    assert await listed(filter='state="FAILED"') == [second.id, first.id]
    assert await listed(filter='state="RUNNING"') == []
    assert (await refused(listed(filter='error="x"'))).reason == "BAD_FILTER"


async def test_unknown_operations(instances: Instances) -> None:
    request = operation_pb2.WaitOperationRequest(id=ids.new("cop"))
    call = rpc.call(instances.operations.WaitOperation, request, metadata=instances.who)
    assert (await refused(call)).reason == "OPERATION_NOT_FOUND"
    assert (await refused(instances.cancel(ids.new("cop")))).reason == "OPERATION_NOT_FOUND"
