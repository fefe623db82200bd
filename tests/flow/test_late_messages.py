"""What arrives when it is no longer true, from hosts and conductors alike: nothing comes of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import grpc
import pytest

from fakes.acts import ACTS
from flow.fault_cloud import Deed, Operation
from flow.fault_world import World
from mcloud.common.v1 import session_pb2
from mcloud.conductor.v1 import domain_pb2, domain_service_pb2, domain_service_pb2_grpc
from mcloud.image.v1 import image_service_pb2, image_service_pb2_grpc
from mcloud.network.v1 import port_service_pb2, port_service_pb2_grpc
from mcloud.network.v1 import session_service_pb2_grpc as network_grpc
from mcloud.scheduler.v1 import placement_service_pb2, placement_service_pb2_grpc
from mcloud.volume.v1 import attachment_service_pb2, attachment_service_pb2_grpc
from mcloud.volume.v1 import session_service_pb2_grpc as volume_grpc
from mcloud_base import endpoints, errors, ids, rpc, tls
from service.core.cloud import refused, rpcs

pytestmark = pytest.mark.asyncio(loop_scope="module")

_LATER = 1 << 60  # a lease number of a later runner than any


async def fail(operation_id: str) -> None:
    raise errors.Internal("INJECTED_FAILURE", "made to fail")


# --- of the agent ---------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["undone", "deleted"])
async def test_a_port_is_not_bound_late(world: World, how: str) -> None:
    """BindPort and ConnectAttachment, delayed until the domain that they were for is gone."""
    await world.prepare("create_instance")
    plan: dict[Any, Deed] = {("create_instance", 2, "do", "after"): fail}
    world.saboteur.plan = plan if how == "undone" else {}
    await world.ended(await world.begin("create_instance"))
    await world.prepare("create_instance")
    bind, connect = world.host.ports.calls[-1], world.host.attachments.calls[-1]

    error = await refused(world.host.ports.bind(*bind))
    assert (type(error), error.reason) == (errors.WrongState, "ID_RETIRED")
    error = await refused(world.host.attachments.connect(*connect))
    assert (type(error), error.reason) == (errors.WrongState, "ID_RETIRED")
    await world.require_clean()


# --- of a conductor -------------------------------------------------------------------------------


async def test_effects_of_an_overtaken_conductor_are_refused(world: World) -> None:
    """Each rpc that carries a lease number, as a conductor that was overtaken would send it."""
    await world.prepare("delete_instance")
    instance = await world.find("instance")
    creating = await world.last_operation("CreateInstance")
    await world.run("delete_instance")
    identity = world.runtime.authority.issue_service("conductor", ())
    async with channel(world, identity) as internal:
        effects = Effects(world, internal, instance, creating)
        carrying = {m.name for m in rpcs() if "lease_number" in m.input_type.fields_by_name}
        carrying.discard("MendViolation")  # with the number of the resource's last operation
        assert carrying == set(effects.calls), "say how these are called late"
        for name in effects.calls:
            error = await refused(effects.call(name, 1))
            assert (type(error), error.reason) == (errors.Conflict, "STALE_LEASE"), name
        # Nor does a later runner do again what was undone, whatever it gives back once more.
        for name in effects.calls:
            if name.startswith("Ensure"):
                assert (await refused(effects.call(name, _LATER))).reason == "ID_RETIRED", name
    await world.require_clean()


class Effects:
    """The calls by which workflows do something in other databases, for one instance."""

    def __init__(
        self, world: World, internal: grpc.aio.Channel, instance: Any, creating: Operation
    ) -> None:
        ports = port_service_pb2_grpc.PortServiceStub(internal)
        attachments = attachment_service_pb2_grpc.AttachmentServiceStub(internal)
        images = image_service_pb2_grpc.ImageServiceStub(internal)
        placement = placement_service_pb2_grpc.PlacementServiceStub(internal)
        project_id, instance_id = instance.metadata.project_id, instance.metadata.id
        domain_id = instance.status.domain_id
        port_id = instance.status.addresses[0].port_id
        volume = instance.status.volumes[0]
        use = {"image_id": world.image_id, "instance_id": instance_id}
        attached = {"attachment_id": volume.attachment_id}
        self.calls: dict[str, tuple[Any, Any]] = {
            "EnsurePort": (
                ports.EnsurePort,
                port_service_pb2.EnsurePortRequest(
                    port_id=port_id,
                    project_id=project_id,
                    instance_id=instance_id,
                    spec={"network_id": world.network_id},
                ),
            ),
            "UnbindPort": (
                ports.UnbindPort,
                port_service_pb2.UnbindPortRequest(port_id=port_id, domain_id=domain_id),
            ),
            "ReleasePort": (
                ports.ReleasePort,
                port_service_pb2.ReleasePortRequest(port_id=port_id, instance_id=instance_id),
            ),
            "EnsureAttachment": (
                attachments.EnsureAttachment,
                attachment_service_pb2.EnsureAttachmentRequest(
                    **attached,
                    project_id=project_id,
                    spec={"volume_id": volume.volume_id, "instance_id": instance_id},
                ),
            ),
            "DisconnectAttachment": (
                attachments.DisconnectAttachment,
                attachment_service_pb2.DisconnectAttachmentRequest(**attached, domain_id=domain_id),
            ),
            "ReleaseAttachment": (
                attachments.ReleaseAttachment,
                attachment_service_pb2.ReleaseAttachmentRequest(**attached),
            ),
            "EnsureImageUse": (
                images.EnsureImageUse,
                image_service_pb2.EnsureImageUseRequest(**use, project_id=project_id),
            ),
            "ReleaseImageUse": (
                images.ReleaseImageUse,
                image_service_pb2.ReleaseImageUseRequest(**use),
            ),
            "SelectDestinations": (
                placement.SelectDestinations,
                placement_service_pb2.SelectDestinationsRequest(
                    domain_id=domain_id,
                    instance_id=instance_id,
                    project_id=project_id,
                    resources={"vcpu_count": 1, "memory_mib": 64, "disk_gib": 1},
                    operation_id=creating.id,
                ),
            ),
        }

    async def call(self, name: str, lease_number: int) -> Any:
        method, request = self.calls[name]
        request.lease_number = lease_number
        return await rpc.call(method, request)


# --- of hosts -------------------------------------------------------------------------------------


class Teller:
    """A stream of a session that says whatever a test wants."""

    def __init__(self, stub: Any, *, incarnation: int, epoch: str = "") -> None:
        self._stream = stub.OpenSession(None)
        hello = session_pb2.Hello(incarnation=incarnation, epoch=epoch, underlay_ip="127.0.0.1")
        self._hello = session_pb2.SessionRequest(hello=hello)

    async def open(self) -> session_pb2.Lease:
        await self._stream.write(self._hello)
        answer = await self._next("lease")
        return answer.lease

    async def tell(self, observed: session_pb2.Observed) -> None:
        """Return when it is stored, or ignored for good."""
        await self._stream.write(session_pb2.SessionRequest(observed=observed))
        await self._next("acknowledgement")

    async def renew(self) -> None:
        # If it has ended, or does just now, reading tells how.
        with suppress(asyncio.InvalidStateError, grpc.aio.AioRpcError):
            await self._stream.write(session_pb2.SessionRequest(renewal=session_pb2.Renewal()))

    async def _next(self, kind: str) -> session_pb2.SessionResponse:
        with rpc.reraised():
            async with asyncio.timeout(60):
                async for message in self._stream:
                    if message.WhichOneof("message") == kind:
                        return message
        raise AssertionError("the stream has ended")

    async def end(self) -> None:
        """Read to the stream's end."""
        await self._next("none")

    def close(self) -> None:
        self._stream.cancel()


