"""Attachments: reserved, served to a host, cut off, given back; each once, and never too late."""

from __future__ import annotations

import asyncio

import pytest

from mcloud.common.v1 import operation_pb2
from mcloud.volume.v1 import attachment_pb2, attachment_service_pb2, volume_pb2
from mcloud_base import errors, ids, rpc
from mcloud_controlplane.core import database
from mcloud_controlplane.volume import model
from service.identity.cloud import eventually, refused
from service.image.cloud import Project, both_databases
from service.volume.cloud import State, VolumeCloud
from service.volume.storage_host import StorageHost, until

Attached = attachment_pb2.AttachmentStatus


@both_databases
async def test_a_volume_is_reserved_served_cut_off_and_given_back(
    cloud: VolumeCloud, project: Project, storage: StorageHost
) -> None:
    volume = await cloud.create_volume(project, size_gib=3)
    id_, host, domain = volume.metadata.id, cloud.host(), ids.new("d")
    assert volume.status.host_id == storage.id
    assert storage.subjects(id_) == []

    attachment = await cloud.reserve(project, id_)
    assert attachment.status.state == Attached.STATE_RESERVED
    assert await state(cloud, project, id_) == State.STATE_RESERVED

    answer = await cloud.connect(host, project, attachment.metadata.id, domain)
    assert (answer.nbd.address, answer.nbd.port) == ("127.0.0.1", 10809)
    assert answer.nbd.size_bytes == 3 << 30
    assert answer.attachment.status.state == Attached.STATE_CONNECTED
    assert storage.subjects(id_) == [f"CN={host.id}"]
    assert await state(cloud, project, id_) == State.STATE_IN_USE

    left = await cloud.disconnect(attachment.metadata.id, domain)
    assert (left.status.state, left.status.domain_id) == (Attached.STATE_RESERVED, "")
    assert storage.subjects(id_) == []

    await cloud.release(attachment.metadata.id)
    assert await state(cloud, project, id_) == State.STATE_AVAILABLE
    assert id_ in storage.volumes


async def test_every_call_may_be_repeated(
    cloud: VolumeCloud, project: Project, storage: StorageHost
) -> None:
    volume = await cloud.create_volume(project)
    attachment_id, instance_id, domain = ids.new("att"), ids.new("i"), ids.new("d")
    host = cloud.host()
    for _ in range(2):
        await cloud.reserve(
            project, volume.metadata.id, attachment_id=attachment_id, instance_id=instance_id
        )
    answers = [await cloud.connect(host, project, attachment_id, domain) for _ in range(2)]
    assert answers[0] == answers[1]
    for _ in range(2):
        await cloud.disconnect(attachment_id, domain)
    for _ in range(2):
        await cloud.release(attachment_id)
    assert storage.most_clients == 1


async def test_a_second_instance_is_refused_with_the_first_ones_name(
    cloud: VolumeCloud, project: Project, storage: StorageHost
) -> None:
    volume = await cloud.create_volume(project)
    first = await cloud.reserve(project, volume.metadata.id)

    refusal = await refused(cloud.reserve(project, volume.metadata.id))
    assert refusal.reason == "VOLUME_IN_USE"
    assert refusal.metadata["instance_id"] == first.spec.instance_id
    refusal = await refused(cloud.begin_delete(project, volume.metadata.id))
    assert refusal.reason == "VOLUME_IN_USE"


@both_databases
async def test_of_many_who_reserve_at_once_one_wins(
    cloud: VolumeCloud, project: Project, storage: StorageHost
) -> None:
    volume = await cloud.create_volume(project)
    results = await asyncio.gather(
        *(cloud.reserve(project, volume.metadata.id) for _ in range(12)), return_exceptions=True
    )
    assert [type(r) for r in results].count(attachment_pb2.Attachment) == 1
    refusals = {r.reason for r in results if isinstance(r, errors.Error)}
    assert refusals == {"VOLUME_IN_USE"}


async def test_another_projects_volume_is_not_there(
    cloud: VolumeCloud, project: Project, storage: StorageHost
) -> None:
    volume = await cloud.create_volume(project)
    attachment = await cloud.reserve(project, volume.metadata.id)
    other = await cloud.project("other")

    assert (await refused(cloud.reserve(other, volume.metadata.id))).reason == "VOLUME_NOT_FOUND"
    get = attachment_service_pb2.GetAttachmentRequest(id=attachment.metadata.id)
    for who, reason in ((project, ""), (other, "ATTACHMENT_NOT_FOUND")):
        call = rpc.call(cloud.storage.attachments.GetAttachment, get, metadata=who.user)
        if reason:
            assert (await refused(call)).reason == reason
        else:
            assert (await call) == attachment
    list_ = attachment_service_pb2.ListAttachmentsRequest(filter="state=RESERVED")
    for who, count in ((project, 1), (other, 0)):
        answer = await rpc.call(cloud.storage.attachments.ListAttachments, list_, metadata=who.user)
        assert len(answer.attachments) == count


