"""Instances: their states, what may be done in which, and how a deletion goes before all."""

from __future__ import annotations

import pytest

from mcloud.common.v1 import operation_pb2
from mcloud.compute.v1 import instance_pb2, instance_service_pb2
from mcloud.scheduler.v1 import placement_pb2
from mcloud_base import errors, ids
from service.compute.host import Host
from service.compute.instances import Instances, State
from service.core.cloud import Client, refused, unpack

Operation = operation_pb2.Operation


@pytest.fixture
async def instances(client: Client) -> Instances:
    return await Instances(client).prepare()


async def test_an_instance_becomes_active_stops_starts_and_goes(instances: Instances) -> None:
    async with Host(instances.client, instances.project) as host:
        begun = await instances.create("My_VM 1", labels={"a": "b"})
        id_ = begun.resource.id
        assert begun.state == Operation.STATE_RUNNING
        assert (await instances.get(id_)).status.state == State.STATE_BUILD
        host.run(await host.wanted(id_))
        ended = await instances.wait(begun)
        assert ended.state == Operation.STATE_SUCCEEDED, ended.error
        assert ended.progress_percent == 100
        instance = unpack(ended, instance_pb2.Instance)
        assert instance.status.state == State.STATE_ACTIVE
        assert instance.status.hostname == "my-vm-1"
        assert instance.status.host_name == host.name
        assert instance.status.operation_id == ""
        assert instance == await instances.get(id_)

        error = await refused(instances.change("Start", id_))
        assert (type(error), error.reason) == (errors.WrongState, "BAD_STATE")
        assert error.metadata == {"state": "ACTIVE"}

        stopping = await instances.change("Stop", id_)
        error = await refused(instances.change("Reboot", id_))
        assert (type(error), error.reason) == (errors.Conflict, "OPERATION_IN_PROGRESS")
        assert error.metadata == {"operation_id": stopping.id}
        host.shut_off(await host.wanted(id_, generation=2))
        assert (await instances.wait(stopping)).state == Operation.STATE_SUCCEEDED
        assert (await instances.get(id_)).status.state == State.STATE_SHUTOFF
        assert (await refused(instances.change("Stop", id_))).reason == "BAD_STATE"

        deleting = await instances.change("Delete", id_)
        assert (await instances.wait(deleting)).state == Operation.STATE_SUCCEEDED
        error = await refused(instances.get(id_))
        assert error.reason == "INSTANCE_NOT_FOUND"


async def test_a_name_is_free_as_soon_as_the_deletion_is_accepted(instances: Instances) -> None:
    async with Host(instances.client, instances.project) as host:
        host.willing = False
        first = await instances.create("vm")
        error = await refused(instances.create("vm"))
        assert (type(error), error.reason) == (errors.AlreadyExists, "INSTANCE_NAME_TAKEN")
        host.run(await host.wanted(first.resource.id))
        await instances.wait(first)
        deleting = await instances.change("Delete", first.resource.id)
        second = await instances.create("vm")
        assert second.resource.id != first.resource.id
        assert (await refused(instances.change("Delete", first.resource.id))).reason == (
            "INSTANCE_NOT_FOUND"
        )
        host.remove(await host.wanted(absent=True))
        assert (await instances.wait(deleting)).state == Operation.STATE_SUCCEEDED
        host.willing = True
        await instances.wait(await instances.change("Delete", second.resource.id))


async def test_a_deletion_goes_before_a_creation(instances: Instances) -> None:
    async with Host(instances.client, instances.project) as host:
        creating = await instances.create("vm")
        await host.wanted(creating.resource.id)  # it waits for the host, which does not answer
        deleting = await instances.change("Delete", creating.resource.id)
        assert (await instances.wait(deleting)).state == Operation.STATE_SUCCEEDED
        ended = await instances.wait(creating)
        assert ended.state == Operation.STATE_CANCELLED
        assert errors.from_status(ended.error).reason == "OPERATION_CANCELLED"
        assert (await refused(instances.get(creating.resource.id))).reason == "INSTANCE_NOT_FOUND"


