"""What is provably nobody's goes by itself; what may be on its way, or needs judgement, stays."""

from __future__ import annotations

import asyncio
import time

import pytest

from mcloud_base import ids
from mcloud_controlplane.compute.model import Claim, HostListing
from mcloud_controlplane.image.model import ImageUse
from mcloud_controlplane.network.model import Port
from mcloud_controlplane.volume.model import Attachment, Volume
from service.conductor import faults
from service.conductor.world import World, keys

pytestmark = pytest.mark.asyncio(loop_scope="module")

SETTINGS = {"verify_confirm_s": 0.1, "sweep_interval_s": 0.2, "sweep_after_s": 3600}


def old_instance_id() -> str:
    """Return an id that was made a day ago."""
    number = (time.time_ns() // 1_000_000 - 86_400_000) << 52
    signs = "".join(ids._ALPHABET[number >> shift & 31] for shift in range(95, -1, -5))
    return f"i-{signs}"


async def test_garbage_goes_and_nothing_else(world: World) -> None:
    gone = old_instance_id()
    assert abs(ids.time_of(gone) / 1e6 - time.time() + 86_400) < 60
    await faults.claim_without_domain(world)  # too young
    await faults.use_without_instance(world)
    await faults.port_without_instance(world)
    await faults.attachment_without_instance(world)
    await faults.port_without_owner(world)  # verify's
    room = {"vcpu_count": 1, "memory_mib": 1, "disk_gib": 1, "create_time": 1}
    claim_id = ids.new("d")
    about = {"instance_id": gone, "host_id": ids.new("h")}
    await world.insert("compute", Claim, domain_id=claim_id, **about, **room)
    await world.insert(
        "image", ImageUse, image_id=world.instances.image_id, instance_id=gone, project_id="p"
    )
    owner = {"owner_type": "instance", "owner_id": gone}
    bound = {"domain_id": ids.new("d"), "host_id": ids.new("h")}
    made = await faults._port(world, **owner, delete_with_owner=True, **bound)
    users = await faults._port(world, **owner)
    attachment_id = ids.new("att")
    volume_id = await faults._volume(world, state="RESERVED", attachment_id=attachment_id)
    await faults._attachment(world, attachment_id, volume_id, gone)
    question = {"request_id": "r", "host_id": "h", "expire_time": 1}
    await world.insert("compute", HostListing, **question)

    async def left() -> int:
        return sum(
            [
                await world.count("compute", Claim, Claim.domain_id == claim_id),
                await world.count("compute", HostListing, HostListing.request_id == "r"),
                await world.count("image", ImageUse, ImageUse.instance_id == gone),
                await world.count("network", Port, Port.id == made),
                await world.count("network", Port, (Port.id == users) & (Port.owner_id != "")),
                await world.count("volume", Attachment, Attachment.id == attachment_id),
            ]
        )

    async with asyncio.timeout(120):
        while await left():
            await asyncio.sleep(0.05)  # nobody is told when the sweeper has had its turn
    assert (await world.row("volume", Volume, volume_id)).state == "AVAILABLE"
    assert (await world.row("network", Port, users)).owner_type == ""
    kinds = sorted(kind for kind, _ in keys(await world.verify()))
    assert kinds == [
        "ATTACHMENT_WITHOUT_INSTANCE", "CLAIM_WITHOUT_DOMAIN", "IMAGE_USE_WITHOUT_INSTANCE",
        "PORT_WITHOUT_INSTANCE", "PORT_WITHOUT_OWNER",
    ]  # fmt: skip
    await world.repair()
    assert await world.verify() == []
