"""Which of the hosts that will do is best. A weigher is a function from arrays to scores.

Scores are scaled to 0 to 1 over the candidates (min-max, as Nova's do), multiplied and added.
Source: https://docs.openstack.org/nova/latest/admin/scheduling.html#weights
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mcloud_controlplane.scheduler.hosts import MEMORY, VCPU, Floats, Hosts, Need


@dataclass(frozen=True)
class Weigher:
    """`scores` are raw, of all hosts; higher is better unless the multiplier is negative."""

    name: str
    scores: Callable[[Hosts, Need], Floats]
    multiplier: float


def free_memory(hosts: Hosts, need: Need) -> Floats:
    """Prefer the share of memory that is free, so that hosts of all sizes fill alike."""
    limit = np.maximum(hosts.limit[MEMORY], 1)
    return np.asarray((hosts.limit[MEMORY] - hosts.claimed[MEMORY]) / limit)


def free_vcpu(hosts: Hosts, need: Need) -> Floats:
    """Prefer the share of processors that is free."""
    limit = np.maximum(hosts.limit[VCPU], 1)
    return np.asarray((hosts.limit[VCPU] - hosts.claimed[VCPU]) / limit)


def failures(hosts: Hosts, need: Need) -> Floats:
    """Avoid hosts that have refused builds lately."""
    return np.minimum(hosts.failure_count, 10)


WEIGHERS: tuple[Weigher, ...] = (
    Weigher("memory", free_memory, 1.0),
    Weigher("vcpu", free_vcpu, 1.0),
    Weigher("failures", failures, -10.0),
)


def scaled(scores: Floats) -> Floats:
    """Return scores on a scale of 0 to 1; all 0 where they are equal: no opinion.

    Args:
        scores: at least one.
    """
    low, high = scores.min(), scores.max()
    if high - low < 1e-12:
        return np.zeros_like(scores)
    return np.asarray((scores - low) / (high - low))