async def test_without_a_host_an_instance_says_why(instances: Instances) -> None:
    request = instances.request("vm")
    request.spec.placement.availability_zone = "nowhere"
    begun = await instances.call("CreateInstance", request)
    ended = await instances.wait(begun)
    assert ended.state == Operation.STATE_FAILED
    error = errors.from_status(ended.error)
    assert error.reason == "NO_VALID_HOST"
    instance = await instances.get(begun.resource.id)
    assert instance.status.state == State.STATE_ERROR
    assert instance.status.fault.reason == "NO_VALID_HOST"
    assert instance.status.fault.message == error.message
    explained = await instances.call(
        "ExplainInstance", instance_service_pb2.ExplainInstanceRequest(id=begun.resource.id)
    )
    assert len(explained.placements) == 1
    assert explained.placements[0] == errors.find_detail(error, placement_pb2.PlacementExplanation)
    # It is charged to the quota and has its name until it is deleted.
    assert (await refused(instances.create("vm"))).reason == "INSTANCE_NAME_TAKEN"
    deleting = await instances.change("Delete", begun.resource.id)
    assert (await instances.wait(deleting)).state == Operation.STATE_SUCCEEDED


async def test_a_dry_run_explains_the_placement_and_writes_nothing(instances: Instances) -> None:
    request = instances.request("vm", validate_only=True)
    request.spec.placement.availability_zone = "nowhere"
    error = await refused(instances.call("CreateInstance", request))
    assert error.reason == "NO_VALID_HOST"
    explanation = errors.find_detail(error, placement_pb2.PlacementExplanation)
    assert isinstance(explanation, placement_pb2.PlacementExplanation)
    async with Host(instances.client, instances.project):
        dry = await instances.create("vm", validate_only=True)
        assert dry.id == ""
    listed = await instances.call(
        "ListInstances", instance_service_pb2.ListInstancesRequest(page_size=5)
    )
    assert list(listed.instances) == []


async def test_what_an_instance_is_made_of_must_be_there(instances: Instances) -> None:
    for field, value, reason in (
        ("flavor_id", ids.new("flv"), "FLAVOR_NOT_FOUND"),
        ("key_pair_id", ids.new("key"), "KEY_PAIR_NOT_FOUND"),
    ):
        request = instances.request("vm")
        setattr(request.spec, field, value)
        error = await refused(instances.call("CreateInstance", request))
        assert (type(error), error.reason) == (errors.NotFound, reason)
    request = instances.request("vm")
    request.spec.image_id = ids.new("img")
    ended = await instances.wait(await instances.call("CreateInstance", request))
    assert errors.from_status(ended.error).reason == "IMAGE_NOT_FOUND"
    await instances.wait(await instances.change("Delete", ended.resource.id))


@pytest.mark.parametrize(
    ("nic", "field"),
    [
        ({}, "spec.nics[0]"),
        ({"network_id": ids.new("net"), "port_id": ids.new("port")}, "spec.nics[0]"),
        ({"port_id": ids.new("port"), "ip_address": "10.0.0.1"}, "spec.nics[0].ip_address"),
    ],
)
async def test_a_nic_is_on_a_network_or_at_a_port(
    instances: Instances, nic: dict[str, str], field: str
) -> None:
    request = instances.request("vm")
    request.spec.nics.add(**nic)
    error = await refused(instances.call("CreateInstance", request))
    assert (error.reason, error.metadata["field"]) == ("BAD_FIELD", field)


async def test_only_operators_choose_the_host(instances: Instances) -> None:
    request = instances.request("vm")
    request.spec.placement.host_id = ids.new("h")
    error = await refused(instances.call("CreateInstance", request))
    assert (type(error), error.reason) == (errors.PermissionDenied, "ROLE_REQUIRED")


async def test_name_and_labels_change_and_nothing_else(instances: Instances) -> None:
    async with Host(instances.client, instances.project) as host:
        begun = await instances.create("vm")
        host.run(await host.wanted(begun.resource.id))
        await instances.wait(begun)
        request = instance_service_pb2.UpdateInstanceRequest(
            request_id=ids.request_id(), id=begun.resource.id, name="other", labels={"x": "y"}
        )
        request.update_mask.paths.extend(["name", "labels"])
        changed = unpack(await instances.call("UpdateInstance", request), instance_pb2.Instance)
        assert (changed.metadata.name, dict(changed.metadata.labels)) == ("other", {"x": "y"})
        assert changed.status.hostname == "vm"  # the guest has it already
        request.request_id = ids.request_id()
        request.update_mask.paths[:] = ["spec.flavor_id"]
        error = await refused(instances.call("UpdateInstance", request))
        assert error.reason == "BAD_UPDATE_MASK"
        await instances.wait(await instances.change("Delete", begun.resource.id))
