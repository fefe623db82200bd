"""Clients of a control plane of identity, image and volume, on real ports over TLS."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import grpc
import pytest

from mcloud.common.v1 import operation_pb2, options_pb2
from mcloud.identity.v1 import token_service_pb2
from mcloud.image.v1 import (
    image_pb2,
    image_service_pb2,
    image_service_pb2_grpc,
)
from mcloud.image.v1 import operation_service_pb2_grpc as image_operation_service_pb2_grpc
from mcloud.volume.v1 import (
    attachment_service_pb2_grpc,
    operation_service_pb2_grpc,
    session_service_pb2_grpc,
    volume_service_pb2_grpc,
)
from mcloud_base import endpoints, ids, rpc, tls
from mcloud_controlplane.core import pki
from mcloud_controlplane.core.runtime import Runtime
from mcloud_controlplane.settings import Settings
from service.identity import cloud

Upload = image_service_pb2.UploadImageDataRequest

# For tests whose units lock, race or compare in the database.
both_databases = pytest.mark.parametrize(
    "database_url",
    ["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)],
    indirect=True,
)


class StorageStubs:
    """The services of image and volume over one channel."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel
        self.images = image_service_pb2_grpc.ImageServiceStub(channel)
        self.image_operations = image_operation_service_pb2_grpc.OperationServiceStub(channel)
        self.volumes = volume_service_pb2_grpc.VolumeServiceStub(channel)
        self.attachments = attachment_service_pb2_grpc.AttachmentServiceStub(channel)
        self.operations = operation_service_pb2_grpc.OperationServiceStub(channel)
        self.sessions = session_service_pb2_grpc.SessionServiceStub(channel)


@dataclass(frozen=True)
class Host:
    """An enrolled host, as the services know it: by its certificate."""

    id: str
    identity: tls.Identity
    stubs: StorageStubs


@dataclass(frozen=True)
class Project:
    id: str
    user: rpc.Metadata


