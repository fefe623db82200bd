"""Images as resources: who sees them, how many, and for how long their bytes stay."""

from __future__ import annotations

import asyncio

import pytest
from google.protobuf import field_mask_pb2

from mcloud.common.v1 import metadata_pb2, operation_pb2
from mcloud.image.v1 import image_pb2, image_service_pb2
from mcloud_base import errors, ids, rpc
from mcloud_controlplane.image import model
from service.identity.cloud import eventually, refused
from service.image.cloud import (
    Project,
    StorageCloud,
    both_databases,
    download,
    names_of,
)

PUBLIC = image_pb2.IMAGE_VISIBILITY_PUBLIC
State = image_pb2.ImageStatus


@both_databases
async def test_an_image_becomes_active_with_its_bytes(
    cloud: StorageCloud, project: Project
) -> None:
    content = bytes(range(256)) * 12_345
    image = await cloud.create_image(project.user, "debian", min_disk_gib=2)
    assert image.status.state == State.STATE_QUEUED
    assert image.spec.visibility == image_pb2.IMAGE_VISIBILITY_PRIVATE

    done = await cloud.upload(project.user, image.metadata.id, content)

    assert done.status.state == State.STATE_ACTIVE
    assert done.status.size_bytes == len(content)
    assert await cloud.get_image(project.user, image.metadata.id) == done
    seen, found, _ = await download(cloud.storage, project.user, image.metadata.id)
    assert (seen, found) == (done, content)


async def test_a_private_image_is_not_there_for_others(
    cloud: StorageCloud, project: Project
) -> None:
    image = await cloud.active_image(project.user)
    other = await cloud.project("other")

    id_ = image.metadata.id
    for call in (
        cloud.get_image(other.user, id_),
        download(cloud.storage, other.user, id_),
        cloud.delete_image(other.user, id_),
        cloud.upload(other.user, id_, b""),
        cloud.use_image(other, id_, ids.new("i")),
    ):
        assert (await refused(call)).reason == "IMAGE_NOT_FOUND"
    assert await listed(cloud, other) == []


async def test_only_an_administrator_makes_an_image_public(
    cloud: StorageCloud, project: Project
) -> None:
    refusal = await refused(cloud.create_image(project.user, visibility=PUBLIC))
    assert (type(refusal), refusal.reason) == (errors.PermissionDenied, "ROLE_REQUIRED")

    image = await cloud.active_image(await cloud.admin(), visibility=PUBLIC)

    assert await listed(cloud, project) == ["debian"]
    assert (await download(cloud.storage, project.user, image.metadata.id))[1]
    await cloud.use_image(project, image.metadata.id, ids.new("i"))
    refusal = await refused(cloud.delete_image(project.user, image.metadata.id))
    assert (type(refusal), refusal.reason) == (errors.PermissionDenied, "IMAGE_NOT_OWNED")


@both_databases
async def test_a_watch_shows_what_its_owner_sees_and_no_more(
    cloud: StorageCloud, project: Project
) -> None:
    other = await cloud.project("other")
    answer = await rpc.call(
        cloud.storage.images.ListImages,
        image_service_pb2.ListImagesRequest(),
        metadata=other.user,
    )
    await cloud.active_image(project.user, b"private")
    public = await cloud.active_image(await cloud.admin(), b"public", visibility=PUBLIC)
    mine = await cloud.create_image(other.user, "mine")
    private = image_service_pb2.UpdateImageRequest(
        request_id=ids.request_id(),
        id=public.metadata.id,
        update_mask=field_mask_pb2.FieldMask(paths=["spec.visibility"]),
        spec=image_pb2.ImageSpec(visibility=image_pb2.IMAGE_VISIBILITY_PRIVATE),
    )
    await rpc.call(cloud.storage.images.UpdateImage, private, metadata=await cloud.admin())

    request = image_service_pb2.WatchImagesRequest(from_revision=answer.revision)
    seen: list[tuple[str, int]] = []
    async for event in rpc.received(
        cloud.storage.images.WatchImages(request, metadata=tuple(other.user), timeout=20)
    ):
        if event.type == metadata_pb2.CHANGE_TYPE_BOOKMARK:
            break
        # Since the public image is private now, nothing of it is told but that it went.
        assert event.image.metadata.id == mine.metadata.id or not event.image.metadata.name
        seen.append((event.image.metadata.id, event.type))

    assert (mine.metadata.id, metadata_pb2.CHANGE_TYPE_ADDED) in seen
    assert (public.metadata.id, metadata_pb2.CHANGE_TYPE_DELETED) in seen
    assert {id_ for id_, _ in seen} == {mine.metadata.id, public.metadata.id}


async def test_an_update_changes_what_its_mask_names(cloud: StorageCloud, project: Project) -> None:
    image = await cloud.create_image(project.user, description="old")
    request = image_service_pb2.UpdateImageRequest(
        request_id=ids.request_id(),
        id=image.metadata.id,
        name="new name",
        resource_version=image.metadata.resource_version,
        update_mask=field_mask_pb2.FieldMask(paths=["name", "spec.protected"]),
        spec=image_pb2.ImageSpec(protected=True, description="not this"),
    )
    await rpc.call(cloud.storage.images.UpdateImage, request, metadata=project.user)

    changed = await cloud.get_image(project.user, image.metadata.id)
    assert changed.metadata.name == "new name"
    assert (changed.spec.protected, changed.spec.description) == (True, "old")
    refusal = await refused(cloud.delete_image(project.user, image.metadata.id))
    assert refusal.reason == "IMAGE_PROTECTED"
    request.request_id = ids.request_id()
    call = rpc.call(cloud.storage.images.UpdateImage, request, metadata=project.user)
    assert (await refused(call)).reason == "VERSION_CONFLICT"


