"""The volumes that one host stores, as mcloud.volume.v1.SessionService desires them.

A volume is a file (data.py), a record (record.py) and, for as long as somebody may reach it, a
process (daemon.py). The processes outlive the agent, which takes them over when it comes back.
"""

from __future__ import annotations

import asyncio
import random
import socket
import time
from collections import defaultdict
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from mcloud.common.v1 import session_pb2
from mcloud.volume.v1 import export_pb2
from mcloud_agents.volume import daemon, data
from mcloud_agents.volume.record import Client, Record, Records
from mcloud_base import errors

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

log = structlog.get_logger()

FIRST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 10.0
CERTIFICATE_CHECK_S = 30.0


@dataclass(frozen=True)
class Settings:
    """Where volumes are kept and served."""

    directory: Path  # of data and records
    run_dir: Path  # of sockets; emptied at boot; a short path (sockets allow 107 bytes)
    pki_dir: Path  # server-cert.pem, server-key.pem, ca-cert.pem
    address: str  # at which other hosts reach this one
    port_first: int = 10809
    port_last: int = 11832


class VolumeHost:
    """Brings volumes to their desired state and keeps their servers running."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._records = Records(settings.directory)
        self._daemons: dict[str, daemon.Daemon] = {}
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._tasks: dict[str, asyncio.Task[None]] = {}  # by volume; "" checks certificates

    async def start(self) -> None:
        """Take over what runs; start what should run and does not."""
        for volume_id in await asyncio.to_thread(daemon.scan, self._settings.run_dir):
            if self._records.find(volume_id) is None:
                log.warning("volume server without a record left alone", volume=volume_id)
        for record in self._records.all():
            self._keep(record.volume_id)
        self._tasks[""] = asyncio.create_task(self._check_certificates())

    async def close(self) -> None:
        """Stop keeping; the servers run on."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        self._tasks.clear()
        for running in self._daemons.values():
            running.release()
        self._daemons.clear()

    async def ensure(
        self, volume_id: str, generation: int, desired: export_pb2.VolumeDesired, epoch: str = ""
    ) -> export_pb2.VolumeOnHost:
        """Store the volume and serve it to exactly the desired clients.

        A client that is no longer desired has been cut off when this returns. Further clients
        come without disturbing those that are connected.

        Raises:
            InvalidArgument: BAD_VOLUME_ID, BAD_VOLUME_SIZE, VOLUME_SHRINK.
            DataLoss: VOLUME_DATA_MISSING, VOLUME_DATA_DAMAGED.
            Exhausted: NO_FREE_PORT.
            Unavailable: STORAGE_COMMAND_FAILED, STORAGE_IO_ERROR, EXPORT_…: try again.
        """
        path = self._records.data(volume_id)
        async with self._locked(volume_id):
            known = self._records.find(volume_id)
            record = known or Record(volume_id, size_bytes=desired.size_bytes)
            clients = tuple(
                Client(client.attachment_id, client.host_id, client.certificate_subject)
                for client in desired.clients
            )
            record = replace(record, epoch=epoch, generation=generation, clients=clients)
            await self._save(record)
            await data.ensure(path, desired.size_bytes, expected=record.created)
            record = await self._save(replace(record, created=True))
            if await asyncio.to_thread(data.virtual_size, path) != desired.size_bytes:
                await self._stop(volume_id)  # no process may have the file open meanwhile
                await data.grow(path, desired.size_bytes)
            record = await self._save(replace(record, size_bytes=desired.size_bytes))
            record = await self._serve(record)
            self._keep(volume_id)
            return await asyncio.to_thread(self._observe, record)

    async def ensure_absent(self, volume_id: str) -> None:
        """Cut off all clients and remove the data.

        Raises:
            InvalidArgument: BAD_VOLUME_ID.
            Unavailable: EXPORT_WILL_NOT_END, EXPORT_STARTING.
        """
        self._records.data(volume_id)
        async with self._locked(volume_id):
            if record := self._records.find(volume_id):
                await self._save(replace(record, clients=()))  # a restart does not serve it again
            await self._stop(volume_id)
            await asyncio.to_thread(self._records.forget, volume_id)
            if keeper := self._tasks.pop(volume_id, None):
                keeper.cancel()
                await asyncio.gather(keeper, return_exceptions=True)

    async def apply(self, desired: session_pb2.Desired) -> session_pb2.Observed:
        """Bring a volume to what a session desires; see `ensure` and `ensure_absent`.

        It is short, so that when cancelled it first ends what it has begun.
        """
        task = asyncio.create_task(self._apply(desired))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            await asyncio.wait({task})
            raise

    async def _apply(self, desired: session_pb2.Desired) -> session_pb2.Observed:
        observed = session_pb2.Observed(
            id=desired.id, epoch=desired.epoch, generation=desired.generation
        )
        if desired.absent:
            await self.ensure_absent(desired.id)
            observed.absent = True
            return observed
        spec = export_pb2.VolumeDesired()
        if not desired.spec.Unpack(spec):
            raise errors.InvalidArgument(
                "UNKNOWN_SPEC", f"{desired.spec.type_url} is not known to this agent"
            )
        status = await self.ensure(desired.id, desired.generation, spec, desired.epoch)
        observed.status.Pack(status)
        return observed

    async def observe_all(self) -> Sequence[session_pb2.Observed]:
        """Return what there is of every volume, whether its server runs or not.

        One whose first data an agent that was killed has left unmade is no loss: it is yet to be.
        """
        everything = []
        for record in self._records.all():
            if not record.created:
                continue
            observed = session_pb2.Observed(
                id=record.volume_id, epoch=record.epoch, generation=record.generation
            )
            try:
                status = await asyncio.to_thread(self._observe, record)
            except FileNotFoundError:
                lost = errors.DataLoss(
                    "VOLUME_DATA_MISSING", "its data is gone", volume=record.volume_id
                )
                observed.error.CopyFrom(errors.to_status(lost))
            else:
                observed.status.Pack(status)
            everything.append(observed)
        return everything

    async def artifacts(self) -> Sequence[session_pb2.Artifact]:
        """Return every data file and server process that is on the host, known or not."""
        kinds = session_pb2.Artifact.Kind
        pids = await asyncio.to_thread(daemon.scan, self._settings.run_dir)
        found = [(kinds.KIND_VOLUME, str(path), path.stem) for path in self._records.data_files()]
        found += [
            (kinds.KIND_EXPORT, f"{daemon.PROGRAM} {pid}", volume_id)
            for volume_id in sorted(pids)
            for pid in pids[volume_id]
        ]
        artifacts = []
        for kind, name, owner_id in found:
            record = self._records.find(owner_id)
            generation = record.generation if record else 0
            artifacts.append(
                session_pb2.Artifact(kind=kind, name=name, owner_id=owner_id, generation=generation)
            )
        return artifacts

    def pid(self, volume_id: str) -> int:
        """Return the process number of a volume's server, or 0."""
        running = self._daemons.get(volume_id)
        return running.pid if running and running.alive else 0

    async def _serve(self, record: Record) -> Record:
        """Make the server what the record says; return the record with its port."""
        subjects = record.subjects
        if not subjects:
            await self._stop(record.volume_id)
            return record
        running = await self._running(record.volume_id)
        if running is not None:
            admitted = await running.subjects()
            if set(admitted) - set(subjects):  # only the end of its process cuts a client off
                await self._stop(record.volume_id)
                running = None
            elif admitted != subjects:
                await running.admit(subjects)
        if running is None:
            if not self._can_bind(record.port):
                record = await self._save(replace(record, port=self._free_port(record)))
            await self._start(record)
        return record

    async def _start(self, record: Record) -> None:
        export = daemon.Export(
            volume_id=record.volume_id,
            path=self._records.data(record.volume_id),
            address=self._settings.address,
            port=record.port,
            name=record.export_name,
            subjects=record.subjects,
        )
        started = await daemon.start(export, self._settings.run_dir, self._settings.pki_dir)
        self._daemons[record.volume_id] = started
        log.info(
            "volume server started", volume=record.volume_id, port=record.port, pid=started.pid
        )

    async def _running(self, volume_id: str) -> daemon.Daemon | None:
        """Return the volume's server; one that an earlier agent left is taken over."""
        running = self._daemons.get(volume_id)
        if running is not None and not running.alive:
            self._daemons.pop(volume_id).release()
            running = None
        if running is None:
            running = await daemon.adopt(volume_id, self._settings.run_dir)
            if running is not None:
                self._daemons[volume_id] = running
                log.info("volume server adopted", volume=volume_id, pid=running.pid)
        return running

    async def _stop(self, volume_id: str) -> None:
        running = await self._running(volume_id)
        if running is not None:
            await running.stop()
            self._daemons.pop(volume_id, None)
            log.info("volume server stopped", volume=volume_id, pid=running.pid)

    def _keep(self, volume_id: str) -> None:
        task = self._tasks.get(volume_id)
        if task is None or task.done():
            self._tasks[volume_id] = asyncio.create_task(self._keeper(volume_id))

    async def _keeper(self, volume_id: str) -> None:
        """Start the volume's server again whenever it ends, for as long as it has clients."""
        pause = FIRST_PAUSE_S
        while True:
            start = time.monotonic()
            running = None
            try:
                async with self._locked(volume_id):
                    record = self._records.find(volume_id)
                    running = await self._revive(record) if record else None
            except errors.Error as error:
                log.warning("volume server not started", volume=volume_id, error=str(error))
            else:
                if running is None:
                    return  # nobody is to reach it
            if running is not None:
                await running.wait()
                if self._daemons.get(volume_id) is running:
                    log.warning("volume server ended", volume=volume_id, pid=running.pid)
                if time.monotonic() - start > LONGEST_PAUSE_S:
                    pause = FIRST_PAUSE_S
                    continue  # at once: guests wait
            await asyncio.sleep(pause * random.uniform(0.8, 1.2))  # noqa: S311 (jitter)
            pause = min(pause * 2, LONGEST_PAUSE_S)

    async def _revive(self, record: Record) -> daemon.Daemon | None:
        if not record.clients:
            await self._stop(record.volume_id)
        elif await self._running(record.volume_id) is None:
            await self._start(record)  # at the same port, which its clients come back to
        return self._daemons.get(record.volume_id)

    async def _check_certificates(self) -> None:
        """Restart servers that have loaded a certificate which has been renewed since.

        They cannot load another one. A connection does not mind; a new one would fail once the
        old certificate has expired. So each is restarted when it has no connection.
        """
        while True:
            await asyncio.sleep(CERTIFICATE_CHECK_S)
            for record in self._records.all():
                with suppress(errors.Error):  # the keeper starts it then
                    await self.refresh_certificate(record.volume_id)

    async def refresh_certificate(self, volume_id: str) -> bool:
        """Restart a server that has an old certificate and no connection; tell whether it was."""
        async with self._locked(volume_id):
            record = self._records.find(volume_id)
            running = self._daemons.get(volume_id)
            if record is None or running is None or not record.clients:
                return False
            newest = (self._settings.pki_dir / "server-cert.pem").stat().st_mtime
            if running.start_time() >= newest or _has_connection(record.port):
                return False
            await self._stop(volume_id)
            await self._start(record)
            self._keep(volume_id)
            return True

    def _can_bind(self, port: int) -> bool:
        if not self._settings.port_first <= port <= self._settings.port_last:
            return False
        address = (self._settings.address, port)
        family = socket.AF_INET6 if ":" in self._settings.address else socket.AF_INET
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(address)
            except OSError:
                return False
        return True

    def _free_port(self, record: Record) -> int:
        taken = {other.port for other in self._records.all()}
        for port in range(self._settings.port_first, self._settings.port_last + 1):
            if port not in taken and self._can_bind(port):
                if record.port:
                    log.warning("volume moves to another port", volume=record.volume_id, port=port)
                return port
        raise errors.Exhausted(
            "NO_FREE_PORT",
            f"every port from {self._settings.port_first} to {self._settings.port_last} is taken",
        )

    @asynccontextmanager
    async def _locked(self, volume_id: str) -> AsyncIterator[None]:
        """Hold a volume alone; a failure of the file system inside is told as such.

        Raises:
            Unavailable: STORAGE_IO_ERROR.
        """
        try:
            async with self._locks[volume_id]:
                yield
        except OSError as error:
            raise errors.Unavailable("STORAGE_IO_ERROR", str(error), volume=volume_id) from error

    async def _save(self, record: Record) -> Record:
        return await asyncio.to_thread(self._records.save, record)

    def _observe(self, record: Record) -> export_pb2.VolumeOnHost:
        path = self._records.data(record.volume_id)
        status = export_pb2.VolumeOnHost(allocated_bytes=data.allocated_bytes(path))
        for client in record.clients:
            status.endpoints.add(
                attachment_id=client.attachment_id,
                address=self._settings.address,
                port=record.port,
                export_name=record.export_name,
            )
        return status


def _has_connection(port: int) -> bool:
    """Tell whether anybody is connected to a port of this network namespace.

    Source: https://www.kernel.org/doc/Documentation/networking/proc_net_tcp.txt
    """
    for table in ("tcp", "tcp6"):
        with suppress(FileNotFoundError):
            for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
                local, state = line.split()[1], line.split()[3]
                if state == "01" and int(local.rpartition(":")[2], 16) == port:
                    return True
    return False
