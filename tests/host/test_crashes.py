"""Whatever fails, is repeated or dies at any step: every instance ends in a state that says what
it is, within a deadline, and nothing is left without an owner.

The steps are those of the conductor's tables and of the agent; a table or a step that is added
there is tried here, and a table without a line in ACTS is an error.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from fakes import inventory
from fakes.crash_plan import Blow, Place
from fakes.host_cloud import HostCloud
from mcloud.common.v1 import operation_pb2
from mcloud.compute.v1 import instance_pb2, instance_service_pb2
from mcloud_agents.compute import workflow as agent_workflow
from mcloud_base import errors
from mcloud_controlplane.conductor.service import workflows_of_instances
from mcloud_controlplane.core.workflow import Workflow

pytestmark = [
    pytest.mark.host,
    pytest.mark.skipif(os.geteuid() != 0, reason="namespaces need root"),
]

Operation = operation_pb2.Operation
State = instance_pb2.InstanceStatus.State
pb = instance_service_pb2

# The tables alone; their steps are not run here.
_NOTHING: Any = None
WORKFLOWS: dict[str, Workflow] = workflows_of_instances(_NOTHING, _NOTHING, _NOTHING)


@dataclass(frozen=True)
class Act:
    """How a workflow is begun, and with what instance."""

    needs: str = "ACTIVE"  # state of the instance; empty: there must be none
    method: str = ""
    fields: tuple[tuple[str, object], ...] = ()
    second_volume: str = ""  # "attached", "free", or no matter


ACTS = {
    "create_instance": Act(needs=""),
    "delete_instance": Act(method="DeleteInstance"),
    "start_instance": Act("SHUTOFF", "StartInstance"),
    # There is no OS that would hear of it: by force.
    "stop_instance": Act("ACTIVE", "StopInstance", (("force", True),)),
    "reboot_instance": Act("ACTIVE", "RebootInstance", (("hard", True),)),
    # Nor one that would let go of a disk.
    "attach_volume": Act("SHUTOFF", "AttachVolume", second_volume="free"),
    "detach_volume": Act("SHUTOFF", "DetachVolume", second_volume="attached"),
}
# Of the agent's steps: what makes it take them.
AGENT_ACTS = {
    step: "delete_instance" if step.startswith("remove") else "create_instance"
    for step in agent_workflow.STEPS
}


@dataclass(frozen=True)
class Case:
    """What goes wrong where."""

    workflow: str
    where: str
    what: str  # "fail", "repeat", "kill"
    blows: tuple[Blow, ...]
    of_agent: bool = False
    ends_well: bool = True

    def __str__(self) -> str:
        return f"{self.workflow} / {self.where} / {self.what}".replace(" ", "_")


def controlplane_cases(name: str) -> Iterator[Case]:
    """Each step's do and undo, after their effects."""
    steps = WORKFLOWS[name].steps
    last: Place = (name, str(len(steps) - 1), "do", "after")
    for index, step in enumerate(steps):
        for what in ("fail", "repeat", "kill"):
            blow = Blow((name, str(index), "do", "after"), what)
            yield Case(name, step.name, what, (blow,), ends_well=what != "fail")
        if step.undo is not None:
            for what in ("repeat", "kill"):
                blow = Blow((name, str(index), "undo", "after"), what)
                blows = (Blow(last, "fail"), blow)
                yield Case(name, f"undo {step.name}", what, blows, ends_well=False)


def agent_cases(removal: bool) -> Iterator[Case]:
    """Each step of the agent, after its effect."""
    for step, workflow in AGENT_ACTS.items():
        if step.startswith("remove") != removal:
            continue
        for what in ("fail", "repeat", "kill"):
            always = what == "fail" and not removal  # of a removal, it tries again
            blow = Blow((step, "after"), what, -1 if always else 1)
            yield Case(workflow, f"agent {step}", what, (blow,), True, not always)


def all_cases() -> list[Case]:
    """Those that need an instance stand after those that leave one."""
    making = [*controlplane_cases("create_instance"), *agent_cases(removal=False)]
    ending = [*controlplane_cases("delete_instance"), *agent_cases(removal=True)]
    others = [case for name in WORKFLOWS for case in controlplane_cases(name)]
    others = [case for case in others if case not in making and case not in ending]
    making.sort(key=lambda case: not case.ends_well)
    pairs = itertools.zip_longest(making, ending)
    return [case for pair in pairs for case in pair if case is not None] + others


