"""The compute part of the agent: takes desired domains, makes them so, reports what it sees.

Desired objects come in through `desire`, observed ones go out through the `report` that it was
given; the session between is somebody else's. Orders are kept on disk, guests are adopted after
a restart, and nothing is ever removed but for a tombstone.
"""

from __future__ import annotations

import asyncio
import errno
import random
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from mcloud.common.v1 import session_pb2
from mcloud.conductor.v1 import domain_pb2
from mcloud_agents.compute import host, workflow
from mcloud_agents.compute.disks import Disks, LocalDisks
from mcloud_agents.compute.driver import IO_ERROR, Domain, Driver, Event, HostFacts, State
from mcloud_agents.compute.managed import Managed
from mcloud_agents.compute.record import Record, Records, RecordStore
from mcloud_agents.compute.services import Attachments, Conductor, Dataplane, Images, Ports
from mcloud_base import errors, ids

log = structlog.get_logger()

# What a control plane answers, or does not, while its processes are replaced: soon over, and then
# there are people who wait.
_PASSING = (errors.Unavailable, errors.DeadlineExceeded, errors.Conflict, errors.Exhausted)
_PASSING_PAUSE_S = 5.0
_LIVE_S = 1.0  # how old what people see of a running step may be


@dataclass(frozen=True)
class Settings:
    """Of the compute part. Times in seconds."""

    host_name: str
    state_dir: Path  # /var/lib/mcloud/compute
    concurrency: int = 16  # domains worked on at a time
    start_attempts: int = 5  # of a guest whose process dies each time, before that is final
    listing_interval_s: float = 30.0
    listing_pause_s: float = 0.1  # at least, between two listings in a burst of events
    longest_pause_s: float = 60.0  # between attempts at a domain
    dataplane_deadline_s: float = 60.0
    cache_limit_bytes: int = 50 << 30
    cache_max_age_s: float = 7 * 86400.0
    cache_check_s: float = 3600.0
    tombstone_age_s: float = 30 * 86400.0
    console_log_bytes: int = 8 << 20  # of one guest
    physical_bridges: Mapping[str, str] | None = None


