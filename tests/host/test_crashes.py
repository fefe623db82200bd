"""Whichever process dies at whichever step: every instance and volume ends in a state that says
what it is, within a deadline, and nothing is left without an owner, on a real host.

The steps are those of every registered workflow and of the agent. What needs no process to die is
tried in tests/flow/test_workflow_faults.py, which is faster.
"""

from __future__ import annotations

import itertools
import os
import signal
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from fakes import inventory
from fakes.acts import ACTS, GONE, REMOVERS, registered
from fakes.crash_plan import Blow, Place
from fakes.host_cloud import HostCloud, _request
from mcloud.common.v1 import operation_pb2
from mcloud.compute.v1 import instance_service_pb2
from mcloud.conductor.v1 import verify_service_pb2
from mcloud.volume.v1 import volume_pb2
from mcloud_agents.compute import workflow as agent_workflow
from mcloud_base import errors, ids

pytestmark = [
    pytest.mark.host,
    pytest.mark.skipif(os.geteuid() != 0, reason="namespaces need root"),
]

Operation = operation_pb2.Operation
pb = instance_service_pb2

# Of the agent's steps: what makes it take them.
AGENT_ACTS = {
    step: "delete_instance" if step.startswith("remove") else "create_instance"
    for step in agent_workflow.STEPS
}


@dataclass(frozen=True)
class Case:
    """Who dies where, always after the effect and before it is saved."""

    workflow: str
    where: str
    blows: tuple[Blow, ...]
    of_agent: bool = False
    ends_well: bool = True

    def __str__(self) -> str:
        return f"{self.workflow} / {self.where}".replace(" ", "_")


def controlplane_cases(name: str) -> Iterator[Case]:
    """Each step's do and undo."""
    steps = registered()[name].steps
    last: Place = (name, str(len(steps) - 1), "do", "after")
    for index, step in enumerate(steps):
        yield Case(name, step.name, (Blow((name, str(index), "do", "after"), "kill"),))
        if step.undo is not None:
            blow = Blow((name, str(index), "undo", "after"), "kill")
            yield Case(name, f"undo {step.name}", (Blow(last, "fail"), blow), ends_well=False)


def agent_cases(removal: bool) -> Iterator[Case]:
    """Each step of the agent."""
    for step, workflow in AGENT_ACTS.items():
        if step.startswith("remove") == removal:
            yield Case(workflow, f"agent {step}", (Blow((step, "after"), "kill"),), of_agent=True)


def all_cases() -> list[Case]:
    """Those that need an instance stand after those that leave one."""
    making = [*controlplane_cases("create_instance"), *agent_cases(removal=False)]
    ending = [*controlplane_cases("delete_instance"), *agent_cases(removal=True)]
    others = [case for name in registered() for case in controlplane_cases(name)]
    others = [case for case in others if case not in making and case not in ending]
    making.sort(key=lambda case: not case.ends_well)
    pairs = itertools.zip_longest(making, ending)
    return [case for pair in pairs for case in pair if case is not None] + others


