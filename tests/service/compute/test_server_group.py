"""Server groups: made, changed, deleted; who is a member, and what a member may rely on."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from mcloud.common.v1 import metadata_pb2, operation_pb2
from mcloud.compute.v1 import (
    instance_pb2,
    instance_service_pb2,
    quota_service_pb2,
    quota_service_pb2_grpc,
    server_group_pb2,
)
from mcloud_base import errors, ids, rpc
from service.compute.host import Host
from service.compute.instances import Instances
from service.compute.server_groups import ServerGroups, Spec
from service.core.cloud import Client, Rule, refused, unpack
from service.core.keys import new_project

Operation = operation_pb2.Operation


@pytest.fixture
async def instances(client: Client) -> Instances:
    return await Instances(client).prepare()


@pytest.fixture
def groups(instances: Instances) -> ServerGroups:
    return ServerGroups(instances.client.public, instances.who)


@asynccontextmanager
async def three_hosts(instances: Instances) -> AsyncIterator[None]:
    """Have hosts on which whatever is wanted runs at once."""
    async with AsyncExitStack() as stack:
        for number in range(3):
            host = Host(instances.client, f"{instances.project}-{number}")
            (await stack.enter_async_context(host)).eager = True
        yield


async def boot(instances: Instances, group_id: str, name: str, **values: int) -> Operation:
    request = instances.request(name, **values)
    request.spec.placement.server_group_id = group_id
    begun: Operation = await instances.call("CreateInstance", request)
    return begun


async def host_ids(instances: Instances, group_id: str) -> Counter[str]:
    request = instance_service_pb2.ListInstancesRequest(filter=f'server_group_id="{group_id}"')
    found = await instances.call("ListInstances", request)
    return Counter(instance.status.host_id for instance in found.instances)


async def test_a_server_group_is_made_changed_and_deleted(groups: ServerGroups) -> None:
    made = await groups.create("ANTI_AFFINITY", "web", most=2, labels={"a": "b"})
    group = unpack(made, server_group_pb2.ServerGroup)
    id_ = group.metadata.id
    assert made.state == Operation.STATE_SUCCEEDED
    assert (group.spec.policy, group.spec.max_instances_per_host) == (Spec.POLICY_ANTI_AFFINITY, 2)
    assert group == await groups.get(id_)
    assert await groups.list() == [group]
    other = await groups.make("SOFT_AFFINITY", name="db")
    assert [each.metadata.id for each in await groups.list(filter="policy=SOFT_AFFINITY")] == [
        other
    ]
    for call, reason in (
        (groups.create("AFFINITY", "web"), "SERVER_GROUP_NAME_TAKEN"),
        (groups.update(other, "name", name="web"), "SERVER_GROUP_NAME_TAKEN"),
        (groups.create("UNSPECIFIED"), "BAD_REQUEST"),
        (groups.create("SOFT_ANTI_AFFINITY", most=2), "BAD_FIELD"),
        (groups.create("ANTI_AFFINITY", most=-1), "BAD_REQUEST"),
        (groups.update(id_, "spec.policy", spec=Spec(policy=1)), "BAD_UPDATE_MASK"),
        (groups.update(id_, "name"), "BAD_FIELD"),
        (groups.update(id_, "labels", resource_version="7"), "VERSION_CONFLICT"),
        (groups.get(ids.new("grp")), "SERVER_GROUP_NOT_FOUND"),
    ):
        assert (await refused(call)).reason == reason
    changed = await groups.update(id_, "name", "labels", name="www", labels={"x": "y"})
    renamed = unpack(changed, server_group_pb2.ServerGroup)
    assert (renamed.metadata.name, dict(renamed.metadata.labels)) == ("www", {"x": "y"})
    assert renamed.spec == group.spec
    await groups.delete(id_)
    assert (await refused(groups.delete(id_))).reason == "SERVER_GROUP_NOT_FOUND"
    assert [each.metadata.id for each in await groups.list()] == [other]


async def test_other_projects_server_groups_are_not_found(
    instances: Instances, groups: ServerGroups
) -> None:
    project = new_project()
    theirs = ServerGroups(
        instances.client.public,
        await instances.client.make_user(project, Rule.ROLE_MEMBER, project),
    )
    id_ = await theirs.make("AFFINITY")
    for call in (
        groups.get(id_),
        groups.update(id_, "name", name="mine"),
        groups.delete(id_),
        boot(instances, id_, "vm"),
        boot(instances, ids.new("grp"), "vm"),
        boot(instances, id_, "vm", validate_only=True),
    ):
        error = await refused(call)
        assert (type(error), error.reason) == (errors.NotFound, "SERVER_GROUP_NOT_FOUND")
    assert await groups.list() == []
    reader = new_project()
    reading = ServerGroups(
        instances.client.public, await instances.client.make_user(reader, Rule.ROLE_READER, project)
    )
    assert (await reading.get(id_)).metadata.id == id_
    error = await refused(reading.delete(id_))
    assert (type(error), error.reason) == (errors.PermissionDenied, "ROLE_REQUIRED")


async def test_server_groups_have_a_quota(instances: Instances, groups: ServerGroups) -> None:
    first = unpack(await groups.create("AFFINITY"), server_group_pb2.ServerGroup)
    stub = quota_service_pb2_grpc.QuotaServiceStub(instances.client.public)
    request = quota_service_pb2.UpdateQuotaRequest(
        request_id=ids.request_id(), project_id=first.metadata.project_id
    )
    request.limits.server_group_count = 2
    request.update_mask.paths.append("limits.server_group_count")
    await rpc.call(stub.UpdateQuota, request, metadata=await instances.client.login())
    await groups.make("AFFINITY")
    error = await refused(groups.make("AFFINITY"))
    assert (type(error), error.reason) == (errors.Exhausted, "QUOTA_EXCEEDED")
    assert "server_group_count: 2 used, 1 asked, 2 allowed" in error.message
    await groups.delete(first.metadata.id)
    await groups.make("AFFINITY")


async def test_members_are_counted_watched_and_keep_their_server_group(
    instances: Instances, groups: ServerGroups
) -> None:
    id_ = await groups.make("SOFT_AFFINITY")
    watch = groups.watch(id=id_)
    assert (await watch.read()).type == metadata_pb2.CHANGE_TYPE_BOOKMARK
    async with Host(instances.client, instances.project) as host:
        host.eager = True
        ended = await instances.wait(await boot(instances, id_, "vm"))
        instance = unpack(ended, instance_pb2.Instance)
        assert instance.spec.placement.server_group_id == id_
        group = await groups.get(id_)
        assert list(group.status.instance_ids) == [instance.metadata.id]
        assert (await watch.read()).server_group == group
        error = await refused(groups.delete(id_))
        assert (type(error), error.reason) == (errors.WrongState, "SERVER_GROUP_IN_USE")
        assert error.metadata == {"instance_count": "1"}
        await instances.wait(await instances.change("Delete", instance.metadata.id))
        while (event := await watch.read()).server_group.status.instance_count:
            pass
        assert event.type == metadata_pb2.CHANGE_TYPE_MODIFIED
        await groups.delete(id_)
        assert (await watch.read()).type == metadata_pb2.CHANGE_TYPE_DELETED
    watch.cancel()


async def test_anti_affinity_spreads_and_then_says_why_not(
    instances: Instances, groups: ServerGroups
) -> None:
    async with three_hosts(instances):
        id_ = await groups.make("ANTI_AFFINITY")
        ended = await instances.wait(await boot(instances, id_, "vm", count=3))
        assert ended.state == Operation.STATE_SUCCEEDED, ended.error
        placed = await host_ids(instances, id_)
        assert set(placed.values()) == {1}
        error = await refused(boot(instances, id_, "one", validate_only=True))
        assert error.reason == "NO_VALID_HOST"
        assert f"3 host(s) with room for it run 1 or more members of server group {id_}" in str(
            error
        )
        fourth = await instances.wait(await boot(instances, id_, "vm"))
        failed = errors.from_status(fourth.error)
        assert (failed.reason, failed.message) == ("NO_VALID_HOST", error.message)
        # Whoever goes makes room for another.
        request = instance_service_pb2.ListInstancesRequest(filter='name="vm-1"')
        first = (await instances.call("ListInstances", request)).instances[0]
        await instances.wait(await instances.change("Delete", first.metadata.id))
        fifth = await instances.wait(await boot(instances, id_, "vm-1"))
        assert unpack(fifth, instance_pb2.Instance).status.host_id == first.status.host_id


async def test_affinity_holds_together_what_is_built_at_once(
    instances: Instances, groups: ServerGroups
) -> None:
    async with three_hosts(instances):
        id_ = await groups.make("AFFINITY")
        begun = await asyncio.gather(*(boot(instances, id_, f"vm-{n}") for n in range(12)))
        ended = await asyncio.gather(*map(instances.wait, begun))
        assert {each.state for each in ended} == {Operation.STATE_SUCCEEDED}
        assert list((await host_ids(instances, id_)).values()) == [12]
        status = (await groups.get(id_)).status
        assert status.instance_count == 12
        assert list(status.instance_ids) == sorted(each.resource.id for each in begun)
