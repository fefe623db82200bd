"""Decides on requests for room: some at a time, each chosen for in turn, all claimed at once.

A transaction costs the same for one claim as for many, and of what a decision takes it is nearly
all. So whatever waits when the last claims are committed is decided together. Each choice counts on
those before it; what is true is decided by the transaction (claims.py), which also tells what the
hosts are then, and who lost a host to another scheduler chooses again.
"""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from mcloud.common.v1 import operation_pb2
from mcloud.scheduler.v1 import placement_pb2, placement_service_pb2
from mcloud_base import errors
from mcloud_controlplane.compute.server_group_store import not_found
from mcloud_controlplane.core import convert, database
from mcloud_controlplane.core.database import Database
from mcloud_controlplane.scheduler import choose, claims, filters, server_group_store
from mcloud_controlplane.scheduler.claims import Claimed, Wish
from mcloud_controlplane.scheduler.hosts import Hosts, Need
from mcloud_controlplane.scheduler.server_group import AFFINITY, Group
from mcloud_controlplane.scheduler.view import View
from mcloud_controlplane.settings import Settings

Groups = Mapping[str, Group]  # server groups by id

_QUEUE_LIMIT = 1000
_AT_A_TIME = 64
_ROUNDS = 32  # in which the host was lost to others, before the request is refused


@dataclass(eq=False)
class _Request:
    """A request in the queue, and where it stands."""

    message: placement_service_pb2.SelectDestinationsRequest
    queue_time: int
    answer: asyncio.Future[placement_service_pb2.SelectDestinationsResponse]
    taken: int = 0  # µs since 1970
    rounds: int = 0
    explanation: placement_pb2.PlacementExplanation = field(
        default_factory=placement_pb2.PlacementExplanation
    )
    lost: list[placement_pb2.ScoredHost] = field(default_factory=list)

    def lose(self, host_id: str, why: str) -> None:
        """Remember that others were quicker."""
        self.rounds += 1
        for host in self.explanation.top_hosts:
            if host.host_id == host_id and not host.rejected:
                host.rejected = why
                self.lost = [*self.lost, host][1 - choose.TOP :]

    def end(self, answer: placement_service_pb2.SelectDestinationsResponse | Exception) -> None:
        """Answer, if anybody still waits."""
        if self.answer.done():
            return
        if isinstance(answer, Exception):
            self.answer.set_exception(answer)
        else:
            self.answer.set_result(answer)


