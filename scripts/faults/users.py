"""People who use the cloud while things fail: what they ask for, and what they then expect.

A user knows an instance only through the contract. Every change is sent with one request id,
again and again until it is answered, and waited for; what comes out is what is expected later.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from benchmarks.client import Client

from mcloud.common.v1 import operation_pb2
from mcloud.compute.v1 import (
    instance_pb2,
    instance_service_pb2,
    instance_service_pb2_grpc,
)
from mcloud.compute.v1 import operation_service_pb2_grpc as compute_operations
from mcloud.volume.v1 import operation_service_pb2_grpc as volume_operations
from mcloud.volume.v1 import volume_pb2, volume_service_pb2, volume_service_pb2_grpc
from mcloud_base import errors, ids

ANSWER_S = 120.0  # within which a call that is repeated is answered
END_S = 240.0  # within which an operation ends
MOST_INSTANCES, MOST_VOLUMES = 2, 2  # of a user
MOST_ATTACHED = 1

Operation = operation_pb2.Operation
State = instance_pb2.InstanceStatus


@dataclass
class Wanted:
    """An instance as its user left it."""

    id: str
    running: bool = True
    volumes: set[str] = field(default_factory=set)


@dataclass
class Tally:
    """What users saw."""

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)  # (verb, end)
    reasons: Counter[str] = field(default_factory=Counter)  # of operations that failed
    wrong: list[str] = field(default_factory=list)  # that must never be
    created: int = 0  # instances that were asked for, each with a request id of its own


@dataclass(frozen=True)
class Things:
    """What every instance needs, by id."""

    flavor: str
    image: str
    network: str


class User:
    """One who does one thing after the other."""

    def __init__(self, name: str, seed: str, client: Client, things: Things, tally: Tally) -> None:
        self.name = name
        self.instances: list[Wanted] = []
        self.volumes: list[str] = []
        self._random = random.Random(seed)  # noqa: S311 (not a secret)
        self._client = client
        self._things = things
        self._tally = tally
        self._count = 0
        self._instances = instance_service_pb2_grpc.InstanceServiceStub(client.channel)
        self._volumes = volume_service_pb2_grpc.VolumeServiceStub(client.channel)

    # --- what may be done -----------------------------------------------------------------------

    async def act(self) -> None:
        """Do one thing, drawn from the seed."""
        choices: list[tuple[int, Callable[[], Awaitable[None]]]] = []
        if len(self.instances) < MOST_INSTANCES:
            choices.append((6, self.boot))
        if len(self.volumes) < MOST_VOLUMES:
            choices.append((3, self._make_volume))
        free = [each for each in self.volumes if not any(each in i.volumes for i in self.instances)]
        if free:
            choices.append((1, lambda: self.remove_volume(self._random.choice(free))))
        for wanted in self.instances:
            choices.append((2, lambda wanted=wanted: self.remove(wanted)))  # type: ignore[misc]
            choices.append((2, lambda wanted=wanted: self._turn(wanted)))  # type: ignore[misc]
            if wanted.running:
                choices.append((1, lambda wanted=wanted: self._reboot(wanted)))  # type: ignore[misc]
            if free and len(wanted.volumes) < MOST_ATTACHED:
                choices.append((3, lambda wanted=wanted: self._attach(wanted, free[0])))  # type: ignore[misc]
            for volume in wanted.volumes:
                choices.append((2, lambda w=wanted, v=volume: self._detach(w, v)))  # type: ignore[misc]
        await self._random.choices([do for _, do in choices], [weight for weight, _ in choices])[
            0
        ]()

    async def boot(self) -> None:
        """Ask for an instance; one that comes to nothing is removed."""
        self._count += 1
        self._tally.created += 1
        spec = instance_pb2.InstanceSpec(
            flavor_id=self._things.flavor,
            image_id=self._things.image,
            nics=[instance_pb2.InstanceNic(network_id=self._things.network)],
        )
        request = instance_service_pb2.CreateInstanceRequest(
            name=f"{self.name}-{self._count}", spec=spec
        )
        operation = await self._ask("boot", self._instances.CreateInstance, request)
        if operation is None:
            return
        wanted = Wanted(operation.resource.id)
        self.instances.append(wanted)
        if operation.state != Operation.STATE_SUCCEEDED:
            await self.remove(wanted)

    async def remove(self, wanted: Wanted) -> None:
        """Delete an instance."""
        request = instance_service_pb2.DeleteInstanceRequest(id=wanted.id)
        operation = await self._ask("delete", self._instances.DeleteInstance, request)
        if operation is not None and operation.state == Operation.STATE_SUCCEEDED:
            self.instances.remove(wanted)

    async def _turn(self, wanted: Wanted) -> None:
        if wanted.running:
            stop = instance_service_pb2.StopInstanceRequest(id=wanted.id)
            operation = await self._ask("stop", self._instances.StopInstance, stop)
        else:
            start = instance_service_pb2.StartInstanceRequest(id=wanted.id)
            operation = await self._ask("start", self._instances.StartInstance, start)
        if operation is not None and operation.state == Operation.STATE_SUCCEEDED:
            wanted.running = not wanted.running

    async def _reboot(self, wanted: Wanted) -> None:
        request = instance_service_pb2.RebootInstanceRequest(id=wanted.id, hard=True)
        await self._ask("reboot", self._instances.RebootInstance, request)

    async def _attach(self, wanted: Wanted, volume: str) -> None:
        request = instance_service_pb2.AttachVolumeRequest(id=wanted.id, volume_id=volume)
        await self._ask("attach", self._instances.AttachVolume, request)
        await self._look_at_volumes(wanted)

    async def _detach(self, wanted: Wanted, volume: str) -> None:
        request = instance_service_pb2.DetachVolumeRequest(id=wanted.id, volume_id=volume)
        await self._ask("detach", self._instances.DetachVolume, request)
        await self._look_at_volumes(wanted)

    async def _make_volume(self) -> None:
        self._count += 1
        request = volume_service_pb2.CreateVolumeRequest(
            name=f"{self.name}-{self._count}", spec=volume_pb2.VolumeSpec(size_gib=1)
        )
        operation = await self._ask("volume create", self._volumes.CreateVolume, request)
        if operation is None:
            return
        self.volumes.append(operation.resource.id)
        if operation.state != Operation.STATE_SUCCEEDED:
            await self.remove_volume(operation.resource.id)

    async def remove_volume(self, volume: str) -> None:
        """Delete a volume."""
        request = volume_service_pb2.DeleteVolumeRequest(id=volume)
        operation = await self._ask("volume delete", self._volumes.DeleteVolume, request)
        if operation is not None and operation.state == Operation.STATE_SUCCEEDED:
            self.volumes.remove(volume)

    # --- afterwards -----------------------------------------------------------------------------

    async def settle(self, wanted: Wanted) -> None:
        """Have an instance as it is expected, when nothing fails any more; or say what it is.

        A guest whose QEMU was killed is off: its user starts it again.
        """
        try:
            instance = await self._get(wanted)
        except errors.NotFound as error:
            self._tally.wrong.append(f"nobody has seen {wanted.id} deleted: {error}")
            self.instances.remove(wanted)
            return
        if wanted.running and instance.status.state == State.STATE_SHUTOFF:
            request = instance_service_pb2.StartInstanceRequest(id=wanted.id)
            await self._ask("start", self._instances.StartInstance, request)
            instance = await self._get(wanted)
        expected = State.STATE_ACTIVE if wanted.running else State.STATE_SHUTOFF
        attached = {each.volume_id for each in instance.status.volumes}
        if instance.status.state != expected or attached != wanted.volumes:
            state = State.State.Name(instance.status.state)
            self._tally.wrong.append(
                f"{wanted.id} is {state} with {sorted(attached)}; expected "
                f"{State.State.Name(expected)} with {sorted(wanted.volumes)}: "
                f"{instance.status.fault.message}"
            )

    # --- how ------------------------------------------------------------------------------------

    async def _get(self, wanted: Wanted) -> instance_pb2.Instance:
        request = instance_service_pb2.GetInstanceRequest(id=wanted.id)
        found: instance_pb2.Instance = await self._client.call(
            self._instances.GetInstance, request, timeout_s=ANSWER_S
        )
        return found

    async def _look_at_volumes(self, wanted: Wanted) -> None:
        """Take what is for what is wanted: an operation that failed may have done it or not."""
        instance = await self._get(wanted)
        wanted.volumes = {each.volume_id for each in instance.status.volumes}

    async def _ask(self, verb: str, method: Any, request: Any) -> Operation | None:
        """Make a change and wait for its end; None: it was refused."""
        request.request_id = ids.request_id()
        began = time.monotonic()
        try:
            operation = await self._client.call(method, request, timeout_s=ANSWER_S)
            operation = await self._ended(operation)
        except errors.Error as error:
            self._tally.outcomes[verb, f"refused: {error.reason}"] += 1
            if isinstance(error, errors.DeadlineExceeded | errors.Unavailable | errors.Internal):
                took = time.monotonic() - began
                self._tally.wrong.append(f"{verb} of {self.name} after {took:.0f} s: {error}")
            return None
        if operation is None:
            self._tally.wrong.append(f"{verb} of {self.name} is stuck: {request}")
            return None
        state = Operation.State.Name(operation.state).removeprefix("STATE_")
        self._tally.outcomes[verb, state] += 1
        if operation.state != Operation.STATE_SUCCEEDED:
            reason = errors.from_status(operation.error)
            self._tally.reasons[f"{verb}: {reason}"] += 1
            if isinstance(reason, errors.Internal):
                self._tally.wrong.append(f"{verb} of {self.name}: {reason} ({operation.id})")
        return operation

    async def _ended(self, operation: Operation) -> Operation | None:
        """Return an operation at its end; None if it does not end."""
        module = volume_operations if operation.id.startswith("vop-") else compute_operations
        wait = module.OperationServiceStub(self._client.channel).WaitOperation
        end = time.monotonic() + END_S
        while operation.state in (Operation.STATE_RUNNING, Operation.STATE_UNDOING):
            if time.monotonic() > end:
                return None
            request = operation_pb2.WaitOperationRequest(id=operation.id)
            request.timeout.FromSeconds(5)
            operation = await self._client.call(wait, request, timeout_s=ANSWER_S)
        return operation


async def everyone_acts(users: list[User], stopped: asyncio.Event, pause_s: float) -> None:
    """Have every user do things until told to stop; what is begun is finished."""

    async def one(user: User, seed: int) -> None:
        pauses = random.Random(seed)  # noqa: S311 (not a secret)
        while not stopped.is_set():
            await user.act()
            await asyncio.sleep(pauses.uniform(0, pause_s))

    async with asyncio.TaskGroup() as group:
        for number, user in enumerate(users):
            group.create_task(one(user, number))
