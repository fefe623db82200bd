"""The decision, without any effect: hosts and a need in, candidates in order and reasons out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mcloud.scheduler.v1 import placement_pb2
from mcloud_controlplane.scheduler.filters import FILTERS, Filter
from mcloud_controlplane.scheduler.hosts import DISK, MEMORY, VCPU, Bools, Floats, Hosts, Ints, Need
from mcloud_controlplane.scheduler.server_group import ANTI_AFFINITY, Group
from mcloud_controlplane.scheduler.weighers import WEIGHERS, Weigher, weighed

TOP = 10


@dataclass(frozen=True)
class Choice:
    """Ids of candidates, best first, and the explanation (without a chosen host)."""

    candidates: list[str]
    explanation: placement_pb2.PlacementExplanation


def choose(
    hosts: Hosts,
    need: Need,
    *,
    limit: int = TOP,
    turn: int = 0,
    filters: Sequence[Filter] = FILTERS,
    weighers: Sequence[Weigher] = WEIGHERS,
) -> Choice:
    """Filter and weigh.

    Args:
        limit: candidates to return.
        turn: hosts of equal score take turns by it.
    """
    explanation = placement_pb2.PlacementExplanation(
        considered_count=len(hosts),
        requested=placement_pb2.Resources(
            vcpu_count=int(need.resources[VCPU]),
            memory_mib=int(need.resources[MEMORY]),
            disk_gib=int(need.resources[DISK]),
        ),
    )
    # Arrays of all hosts are what a choice takes its time for: none is made for what all pass.
    everyone, left, count = len(hosts), None, len(hosts)
    for rule in filters:
        mask = rule.mask(hosts, need)
        passed, before = left, count
        if mask is not None:
            passed = mask if left is None else left & mask
            count = int(np.count_nonzero(passed))
            if count == everyone:
                passed = None
        reason = ""
        if before and not count:
            reason = rule.reason(hosts, need, _all(hosts) if left is None else left)
        explanation.filters.add(
            name=rule.name, removed_count=before - count, left_count=count, reason=reason
        )
        left = passed
        if not count:
            return Choice([], explanation)
    numbers = np.arange(everyone) if left is None else np.flatnonzero(left)
    scores = np.zeros(count)
    weights: dict[str, Floats] = {}
    for weigher in weighers:
        raw = weigher.scores(hosts, need)
        if raw is None:
            continue
        raw = raw if left is None else raw[numbers]
        weights[weigher.name] = raw
        more = weighed(raw, weigher.multiplier)
        if more is not None:
            scores += more
    best = _best(np.round(scores, 9), numbers, turn % everyone, limit)
    # As lists: to take one value out of an array takes as long as all of these.
    chosen, top = numbers[best].tolist(), best[:TOP]
    of_top = [(name, raw[top].tolist()) for name, raw in weights.items()]
    for place, (number, score) in enumerate(zip(chosen, scores[top].tolist(), strict=False)):
        host = explanation.top_hosts.add(
            host_id=hosts.ids[number], host_name=hosts.names[number], score=score
        )
        for name, values in of_top:
            host.weights[name] = values[place]
    return Choice([hosts.ids[number] for number in chosen], explanation)


def _all(hosts: Hosts) -> Bools:
    return np.ones(len(hosts), np.bool_)


def _best(scores: Floats, numbers: Ints, turn: int, limit: int) -> Ints:
    """Return where the highest scores are, best first; equal ones in turns.

    Only those are put in order: there may be 10,000 others.

    Args:
        numbers: of the hosts, rising; those that are at least `turn` come first.
    """
    limit = min(limit, len(scores))
    lowest = np.partition(scores, -limit)[-limit]
    better = np.flatnonzero(scores > lowest)
    better = better[np.lexsort((numbers[better] < turn, -scores[better]))]
    equal = np.flatnonzero(scores == lowest)
    first = int(np.searchsorted(numbers[equal], turn))
    most = limit - len(better)
    return np.concatenate(
        (better, equal[first : first + most], equal[: max(most - len(equal) + first, 0)])
    )


def capacity(hosts: Hosts, need: Need) -> tuple[int, int]:
    """Return how many more of a size fit, and on how many hosts.

    With affinity and no member yet, on whichever hosts: the first one decides.
    """
    left = _all(hosts)
    for rule in FILTERS:
        if (mask := rule.mask(hosts, need)) is not None:
            left &= mask
    wanted = np.array(need.resources)
    if not left.any() or not wanted.any():
        return 0, int(left.sum())
    free = hosts.free[:, left][wanted > 0]
    fits = np.maximum(np.floor(free / wanted[wanted > 0][:, None]).min(axis=0), 0)
    if need.group is not None and need.group.policy == ANTI_AFFINITY:
        fits = np.minimum(fits, _rooms(hosts, need.group)[left])
    return int(fits.sum()), int(left.sum())


def _rooms(hosts: Hosts, group: Group) -> Ints:
    """Return how many more members each host may have."""
    rooms = np.full(len(hosts), group.most)
    for id_, count in group.members.items():
        rooms[hosts.find([id_])] -= count
    return rooms
