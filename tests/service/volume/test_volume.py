"""Volumes: made by a host that has room, buried by it; nothing is left when a step fails."""

from __future__ import annotations

import asyncio

from google.protobuf import field_mask_pb2

from mcloud.common.v1 import metadata_pb2, operation_pb2
from mcloud.volume.v1 import quota_service_pb2, quota_service_pb2_grpc, volume_service_pb2
from mcloud_base import errors, ids, rpc
from mcloud_controlplane.core import database
from mcloud_controlplane.volume import model
from service.identity.cloud import eventually, refused
from service.image.cloud import Project, both_databases
from service.volume.cloud import Operation, State, VolumeCloud, assert_clean, write
from service.volume.storage_host import StorageHost


@both_databases
async def test_a_volume_is_made_and_deleted(
    cloud: VolumeCloud, project: Project, storage: StorageHost
) -> None:
    volume = await cloud.create_volume(project, name="data", size_gib=2)
    id_ = volume.metadata.id
    assert volume.status.state == State.STATE_AVAILABLE
    assert storage.volumes[id_].size_bytes == 2 << 30

    ended = await cloud.delete_volume(project, id_)

    assert ended.state == Operation.STATE_SUCCEEDED
    assert storage.buried == {id_}
    assert storage.volumes == {}
    assert await cloud.volumes(project) == []


async def test_the_steps_are_in_the_trace(
    cloud: VolumeCloud, project: Project, storage: StorageHost
) -> None:
    operation = await cloud.begin_create(project)
    ended = await cloud.end_of(project, operation.id)
    assert [(s.number, s.service) for s in ended.steps] == [
        (1, "volume"),
        (2, "volume"),
        (3, "agent"),
    ]
    assert {s.state for s in ended.steps} == {operation_pb2.OperationStep.STATE_DONE}
    assert ended.steps[0].detail == storage.id


async def test_without_a_host_nothing_is_recorded(cloud: VolumeCloud, project: Project) -> None:
    refusal = await refused(cloud.begin_create(project))
    assert (type(refusal), refusal.reason) == (errors.Exhausted, "NO_STORAGE")
    assert await cloud.volumes(project) == []


async def test_a_full_host_gets_nothing_and_the_emptiest_is_taken(
    cloud: VolumeCloud, project: Project
) -> None:
    hosts = [StorageHost(cloud.host(), capacity_gib=capacity) for capacity in (2, 10)]
    for host in hosts:
        await host.start()

    volumes = [await cloud.create_volume(project, size_gib=2) for _ in range(6)]

    placed = [v.status.host_id for v in volumes]
    assert (placed.count(hosts[0].id), placed.count(hosts[1].id)) == (1, 5)
    assert (await refused(cloud.begin_create(project))).reason == "NO_STORAGE"
    for host in hosts:
        await host.stop()


@both_databases
async def test_creations_at_once_stay_within_a_hosts_room(
    cloud: VolumeCloud, project: Project
) -> None:
    host = StorageHost(cloud.host(), capacity_gib=5)
    await host.start()
    begun = await asyncio.gather(
        *(cloud.begin_create(project, f"v{n}") for n in range(12)), return_exceptions=True
    )
    ended = [
        await cloud.end_of(project, operation.id)
        for operation in begun
        if isinstance(operation, Operation)
    ]
    assert [o.state for o in ended].count(Operation.STATE_SUCCEEDED) == 5
    assert len(host.volumes) == 5
    await host.stop()


@both_databases
async def test_the_quota_of_volumes_holds(
    cloud: VolumeCloud, project: Project, storage: StorageHost
) -> None:
    await set_quota(cloud, project, volume_gib=5)
    results = await asyncio.gather(
        *(cloud.begin_create(project, f"v{n}", 2) for n in range(6)), return_exceptions=True
    )
    refusals = [r for r in results if isinstance(r, errors.Error)]
    assert [r.reason for r in refusals] == ["QUOTA_EXCEEDED"] * 4
    for operation in results:
        if isinstance(operation, Operation):
            await cloud.end_of(project, operation.id)
            await cloud.delete_volume(project, operation.resource.id)
    await cloud.create_volume(project, size_gib=5)
    found = await rpc.call(
        quota_service_pb2_grpc.QuotaServiceStub(cloud.public.channel).GetQuota,
        quota_service_pb2.GetQuotaRequest(),
        metadata=project.user,
    )
    assert (found.usage.volume_count, found.usage.volume_gib) == (1, 5)
    assert (await refused(cloud.begin_create(project, "more"))).reason == "QUOTA_EXCEEDED"
    await set_quota(cloud, project, volume_gib=-1)
    await cloud.create_volume(project, size_gib=2)


async def test_a_dry_run_writes_nothing(
    cloud: VolumeCloud, project: Project, storage: StorageHost
) -> None:
    operation = await cloud.begin_create(project, validate_only=True)
    assert not operation.id
    assert await cloud.volumes(project) == []


@both_databases
async def test_an_update_changes_name_and_description(
    cloud: VolumeCloud, project: Project, storage: StorageHost
) -> None:
    volume = await cloud.create_volume(project)
    request = volume_service_pb2.UpdateVolumeRequest(
        request_id=ids.request_id(),
        id=volume.metadata.id,
        name="renamed",
        update_mask=field_mask_pb2.FieldMask(paths=["name"]),
    )
    await rpc.call(cloud.storage.volumes.UpdateVolume, request, metadata=project.user)
    assert (await cloud.get_volume(project, volume.metadata.id)).metadata.name == "renamed"
    request.request_id = ids.request_id()
    request.update_mask.paths[:] = ["spec.size_gib"]
    request.spec.size_gib = 5
    call = rpc.call(cloud.storage.volumes.UpdateVolume, request, metadata=project.user)
    assert (await refused(call)).reason == "BAD_UPDATE_MASK"
    other = await cloud.project("other")
    assert (await refused(cloud.get_volume(other, volume.metadata.id))).reason == "VOLUME_NOT_FOUND"
    assert await cloud.volumes(other) == []