async def test_a_host_connects_only_what_its_token_names(
    cloud: VolumeCloud, project: Project, storage: StorageHost
) -> None:
    volume = await cloud.create_volume(project)
    attachment = await cloud.reserve(project, volume.metadata.id)
    host, other_host, domain = cloud.host(), cloud.host(), ids.new("d")
    request = attachment_service_pb2.ConnectAttachmentRequest(
        attachment_id=attachment.metadata.id, domain_id=domain
    )
    elsewhere = await cloud.delegate(host, project, domain_id=domain, attachment_ids=["att-x"])
    of_another_domain = await cloud.delegate(host, project, attachment_ids=[attachment.metadata.id])
    good = await cloud.delegate(
        host, project, domain_id=domain, attachment_ids=[attachment.metadata.id]
    )
    for stubs, token, reason in (
        (host.stubs, elsewhere, "NOT_DELEGATED"),
        (host.stubs, of_another_domain, "NOT_DELEGATED"),
        (other_host.stubs, good, "TOKEN_INVALID"),
        (host.stubs, (), "WRONG_CALLER"),
        (cloud.services, (), "WRONG_CALLER"),
    ):
        call = rpc.call(stubs.attachments.ConnectAttachment, request, metadata=token)
        assert (await refused(call)).reason == reason
    assert storage.subjects(volume.metadata.id) == []


async def test_connecting_brings_row_fifteen_of_the_trace(
    cloud: VolumeCloud, project: Project, storage: StorageHost
) -> None:
    volume = await cloud.create_volume(project)
    attachment = await cloud.reserve(project, volume.metadata.id)
    host, domain = cloud.host(), ids.new("d")
    token = await cloud.delegate(
        host, project, domain_id=domain, attachment_ids=[attachment.metadata.id]
    )
    request = attachment_service_pb2.ConnectAttachmentRequest(
        attachment_id=attachment.metadata.id, domain_id=domain
    )
    call = host.stubs.attachments.ConnectAttachment(request, metadata=tuple(token), timeout=20)
    await call

    step = operation_pb2.OperationStep.FromString(
        dict(await call.trailing_metadata())["mcloud-step-bin"]
    )
    assert (step.number, step.service) == (15, "volume")
    assert 0 < step.start_time.ToMicroseconds() <= step.end_time.ToMicroseconds()


@both_databases
async def test_a_connected_volume_is_not_given_to_another_domain(
    cloud: VolumeCloud, project: Project, storage: StorageHost
) -> None:
    volume = await cloud.create_volume(project)
    attachment_id = (await cloud.reserve(project, volume.metadata.id)).metadata.id
    first, second, domains = cloud.host(), cloud.host(), [ids.new("d"), ids.new("d")]
    await cloud.connect(first, project, attachment_id, domains[0])

    refusal = await refused(cloud.connect(second, project, attachment_id, domains[1]))
    assert refusal.reason == "ATTACHMENT_CONNECTED_ELSEWHERE"
    refusal = await refused(cloud.release(attachment_id))
    assert refusal.reason == "ATTACHMENT_CONNECTED"
    # Of a domain that does not hold it nothing is taken; but it may never connect any more.
    await cloud.disconnect(attachment_id, domains[1])
    assert storage.subjects(volume.metadata.id) == [f"CN={first.id}"]

    await cloud.disconnect(attachment_id, domains[0])
    for host, domain in ((first, domains[0]), (second, domains[1])):
        refusal = await refused(cloud.connect(host, project, attachment_id, domain))
        assert refusal.reason == "ID_RETIRED"
    await cloud.connect(second, project, attachment_id, ids.new("d"))
    assert storage.subjects(volume.metadata.id) == [f"CN={second.id}"]
    assert storage.most_clients == 1


@both_databases
async def test_what_was_released_is_never_reserved_or_connected_again(
    cloud: VolumeCloud, project: Project, storage: StorageHost
) -> None:
    volume = await cloud.create_volume(project)
    attachment_id, instance_id = ids.new("att"), ids.new("i")
    await cloud.release(attachment_id, lease_number=5)

    reserve = {"attachment_id": attachment_id, "instance_id": instance_id}
    for lease_number, reason in ((5, "ID_RETIRED"), (4, "STALE_LEASE")):
        refusal = await refused(
            cloud.reserve(project, volume.metadata.id, lease_number=lease_number, **reserve)
        )
        assert refusal.reason == reason
    refusal = await refused(cloud.connect(cloud.host(), project, attachment_id, ids.new("d")))
    assert refusal.reason == "ID_RETIRED"


