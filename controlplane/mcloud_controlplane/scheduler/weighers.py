"""Which of the hosts that will do is best. A weigher is a function from arrays to scores.

Scores are scaled to 0 to 1 over the candidates (min-max, as Nova's do), multiplied and added.
Source: https://docs.openstack.org/nova/latest/admin/scheduling.html#weights
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mcloud_controlplane.scheduler.hosts import MEMORY, VCPU, Floats, Hosts, Need
from mcloud_controlplane.scheduler.server_group import SOFT_AFFINITY, SOFT_ANTI_AFFINITY


@dataclass(frozen=True)
class Weigher:
    """`scores` are raw, of all hosts; higher is better unless the multiplier is negative.

    Where nothing is wished for that would make a difference, there are none.
    """

    name: str
    scores: Callable[[Hosts, Need], Floats | None]
    multiplier: float


def free_memory(hosts: Hosts, need: Need) -> Floats:
    """Prefer the share of memory that is free, so that hosts of all sizes fill alike."""
    return np.asarray(hosts.free_share[MEMORY])


def free_vcpu(hosts: Hosts, need: Need) -> Floats:
    """Prefer the share of processors that is free."""
    return np.asarray(hosts.free_share[VCPU])


def failures(hosts: Hosts, need: Need) -> Floats:
    """Avoid hosts that have refused builds lately."""
    return np.minimum(hosts.failure_count, 10)


def server_group(hosts: Hosts, need: Need) -> Floats | None:
    """Prefer what the soft rule of the server group, if it has one, prefers: members, or none."""
    group = need.group
    if group is None or group.policy not in _SIGNS or not group.members:
        return None
    scores = np.zeros(len(hosts))
    known = [id_ for id_ in group.members if id_ in hosts.index]
    scores[hosts.find(known)] = [_SIGNS[group.policy] * group.members[id_] for id_ in known]
    return scores


_SIGNS = {SOFT_AFFINITY: 1, SOFT_ANTI_AFFINITY: -1}

WEIGHERS: tuple[Weigher, ...] = (
    Weigher("memory", free_memory, 1.0),
    Weigher("vcpu", free_vcpu, 1.0),
    Weigher("failures", failures, -10.0),
    # A wish goes before what is emptier, but not before what works.
    Weigher("server_group", server_group, 5.0),
)


def weighed(scores: Floats, multiplier: float) -> Floats | None:
    """Return scores on a scale of 0 to 1, times the multiplier; None: all are equal.

    Args:
        scores: at least one.
    """
    low, high = float(scores.min()), float(scores.max())
    if high - low < 1e-12:
        return None
    found = scores - low
    found *= multiplier / (high - low)
    return found
