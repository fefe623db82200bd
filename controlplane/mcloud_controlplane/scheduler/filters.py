"""Which hosts will do. A filter is a function from arrays to a mask, with a sentence for the rest.

To add one: write the function, and add it to FILTERS at the place where it is to be applied (the
cheap and the telling first: the explanation counts what each one removed of what was left).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mcloud_controlplane.scheduler.hosts import DIMENSIONS, DISK, MEMORY, VCPU, Bools, Hosts, Need

_RECENTLY_US = 120_000_000  # that a host which has fallen silent may be heard of again


@dataclass(frozen=True)
class Filter:
    """`mask` is True for hosts that pass; `reason` says why, of those left before, none did."""

    name: str
    mask: Callable[[Hosts, Need], Bools]
    reason: Callable[[Hosts, Need, Bools], str]


def alive(hosts: Hosts, need: Need) -> Bools:
    """Pass hosts that have reported lately, and not before a clock was set back."""
    return np.abs(need.now - hosts.report_time) <= need.silent_after_us


def all_just_fell_silent(hosts: Hosts, need: Need) -> bool:
    """Tell whether no host is alive, and some were a moment ago.

    So it is after the database was away, when no host's report could be written down.
    """
    age = need.now - hosts.report_time
    return bool(not alive(hosts, need).any() and (np.abs(age) <= _RECENTLY_US).any())


def enabled(hosts: Hosts, need: Need) -> Bools:
    """Pass hosts that the operator has not disabled."""
    return hosts.enabled


def target(hosts: Hosts, need: Need) -> Bools:
    """Pass the host that was asked for, if one was."""
    if not need.host_id:
        return np.ones(len(hosts), np.bool_)
    mask = np.zeros(len(hosts), np.bool_)
    if need.host_id in hosts.index:
        mask[hosts.index[need.host_id]] = True
    return mask


def excluded(hosts: Hosts, need: Need) -> Bools:
    """Stop hosts that have refused this instance already."""
    mask = np.ones(len(hosts), np.bool_)
    mask[[hosts.index[id_] for id_ in need.excluded if id_ in hosts.index]] = False
    return mask


def zone(hosts: Hosts, need: Need) -> Bools:
    """Pass hosts of the availability zone that was asked for, if one was."""
    if not need.zone:
        return np.ones(len(hosts), np.bool_)
    return np.asarray(hosts.zones == hosts.words.find(need.zone))


def arch(hosts: Hosts, need: Need) -> Bools:
    """Pass hosts whose processor runs the image."""
    if not need.arch:
        return np.ones(len(hosts), np.bool_)
    return np.asarray(hosts.archs == hosts.words.find(need.arch))


def _room(dimension: int) -> Callable[[Hosts, Need], Bools]:
    def mask(hosts: Hosts, need: Need) -> Bools:
        room = hosts.limit[dimension] - hosts.claimed[dimension]
        return np.asarray(room >= need.resources[dimension])

    return mask


def _no_room(dimension: int) -> Callable[[Hosts, Need, Bools], str]:
    def reason(hosts: Hosts, need: Need, left: Bools) -> str:
        largest = (hosts.limit[dimension] - hosts.claimed[dimension])[left].max(initial=0)
        return (
            f"no host has {need.resources[dimension]:.0f} {DIMENSIONS[dimension]} free "
            f"(largest: {max(largest, 0):.0f})"
        )

    return reason


FILTERS: tuple[Filter, ...] = (
    Filter("alive", alive, lambda hosts, need, left: "no host has reported lately"),
    Filter("enabled", enabled, lambda hosts, need, left: "every host is disabled"),
    Filter("target", target, lambda hosts, need, left: f"host {need.host_id} is not among them"),
    Filter("excluded", excluded, lambda hosts, need, left: "every host has refused the instance"),
    Filter("zone", zone, lambda hosts, need, left: f"no host is in zone {need.zone}"),
    Filter("arch", arch, lambda hosts, need, left: f"no host runs {need.arch}"),
    Filter("vcpu", _room(VCPU), _no_room(VCPU)),
    Filter("memory", _room(MEMORY), _no_room(MEMORY)),
    Filter("disk", _room(DISK), _no_room(DISK)),
)