class World:
    """The cloud, and the one instance, volume and fault that cases are tried on."""

    def __init__(self, cloud: HostCloud) -> None:
        self.cloud = cloud
        self.subjects = {"instance": "", "volume": "", "fault": ""}
        self.number = 0
        # Once there and gone again: image, bridge and whatever else stays are in place.
        self.prepare("delete_instance")
        self.run("delete_instance")
        self.baseline: set[str] = set()
        self.until_still()

    def until_still(self) -> None:
        """Note what is there without an instance, once nothing of one is left to take away."""

        def look() -> bool:
            earlier, self.baseline = self.baseline, inventory.take(self.cloud)
            of_a_guest = any("crash-" in line or " tap" in line for line in self.baseline)
            return earlier == self.baseline and not of_a_guest

        self.cloud.until(look)

    def begin(self, workflow: str) -> Operation:
        act = ACTS[workflow]
        self.number += 1
        name = f"crash-{self.number}"
        if workflow == "create_instance":
            operation = self.cloud.create(name)
        elif workflow == "create_volume":
            spec = volume_pb2.VolumeSpec(size_gib=1)
            operation = self.cloud.mutate(*_request(act.method, name=name, spec=spec))
        elif act.subject == "fault":
            return self.cloud.mutate(*_request(act.method), system=True)
        else:
            fields = dict(act.fields)
            if act.second_volume:
                fields["volume_id"] = self.cloud.volume_ids[1]
            request = _request(act.method, id=self.subjects[act.subject], **fields)
            operation = self.cloud.mutate(*request)
        self.subjects[act.subject] = operation.resource.id
        return operation

    def run(self, workflow: str) -> None:
        act = ACTS[workflow]
        operation = self.cloud.ended(self.begin(workflow))
        assert operation.state == Operation.STATE_SUCCEEDED, operation.error
        assert self.settled(workflow, ("ACTIVE", "SHUTOFF") if act.second_volume else act.ends)

    def prepare(self, workflow: str, *, undone: bool = False) -> None:
        """Have the subject that a workflow needs, and not the others.

        Args:
            undone: the workflow will be: what it adds has to come off again.
        """
        act = ACTS[workflow]
        for other, id_ in self.subjects.items():
            if id_ and other != act.subject:
                self.run(REMOVERS[other])
        state = self.state(act.subject)
        if act.makes:
            if state != GONE:
                self.run(REMOVERS[act.subject])
                self.require_clean()
            return
        if act.subject == "fault":
            self.plant()
            return
        if state == GONE:
            self.run(f"create_{act.subject}")
        needs = act.needs_without_os or act.needs
        if act.second_volume and undone:
            needs = "SHUTOFF"
        if act.second_volume and self.has_second_volume() != (act.second_volume == "attached"):
            if self.has_second_volume() and self.state("instance") == "ACTIVE":
                self.run("stop_instance")
            self.run("detach_volume" if self.has_second_volume() else "attach_volume")
        if self.state(act.subject) != needs:
            self.run({"ACTIVE": "start_instance", "SHUTOFF": "stop_instance"}[needs])

    def plant(self) -> None:
        """Leave a claim without a domain, as no program does."""
        self.subjects["fault"] = ids.new("d")
        row = (self.subjects["fault"], ids.new("i"), ids.new("h"), 1, 64, 1, 0)
        with sqlite3.connect(self.cloud.state_dir / "compute.db", timeout=20) as connection:
            connection.execute(
                "INSERT INTO claim (domain_id, instance_id, host_id, vcpu_count, memory_mib,"
                " disk_gib, create_time) VALUES (?, ?, ?, ?, ?, ?, ?)",
                row,
            )
        connection.close()

    def state(self, subject: str) -> str:
        """Return the state of a subject, or GONE."""
        id_ = self.subjects[subject]
        if not id_:
            return GONE
        if subject == "fault":
            there = any(id_ in line for line in inventory.take(self.cloud))
            state = "PLANTED" if there else GONE
        else:
            state = self.cloud.until(lambda: self._state(subject, id_))
        if state == GONE:
            self.subjects[subject] = ""
        return state

    def _state(self, subject: str, id_: str) -> str:
        method = {
            "instance": "compute.InstanceService/GetInstance",
            "volume": "volume.VolumeService/GetVolume",
        }[subject]
        try:
            found = self.cloud.call(*_request(method, id=id_))
        except errors.NotFound:
            return GONE
        name: str = type(found.status).State.Name(found.status.state)
        return name.removeprefix("STATE_")

    def settled(self, workflow: str, states: tuple[str, ...]) -> str:
        """Wait until the subject is in one of these states; return it."""

        def look() -> str | None:
            state = self.state(ACTS[workflow].subject)
            return state if state in states else None

        return self.cloud.until(look)

    def has_second_volume(self) -> bool:
        found = self.cloud.until(lambda: self.cloud.instance(self.subjects["instance"]))
        return self.cloud.volume_ids[1] in {each.volume_id for each in found.status.volumes}

    def require_clean(self, deadline_s: float = 60, *, other_than: str = "") -> None:
        """Nothing is left of any subject but this line, and verify finds nothing."""
        seen: set[str] = set()
        wanted = self.baseline | {other_than} - {""}

        def look() -> bool:
            seen.clear()
            seen.update(inventory.take(self.cloud))
            return seen == wanted

        try:
            self.cloud.until(look, deadline_s)
        except AssertionError:
            left, missing = sorted(seen - wanted), sorted(wanted - seen)
            pytest.fail("\n".join(["left:", *left, "missing:", *missing]))
        self.require_verified()

    def require_verified(self) -> None:
        findings: list[verify_service_pb2.Finding] = []
        findings = self.cloud.until(lambda: [self.cloud.verify()])[0]
        assert not findings, findings