class Decisions:
    """The queue, and who works it off."""

    def __init__(self, opened: Database, settings: Settings, view: View) -> None:
        self._database = opened
        self._settings = settings
        self._view = view
        self._queue: asyncio.Queue[_Request] = asyncio.Queue(_QUEUE_LIMIT)
        # Elsewhere than in other schedulers, so that they do not ask for the same hosts in step.
        self._turn = random.randrange(1 << 30)  # noqa: S311

    async def decide(
        self, message: placement_service_pb2.SelectDestinationsRequest
    ) -> placement_service_pb2.SelectDestinationsResponse:
        """Queue a request and return what was decided.

        Raises:
            errors.Exhausted: QUEUE_FULL, NO_VALID_HOST.
            errors.Unavailable: HOSTS_SILENT.
            errors.Conflict, errors.WrongState: as `claims.claim` has them.
        """
        request = _Request(message, database.now(), asyncio.get_running_loop().create_future())
        try:
            self._queue.put_nowait(request)
        except asyncio.QueueFull as error:
            raise errors.Exhausted(
                "QUEUE_FULL", f"{_QUEUE_LIMIT} requests wait for the scheduler",
                details=(errors.retry_after(1),),
            ) from error  # fmt: skip
        return await request.answer

    async def work(self) -> None:
        """Decide on what waits, for ever."""
        again: list[_Request] = []
        while True:
            waiting = again or [await self._queue.get()]
            while len(waiting) < _AT_A_TIME and not self._queue.empty():
                waiting.append(self._queue.get_nowait())
            # Of repeats that wait together one goes first, and the others find what it got.
            batch = {
                each.message.domain_id: each for each in waiting[::-1] if not each.answer.done()
            }
            again = [each for each in waiting if batch.get(each.message.domain_id) is not each]
            again = [each for each in again if not each.answer.done()]
            try:
                again = await self._decide(list(batch.values())[::-1]) + again
            except Exception as error:
                # Whatever it is, it is theirs; the next ones are decided all the same.
                for each in batch.values():
                    each.end(error)

    async def _decide(self, batch: Sequence[_Request]) -> list[_Request]:
        """Take requests (6), filter, weigh and claim (7); return those to be decided once more."""
        async with self._view.changing:
            wishes, stuck = await self._choose_all(batch, await self._groups(batch))
            claimed = await self._claim(wishes, wait=any(each.rounds for each in batch))
            self._view.hosts = self._view.hosts.update(claimed.hosts)
            lost = self._answer(batch, wishes, claimed)
            unknown = {wish.host_id for wish in wishes} - set(claimed.hosts)
            if lost and unknown:
                await self._view.read(unknown)
            if stuck:
                await self._view.catch_up()
        # Perhaps the view was old, or who was to have the room did not take it.
        groups = await self._groups(stuck)
        free = [each for each in stuck if self._choose(self._view.hosts, each, groups) is not None]
        again = [each for each in (*lost, *free) if each.rounds < _ROUNDS]
        await self._refuse([each for each in (*lost, *stuck) if each not in again])
        return again

    async def _groups(self, requests: Sequence[_Request]) -> Groups:
        """Return the server groups that requests name, by id, with all members that are claimed."""
        found = {each.message.server_group_id for each in requests} - {""}
        if not found:
            return {}
        return await self._database.read_few(server_group_store.load, self._database, found)

    async def _choose_all(
        self, batch: Sequence[_Request], groups: Groups
    ) -> tuple[list[Wish], list[_Request]]:
        """Choose for one after the other; return what to claim, and for whom there is no host.

        Args:
            groups: of the batch; the choices count as members from then on.
        """
        hosts, wishes, stuck = self._view.hosts, list[Wish](), list[_Request]()
        counted = list[Wish]()  # on by choices after them
        try:
            for request in batch:
                if request is not batch[0]:
                    await asyncio.sleep(0)  # it takes a while, in which others have their turns
                request.taken = request.taken or database.now()
                group_id = request.message.server_group_id
                if group_id and group_id not in groups:
                    request.end(not_found(group_id))
                    continue
                host_id = self._choose(hosts, request, groups)
                if host_id is None:
                    stuck.append(request)
                elif request.message.dry_run:
                    request.end(self._told(hosts, request, host_id, groups))
                else:
                    if group_id:
                        groups[group_id].add(host_id)
                    wishes.append(Wish(request.message, host_id, request.explanation))
                    if request is not batch[-1]:
                        counted.append(wishes[-1])
                        hosts.claim(host_id, claims.resources(request.message.resources))
        finally:  # what is claimed the transaction will tell
            for wish in counted:
                hosts.give_back(wish.host_id, claims.resources(wish.request.resources))
        return wishes, stuck

    def _told(
        self, hosts: Hosts, request: _Request, host_id: str, groups: Groups
    ) -> placement_service_pb2.SelectDestinationsResponse | errors.Error:
        """Return what a dry run tells, when there is a host for the first one."""
        wanted = request.message.count
        if wanted > 1:
            need = self._need(request.message, groups)
            if need.group is not None and need.group.policy == AFFINITY:
                need = replace(need, host_id=host_id)  # where the others have to be
            fits, host_count = choose.capacity(hosts, need)
            if fits < wanted:
                return errors.Exhausted(
                    "NO_VALID_HOST",
                    f"{fits} of the {wanted} instances fit, on {host_count} host(s)",
                    details=(request.explanation,),
                    considered=request.explanation.considered_count,
                )
        return placement_service_pb2.SelectDestinationsResponse(explanation=request.explanation)

    def _choose(self, hosts: Hosts, request: _Request, groups: Groups) -> str | None:
        """Return the best host, and explain; None: none will do."""
        self._turn += 1
        need = self._need(request.message, groups)
        choice = choose.choose(hosts, need, turn=self._turn)
        if request.lost:
            top_hosts = [*request.lost, *choice.explanation.top_hosts][: choose.TOP]
            del choice.explanation.top_hosts[:]
            choice.explanation.top_hosts.extend(top_hosts)
        choice.explanation.duration_us = database.now() - request.queue_time
        request.explanation = choice.explanation
        return choice.candidates[0] if choice.candidates else None

    def _need(
        self, message: placement_service_pb2.SelectDestinationsRequest, groups: Groups
    ) -> Need:
        return Need(
            resources=claims.resources(message.resources),
            host_id=message.host_id,
            zone=message.availability_zone,
            arch=message.cpu_arch,
            excluded=frozenset(message.excluded_host_ids),
            now=self._database.now(),
            group=groups.get(message.server_group_id),
        )

    async def _claim(self, wishes: list[Wish], *, wait: bool) -> Claimed:
        """Claim for all; if that fails, for each by itself: one's fault is not the others'."""
        if not wishes:
            return Claimed([], {})
        try:
            return await self._database.write(
                claims.claim, self._database, self._settings, wishes, wait=wait
            )
        except Exception as error:
            if len(wishes) == 1 or isinstance(error, errors.Unavailable | errors.Exhausted):
                return Claimed([error] * len(wishes), {})
        found = Claimed([], {})
        for wish in wishes:
            one = await self._claim([wish], wait=wait)
            found.outcomes.extend(one.outcomes)
            found.hosts.update(one.hosts)
        return found

    def _answer(
        self, batch: Sequence[_Request], wishes: Sequence[Wish], claimed: Claimed
    ) -> list[_Request]:
        """Tell what came of it; return those whose host was taken by others."""
        requests = {each.message.domain_id: each for each in batch}
        lost = []
        for wish, outcome in zip(wishes, claimed.outcomes, strict=True):
            request = requests[wish.request.domain_id]
            if isinstance(outcome, str):
                request.lose(wish.host_id, outcome)
                lost.append(request)
            elif isinstance(outcome, Exception):
                request.end(outcome)
            else:
                request.end(_answer(request, outcome, wish.explanation))
        return lost

    async def _refuse(self, requests: Sequence[_Request]) -> None:
        """Say why there is no host; but a repeat finds what its first time has taken."""
        real = [each for each in requests if not each.message.dry_run]
        earlier: dict[str, placement_pb2.Claim] = {}
        if real:
            ids = [each.message.domain_id for each in real]
            earlier = await self._database.read_few(claims.find_claims, ids)
        attempts = []
        for request in requests:
            message = request.message
            if message.domain_id in earlier and not message.dry_run:
                request.end(_answer(request, earlier[message.domain_id]))
            elif not message.dry_run and filters.all_just_fell_silent(
                self._view.hosts, self._need(message, {})
            ):
                request.end(
                    errors.Unavailable(
                        "HOSTS_SILENT",
                        "no host answers just now; try again in a moment",
                        details=(errors.retry_after(2),),
                    )
                )
            elif not message.dry_run:
                attempts.append((message, request.explanation))
        if attempts:
            await self._database.write(claims.record_placements, self._database, attempts)
        for request in requests:
            request.end(_no_valid_host(request.explanation))


