"""Verify finds each planted fault and nothing else; a dry run names it, a repair mends it."""

from __future__ import annotations

import random

import pytest

from mcloud.conductor.v1 import verify_service_pb2, verify_service_pb2_grpc
from mcloud_base import errors, ids, rpc
from mcloud_controlplane.compute.model import Claim, shared
from mcloud_controlplane.network import model as network
from mcloud_controlplane.network.model import HostDataplane
from service.compute.host import artifact
from service.compute.server_groups import ServerGroups
from service.conductor import faults
from service.conductor.world import Artifact, Finding, World, keys, states
from service.core.cloud import Rule, refused

pytestmark = pytest.mark.asyncio(loop_scope="module")

_SEEDS = (1, 2)  # which leave nothing out


def sample(seed: int) -> list[faults.Plant]:
    chosen = random.Random(seed)
    return chosen.sample(faults.TOGETHER, chosen.randint(8, len(faults.TOGETHER) - 1))


async def test_the_samples_leave_nothing_out() -> None:
    assert {plant for seed in _SEEDS for plant in sample(seed)} == set(faults.TOGETHER)


@pytest.mark.parametrize("seed", _SEEDS)
async def test_faults_are_found_and_mended_together(world: World, seed: int) -> None:
    await faults.check(world, *sample(seed))
    assert await world.verify() == []
    assert states(await world.repair()) == {}, "a repeat finds nothing to mend"


async def test_mending_one_may_show_the_next(world: World) -> None:
    await faults.check(world, faults.domain_without_claim)
    assert await world.verify() == []
    await faults.check(world, faults.attachment_without_volume)
    (next_,) = await world.verify()
    assert next_.kind == Finding.KIND_INSTANCE_WITHOUT_ATTACHMENT
    await world.repair()
    assert await world.verify() == []


async def test_only_what_is_named_is_mended(world: World) -> None:
    (claim,) = await faults.claim_without_domain(world)
    (member,) = await faults.member_without_port(world)
    assert keys(await world.verify(kinds=[Finding.KIND_CLAIM_WITHOUT_DOMAIN])) == {claim}
    assert keys(await world.verify(resources=[member[1]])) == {member}
    assert states(await world.repair(resources=[member[1]])) == {member: "DONE"}
    assert keys(await world.verify()) == {claim}
    only = [Finding.KIND_CLAIM_WITHOUT_DOMAIN]
    assert states(await world.repair(kinds=only)) == {claim: "DONE"}
    assert await world.verify() == []


async def test_a_repeat_with_the_same_request_id_is_the_same_operation(world: World) -> None:
    await faults.claim_without_domain(world)
    request_id = ids.request_id()
    first = await world.repair(request_id=request_id)
    again = await world.repair(request_id=request_id)
    assert first == again
    assert list(states(first).values()) == ["DONE"]


async def test_a_foreign_domain_goes_only_when_it_is_named(world: World) -> None:
    id_ = ids.new("d")
    foreign = artifact(Artifact.KIND_DOMAIN, id_, "foreign", generation=7)
    disk = artifact(Artifact.KIND_OVERLAY, id_, f"/instances/{id_}/root.qcow2")
    world.host.artifacts += [foreign, disk]
    expected = {("UNKNOWN_ARTIFACT", "foreign"), ("UNKNOWN_ARTIFACT", disk.name)}
    assert keys(await world.verify()) == expected
    assert states(await world.plan()) == dict.fromkeys(expected, "LEFT")
    assert states(await world.repair()) == dict.fromkeys(expected, "LEFT")
    assert foreign in world.host.artifacts, "absence is never an order"

    named = await world.plan(resources=[id_])
    assert states(named) == dict.fromkeys(expected, "PLANNED")
    assert set(states(await world.repair(resources=[id_])).values()) == {"DONE"}
    assert world.host.desired[id_].absent
    assert world.host.desired[id_].generation == 8
    assert await world.verify() == []


async def test_what_is_not_ours_is_never_touched(world: World) -> None:
    strange = artifact(Artifact.KIND_OVERLAY, "backup", "/instances/backup/root.qcow2")
    tap = artifact(Artifact.KIND_TAP, "", "tap0")
    world.host.artifacts += [strange, tap]
    left = {("UNKNOWN_ARTIFACT", strange.name): "LEFT", ("UNKNOWN_ARTIFACT", "tap0"): "LEFT"}
    everything = [strange.name, "backup", "tap0"]
    assert states(await world.plan(resources=everything)) == left
    assert states(await world.repair(resources=everything)) == left
    assert strange in world.host.artifacts
    world.host.artifacts = [a for a in world.host.artifacts if a not in (strange, tap)]


