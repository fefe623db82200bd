"""Faults that are planted through the tables, one for each rule that a repair can mend."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from typing import Any

from mcloud.network.v1 import port_pb2
from mcloud.volume.v1 import attachment_pb2, volume_pb2
from mcloud_base import ids
from mcloud_controlplane.compute.model import Claim, Domain, Instance
from mcloud_controlplane.compute.model import Host as HostRow
from mcloud_controlplane.compute.model import shared as compute_shared
from mcloud_controlplane.identity.model import RoleAssignment
from mcloud_controlplane.image.model import Image, ImageUse
from mcloud_controlplane.network.model import Address, FloatingIp, Port, PortGroup
from mcloud_controlplane.volume.model import Attachment, Volume
from mcloud_controlplane.volume.model import shared as volume_shared
from service.conductor.world import Key, World, keys, states

Plant = Callable[[World], Awaitable[set[Key]]]


async def check(world: World, *plants: Plant) -> None:
    """Plant faults, and see them found, planned and mended; the plan is what is done."""
    expected = set()
    for plant in plants:
        expected |= await plant(world)
    found = await world.verify()
    assert keys(found) == expected
    assert all(finding.repair for finding in found)
    plan = await world.plan()
    assert states(plan) == dict.fromkeys(expected, "PLANNED")
    done = await world.repair()
    assert set(states(done).values()) <= {"DONE", "NOT_NEEDED"}, done
    assert [each.finding for each in done.repairs] == [each.finding for each in plan.repairs]


_macs = iter(range(1, 1 << 16))


def _mac() -> str:
    number = next(_macs)
    return f"fa:16:3e:ff:{number >> 8:02x}:{number & 255:02x}"


async def claim_without_domain(world: World) -> set[Key]:
    id_ = ids.new("d")
    room = {"vcpu_count": 1, "memory_mib": 1, "disk_gib": 1, "create_time": 1}
    where = {"instance_id": ids.new("i"), "host_id": ids.new("h")}
    await world.insert("compute", Claim, domain_id=id_, **where, **room)
    return {("CLAIM_WITHOUT_DOMAIN", id_)}


async def claim_differs(world: World) -> set[Key]:
    mine = Claim.domain_id == world.domain_id
    unseen = await _unseen(world, lambda n: world.update("compute", Claim, mine, memory_mib=n))
    return {("CLAIM_DIFFERS", world.domain_id), unseen}


async def domain_without_claim(world: World) -> set[Key]:
    mine = Claim.domain_id == world.domain_id
    unseen = await _unseen(world, lambda n: world.update("compute", Claim, mine, memory_mib=n))
    await world.delete("compute", Claim, mine)
    return {("DOMAIN_WITHOUT_CLAIM", world.domain_id), unseen}


async def host_view_differs(world: World) -> set[Key]:
    mine = HostRow.id == world.host.id
    zone = f"zone-{world.host.id}"
    return {
        await _unseen(
            world, lambda n: world.update("compute", HostRow, mine, availability_zone=f"{zone}-{n}")
        )
    }


async def _unseen(world: World, change: Callable[[int], Awaitable[None]]) -> Key:
    """Change what the scheduler knows of the host, as no program does: without telling it.

    While it follows what was changed before, it sees that, too: until it does not.
    """
    fault = ("HOST_VIEW_DIFFERS", world.host.id)
    async with asyncio.timeout(20):
        for number in itertools.count(1):
            await change(number)
            if fault in keys(await world.verify()):
                break
    return fault


async def domain_without_instance(world: World) -> set[Key]:
    id_ = await world.insert(
        "compute", Domain, id=ids.new("d"), instance_id=ids.new("i"), project_id="p",
        host_id=world.host.id, generation=1, create_time=1,
    )  # fmt: skip
    return {("DOMAIN_WITHOUT_INSTANCE", id_)}


async def instance_without_operation(world: World) -> set[Key]:
    mine = Instance.id == world.instance_id
    await world.update("compute", Instance, mine, operation_id=ids.new("cop"), state="REBOOT")
    return {("INSTANCE_WITHOUT_OPERATION", world.instance_id)}


def _operation(id_: str) -> dict[str, Any]:
    return {
        "id": id_, "project_id": "p", "method": "m", "principal_id": "u", "request_id": id_,
        "state": "RUNNING", "workflow": "forgotten", "create_time": 1, "deadline": 2,
    }  # fmt: skip


async def operation_overdue(world: World) -> set[Key]:
    id_ = ids.new("cop")
    await world.insert("compute", compute_shared.operation, **_operation(id_))
    return {("OPERATION_OVERDUE", id_)}


async def volume_operation_overdue(world: World) -> set[Key]:
    id_ = ids.new("vop")
    await world.insert("volume", volume_shared.operation, **_operation(id_))
    return {("OPERATION_OVERDUE", id_)}


async def use_without_instance(world: World) -> set[Key]:
    where = {"instance_id": ids.new("i"), "project_id": "p"}
    await world.insert("image", ImageUse, image_id=world.instances.image_id, **where)
    return {("IMAGE_USE_WITHOUT_INSTANCE", world.instances.image_id)}


async def use_without_image(world: World) -> set[Key]:
    image_id = ids.new("img")
    where = {"instance_id": world.instance_id, "project_id": "p"}
    await world.insert("image", ImageUse, image_id=image_id, **where)
    return {("IMAGE_USE_WITHOUT_IMAGE", image_id)}


async def instance_without_use(world: World) -> set[Key]:
    mine = ImageUse.instance_id == world.instance_id
    this = ImageUse.image_id == world.instances.image_id
    await world.delete("image", ImageUse, mine & this)
    return {("INSTANCE_WITHOUT_IMAGE_USE", world.instance_id)}


async def image_usage_differs(world: World) -> set[Key]:
    id_ = world.instances.image_id
    await world.update("image", Image, Image.id == id_, reserved_bytes=1)
    return {("IMAGE_USAGE_DIFFERS", id_)}


async def address_without_port(world: World) -> set[Key]:
    port_id = ids.new("port")
    await world.insert(
        "network", Address, subnet_id=ids.new("sub"), position=9, ip_address="10.9.9.9",
        prefix_len=24, ip_version=4, port_id=port_id, number=0,
    )  # fmt: skip
    return {("ADDRESS_WITHOUT_PORT", port_id)}


async def _port(world: World, **values: Any) -> str:
    id_ = ids.new("port")
    spec = port_pb2.PortSpec().SerializeToString()
    network = {"network_id": ids.new("net"), "mac": _mac(), "spec": spec}
    await world.insert("network", Port, **{"id": id_, "project_id": "p", **network, **values})
    return id_


async def port_without_owner(world: World) -> set[Key]:
    id_ = await _port(world, owner_type="router", owner_id=ids.new("rtr"))
    return {("PORT_WITHOUT_OWNER", id_)}


async def port_without_instance(world: World) -> set[Key]:
    owner = {"owner_type": "instance", "owner_id": ids.new("i"), "delete_with_owner": True}
    id_ = await _port(world, **owner, host_id=ids.new("h"), domain_id=ids.new("d"))
    return {("PORT_WITHOUT_INSTANCE", id_)}


async def port_bound_to_no_domain(world: World) -> set[Key]:
    owner = {"owner_type": "instance", "owner_id": world.instance_id}
    id_ = await _port(world, **owner, host_id=ids.new("h"), domain_id=ids.new("d"))
    row = await world.row("compute", Instance, world.instance_id)
    nics = [*row.nics, {"port_id": id_, "network_id": "n", "existing": True}]
    await world.update("compute", Instance, Instance.id == world.instance_id, nics=nics)
    return {("PORT_BOUND_TO_NO_DOMAIN", id_)}


async def floating_ip_leads_nowhere(world: World) -> set[Key]:
    id_ = ids.new("fip")
    held = await _port(world, owner_type="floating_ip", owner_id=id_)
    await world.insert(
        "network", FloatingIp, id=id_, external_network_id=ids.new("net"), address_port_id=held,
        floating_ip_address="203.0.113.9", port_id=ids.new("port"),
    )  # fmt: skip
    return {("FLOATING_IP_WITHOUT_PORT", id_)}


async def member_without_port(world: World) -> set[Key]:
    port_id = ids.new("port")
    await world.insert("network", PortGroup, port_id=port_id, security_group_id=ids.new("sg"))
    return {("GROUP_MEMBER_WITHOUT_PORT", port_id)}


async def _volume(world: World, **values: Any) -> str:
    id_ = ids.new("vol")
    spec = volume_pb2.VolumeSpec(size_gib=1).SerializeToString()
    about = {"id": id_, "name": id_, "project_id": "p", "size_gib": 1, "spec": spec}
    await world.insert("volume", Volume, **{"state": "AVAILABLE", **about, **values})
    return id_


async def _attachment(world: World, id_: str, volume_id: str, instance_id: str) -> None:
    spec = attachment_pb2.AttachmentSpec(volume_id=volume_id, instance_id=instance_id)
    about = {"id": id_, "project_id": "p", "state": "RESERVED", "spec": spec.SerializeToString()}
    await world.insert("volume", Attachment, volume_id=volume_id, instance_id=instance_id, **about)


async def attachment_without_instance(world: World) -> set[Key]:
    id_, owner = ids.new("att"), {"instance_id": ids.new("i")}
    volume_id = await _volume(world, state="RESERVED", attachment_id=id_, **owner)
    await _attachment(world, id_, volume_id, owner["instance_id"])
    return {("ATTACHMENT_WITHOUT_INSTANCE", id_)}


async def attachment_without_volume(world: World) -> set[Key]:
    id_, volume_id = ids.new("att"), ids.new("vol")
    await _attachment(world, id_, volume_id, world.instance_id)
    row = await world.row("compute", Instance, world.instance_id)
    volumes = [*row.volumes, {"attachment_id": id_, "volume_id": volume_id, "device": "vdb"}]
    mine = Instance.id == world.instance_id
    await world.update("compute", Instance, mine, volumes=volumes)
    return {("ATTACHMENT_WITHOUT_VOLUME", id_)}


async def instance_without_attachment(world: World) -> set[Key]:
    row = await world.row("compute", Instance, world.instance_id)
    lost = {"attachment_id": ids.new("att"), "volume_id": ids.new("vol"), "device": "vdc"}
    mine = Instance.id == world.instance_id
    await world.update("compute", Instance, mine, volumes=[*row.volumes, lost])
    return {("INSTANCE_WITHOUT_ATTACHMENT", world.instance_id)}


async def volume_differs(world: World) -> set[Key]:
    id_ = await _volume(world, state="IN_USE", attachment_id=ids.new("att"))
    return {("VOLUME_DIFFERS", id_)}


async def volume_without_operation(world: World) -> set[Key]:
    return {("VOLUME_WITHOUT_OPERATION", await _volume(world, state="CREATING"))}


async def role_without_holder(world: World) -> set[Key]:
    id_ = await world.insert(
        "identity", RoleAssignment, id=ids.new("ra"), user_id=ids.new("u"), role=1
    )
    return {("ROLE_WITHOUT_HOLDER", id_)}


# Two more are planted alone: what is mended of them shows or hides another.
TOGETHER: tuple[Plant, ...] = (
    claim_without_domain, claim_differs, host_view_differs, domain_without_instance,
    instance_without_operation, operation_overdue, volume_operation_overdue, use_without_instance,
    use_without_image, instance_without_use, image_usage_differs, address_without_port,
    port_without_owner, port_without_instance, port_bound_to_no_domain, floating_ip_leads_nowhere,
    member_without_port, attachment_without_instance, instance_without_attachment, volume_differs,
    volume_without_operation, role_without_holder,
)  # fmt: skip