class StorageCloud(cloud.Cloud):
    def __init__(self, settings: Settings, runtime: Runtime) -> None:
        super().__init__(settings, runtime)
        self.storage = StorageStubs(self.public.channel)
        self.services = StorageStubs(self.service.channel)
        self._hosts: list[Host] = []

    async def close(self) -> None:
        for host in self._hosts:
            await host.stubs.channel.close(None)
        await super().close()

    async def project(self, name: str) -> Project:
        """Make a project with one member."""
        admin = await self.admin()
        project = await self.make_project(admin, name)
        user = await self.make_user(admin, f"member-of-{name}")
        await self.assign(
            admin, user.metadata.id, project.metadata.id, options_pb2.Rule.ROLE_MEMBER
        )
        token = await self.as_user(f"member-of-{name}", project=project.metadata.id)
        return Project(project.metadata.id, token)

    def host(self, host_id: str = "") -> Host:
        host_id = host_id or ids.new("h")
        key = tls.new_key()
        signed = self.runtime.authority.issue_host(
            tls.signing_request(key, host_id), host_id, "127.0.0.1"
        )
        identity = tls.Identity(key, pki._pem(signed), self.runtime.authority.certificate)
        channel = rpc.channel(
            self.settings.internal_listen,
            identity.channel_credentials(),
            server_name=endpoints.SERVICE_NAME,
        )
        host = Host(host_id, identity, StorageStubs(channel))
        self._hosts.append(host)
        return host

    async def delegate(self, host: Host, project: Project, **names: Any) -> rpc.Metadata:
        """Draw a delegated token for a host, as the conductor does."""
        names.setdefault("domain_id", ids.new("d"))
        answer = await rpc.call(
            self.service.token.CreateDelegatedToken,
            token_service_pb2.CreateDelegatedTokenRequest(
                host_id=host.id,
                certificate_sha256=host.identity.fingerprint(),
                project_id=project.id,
                generation=1,
                **names,
            ),
        )
        return rpc.bearer(answer.token)

    # -- images ------------------------------------------------------------------------------------

    async def create_image(
        self, who: rpc.Metadata, name: str = "debian", **spec: Any
    ) -> image_pb2.Image:
        spec.setdefault("disk_format", image_pb2.DISK_FORMAT_RAW)
        request = image_service_pb2.CreateImageRequest(
            request_id=ids.request_id(), name=name, spec=image_pb2.ImageSpec(**spec)
        )
        operation = await rpc.call(self.storage.images.CreateImage, request, metadata=who)
        image: image_pb2.Image = cloud.unpack(operation, image_pb2.Image)
        return image

    async def upload(
        self, who: rpc.Metadata, image_id: str, content: bytes, **how: Any
    ) -> image_pb2.Image:
        # With a synchronous stub: where a server ends a call before it has read everything,
        # grpc.aio's clients often tell of an "Internal error from Core" instead of its status.
        def upload() -> image_pb2.Image:
            credentials = grpc.ssl_channel_credentials(self.runtime.authority.certificate)
            with grpc.secure_channel(self.settings.public_listen, credentials) as channel:
                stub = image_service_pb2_grpc.ImageServiceStub(channel)
                requests = upload_requests(image_id, content, **how)
                return stub.UploadImageData(requests, metadata=tuple(who), timeout=60)

        with rpc.reraised():
            return await asyncio.to_thread(upload)

    async def active_image(
        self, who: rpc.Metadata, content: bytes = b"disk" * 1024, **spec: Any
    ) -> image_pb2.Image:
        image = await self.create_image(who, **spec)
        return await self.upload(who, image.metadata.id, content)

    async def get_image(self, who: rpc.Metadata, image_id: str) -> image_pb2.Image:
        request = image_service_pb2.GetImageRequest(id=image_id)
        return await rpc.call(self.storage.images.GetImage, request, metadata=who)

    async def delete_image(self, who: rpc.Metadata, image_id: str) -> operation_pb2.Operation:
        request = image_service_pb2.DeleteImageRequest(request_id=ids.request_id(), id=image_id)
        return await rpc.call(self.storage.images.DeleteImage, request, metadata=who)

    async def use_image(
        self, project: Project, image_id: str, instance_id: str, lease_number: int = 1
    ) -> image_service_pb2.ImageUse:
        request = image_service_pb2.EnsureImageUseRequest(
            image_id=image_id,
            instance_id=instance_id,
            project_id=project.id,
            lease_number=lease_number,
        )
        return await rpc.call(self.services.images.EnsureImageUse, request)

    async def release_image(
        self, image_id: str, instance_id: str, lease_number: int = 1
    ) -> image_service_pb2.ReleaseImageUseResponse:
        request = image_service_pb2.ReleaseImageUseRequest(
            image_id=image_id, instance_id=instance_id, lease_number=lease_number
        )
        return await rpc.call(self.services.images.ReleaseImageUse, request)


async def download(
    stubs: StorageStubs, who: rpc.Metadata, image_id: str, offset: int = 0
) -> tuple[image_pb2.Image, bytes, dict[str, Any]]:
    """Return the image, the bytes and the trailing metadata."""
    request = image_service_pb2.DownloadImageRequest(id=image_id, offset=offset)
    stream = stubs.images.DownloadImage(request, metadata=tuple(who), timeout=60)
    image, content = image_pb2.Image(), bytearray()
    async for message in rpc.received(stream):
        if message.HasField("image"):
            image = message.image
        else:
            assert len(message.chunk) <= 1 << 20
            content += message.chunk
    return image, bytes(content), dict(await stream.trailing_metadata())


def upload_requests(
    image_id: str,
    content: bytes,
    *,
    offset: int = 0,
    sha256: str = "",
    whole: bytes | None = None,
    chunk: int = 1 << 20,
    end: bool = True,
) -> Iterator[Upload]:
    """Yield an upload of `content`, which is `whole` from `offset` on."""
    yield Upload(start=image_service_pb2.UploadStart(id=image_id, offset=offset))
    for position in range(0, len(content), chunk):
        yield Upload(chunk=content[position : position + chunk])
    if end:
        digest = sha256 or hashlib.sha256(content if whole is None else whole).hexdigest()
        yield Upload(end=image_service_pb2.UploadEnd(sha256=digest))


def names_of(images: Iterable[image_pb2.Image]) -> list[str]:
    return [image.metadata.name for image in images]