class World:
    """The cloud, and the one instance that cases are tried on."""

    def __init__(self, cloud: HostCloud) -> None:
        self.cloud = cloud
        self.instance_id = ""
        self.number = 0
        # Once there and gone again: image, bridge and whatever else stays are in place.
        self.create()
        self.delete()
        self.baseline: set[str] = set()
        self.until_still()

    def until_still(self) -> None:
        """Note what is there without an instance, once it does not change any more."""

        def look() -> bool:
            earlier, self.baseline = self.baseline, inventory.take(self.cloud)
            return earlier == self.baseline

        self.cloud.until(look)

    def create(self) -> None:
        operation = self.begin("create_instance")
        ended = self.cloud.ended(operation)
        assert ended.state == Operation.STATE_SUCCEEDED, ended.error

    def delete(self) -> None:
        self.cloud.ended(self.begin("delete_instance"))
        self.cloud.gone(self.instance_id)
        self.instance_id = ""

    def begin(self, workflow: str) -> Operation:
        act = ACTS[workflow]
        if not act.needs:
            self.number += 1
            operation = self.cloud.create(f"crash-{self.number}")
            self.instance_id = operation.resource.id
            return operation
        fields = dict(act.fields)
        if act.second_volume:
            fields["volume_id"] = self.cloud.volume_ids[1]
        request = getattr(pb, f"{act.method}Request")(id=self.instance_id, **fields)
        return self.cloud.mutate(f"compute.InstanceService/{act.method}", request)

    def run(self, workflow: str) -> None:
        operation = self.cloud.ended(self.begin(workflow))
        assert operation.state == Operation.STATE_SUCCEEDED, operation.error

    def prepare(self, workflow: str) -> None:
        """Have the instance that the workflow needs."""
        act = ACTS[workflow]
        if not act.needs:
            if self.instance_id:
                self.delete()
                self.require_clean()
            return
        if not self.instance_id:
            self.create()
        state = State.Name(self.state().status.state).removeprefix("STATE_")
        if act.second_volume:
            attached = self.has_second_volume()
            if attached != (act.second_volume == "attached"):
                if state == "ACTIVE":
                    self.run("stop_instance")
                    state = "SHUTOFF"
                self.run("detach_volume" if attached else "attach_volume")
        if state != act.needs:
            self.run("stop_instance" if state == "ACTIVE" else "start_instance")

    def state(self) -> instance_pb2.Instance:
        found = self.cloud.until(lambda: self.cloud.instance(self.instance_id))
        assert found.status.state != State.STATE_BUILD, found
        return found

    def has_second_volume(self) -> bool:
        volumes = {volume.volume_id for volume in self.state().status.volumes}
        return self.cloud.volume_ids[1] in volumes

    def require_clean(self, deadline_s: float = 60, *, other_than: str = "") -> None:
        """Nothing is left of any instance but this, and verify finds nothing."""
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
    world.prepare(case.workflow)
    plan = cloud.agent_plan if case.of_agent else cloud.controlplane_plan
    restarts = sum(cloud.restarts.values())
    plan.arm(*case.blows)
    began = time.monotonic()

    operation = cloud.ended(world.begin(case.workflow))
    outcome = Operation.State.Name(operation.state).removeprefix("STATE_")
    took = time.monotonic() - began
    left = [blow for blow in plan.pending() if blow.times > 0]
    plan.arm()
    assert not left
    assert sum(cloud.restarts.values()) - restarts == (case.what == "kill")
    assert (outcome == "SUCCEEDED") == case.ends_well, operation
    if not case.ends_well:
        assert errors.from_status(operation.error).reason == "INJECTED_FAILURE"
    state = settle(world, case)
    where = f"{case.workflow:17}{case.where:38}{case.what:8}"
    case_table.append(f"{where}{outcome:11}{state:9}{took:6.1f} s")