@both_databases
async def test_a_silent_storing_host_is_told_and_taken_up_when_it_is_back(
    cloud: VolumeCloud, project: Project, storage: StorageHost
) -> None:
    volume = await cloud.create_volume(project)
    attachment_id = (await cloud.reserve(project, volume.metadata.id)).metadata.id
    host, domain = cloud.host(), ids.new("d")
    await storage.stop()
    await let_lease_run_out(cloud, storage.id)

    refusal = await refused(cloud.connect(host, project, attachment_id, domain, timeout_s=3))
    assert (type(refusal), refusal.reason) == (errors.Unavailable, "STORAGE_HOST_SILENT")

    await storage.start()
    await cloud.connect(host, project, attachment_id, domain)
    await storage.stop()
    await let_lease_run_out(cloud, storage.id)
    refusal = await refused(cloud.disconnect(attachment_id, domain, timeout_s=3))
    assert refusal.reason == "STORAGE_HOST_SILENT"
    refusal = await refused(cloud.release(attachment_id))
    assert refusal.reason == "ATTACHMENT_CONNECTED"

    await storage.start()
    left = await cloud.disconnect(attachment_id, domain)
    assert left.status.state == Attached.STATE_RESERVED
    assert storage.subjects(volume.metadata.id) == []


async def test_what_hinders_the_storing_host_is_told(
    cloud: VolumeCloud, project: Project, storage: StorageHost
) -> None:
    volume = await cloud.create_volume(project)
    attachment_id = (await cloud.reserve(project, volume.metadata.id)).metadata.id
    storage.failure = errors.Exhausted("NO_FREE_PORT", "every port is taken")

    refusal = await refused(
        cloud.connect(cloud.host(), project, attachment_id, ids.new("d"), timeout_s=10)
    )

    assert refusal.reason == "STORAGE_HOST_FAILED"
    assert "every port is taken" in refusal.message


@pytest.mark.parametrize("with_instance", [True, False])
async def test_a_volume_goes_with_its_instance_only_when_that_is_deleted(
    cloud: VolumeCloud, project: Project, storage: StorageHost, with_instance: bool
) -> None:
    detached = await cloud.create_volume(project)
    attachment = await cloud.reserve(project, detached.metadata.id, delete_with_instance=True)
    await cloud.release(attachment.metadata.id)
    assert await state(cloud, project, detached.metadata.id) == State.STATE_AVAILABLE

    volume = await cloud.create_volume(project)
    attachment = await cloud.reserve(
        project, volume.metadata.id, delete_with_instance=with_instance
    )
    await cloud.release(attachment.metadata.id, instance_deleted=True)

    if not with_instance:
        assert await state(cloud, project, volume.metadata.id) == State.STATE_AVAILABLE
        return
    await until(lambda: volume.metadata.id in storage.buried)

    async def ended() -> operation_pb2.Operation | None:
        request = operation_pb2.ListOperationsRequest(
            filter=f'resource.id="{volume.metadata.id}" AND state=SUCCEEDED'
        )
        answer = await rpc.call(
            cloud.storage.operations.ListOperations, request, metadata=project.user
        )
        found = [o for o in answer.operations if o.method.endswith("DeleteVolume")]
        return found[0] if found else None

    assert (await eventually(ended)).project_id == project.id
    refusal = await refused(cloud.get_volume(project, volume.metadata.id))
    assert refusal.reason == "VOLUME_NOT_FOUND"


async def test_attachments_of_all_projects_are_listed_by_id(
    cloud: VolumeCloud, project: Project, storage: StorageHost
) -> None:
    made = []
    for name in ("a", "b", "c"):
        volume = await cloud.create_volume(project, name=name)
        made.append((await cloud.reserve(project, volume.metadata.id)).metadata.id)
    request = attachment_service_pb2.ListInstanceAttachmentsRequest(after_id=sorted(made)[0])
    answer = await rpc.call(cloud.services.attachments.ListInstanceAttachments, request)
    assert [row.metadata.id for row in answer.attachments] == sorted(made)[1:]


async def state(
    cloud: VolumeCloud, project: Project, volume_id: str
) -> volume_pb2.VolumeStatus.State.ValueType:
    return (await cloud.get_volume(project, volume_id)).status.state


async def let_lease_run_out(cloud: VolumeCloud, host_id: str) -> None:
    """As if the lease's time had passed."""
    store = cloud.runtime.database("volume", model.open_database)
    table = model.shared.host_session

    def write() -> None:
        table.update(lease_expire_time=database.now() - 1).where(table.host_id == host_id).execute()

    await store.write(write)