@asynccontextmanager
async def channel(world: World, identity: tls.Identity) -> AsyncIterator[grpc.aio.Channel]:
    opened = rpc.channel(
        world.settings.internal_listen,
        identity.channel_credentials(),
        server_name=endpoints.SERVICE_NAME,
    )
    try:
        yield opened
    finally:
        await opened.close(None)


# Which rumour: whose certificate, and what is old about it.
RUMOURS = ["another host", "an older incarnation", "a lower sequence", "an older epoch"]


@pytest.mark.parametrize("rumour", RUMOURS)
async def test_an_old_report_changes_nothing(world: World, rumour: str) -> None:
    """ "It is gone", of a domain that runs, a volume that is served, a network that is in place."""
    await world.prepare("delete_instance")
    instance = await world.find("instance")
    before = await world.inventory()
    host_id = ids.new("h") if rumour == "another host" else world.host.id
    identity, _ = world.host_identity(host_id)
    incarnation = {"an older incarnation": 0, "a lower sequence": 1}.get(rumour, 9)
    async with channel(world, identity) as internal:
        for stub, id_ in (
            (domain_service_pb2_grpc.SessionServiceStub(internal), instance.status.domain_id),
            (volume_grpc.SessionServiceStub(internal), world.first_volume),
            (network_grpc.SessionServiceStub(internal), world.host.id),
        ):
            teller = Teller(stub, incarnation=incarnation)
            lease = await teller.open()
            observed = session_pb2.Observed(id=id_, absent=True, generation=99)
            observed.epoch = "of-before" if rumour == "an older epoch" else lease.epoch
            observed.sequence = 1 if rumour == "a lower sequence" else _LATER
            observed.status.Pack(
                domain_pb2.DomainStatus(state=domain_pb2.DomainStatus.STATE_ABSENT)
            )
            if rumour == "an older epoch" and id_ == world.host.id:
                observed.generation = 1  # of a document, it says what the host has: not this one
            await teller.tell(observed)
            teller.close()
    assert await world.state(ACTS["delete_instance"]) == "ACTIVE"
    assert await world.inventory() == before
    await world.until_connected()
    await world.require_verified()
    await world.run("delete_instance")
    await world.require_clean()


