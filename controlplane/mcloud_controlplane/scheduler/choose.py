"""The decision, without any effect: hosts and a need in, candidates in order and reasons out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mcloud.scheduler.v1 import placement_pb2
from mcloud_controlplane.scheduler.filters import FILTERS, Filter
from mcloud_controlplane.scheduler.hosts import DISK, MEMORY, VCPU, Hosts, Need
from mcloud_controlplane.scheduler.weighers import WEIGHERS, Weigher, scaled

_TOP = 10


@dataclass(frozen=True)
class Choice:
    """Ids of candidates, best first, and the explanation (without a chosen host)."""

    candidates: list[str]
    explanation: placement_pb2.PlacementExplanation


def choose(
    hosts: Hosts,
    need: Need,
    *,
    limit: int = 32,
    turn: int = 0,
    filters: Sequence[Filter] = FILTERS,
    weighers: Sequence[Weigher] = WEIGHERS,
) -> Choice:
    """Filter and weigh.

    Args:
        limit: candidates to return; those after the first are for lost races.
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
    left = np.ones(len(hosts), np.bool_)
    for rule in filters:
        passed = left & rule.mask(hosts, need)
        removed = int(left.sum() - passed.sum())
        explanation.filters.add(
            name=rule.name,
            removed_count=removed,
            left_count=int(passed.sum()),
            reason=rule.reason(hosts, need, left) if removed and not passed.any() else "",
        )
        left = passed
        if not left.any():
            return Choice([], explanation)
    numbers = np.flatnonzero(left)
    scores = np.zeros(len(numbers))
    weights: dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float64]]] = {}
    for weigher in weighers:
        raw = weigher.scores(hosts, need)[numbers]
        weights[weigher.name] = raw
        scores += weigher.multiplier * scaled(raw)
    # Equal scores in turns: the last key sorts first, so by score, then by distance from the turn.
    distance = (numbers - turn) % max(len(hosts), 1)
    best = np.lexsort((distance, -np.round(scores, 9)))[:limit]
    for place in best[:_TOP]:
        explanation.top_hosts.add(
            host_id=hosts.ids[numbers[place]],
            host_name=hosts.names[numbers[place]],
            score=float(scores[place]),
            weights={name: float(raw[place]) for name, raw in weights.items()},
        )
    return Choice([hosts.ids[numbers[place]] for place in best], explanation)


def capacity(hosts: Hosts, need: Need) -> tuple[int, int]:
    """Return how many more of a size fit, and on how many hosts."""
    left = np.ones(len(hosts), np.bool_)
    for rule in FILTERS:
        left &= rule.mask(hosts, need)
    wanted = np.array(need.resources)
    if not left.any() or not wanted.any():
        return 0, int(left.sum())
    free = hosts.free()[:, left][wanted > 0]
    fits = np.floor(free / wanted[wanted > 0][:, None]).min(axis=0)
    return int(np.maximum(fits, 0).sum()), int(left.sum())
