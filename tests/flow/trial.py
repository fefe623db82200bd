"""One case of a workflow made to go wrong: what happens where, and what must have come of it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass

from fakes.acts import ACTS, GONE, REMOVERS, Act, registered
from flow.fault_cloud import Deed, Operation, Place, service_of
from flow.fault_world import World
from mcloud_base import errors


@dataclass(frozen=True)
class Case:
    """What happens where."""

    place: Place
    what: str

    def __str__(self) -> str:
        return "-".join([*map(str, self.place), self.what])


Moments = dict[str, tuple[str, ...]]


def cases(at_do: Moments, at_undo: Moments) -> Iterator[Case]:
    for name, table in registered().items():
        for index, step in enumerate(table.steps):
            yield from _at((name, index, "do"), at_do)
            if step.undo is not None:
                yield from _at((name, index, "undo"), at_undo)


def _at(act: tuple[str, int, str], planned: Moments) -> Iterator[Case]:
    for what, moments in planned.items():
        if what == "delete" and REMOVERS[ACTS[act[0]].subject] == "repair":
            continue  # there is nothing that could be deleted
        yield from (Case((*act, moment), what) for moment in moments)


class Trial:
    """One case under way."""

    def __init__(self, world: World, case: Case) -> None:
        self.world, self.case = world, case
        self.name = case.place[0]
        self.act: Act = ACTS[self.name]
        self.is_last = case.place[1] == len(world.tables[self.name].steps) - 1
        self.deleting: Operation | None = None
        self.refused: errors.Error | None = None
        self.zombie: asyncio.Task[None] | None = None

    async def run(self) -> Operation:
        world, case = self.world, self.case
        await world.prepare(self.name)
        plan: dict[Place, Deed] = {case.place: getattr(self, case.what)}
        if case.place[2] == "undo":
            plan[self.name, len(world.tables[self.name].steps) - 1, "do", "after"] = self.fail
        world.saboteur.plan = plan
        ended = await world.ended(await world.begin(self.name))
        if self.zombie is not None:
            await asyncio.wait({self.zombie}, timeout=60)
            assert self.zombie.done()
        assert not world.saboteur.plan, "the workflow did not come by"
        if self.deleting is not None:
            deleted = await world.ended(self.deleting)
            assert deleted.state == Operation.STATE_SUCCEEDED, deleted
        return ended

    # --- deeds ----------------------------------------------------------------------------------

    async def fail(self, operation_id: str) -> None:
        raise errors.Internal("INJECTED_FAILURE", "made to fail")

    async def repeat(self, operation_id: str) -> None:
        raise errors.Unavailable("INJECTED_REPEAT", "to be repeated")

    async def die(self, operation_id: str) -> None:
        """The work ends here, as it does with its process."""
        await self.world.expire_lease(operation_id)
        raise asyncio.CancelledError

    async def overtake(self, operation_id: str) -> None:
        """The runner stands still until another has ended the operation, then goes on."""
        self.zombie = asyncio.current_task()
        async with self.world.another_runner(service_of(operation_id)):
            await self.world.hand_over(operation_id)
            await self.world.ended(operation_id)

    async def cancel(self, operation_id: str) -> None:
        method = f"{service_of(operation_id)}.OperationService/CancelOperation"
        try:
            await self.world.mutate(method, system=self.act.is_of_operators, id=operation_id)
        except errors.WrongState as error:
            self.refused = error

    async def delete(self, operation_id: str) -> None:
        seen = await self.world.operation(operation_id)
        try:
            self.deleting = await self.world.mutate(
                ACTS[REMOVERS[self.act.subject]].method, id=seen.resource.id
            )
        except errors.NotFound as error:
            self.refused = error

    # --- what must have come of it --------------------------------------------------------------

    def outcomes(self) -> tuple[str, ...]:
        """Return how the operation may have ended."""
        if self.case.place[2] == "undo" or self.case.what == "fail":
            return ("FAILED",)
        if self.case.what in ("repeat", "die", "overtake") or self.name.startswith("delete_"):
            return ("SUCCEEDED",)
        if self.case.what == "delete" and self.act.subject == "volume":
            # It is not pre-empted: it finds that there is nothing to make any more.
            return ("FAILED", "SUCCEEDED") if self.is_last else ("FAILED",)
        # What has been done to its end can be too late to be cancelled.
        return ("CANCELLED", "SUCCEEDED") if self.is_last else ("CANCELLED",)

    def reason(self) -> str:
        if self.case.what == "delete" and self.case.place[2] == "do":
            return "VOLUME_DELETED"
        return "INJECTED_FAILURE"


async def try_out(world: World, case: Case) -> None:
    """Require that nothing is stuck and nothing is left."""
    trial = Trial(world, case)
    ended = await trial.run()

    outcome = Operation.State.Name(ended.state).removeprefix("STATE_")
    assert outcome in trial.outcomes(), ended
    if outcome == "FAILED":
        assert errors.from_status(ended.error).reason == trial.reason()
    if trial.refused is not None:
        gone = f"{trial.act.subject.upper()}_NOT_FOUND"
        assert trial.refused.reason == (
            gone if case.what == "delete" else "OPERATION_NOT_CANCELLABLE"
        )
    await settle(world, trial, outcome)


async def settle(world: World, trial: Trial, outcome: str) -> None:
    """Require that the subject is what it should be, and that nothing else is."""
    act = trial.act
    wanted = act.ends if outcome == "SUCCEEDED" else act.fails
    if trial.deleting is not None:
        wanted = (GONE,)

    async def settled() -> bool:
        # What was cancelled may have been asked of the host already.
        return await world.is_reached() and await world.state(act) in wanted

    await world.until(settled)
    if act.second_volume and GONE not in wanted:
        await world.until(lambda: _disk_agrees(world))
    if "ERROR" in wanted:
        await world.prepare(trial.name)  # it can be deleted
    if act.subject == "fault" and world.subjects["fault"]:
        await world.run("repair")
    if world.subjects[act.subject]:
        await world.require_verified()
    else:
        await world.require_clean()


async def _disk_agrees(world: World) -> bool:
    """What the instance shows, its volume's host serves and its guest has."""
    shown = await world.has_second_volume()
    served = bool(world.host.volumes.stored[world.second_volume].clients)
    (guest,) = world.host.driver.guests.values()
    assert guest.wanted is not None
    had = world.second_volume in {disk.volume_id for disk in guest.wanted.disks}
    return shown == served == had