@pytest.fixture(scope="module")
def world(host_cloud: HostCloud) -> World:
    return World(host_cloud)


@pytest.mark.parametrize("case", all_cases(), ids=str)
def test_nothing_is_stuck_and_nothing_is_left(
    world: World, case: Case, case_table: list[str]
) -> None:
    cloud = world.cloud
    world.prepare(case.workflow, undone=not case.ends_well)
    plan = cloud.agent_plan if case.of_agent else cloud.controlplane_plan
    restarts = sum(cloud.restarts.values())
    plan.arm(*case.blows)
    began = time.monotonic()

    operation = cloud.ended(world.begin(case.workflow))
    outcome = Operation.State.Name(operation.state).removeprefix("STATE_")
    took = time.monotonic() - began
    assert not plan.pending()
    assert sum(cloud.restarts.values()) == restarts + 1
    assert (outcome == "SUCCEEDED") == case.ends_well, operation
    if not case.ends_well:
        assert errors.from_status(operation.error).reason == "INJECTED_FAILURE"
    state = settle(world, case)
    case_table.append(f"{case.workflow:17}{case.where:38}{outcome:11}{state:9}{took:6.1f} s")


def settle(world: World, case: Case) -> str:
    """Require that the subject is what it should be, and nothing else is."""
    act = ACTS[case.workflow]
    states = act.ends if case.ends_well else act.fails
    state = world.settled(case.workflow, ("ACTIVE", "SHUTOFF") if act.second_volume else states)
    if act.second_volume:
        attached = case.workflow == "attach_volume" and case.ends_well
        world.cloud.until(lambda: world.has_second_volume() == attached)
    if state == "ERROR":
        world.run(REMOVERS[act.subject])
    if not world.subjects[act.subject]:
        world.require_clean()
    else:
        world.require_verified()
    return state


# --- programs that are not ours -------------------------------------------------------------------


def kill_libvirtd(cloud: HostCloud) -> None:
    """It dies, and is started again, as by its host's init."""
    for pid in cloud.host.libvirtd_pids():
        os.kill(pid, signal.SIGKILL)
    cloud.host.lab("up")


def kill_volume_servers(cloud: HostCloud) -> None:
    """They die; it is the agent that starts them again."""
    cloud.host.run("pkill", "--signal", "KILL", "--full", "^qemu-storage-daemon")


@pytest.mark.parametrize("kill", [kill_libvirtd, kill_volume_servers])
@pytest.mark.parametrize("workflow", ["create_instance", "attach_volume"])
def test_a_program_dies_under_the_agents_hands(world: World, workflow: str, kill: Any) -> None:
    """Between the connection of the volumes and their use."""
    cloud = world.cloud
    world.prepare(workflow)
    cloud.agent_plan.arm(Blow(("16", "before"), "stand"))
    operation = world.begin(workflow)
    cloud.until(cloud.agent_plan.is_standing)

    kill(cloud)
    os.kill(cloud.agent_pid, signal.SIGUSR1)

    ended = cloud.ended(operation, 120)
    assert ended.state == Operation.STATE_SUCCEEDED, ended
    assert world.settled(workflow, ACTS[workflow].ends)
    if workflow == "attach_volume":
        assert world.has_second_volume()
    world.require_verified()