def _answer(
    request: _Request,
    claim: placement_pb2.Claim,
    explanation: placement_pb2.PlacementExplanation | None = None,
) -> placement_service_pb2.SelectDestinationsResponse:
    return placement_service_pb2.SelectDestinationsResponse(
        claim=claim,
        explanation=explanation,
        steps=_steps(request.queue_time, request.taken, claim.host_name),
    )


def _steps(queued: int, taken: int, host_name: str) -> list[operation_pb2.OperationStep]:
    here = socket.gethostname()
    done = operation_pb2.OperationStep.STATE_DONE
    return [
        operation_pb2.OperationStep(
            number=6, name="take the request", service="scheduler", host=here, state=done,
            start_time=convert.timestamp(queued), end_time=convert.timestamp(taken),
        ),
        operation_pb2.OperationStep(
            number=7, name="filter, weigh, claim", service="scheduler", host=here, state=done,
            start_time=convert.timestamp(taken), end_time=convert.timestamp(database.now()),
            detail=f"{host_name} claimed",
        ),
    ]  # fmt: skip


def _no_valid_host(explanation: placement_pb2.PlacementExplanation) -> errors.Exhausted:
    removed = [item for item in explanation.filters if item.removed_count]
    last = next((item.reason for item in reversed(removed) if item.reason), "")
    why = last or ("there are no hosts" if not explanation.considered_count else "all were taken")
    return errors.Exhausted(
        "NO_VALID_HOST",
        f"no host can take the instance: {why}",
        details=(explanation,),
        considered=explanation.considered_count,
    )
