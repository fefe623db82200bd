"""A domain's files on its host: root disk, config drive, console log, and the images below them."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

from mcloud.common.v1 import session_pb2
from mcloud.conductor.v1 import domain_pb2
from mcloud_agents.compute import config_drive, files, image_cache, qcow2
from mcloud_agents.compute.image_cache import ByteSource, CachedImage, ImageCache


class Disks(Protocol):
    """Where the workflow has a domain's files made; what they are is its business."""

    async def prepare(self, domain_id: str) -> None:
        """Have a place for a domain's files."""

    def root_disk(self, domain_id: str) -> Path:
        """Return where a domain's root disk is, or would be."""

    def has_root_disk(self, domain_id: str) -> bool:
        """Tell whether it is there."""

    async def make_root_disk(self, domain_id: str, base: CachedImage, size_gib: int) -> None:
        """Have a root disk on top of an image.

        Raises:
            InvalidArgument: FLAVOR_TOO_SMALL. Exhausted: HOST_DISK_FULL.
        """

    async def find_image(self, digest: str, image_format: str) -> CachedImage | None:
        """Return an image that is here."""

    async def ensure_image(
        self, digest: str, image_format: str, size_bytes: int, source: ByteSource
    ) -> CachedImage:
        """Have an image here; see ImageCache.ensure."""

    def config_drive(self, domain_id: str) -> Path:
        """Return where a domain's config drive is, or would be."""

    def has_config_drive(self, domain_id: str) -> bool:
        """Tell whether it is there."""

    async def write_config_drive(self, domain_id: str, documents: Mapping[str, bytes]) -> None:
        """Write it, or write it anew."""

    def console_log(self, domain_id: str) -> Path:
        """Return where a guest's console is written to."""

    async def trim_console_logs(self, limit_bytes: int) -> None:
        """Cut those that are longer."""

    async def remove(self, domain_id: str) -> None:
        """Have nothing left of a domain's files."""

    def artifacts(self) -> list[tuple[session_pb2.Artifact.Kind.ValueType, Path, str]]:
        """Return all files that matter, each with its domain's id, known or not."""

    async def tidy(self, wanted: Iterable[domain_pb2.RootDisk]) -> None:
        """Let images go that no root disk lies on and none of the wanted ones will."""


class LocalDisks:
    """Disks in a directory of this machine.

    Args:
        directory: `instances` and `images` are in it.
        limit_bytes: of the image cache, as `max_age_s` is.
    """

    def __init__(self, directory: Path, *, limit_bytes: int, max_age_s: float) -> None:
        self._instances = directory / "instances"
        self._images = directory / "images"
        files.make_private_directory(directory)
        files.make_private_directory(self._instances)
        self._cache = ImageCache(self._images, limit_bytes=limit_bytes, max_age_s=max_age_s)
        self.find_image = self._cache.find
        self.ensure_image = self._cache.ensure

    async def prepare(self, domain_id: str) -> None:
        """See Disks."""
        await files.in_thread(files.make_private_directory, self._instances / domain_id)

    def root_disk(self, domain_id: str) -> Path:
        """See Disks."""
        return self._instances / domain_id / "root.qcow2"

    def has_root_disk(self, domain_id: str) -> bool:
        """See Disks."""
        return self.root_disk(domain_id).exists()

    async def make_root_disk(self, domain_id: str, base: CachedImage, size_gib: int) -> None:
        """See Disks."""
        await image_cache.ensure_overlay(self.root_disk(domain_id), base, size_gib)

    def config_drive(self, domain_id: str) -> Path:
        """See Disks."""
        return self._instances / domain_id / "config-drive.iso"

    def has_config_drive(self, domain_id: str) -> bool:
        """See Disks."""
        return self.config_drive(domain_id).exists()

    async def write_config_drive(self, domain_id: str, documents: Mapping[str, bytes]) -> None:
        """See Disks."""
        await files.in_thread(config_drive.write, self.config_drive(domain_id), documents)

    def console_log(self, domain_id: str) -> Path:
        """See Disks."""
        return self._instances / domain_id / "console.log"

    async def trim_console_logs(self, limit_bytes: int) -> None:
        """See Disks."""

        def trim() -> None:
            for path in self._instances.glob("*/console.log"):
                files.trim(path, limit_bytes)

        await files.in_thread(trim)

    async def remove(self, domain_id: str) -> None:
        """See Disks."""
        await files.in_thread(_remove_tree, self._instances / domain_id)

    def artifacts(self) -> list[tuple[session_pb2.Artifact.Kind.ValueType, Path, str]]:
        """See Disks."""
        return [
            (kind, path, path.parent.name)
            for kind, name in (
                (session_pb2.Artifact.KIND_OVERLAY, "root.qcow2"),
                (session_pb2.Artifact.KIND_CONFIG_DRIVE, "config-drive.iso"),
            )
            for path in sorted(self._instances.glob(f"*/{name}"))
        ]

    async def tidy(self, wanted: Iterable[domain_pb2.RootDisk]) -> None:
        """See Disks."""
        used = await files.in_thread(self._bases_in_use)
        # Looked at last: whoever wants one has not got an overlay over it yet.
        needed = {self._images / f"{disk.image_sha256}.{disk.image_format}" for disk in wanted}
        await self._cache.age(used | needed)

    def _bases_in_use(self) -> frozenset[Path]:
        """Return what any overlay lies on, known or not."""
        overlays = self._instances.glob("*/root.*")
        return frozenset(base for path in overlays if (base := qcow2.read_backing(path)))


def _remove_tree(directory: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(directory)
