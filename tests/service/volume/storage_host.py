"""A host that stores volumes in memory: the agent's own session, and no qemu-storage-daemon."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from mcloud.common.v1 import session_pb2
from mcloud.volume.v1 import export_pb2
from mcloud_agents.session import HostSession
from mcloud_base import errors
from service.image.cloud import Host


class StorageHost:
    """Brings volumes to their desired state at once, unless told to fail or to wait."""

    def __init__(self, host: Host, *, capacity_gib: int = 0, incarnation: int = 1) -> None:
        self.id = host.id
        self.volumes: dict[str, export_pb2.VolumeDesired] = {}
        self.buried: set[str] = set()
        self.most_clients = 0  # of one volume at a time, ever
        self.failure: errors.Error | None = None
        self.going_on = asyncio.Event()
        self.going_on.set()
        capabilities = ["storage", *([f"storage_gib={capacity_gib}"] if capacity_gib else [])]
        self.session = HostSession(
            "volume",
            host.stubs.sessions.OpenSession,
            self,
            session_pb2.Hello(
                incarnation=incarnation, capabilities=capabilities, underlay_ip="127.0.0.1"
            ),
        )
        self._running: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._running = asyncio.create_task(self.session.run())
        await until(lambda: self.session.connected)

    async def stop(self) -> None:
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)
            self._running = None

    async def apply(self, desired: session_pb2.Desired) -> session_pb2.Observed:
        await self.going_on.wait()
        if self.failure is not None:
            raise self.failure
        observed = session_pb2.Observed(
            id=desired.id, epoch=desired.epoch, generation=desired.generation
        )
        if desired.absent:
            self.volumes.pop(desired.id, None)
            self.buried.add(desired.id)
            observed.absent = True
            return observed
        spec = export_pb2.VolumeDesired()
        assert desired.spec.Unpack(spec)
        self.volumes[desired.id] = spec
        self.most_clients = max(self.most_clients, len(spec.clients))
        observed.status.Pack(self._observe(desired.id))
        return observed

    async def observe_all(self) -> Sequence[session_pb2.Observed]:
        return []

    async def artifacts(self) -> Sequence[session_pb2.Artifact]:
        return [
            session_pb2.Artifact(kind=session_pb2.Artifact.KIND_VOLUME, name=id_, owner_id=id_)
            for id_ in self.volumes
        ]

    def subjects(self, volume_id: str) -> list[str]:
        """Return who may connect."""
        return [client.certificate_subject for client in self.volumes[volume_id].clients]

    def _observe(self, volume_id: str) -> export_pb2.VolumeOnHost:
        return export_pb2.VolumeOnHost(
            allocated_bytes=4096,
            endpoints=[
                export_pb2.ExportEndpoint(
                    attachment_id=client.attachment_id,
                    address="127.0.0.1",
                    port=10809,
                    export_name=client.attachment_id,
                )
                for client in self.volumes[volume_id].clients
            ],
        )


async def until(condition: Callable[[], object], timeout_s: float = 20) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.02)