async def test_a_former_host_says_that_a_deleted_guest_runs(world: World) -> None:
    await world.prepare("delete_instance")
    instance = await world.find("instance")
    await world.run("delete_instance")
    identity, _ = world.host_identity(world.host.id)
    async with channel(world, identity) as internal:
        stub = domain_service_pb2_grpc.SessionServiceStub(internal)
        teller = Teller(stub, incarnation=1)
        lease = await teller.open()
        observed = session_pb2.Observed(
            id=instance.status.domain_id, epoch=lease.epoch, generation=1, sequence=_LATER
        )
        observed.status.Pack(domain_pb2.DomainStatus(state=domain_pb2.DomainStatus.STATE_RUNNING))
        await teller.tell(observed)
        teller.close()
    await world.until_connected()
    await world.require_clean()


async def test_the_spec_of_a_domain_is_for_its_host_and_epoch(world: World) -> None:
    await world.prepare("delete_instance")
    instance = await world.find("instance")
    wanted = domain_service_pb2.GetDomainSpecRequest(domain_id=instance.status.domain_id)
    for host_id, epoch, reason in (
        (world.host.id, "of-before", "STALE_EPOCH"),
        (ids.new("h"), "", "DOMAIN_NOT_FOUND"),
    ):
        identity, _ = world.host_identity(host_id)
        async with channel(world, identity) as internal:
            stub = domain_service_pb2_grpc.DomainServiceStub(internal)
            wanted.epoch = epoch
            assert (await refused(rpc.call(stub.GetDomainSpec, wanted))).reason == reason


async def superseded(stub: Any) -> errors.Error:
    """Open a session and a newer one; return how the older ends."""
    older, newer = (Teller(stub, incarnation=1) for _ in range(2))
    try:
        first = await older.open()
        second = await newer.open()
        assert second.session_number > first.session_number
        await older.renew()
        return await refused(older.end())
    finally:
        newer.close()


async def test_the_newest_session_of_a_host_counts(world: World) -> None:
    identity, _ = world.host_identity(ids.new("h"))
    async with channel(world, identity) as internal:
        for stub in (
            domain_service_pb2_grpc.SessionServiceStub(internal),
            volume_grpc.SessionServiceStub(internal),
            network_grpc.SessionServiceStub(internal),
        ):
            error = await superseded(stub)
            while error.reason == "STREAM_BROKEN":  # it ended in the moment that it was written to
                error = await superseded(stub)
            assert (type(error), error.reason) == (errors.Conflict, "SESSION_SUPERSEDED")