async def test_a_domain_that_its_host_has_lost_is_made_again(world: World) -> None:
    before = world.host.artifacts
    world.host.artifacts = [a for a in before if a.owner_id != world.domain_id]
    assert keys(await world.verify()) == {("MISSING_ARTIFACT", world.domain_id)}
    assert list(states(await world.repair()).values()) == ["DONE"]
    generation = (await world.row("compute", faults.Domain, world.domain_id)).generation
    await world.host.wanted(world.instance_id, generation=generation)
    assert await world.verify() == []


async def test_a_host_that_is_behind_with_its_network_goes_over_it_again(world: World) -> None:
    refused_ = errors.to_status(errors.Unavailable("NETWORK_REFUSED", "the kernel refused"))
    values = {"generation": 5, "observed_generation": 4, "error": refused_.SerializeToString()}
    await world.insert("network", HostDataplane, host_id=world.host.id, **values)
    soon = world.now("network") + 30_000_000
    session = {"number": 1, "process": "p", "lease_expire_time": soon}
    await world.insert("network", network.shared.host_session, host_id=world.host.id, **session)
    (finding,) = await world.verify()
    assert finding.kind == Finding.KIND_DATAPLANE_BEHIND
    assert "the kernel refused" in finding.detail
    assert list(states(await world.repair()).values()) == ["DONE"]
    mine = HostDataplane.host_id == world.host.id
    assert await world.count("network", HostDataplane, mine & (HostDataplane.generation == 6)) == 1
    await world.delete("network", HostDataplane, mine)
    assert await world.verify() == []


async def test_two_ports_with_one_address_are_for_a_person(world: World) -> None:
    """What the table's key forbids is found all the same: the key may be gone."""
    drop = "DROP INDEX port_mac"
    await world.write("network", lambda: world._opened["network"].execute(drop))
    ports = [await faults._port(world, mac="fa:16:3e:00:00:01", owner_type="") for _ in range(2)]
    expected = {("MAC_TWICE", id_) for id_ in ports}
    assert keys(await world.verify()) == expected
    assert states(await world.repair()) == dict.fromkeys(expected, "LEFT")
    for id_ in ports:
        await world.delete("network", faults.Port, faults.Port.id == id_)
    assert await world.verify() == []


async def test_members_of_a_server_group_that_break_its_rule_are_for_a_person(
    world: World,
) -> None:
    groups = ServerGroups(world.client.public, world.instances.who)
    id_ = await groups.make("ANTI_AFFINITY")
    other = await world.create("other")
    members = Claim.instance_id.in_([world.instance_id, other.resource.id])
    await world.update("compute", Claim, members, server_group_id=id_)
    (finding,) = await world.verify()
    assert (finding.kind, finding.subject, finding.host_id) == (
        Finding.KIND_SERVER_GROUP_RULE_BROKEN, id_, world.host.id,
    )  # fmt: skip
    assert finding.detail.startswith("2 of its members run there")
    assert states(await world.repair()) == {("SERVER_GROUP_RULE_BROKEN", id_): "LEFT"}
    deleted = await world.instances.change("Delete", other.resource.id)
    await world.instances.wait(deleted)
    assert await world.verify() == []
    await world.update("compute", Claim, members, server_group_id=None)
    await groups.delete(id_)


async def test_one_repair_at_a_time(world: World) -> None:
    values = faults._operation(ids.new("cop"))
    values |= {"workflow": "repair", "deadline": None, "not_before": 1 << 60}
    await world.insert("compute", shared.operation, **values)
    error = await refused(world.repair())
    assert (type(error), error.reason) == (errors.Conflict, "REPAIR_IN_PROGRESS")
    await world.delete("compute", shared.operation, shared.operation.id == values["id"])


async def test_only_an_administrator_of_the_system_repairs(world: World) -> None:
    reader = await world.client.make_user(ids.request_id(), Rule.ROLE_READER)
    stub = verify_service_pb2_grpc.VerifyServiceStub(world.client.public)
    request = verify_service_pb2.RepairRequest(request_id=ids.request_id(), validate_only=True)
    error = await refused(rpc.call(stub.Repair, request, metadata=reader))
    assert isinstance(error, errors.PermissionDenied)