@both_databases
async def test_a_watch_shows_the_life_of_a_volume(
    cloud: VolumeCloud, project: Project, storage: StorageHost
) -> None:
    answer = await rpc.call(
        cloud.storage.volumes.ListVolumes,
        volume_service_pb2.ListVolumesRequest(),
        metadata=project.user,
    )
    volume = await cloud.create_volume(project)
    await cloud.delete_volume(project, volume.metadata.id)
    request = volume_service_pb2.WatchVolumesRequest(
        from_revision=answer.revision, id=volume.metadata.id
    )
    stream = cloud.storage.volumes.WatchVolumes(request, metadata=tuple(project.user), timeout=20)
    async for event in rpc.received(stream):
        if event.type == metadata_pb2.CHANGE_TYPE_DELETED:
            assert event.volume.metadata.id == volume.metadata.id
            break


async def test_a_host_that_cannot_store_it_ends_the_creation(
    cloud: VolumeCloud, project: Project, storage: StorageHost
) -> None:
    storage.failure = errors.Exhausted("HOST_DISK_FULL", "the host's disk is full")
    operation = await cloud.begin_create(project)
    await until_failed(cloud, project, operation)
    storage.failure = None

    ended = await cloud.end_of(project, operation.id)

    assert ended.state == Operation.STATE_FAILED
    assert errors.from_status(ended.error).reason == "HOST_DISK_FULL"
    volume = await cloud.get_volume(project, operation.resource.id)
    assert volume.status.state == State.STATE_ERROR
    assert volume.status.fault == "the host's disk is full"
    await assert_clean(cloud, project, storage)


@both_databases
async def test_a_cancelled_creation_leaves_nothing_on_the_host(
    cloud: VolumeCloud, project: Project, storage: StorageHost
) -> None:
    storage.going_on.clear()
    operation = await cloud.begin_create(project)
    await step_begun(cloud, project, operation, 3)
    cancel = operation_pb2.CancelOperationRequest(id=operation.id, request_id=ids.request_id())
    await rpc.call(cloud.storage.operations.CancelOperation, cancel, metadata=project.user)
    storage.going_on.set()

    ended = await cloud.end_of(project, operation.id)

    assert ended.state == Operation.STATE_CANCELLED
    await assert_clean(cloud, project, storage)


async def test_a_deletion_pre_empts_the_creation(
    cloud: VolumeCloud, project: Project, storage: StorageHost
) -> None:
    storage.going_on.clear()
    creation = await cloud.begin_create(project)
    await step_begun(cloud, project, creation, 3)
    deletion = await cloud.begin_delete(project, creation.resource.id)
    storage.going_on.set()

    assert (await cloud.end_of(project, deletion.id)).state == Operation.STATE_SUCCEEDED
    ended = await cloud.end_of(project, creation.id)
    assert errors.from_status(ended.error).reason == "VOLUME_DELETED"
    assert storage.volumes == {}
    assert await cloud.volumes(project) == []


async def test_a_silent_host_holds_the_volume_until_it_is_back(
    cloud: VolumeCloud, project: Project, storage: StorageHost
) -> None:
    volume = await cloud.create_volume(project)
    await set_quota(cloud, project, volume_count=1)
    await storage.stop()
    operation = await cloud.begin_delete(project, volume.metadata.id)
    await step_begun(cloud, project, operation, 2)
    await hasten(cloud, operation)

    ended = await cloud.end_of(project, operation.id)

    assert errors.from_status(ended.error).reason == "STORAGE_HOST_SILENT"
    held = await cloud.get_volume(project, volume.metadata.id)
    assert held.status.state == State.STATE_DELETING
    assert storage.id in held.status.fault
    # The quota is free at once; the data go when the host is back, without anybody's help.
    await storage.start()

    async def gone() -> bool:
        return await cloud.volumes(project) == []

    await eventually(gone)
    assert storage.buried == {volume.metadata.id}


async def until_failed(cloud: VolumeCloud, project: Project, operation: Operation) -> None:
    async def undoing() -> bool:
        now = await get_operation(cloud, project, operation)
        return now.state != Operation.STATE_RUNNING

    await eventually(undoing)


async def step_begun(
    cloud: VolumeCloud, project: Project, operation: Operation, number: int
) -> None:
    async def begun() -> bool:
        now = await get_operation(cloud, project, operation)
        return any(step.number == number for step in now.steps)

    await eventually(begun)


async def get_operation(cloud: VolumeCloud, project: Project, operation: Operation) -> Operation:
    request = operation_pb2.GetOperationRequest(id=operation.id)
    return await rpc.call(cloud.storage.operations.GetOperation, request, metadata=project.user)


async def hasten(cloud: VolumeCloud, operation: Operation) -> None:
    """Move an operation's deadline near, and have another runner take it."""
    table = model.shared.operation
    await write(
        cloud,
        lambda: (
            table.update(
                deadline=database.now() + 2_000_000,
                lease_owner="",
                lease_expire_time=0,
                lease_number=table.lease_number + 1,
            )
            .where(table.id == operation.id)
            .execute()
        ),
    )


async def set_quota(cloud: VolumeCloud, project: Project, **values: int) -> None:
    await write(
        cloud,
        lambda: (
            model.Quota.insert(project_id=project.id, **values)
            .on_conflict(conflict_target=[model.Quota.project_id], update=values)
            .execute()
        ),
    )