class ComputeAgent:
    """One host's domains."""

    def __init__(
        self,
        settings: Settings,
        driver: Driver,
        *,
        conductor: Conductor,
        images: Images,
        ports: Ports,
        attachments: Attachments,
        dataplane: Dataplane,
        report: Callable[[session_pb2.Observed], None],
        disks: Disks | None = None,
        records: Records | None = None,
        probe: workflow.Probe = workflow.no_probe,
    ) -> None:
        """Make the agent; nothing happens before `start`.

        `disks` and `records` are in `settings.state_dir` unless others are given. `report` is
        called in the event loop, must not block, and sets the sequence: the order of the calls is
        the order of the reports. `probe` is called around each step of the work on a domain.
        """
        self._settings = settings
        self._driver = driver
        self._report = report
        directory = settings.state_dir
        self._place = workflow.Workplace(
            driver=driver,
            disks=disks
            or LocalDisks(
                directory,
                limit_bytes=settings.cache_limit_bytes,
                max_age_s=settings.cache_max_age_s,
            ),
            store=records or RecordStore(directory / "domains", directory / "boot_id"),
            conductor=conductor,
            images=images,
            ports=ports,
            attachments=attachments,
            dataplane=dataplane,
            physical_bridges=settings.physical_bridges or {},
            dataplane_deadline_s=settings.dataplane_deadline_s,
            probe=probe,
        )
        self._managed: dict[str, Managed] = {}
        self._slots = asyncio.Semaphore(settings.concurrency)
        self._tasks: set[asyncio.Task[None]] = set()
        self._look = asyncio.Event()
        self._unknown: set[str] = set()
        self._unsubscribe: Callable[[], None] = lambda: None

    # --- life -----------------------------------------------------------------------------------

    async def start(self) -> None:
        """Read what is on disk, adopt what runs, and go on with what was not finished."""
        for record in self._place.store.load():
            self._managed[record.domain_id] = self._manage(record)
        await self._note_boot()
        self._unsubscribe = self._driver.subscribe(self._on_event)
        try:
            await self._driver.start()
            await self._list()
        except errors.Error as error:  # it goes on trying; documents are served meanwhile
            log.warning("hypervisor not there yet", error=str(error))
        for managed in self._managed.values():
            if managed.record.reached != managed.record.generation:
                self._begin(managed)
        self._spawn(self._keep_listing(), "domain listing")
        self._spawn(self._keep_tidy(), "image ageing")

    async def close(self) -> None:
        """Stop working; guests are not touched."""
        self._unsubscribe()
        for managed in self._managed.values():
            if managed.telling is not None:
                managed.telling.cancel()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await self._driver.close()

    async def _note_boot(self) -> None:
        """After a restart of the machine every guest is off: those meant to run are begun again."""
        now, last = host.boot_id(), self._place.store.last_boot()
        if last not in ("", now):
            for managed in self._managed.values():
                spec = managed.record.spec
                if spec and spec.power_state == domain_pb2.POWER_STATE_RUNNING:
                    managed.record.reached = 0
                    await self._place.store.save(managed.record)
        self._place.store.note_boot(now)

    # --- orders ---------------------------------------------------------------------------------

    def desire(self, desired: session_pb2.Desired) -> None:
        """Take an order; the newest wins, and repeats are answered with what is observed."""
        if not ids.is_id(desired.id, "d"):
            log.error("desired object refused", id=desired.id[:64])
            error = errors.InvalidArgument("BAD_ID", f"{desired.id[:64]!r} is no domain's id")
            self._report(
                session_pb2.Observed(
                    id=desired.id[:64], epoch=desired.epoch, error=errors.to_status(error)
                )
            )
            return
        managed = self._managed.get(desired.id)
        if managed is None:
            managed = self._managed[desired.id] = self._manage(Record(desired.id))
        record = managed.record
        if record.epoch == desired.epoch:
            if desired.generation < record.generation:
                log.debug("older order ignored", domain=desired.id, generation=desired.generation)
                return
            if desired.generation == record.generation and desired.absent == record.absent:
                self._tell(managed)
                if record.reached != record.generation:
                    self._begin(managed)
                return
            if desired.generation == record.generation and record.absent:
                return  # absence is final within a generation
        else:
            record.reached = 0
        spec = domain_pb2.DomainDesired()
        if desired.spec.Unpack(spec):
            record.instance_id = spec.instance_id
        record.epoch = desired.epoch
        record.generation = desired.generation
        record.absent = desired.absent
        record.attempt = 0
        managed.error = None
        managed.steps.rows.clear()
        log.info("domain desired", domain=desired.id, generation=desired.generation,
                 absent=desired.absent)  # fmt: skip
        self._begin(managed, anew=True)

    async def apply(self, desired: session_pb2.Desired) -> None:
        """Take an order from the session; how it goes is reported, and it is retried, from here."""
        self.desire(desired)

    async def observe_all(self) -> list[session_pb2.Observed]:
        """Return everything that is known, for the beginning of a session."""
        return [managed.observed() for managed in self._managed.values()]

    def states(self) -> Iterator[tuple[str, State.ValueType, int]]:
        """Yield what is here: (domain id, state, generation that has been reached)."""
        for id_, managed in self._managed.items():
            if not managed.record.gone:
                yield id_, managed.state(), managed.record.reached

    def _manage(self, record: Record) -> Managed:
        managed = Managed(record, self._settings.host_name)
        managed.steps.changed = lambda: self._tell_soon(managed)
        return managed

    def _tell(self, managed: Managed) -> None:
        if managed.telling is not None:
            managed.telling.cancel()
            managed.telling = None
        self._report(managed.observed())

    def _tell_soon(self, managed: Managed) -> None:
        """Tell how far a domain is: with what else comes within a moment, so not of each step."""
        if managed.telling is None:
            loop = asyncio.get_running_loop()
            managed.telling = loop.call_later(_LIVE_S, self._tell, managed)

    def _begin(self, managed: Managed, *, anew: bool = False) -> None:
        """Have a task work on a domain.

        Args:
            anew: what it does now is no longer wanted.
        """
        former = managed.task
        if former and not former.done():
            if not anew:
                return
            former.cancel()
        managed.task = self._spawn(
            self._work(managed, former), f"domain {managed.record.domain_id}"
        )

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _work(self, managed: Managed, former: asyncio.Task[None] | None) -> None:
        """Attempt to do what is desired of a domain until it is done."""
        if former:
            await asyncio.wait({former})
        pause, deaths = 0.5, 0
        while True:
            longest = self._settings.longest_pause_s
            try:
                async with self._slots:
                    managed.busy = True
                    await self._attempt(managed)
                managed.error = None
                self._tell(managed)
                return
            except errors.Error as error:
                log.warning("domain not reached", domain=managed.record.domain_id,
                            attempt=managed.record.attempt, error=str(error))  # fmt: skip
                deaths += error.reason == "QEMU_DIED"
                if isinstance(error, _PASSING) and not deaths:
                    longest = min(longest, _PASSING_PAUSE_S)
                managed.error = errors.to_status(self._verdict(error, deaths))
            except Exception as error:
                managed.error = errors.to_status(_unexpected(error, managed.record.domain_id))
            finally:
                managed.busy = False
                managed.serial += 1
            self._tell(managed)
            self._look.set()
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311 (jitter)
            pause = min(pause * 2, longest)

    def _verdict(self, error: errors.Error, deaths: int) -> errors.Error:
        """Return what the control plane is told: a process that always dies will not run."""
        if error.reason != "QEMU_DIED" or deaths < self._settings.start_attempts:
            return error
        return errors.WrongState(
            "HYPERVISOR_REFUSED",
            f"the guest's process has ended at each of {deaths} starts: {error.message}",
        )

    async def _attempt(self, managed: Managed) -> None:
        record = managed.record
        record.attempt += 1
        managed.steps.begin(record.attempt)
        await self._place.store.save(record)
        if record.absent:
            await workflow.remove(self._place, record)
            record.gone_time = time.time()
            managed.steps.rows.clear()
            managed.domain = None
        else:
            managed.domain = await workflow.ensure(self._place, record, managed.steps)
        record.steps = managed.steps.listing()
        managed.documents = None
        await self._place.store.save(record)
        log.info("domain reached", domain=record.domain_id, generation=record.reached,
                 absent=record.absent)  # fmt: skip

    # --- looking --------------------------------------------------------------------------------

    def _on_event(self, event: Event) -> None:
        log.debug("hypervisor event", kind=event.kind.value, name=event.name, detail=event.detail)
        self._look.set()

    async def _keep_listing(self) -> None:
        """List everything after events, which are hints, and at intervals."""
        while True:
            try:
                async with asyncio.timeout(self._settings.listing_interval_s):
                    await self._look.wait()
            except TimeoutError:
                pass
            self._look.clear()
            try:
                await self._list()
                await self._place.disks.trim_console_logs(self._settings.console_log_bytes)
            except errors.Error as error:
                log.warning("domains not listed", error=str(error))
            except Exception:  # the outermost loop: a fault must not blind the agent
                log.exception("domains not listed")
            await asyncio.sleep(self._settings.listing_pause_s)

    async def _list(self) -> None:
        before = {managed: managed.serial for managed in self._managed.values()}
        domains = await self._driver.list()
        found = {domain.identity.domain_id: domain for domain in domains if domain.identity}
        for managed, serial in before.items():
            # Of one that was worked on meanwhile this listing may be older than what is known.
            if not managed.busy and managed.serial == serial and not managed.record.absent:
                self._notice(managed, found.get(managed.record.domain_id))
        unknown = found.keys() - self._managed.keys()
        for domain_id in unknown - self._unknown:
            log.warning("domain without orders left alone", domain=domain_id)
        self._unknown = unknown

    def _notice(self, managed: Managed, domain: Domain | None) -> None:
        """Take in what a domain is like now; report it if it has changed."""
        if domain is None:
            if managed.record.reached:
                log.error(
                    "domain has vanished from the hypervisor", domain=managed.record.domain_id
                )
                managed.domain = None
                managed.record.reached = 0
                self._tell(managed)
                self._begin(managed)
            return
        if domain != managed.domain:
            managed.domain = domain
            self._tell(managed)
        stopped_by_disk = domain.state == State.STATE_PAUSED and domain.reason == IO_ERROR
        if stopped_by_disk and (managed.recovery is None or managed.recovery.done()):
            managed.recovery = self._spawn(
                self._recover(managed), f"recovery of {managed.record.domain_id}"
            )

    async def _recover(self, managed: Managed) -> None:
        """Resume a guest whose disk has not answered, until it stays running.

        The first request after the disk's server has returned still fails now and then.
        """
        pause, domain_id = 1.0, managed.record.domain_id
        while not managed.record.absent:
            try:
                await self._driver.resume(domain_id)
                await asyncio.sleep(pause)
                domain = await self._driver.find(domain_id)
            except errors.Error as error:
                log.warning("guest not resumed", domain=domain_id, error=str(error))
                await asyncio.sleep(pause)
                continue
            if domain is None or domain.reason != IO_ERROR:
                log.info("guest runs on after a disk's error", domain=domain_id)
                break
            pause = min(pause * 1.5, 10.0)
        self._look.set()

    # --- answers --------------------------------------------------------------------------------

    async def host_facts(self) -> HostFacts:
        """Look at the host."""
        return await self._driver.host_facts()

    def documents(self, port_id: str) -> Mapping[str, bytes] | None:
        """Return what the guest at a port is told; None if no guest of ours is there."""
        for managed in self._managed.values():
            if any(each.binding.port_id == port_id for each in managed.record.bindings):
                if managed.documents is None:
                    managed.documents = workflow.documents_of(managed.record)
                return managed.documents
        return None

    async def artifacts(self) -> list[session_pb2.Artifact]:
        """Return everything of mcloud's that is on the host, known or not."""
        kinds = session_pb2.Artifact
        result = []
        for domain in await self._driver.list():
            if not domain.identity:
                continue
            id_, generation = domain.identity.domain_id, domain.identity.generation
            result.append(
                session_pb2.Artifact(
                    kind=kinds.KIND_DOMAIN, name=domain.name, owner_id=id_, generation=generation
                )
            )
            result += [
                session_pb2.Artifact(
                    kind=kinds.KIND_DISK,
                    name=f"{id_}/{device}",
                    owner_id=volume_id or id_,  # the root disk is the domain's own
                    generation=generation,
                )
                for device, volume_id in domain.disks
            ]
        for kind, path, domain_id in self._place.disks.artifacts():
            managed = self._managed.get(domain_id)
            result.append(
                session_pb2.Artifact(
                    kind=kind,
                    name=str(path),
                    owner_id=domain_id,
                    generation=managed.record.generation if managed else 0,
                )
            )
        return result

    # --- tidying --------------------------------------------------------------------------------

    async def _keep_tidy(self) -> None:
        """Let unused images and old tombstones go."""
        while True:
            await asyncio.sleep(self._settings.cache_check_s)
            try:
                await self.tidy()
            except Exception:  # the outermost loop
                log.exception("not tidied")

    async def tidy(self) -> None:
        """Let unused images and old tombstones go, now."""
        specs = (managed.record.spec for managed in list(self._managed.values()))
        await self._place.disks.tidy(spec.root_disk for spec in specs if spec)
        oldest = time.time() - self._settings.tombstone_age_s
        for domain_id, managed in list(self._managed.items()):
            if managed.record.gone and managed.record.gone_time < oldest:
                self._place.store.remove(domain_id)
                del self._managed[domain_id]


def _unexpected(error: Exception, domain_id: str) -> errors.Error:
    """Return what the control plane is told of a failure that no step has a word for."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        log.warning("domain not reached", domain=domain_id, error=str(error))
        return errors.Exhausted("HOST_DISK_FULL", "no room is left on this host's disk")
    log.exception("domain not reached", domain=domain_id)
    return errors.Internal("INTERNAL", "internal error of the agent")
