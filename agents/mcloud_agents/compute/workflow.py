"""Steps 8 to 16 on the host: from the name of a desired domain to the domain.

Every step may be repeated: what is there stays, what is missing is made. Steps 10, 12 and 14 need
nothing of each other and run at the same time.

 8 agent   pick the domain up; ask for its spec         (9 conductor: answers)
10 agent   ask image for metadata and bytes             (11 image: authorizes, answers)
12 agent   ask network to bind the ports                (13 network: authorizes, answers)
14 agent   ask volume to connect the attachments        (15 volume: authorizes, answers)
16 agent   define and start
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar, cast

from mcloud.conductor.v1 import domain_pb2
from mcloud.image.v1 import image_pb2
from mcloud.network.v1 import dataplane_pb2
from mcloud_agents.compute import guest_data
from mcloud_agents.compute.disks import Disks
from mcloud_agents.compute.driver import (
    Domain,
    Driver,
    ResolvedDisk,
    ResolvedDomain,
    ResolvedNic,
    RootDisk,
)
from mcloud_agents.compute.image_cache import CachedImage
from mcloud_agents.compute.record import Record, Records
from mcloud_agents.compute.services import Attachments, Conductor, Dataplane, Images, Ports
from mcloud_agents.compute.steps import StepLog
from mcloud_base.errors import Conflict, DataLoss, WrongState

# What a probe is called with; those of `ensure` by their numbers, then those of `remove`.
STEPS = ("8", "10", "12", "14", "16", "remove domain", "remove files")

# Called around each step with (step, "before" or "after"). It may raise what the step may raise,
# with the same consequences; tests do, or end the process, and simulated hosts take their time.
Probe = Callable[[str, str], Awaitable[None]]

T = TypeVar("T")
U = TypeVar("U")
V = TypeVar("V")

_FORMATS = {image_pb2.DISK_FORMAT_QCOW2: "qcow2", image_pb2.DISK_FORMAT_RAW: "raw"}


async def no_probe(step: str, moment: str) -> None:
    """Do nothing."""


@dataclass(frozen=True)
class Workplace:
    """Everything that the steps work with; one for all domains."""

    driver: Driver
    disks: Disks
    store: Records
    conductor: Conductor
    images: Images
    ports: Ports
    attachments: Attachments
    dataplane: Dataplane
    physical_bridges: Mapping[str, str] = field(default_factory=dict)
    dataplane_deadline_s: float = 60.0
    probe: Probe = no_probe

    async def probed(self, step: str, work: Callable[[], Awaitable[T]]) -> T:
        """Do the work of a step between calls of the probe."""
        await self.probe(step, "before")
        result = await work()
        await self.probe(step, "after")
        return result


async def ensure(place: Workplace, record: Record, steps: StepLog) -> Domain:
    """Bring a domain to what its conductor says it is to be; keep `record` true throughout."""
    step = place.probed
    spec, token = await step("8", partial(_ask_for_spec, place, record, steps))
    at = (place, record, spec, token, steps)
    root_disk, nics, disks = await _together(
        step("10", partial(_ensure_root_disk, *at)),
        step("12", partial(_bind_ports, *at)),
        step("14", partial(_connect_attachments, place, spec, token, steps)),
    )
    start = partial(_start, place, record, spec, root_disk, nics, disks, steps)
    domain = await step("16", start)
    record.reached = spec.generation
    return domain


async def _together(
    first: Awaitable[T], second: Awaitable[U], third: Awaitable[V]
) -> tuple[T, U, V]:
    """Await three steps; the first error is raised when all have ended.

    So what one of them has made is there when the others are tried again.
    """
    results = await asyncio.gather(first, second, third, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return cast(tuple[T, U, V], results)


async def remove(place: Workplace, record: Record) -> None:
    """Have nothing left of a domain but the record that it is gone."""
    order = (record.domain_id, record.epoch, record.generation)
    await place.probed("remove domain", partial(place.driver.ensure_absent, *order))
    await place.probed("remove files", partial(place.disks.remove, record.domain_id))
    record.reached = record.generation
    record.root_disk_made = False
    record.config_digest = ""
    record.spec = None
    record.bindings = []
    record.steps = []


async def _ask_for_spec(
    place: Workplace, record: Record, steps: StepLog
) -> tuple[domain_pb2.DomainSpec, str]:
    """8. Take the domain up; its spec, and the token for this attempt only."""
    with steps.step(8):
        spec = await place.conductor.get_domain_spec(record.domain_id, record.epoch, steps.collect)
        same = (spec.domain_id, spec.epoch) == (record.domain_id, record.epoch)
        if not same or spec.generation < record.generation:
            raise Conflict(
                "STALE_SPEC",
                f"asked for generation {record.generation} of {record.domain_id}, "
                f"the conductor answered with {spec.generation} of {spec.domain_id}",
            )
        token, spec.delegated_token = spec.delegated_token, ""
        record.generation = spec.generation
        record.instance_id = spec.instance_id
        record.spec = spec
        await place.disks.prepare(spec.domain_id)
    return spec, token


async def _ensure_root_disk(
    place: Workplace,
    record: Record,
    spec: domain_pb2.DomainSpec,
    token: str,
    steps: StepLog,
) -> RootDisk:
    """10. An overlay over the image; the image is asked for only if there is none yet.

    Raises:
        DataLoss: ROOT_DISK_LOST, BASE_IMAGE_LOST: made once, and not there any more. A new one
            would hide it.
    """
    wanted = spec.root_disk
    overlay = place.disks.root_disk(spec.domain_id)
    if place.disks.has_root_disk(spec.domain_id):
        base = await place.disks.find_image(wanted.image_sha256, wanted.image_format)
        if base is None:
            raise DataLoss("BASE_IMAGE_LOST", f"the image below {overlay} is not there any more")
        steps.skip("the root disk is there", 10, 11)
    elif record.root_disk_made:
        raise DataLoss("ROOT_DISK_LOST", f"{overlay} is not there any more")
    else:
        base = await _ensure_image(place, spec, token, steps)
        await place.disks.make_root_disk(spec.domain_id, base, wanted.size_gib)
    record.root_disk_made = True
    return RootDisk(overlay, base.path, base.format)


async def _ensure_image(
    place: Workplace, spec: domain_pb2.DomainSpec, token: str, steps: StepLog
) -> CachedImage:
    """10. Ask the image service, also for bytes that are here: it decides who may have them."""
    wanted = spec.root_disk
    source = partial(_download, place.images, wanted.image_id, token, steps)
    with steps.step(10) as row:
        image = await place.images.get(wanted.image_id, token, steps.collect)
        told = (image.status.sha256, _FORMATS.get(image.spec.disk_format, ""))
        if told != (wanted.image_sha256, wanted.image_format):
            raise WrongState(
                "IMAGE_CHANGED", f"image {wanted.image_id} is not what the instance was made from"
            )
        digest, image_format, size_bytes = *told, image.status.size_bytes
        base = await place.disks.find_image(digest, image_format)
        if base is None:
            base = await place.disks.ensure_image(digest, image_format, size_bytes, source)
            row.detail = f"{size_bytes} bytes"
        elif not steps.has(11):
            async for _ in source(size_bytes):  # nothing is left to send, but to be allowed
                pass
        row.detail = row.detail or "cached"
    return base


def _download(
    images: Images, image_id: str, token: str, steps: StepLog, offset: int
) -> AsyncIterator[bytes]:
    return images.download(image_id, token, offset, steps.collect)


async def _bind_ports(
    place: Workplace,
    record: Record,
    spec: domain_pb2.DomainSpec,
    token: str,
    steps: StepLog,
) -> tuple[ResolvedNic, ...]:
    """12. Bind each port to this host, then wait until its network and its rules are in place."""
    if not spec.nics:
        steps.skip("no NIC was asked for", 12, 13)
        record.bindings = []
        return ()
    with steps.step(12):
        responses = [
            await place.ports.bind(
                nic.port_id, spec.domain_id, spec.generation, token, steps.collect
            )
            for nic in spec.nics
        ]
        for response in responses:
            # The dataplane's document has them; here they would be most of the record.
            response.network.ClearField("remote_ports")
        generation = max(response.dataplane_generation for response in responses)
        port_ids = [nic.port_id for nic in spec.nics]
        await place.dataplane.wait_ports(port_ids, generation, place.dataplane_deadline_s)
        record.bindings = responses
    return tuple(
        ResolvedNic(
            binding=response.binding,
            bridge=bridge_name(response.network, place.physical_bridges),
            mtu=response.network.mtu,
        )
        for response in responses
    )


def bridge_name(segment: dataplane_pb2.NetworkSegment, physical: Mapping[str, str]) -> str:
    """Return the bridge of a network on this host.

    Raises:
        WrongState: PHYSICAL_NETWORK_UNKNOWN.
    """
    if not segment.physical_network:
        return f"mcbr{segment.vni}"
    if bridge := physical.get(segment.physical_network):
        return bridge
    raise WrongState(
        "PHYSICAL_NETWORK_UNKNOWN", f"this host has no network {segment.physical_network!r}"
    )


async def _connect_attachments(
    place: Workplace, spec: domain_pb2.DomainSpec, token: str, steps: StepLog
) -> tuple[ResolvedDisk, ...]:
    """14. Have each volume served to this host."""
    if not spec.disks:
        steps.skip("no volume was asked for", 14, 15)
        return ()
    disks = []
    with steps.step(14):
        for disk in spec.disks:
            response = await place.attachments.connect(
                disk.attachment_id, spec.domain_id, spec.generation, token, steps.collect
            )
            disks.append(ResolvedDisk(disk.device, disk.volume_id, response.nbd))
    return tuple(disks)


async def _start(
    place: Workplace,
    record: Record,
    spec: domain_pb2.DomainSpec,
    root_disk: RootDisk,
    nics: tuple[ResolvedNic, ...],
    disks: tuple[ResolvedDisk, ...],
    steps: StepLog,
) -> Domain:
    """16. Define and start."""
    with steps.step(16):
        wanted = ResolvedDomain(
            spec=spec,
            root_disk=root_disk,
            console_log=place.disks.console_log(spec.domain_id),
            config_drive=await _ensure_config_drive(place, record, spec),
            nics=nics,
            disks=disks,
        )
        # All that the steps before have made, at once: until a guest runs, they can be repeated.
        # From now on its root disk has data, and it may ask for its documents.
        await place.store.save(record)
        return await place.driver.ensure(wanted)


async def _ensure_config_drive(
    place: Workplace, record: Record, spec: domain_pb2.DomainSpec
) -> Path | None:
    if not spec.config.config_drive:
        return None
    documents = guest_data.on_drive(documents_of(record))
    text = b"".join(key.encode() + b"\0" + documents[key] + b"\0" for key in sorted(documents))
    digest = hashlib.sha256(text).hexdigest()
    if record.config_digest != digest or not place.disks.has_config_drive(spec.domain_id):
        await place.disks.write_config_drive(spec.domain_id, documents)
        record.config_digest = digest
    return place.disks.config_drive(spec.domain_id)


def documents_of(record: Record) -> dict[str, bytes]:
    """Return what the guest of a record is told; nothing before its spec is known."""
    if record.spec is None:
        return {}
    nics = [(response.binding, response.network) for response in record.bindings]
    return guest_data.documents(record.spec, nics)