# --- pre-empted, silent ---------------------------------------------------------------------------


def test_a_delete_preempts(world: World) -> None:
    world.prepare("create_instance")
    # The agent never gets over a step, until its plan is cleared.
    world.cloud.agent_plan.arm(Blow(("14", "after"), "repeat", -1))
    preempted = world.begin("create_instance")
    request = operation_pb2.GetOperationRequest(id=preempted.id)

    def works_on_it() -> bool:
        seen = world.cloud.call("compute.OperationService/GetOperation", request)
        return any(step.number == 14 for step in seen.steps)

    world.cloud.until(works_on_it)
    deleting = world.begin("delete_instance")
    world.cloud.agent_plan.arm()

    assert world.cloud.ended(preempted).state == Operation.STATE_CANCELLED
    assert world.cloud.ended(deleting).state == Operation.STATE_SUCCEEDED
    assert world.settled("delete_instance", (GONE,))
    world.require_clean()


DEADLINE_S = 30


@contextmanager
def short_deadline(cloud: HostCloud) -> Iterator[None]:
    """Operations have to end soon, and nobody starts a dead agent."""
    cloud.restart_controlplane(operation_lease_s=2, operation_deadline_s=DEADLINE_S)
    cloud.agent_wanted = False
    try:
        yield
    finally:
        cloud.restart_controlplane(operation_lease_s=2)
        cloud.agent_wanted = True


def kinds(lines: set[str]) -> set[str]:
    """ "compute claim d-…" is a claim."""
    return {line.split()[1] for line in lines}


def test_what_a_silent_host_has_of_a_failed_create_is_held(world: World) -> None:
    world.prepare("create_instance")
    cloud = world.cloud
    with short_deadline(cloud):
        cloud.agent_plan.arm(Blow(("14", "after"), "kill"))
        operation = cloud.ended(world.begin("create_instance"), DEADLINE_S + 30)
        held = kinds(inventory.take(cloud) - world.baseline)

    assert errors.from_status(operation.error).reason == "HOST_SILENT"
    late = operation.end_time.ToMicroseconds() - operation.deadline.ToMicroseconds()
    assert late < 60e6  # it ended because of its deadline, not whenever
    instance = cloud.until(lambda: cloud.instance(world.subjects["instance"]))
    assert world.state("instance") == "ERROR"
    assert "held until" in instance.status.fault.message
    assert {"claim", "domain", "port", "attachment", "use"} <= held
    world.require_clean(other_than=f"compute instance {instance.metadata.id} ERROR")
    world.run("delete_instance")
    world.require_clean()


def test_what_a_silent_host_has_of_a_deleted_instance_is_held(world: World) -> None:
    world.prepare("stop_instance")
    cloud = world.cloud
    with short_deadline(cloud):
        cloud.kill_agent()
        operation = cloud.ended(world.begin("delete_instance"), DEADLINE_S + 30)
        listed = cloud.call("compute.InstanceService/ListInstances", pb.ListInstancesRequest())
        held = kinds(inventory.take(cloud) - world.baseline)

    assert errors.from_status(operation.error).reason == "HOST_SILENT"
    assert not listed.instances  # name and quota are free
    assert {"claim", "domain", "port", "attachment", "use", "process"} <= held
    assert world.settled("delete_instance", (GONE,))
    world.require_clean()


def test_no_step_was_left_out(world: World) -> None:
    """Runs after all cases."""
    world.prepare("create_instance")
    world.require_clean()
    visited = world.cloud.controlplane_plan.visited()
    wanted = set()
    for name, table in registered().items():
        for index, step in enumerate(table.steps):
            wanted.add((name, str(index), "do", "after"))
            if step.undo is not None:
                wanted.add((name, str(index), "undo", "after"))
    assert {place for place in visited if place[3] == "after"} == wanted
    of_agent = {place for place in world.cloud.agent_plan.visited() if place[1] == "after"}
    assert of_agent == {(step, "after") for step in agent_workflow.STEPS}
