"""A simulated host's disks, network and volumes: what is there is what its records say."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mcloud.common.v1 import session_pb2
from mcloud.conductor.v1 import domain_pb2
from mcloud.network.v1 import dataplane_pb2
from mcloud.volume.v1 import export_pb2
from mcloud_agents.compute.image_cache import ByteSource, CachedImage
from mcloud_agents.compute.record import Record
from mcloud_agents.simulate.state_file import StateFile
from mcloud_base import errors

if TYPE_CHECKING:
    from mcloud_agents.network.dataplane import InPlace

VOLUME = "volume"
_NBD_PORT = 10809


class Disks:
    """Files that are not there (compute.disks.Disks).

    Args:
        records: of the domains that have disks from the start.
        download: fetch and check the bytes of each image once; otherwise every image is here.
    """

    def __init__(self, records: Iterable[Record], *, download: bool) -> None:
        found = list(records)
        self._roots = {each.domain_id for each in found if each.root_disk_made}
        self._drives = {each.domain_id for each in found if each.config_digest}
        self._images = {each.spec.root_disk.image_sha256 for each in found if each.spec}
        self._download = download

    async def prepare(self, domain_id: str) -> None:
        """See compute.disks.Disks."""

    def root_disk(self, domain_id: str) -> Path:
        """See compute.disks.Disks."""
        return Path("instances") / domain_id / "root.qcow2"

    def has_root_disk(self, domain_id: str) -> bool:
        """See compute.disks.Disks."""
        return domain_id in self._roots

    async def make_root_disk(self, domain_id: str, base: CachedImage, size_gib: int) -> None:
        """See compute.disks.Disks."""
        self._roots.add(domain_id)

    async def find_image(self, digest: str, image_format: str) -> CachedImage | None:
        """See compute.disks.Disks."""
        if self._download and digest not in self._images:
            return None
        return CachedImage(Path("images") / f"{digest}.{image_format}", image_format, 0)

    async def ensure_image(
        self, digest: str, image_format: str, size_bytes: int, source: ByteSource
    ) -> CachedImage:
        """See compute.disks.Disks.

        Raises:
            DataLoss: IMAGE_CORRUPT.
        """
        hasher = hashlib.sha256()
        async for chunk in source(0):
            hasher.update(chunk)
        if hasher.hexdigest() != digest:
            raise errors.DataLoss(
                "IMAGE_CORRUPT", f"the image's bytes are not those of {digest}", sha256=digest
            )
        self._images.add(digest)
        return CachedImage(Path("images") / f"{digest}.{image_format}", image_format, 0)

    def config_drive(self, domain_id: str) -> Path:
        """See compute.disks.Disks."""
        return Path("instances") / domain_id / "config-drive.iso"

    def has_config_drive(self, domain_id: str) -> bool:
        """See compute.disks.Disks."""
        return domain_id in self._drives

    async def write_config_drive(self, domain_id: str, documents: Mapping[str, bytes]) -> None:
        """See compute.disks.Disks."""
        self._drives.add(domain_id)

    def console_log(self, domain_id: str) -> Path:
        """See compute.disks.Disks."""
        return Path("instances") / domain_id / "console.log"

    async def trim_console_logs(self, limit_bytes: int) -> None:
        """See compute.disks.Disks."""

    async def remove(self, domain_id: str) -> None:
        """See compute.disks.Disks."""
        self._roots.discard(domain_id)
        self._drives.discard(domain_id)

    def artifacts(self) -> list[tuple[session_pb2.Artifact.Kind.ValueType, Path, str]]:
        """See compute.disks.Disks."""
        kinds = session_pb2.Artifact
        return [
            *((kinds.KIND_OVERLAY, self.root_disk(id_), id_) for id_ in sorted(self._roots)),
            *(
                (kinds.KIND_CONFIG_DRIVE, self.config_drive(id_), id_)
                for id_ in sorted(self._drives)
            ),
        ]

    async def tidy(self, wanted: Iterable[domain_pb2.RootDisk]) -> None:
        """See compute.disks.Disks."""


class Dataplane:
    """A network without packets (agent.Dataplane): each document is in place at once."""

    def __init__(self) -> None:
        self._taps: list[tuple[str, str]] = []  # (device, port)

    async def start(self) -> None:
        """See agent.Dataplane: the control plane sends the document anew."""

    async def close(self) -> None:
        """See agent.Dataplane."""

    async def apply(
        self, desired: dataplane_pb2.HostDataplane, in_place: InPlace
    ) -> dataplane_pb2.HostDataplaneStatus:
        """See handlers.Dataplane."""
        self._taps = [(port.device_name, port.port_id) for port in desired.ports]
        await in_place([port_id for _, port_id in self._taps])
        return dataplane_pb2.HostDataplaneStatus(
            network_count=len(desired.networks),
            port_count=len(desired.ports),
            router_count=len(desired.routers),
        )

    async def artifacts(self) -> Sequence[session_pb2.Artifact]:
        """See handlers.Dataplane."""
        return [
            session_pb2.Artifact(kind=session_pb2.Artifact.KIND_TAP, name=device, owner_id=port_id)
            for device, port_id in self._taps
        ]


class Volumes:
    """Volumes without bytes (agent.Volumes); what is stored and served is in the file."""

    def __init__(self, file: StateFile, host: int, address: str) -> None:
        self._file = file
        self._host = host
        self._address = address
        self._known = {
            id_: session_pb2.Desired.FromString(body)
            for id_, body in file.read(host, VOLUME).items()
        }

    async def start(self) -> None:
        """See agent.Volumes."""

    async def close(self) -> None:
        """See agent.Volumes."""

    async def apply(self, desired: session_pb2.Desired) -> session_pb2.Observed:
        """See session.Handler."""
        if desired.absent:
            self._file.remove(self._host, VOLUME, desired.id)
            self._known.pop(desired.id, None)
        else:
            self._file.write(self._host, VOLUME, desired.id, desired.SerializeToString())
            self._known[desired.id] = desired
        return self._observed(desired)

    async def observe_all(self) -> Sequence[session_pb2.Observed]:
        """See session.Handler."""
        return [self._observed(desired) for desired in self._known.values()]

    async def artifacts(self) -> Sequence[session_pb2.Artifact]:
        """See session.Handler."""
        kind = session_pb2.Artifact.KIND_VOLUME
        return [
            session_pb2.Artifact(
                kind=kind,
                name=f"volumes/{id_}.qcow2",
                owner_id=id_,
                generation=desired.generation,
            )
            for id_, desired in self._known.items()
        ]

    def _observed(self, desired: session_pb2.Desired) -> session_pb2.Observed:
        observed = session_pb2.Observed(
            id=desired.id,
            epoch=desired.epoch,
            generation=desired.generation,
            absent=desired.absent,
        )
        spec = export_pb2.VolumeDesired()
        if not desired.absent and desired.spec.Unpack(spec):
            status = export_pb2.VolumeOnHost()
            for client in spec.clients:
                status.endpoints.add(
                    attachment_id=client.attachment_id,
                    address=self._address,
                    port=_NBD_PORT,
                    export_name=desired.id,
                )
            observed.status.Pack(status)
        return observed