def settle(world: World, case: Case) -> str:
    """Require that the instance is what it should be, and nothing else is."""
    if case.workflow == "delete_instance":
        world.cloud.gone(world.instance_id)
        world.instance_id = ""
        world.require_clean()
        return "gone"
    instance = world.state()
    state = State.Name(instance.status.state).removeprefix("STATE_")
    assert not instance.status.operation_id
    if case.workflow == "create_instance" and not case.ends_well:
        assert state == "ERROR"
        assert instance.status.fault.reason == "INJECTED_FAILURE"
        world.delete()
        world.require_clean()
    else:
        assert state in ("ACTIVE", "SHUTOFF")
        if case.workflow.endswith("_volume"):
            attached = case.workflow == "attach_volume" and case.ends_well
            # What a detach had to leave undone is done without it.
            world.cloud.until(lambda: world.has_second_volume() == attached)
        world.require_verified()
    return state


# --- pre-empted, cancelled, silent ----------------------------------------------------------------


@pytest.fixture
def hanging(world: World) -> Iterator[World]:
    """The agent never gets over a step, until its plan is cleared."""
    world.cloud.agent_plan.arm(Blow(("14", "after"), "repeat", -1))
    yield world
    world.cloud.agent_plan.arm()


def until_hanging(world: World, operation: Operation) -> None:
    """Wait until the agent works on it."""
    request = operation_pb2.GetOperationRequest(id=operation.id)

    def look() -> bool:
        seen = world.cloud.call("compute.OperationService/GetOperation", request)
        return any(step.number == 14 for step in seen.steps)

    world.cloud.until(look)


def cancel(world: World, operation: Operation) -> None:
    request = operation_pb2.CancelOperationRequest(id=operation.id)
    world.cloud.mutate("compute.OperationService/CancelOperation", request)


@pytest.mark.parametrize("workflow", ["create_instance", "attach_volume", "reboot_instance"])
def test_a_delete_preempts(world: World, workflow: str, request: pytest.FixtureRequest) -> None:
    world.prepare(workflow)
    request.getfixturevalue("hanging")
    preempted = world.begin(workflow)
    until_hanging(world, preempted)

    deleting = world.begin("delete_instance")
    with pytest.raises(errors.WrongState, match="OPERATION_NOT_CANCELLABLE"):
        cancel(world, deleting)
    world.cloud.agent_plan.arm()

    assert world.cloud.ended(preempted).state == Operation.STATE_CANCELLED
    assert world.cloud.ended(deleting).state == Operation.STATE_SUCCEEDED
    world.cloud.gone(world.instance_id)
    world.instance_id = ""
    world.require_clean()


def test_a_cancelled_create_says_so(world: World, request: pytest.FixtureRequest) -> None:
    world.prepare("create_instance")
    request.getfixturevalue("hanging")
    operation = world.begin("create_instance")
    until_hanging(world, operation)

    cancel(world, operation)

    assert world.cloud.ended(operation).state == Operation.STATE_CANCELLED
    assert world.state().status.fault.reason == "OPERATION_CANCELLED"
    world.delete()
    world.require_clean()


DEADLINE_S = 40


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
    instance = world.state()
    assert instance.status.state == State.STATE_ERROR
    assert "held until" in instance.status.fault.message
    assert {"claim", "domain", "port", "attachment", "use"} <= held
    world.require_clean(other_than=f"compute instance {instance.metadata.id} ERROR")
    world.delete()
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
    cloud.gone(world.instance_id)
    world.instance_id = ""
    world.require_clean()


def test_no_step_was_left_out(world: World) -> None:
    """Runs after all cases."""
    if world.instance_id:
        world.delete()
    world.require_clean()
    assert set(WORKFLOWS) == set(ACTS)
    visited = world.cloud.controlplane_plan.visited()
    wanted = set()
    for name, table in WORKFLOWS.items():
        for index, step in enumerate(table.steps):
            wanted.add((name, str(index), "do", "after"))
            if step.undo is not None:
                wanted.add((name, str(index), "undo", "after"))
    assert {place for place in visited if place[0] in WORKFLOWS and place[3] == "after"} == wanted
    of_agent = {place for place in world.cloud.agent_plan.visited() if place[1] == "after"}
    assert of_agent == {(step, "after") for step in agent_workflow.STEPS}