@both_databases
async def test_the_quota_of_images_holds(cloud: StorageCloud, project: Project) -> None:
    await set_quota(cloud, project, image_count=2)
    results = await asyncio.gather(
        *(cloud.create_image(project.user, f"image-{n}") for n in range(5)), return_exceptions=True
    )

    refusals = [r for r in results if isinstance(r, errors.Error)]
    assert [r.reason for r in refusals] == ["QUOTA_EXCEEDED"] * 3
    assert len(await listed(cloud, project)) == 2


@both_databases
async def test_a_repeated_creation_returns_the_first_operation(
    cloud: StorageCloud, project: Project
) -> None:
    request = image_service_pb2.CreateImageRequest(
        request_id=ids.request_id(),
        name="debian",
        spec=image_pb2.ImageSpec(disk_format=image_pb2.DISK_FORMAT_RAW),
    )
    first = await rpc.call(cloud.storage.images.CreateImage, request, metadata=project.user)
    again = await rpc.call(cloud.storage.images.CreateImage, request, metadata=project.user)
    assert again == first
    assert first.state == operation_pb2.Operation.STATE_SUCCEEDED

    request.request_id, request.validate_only = ids.request_id(), True
    await rpc.call(cloud.storage.images.CreateImage, request, metadata=project.user)
    assert await listed(cloud, project) == ["debian"]


@both_databases
async def test_the_bytes_of_a_deleted_image_stay_while_they_are_used(
    cloud: StorageCloud, project: Project
) -> None:
    image = await cloud.active_image(project.user, b"used" * 1000)
    id_, instance = image.metadata.id, ids.new("i")
    await cloud.use_image(project, id_, instance)
    path = cloud.settings.state_dir / "images" / id_
    host = cloud.host()
    token = await cloud.delegate(host, project, image_ids=[id_])

    await cloud.delete_image(project.user, id_)

    assert (await refused(cloud.get_image(project.user, id_))).reason == "IMAGE_NOT_FOUND"
    assert (await download(host.stubs, token, id_))[1] == b"used" * 1000
    refusal = await refused(cloud.use_image(project, id_, ids.new("i")))
    assert refusal.reason == "IMAGE_NOT_FOUND"
    await cloud.use_image(project, id_, instance)  # a repeat
    assert path.exists()

    await cloud.release_image(id_, instance)
    await cloud.create_image(project.user, "wakes the sweeper")

    async def gone() -> bool:
        return not path.exists()

    await eventually(gone)
    refusal = await refused(download(host.stubs, token, id_))
    assert refusal.reason == "IMAGE_NOT_FOUND"


@both_databases
async def test_a_use_that_was_released_never_comes_again(
    cloud: StorageCloud, project: Project
) -> None:
    image = await cloud.active_image(project.user)
    id_, instance = image.metadata.id, ids.new("i")

    await cloud.release_image(id_, instance, lease_number=3)

    assert (await refused(cloud.use_image(project, id_, instance, 3))).reason == "ID_RETIRED"
    assert (await refused(cloud.use_image(project, id_, instance, 2))).reason == "STALE_LEASE"
    uses = await rpc.call(
        cloud.services.images.ListImageUses, image_service_pb2.ListImageUsesRequest()
    )
    assert not uses.uses


async def test_an_image_without_bytes_cannot_be_used(cloud: StorageCloud, project: Project) -> None:
    image = await cloud.create_image(project.user)
    refusal = await refused(cloud.use_image(project, image.metadata.id, ids.new("i")))
    assert refusal.reason == "IMAGE_NOT_ACTIVE"
    refusal = await refused(download(cloud.storage, project.user, image.metadata.id))
    assert refusal.reason == "IMAGE_NOT_ACTIVE"


@both_databases
async def test_uses_are_listed_by_instance(cloud: StorageCloud, project: Project) -> None:
    image = await cloud.active_image(project.user)
    instances = sorted(ids.new("i") for _ in range(5))
    for instance in instances:
        await cloud.use_image(project, image.metadata.id, instance)

    request = image_service_pb2.ListImageUsesRequest(after_instance_id=instances[1])
    answer = await rpc.call(cloud.services.images.ListImageUses, request)

    assert [use.instance_id for use in answer.uses] == instances[2:]
    assert {use.project_id for use in answer.uses} == {project.id}


@pytest.mark.parametrize("filter_", ["state=ACTIVE", 'name="debian"', "visibility=PRIVATE"])
async def test_a_filter_finds_images(cloud: StorageCloud, project: Project, filter_: str) -> None:
    await cloud.active_image(project.user)
    await cloud.create_image(await cloud.admin(), "fresh", visibility=PUBLIC)
    assert await listed(cloud, project, filter_) == ["debian"]
    assert await listed(cloud, project) == ["debian", "fresh"]


async def listed(cloud: StorageCloud, project: Project, filter_: str = "") -> list[str]:
    request = image_service_pb2.ListImagesRequest(filter=filter_)
    answer = await rpc.call(cloud.storage.images.ListImages, request, metadata=project.user)
    return names_of(answer.images)


async def set_quota(cloud: StorageCloud, project: Project, **values: int) -> None:
    database = cloud.runtime.database("image", model.open_database)

    def write() -> None:
        model.Quota.insert(project_id=project.id, **values).on_conflict(
            conflict_target=[model.Quota.project_id], update=values
        ).execute()

    await database.write(write)
