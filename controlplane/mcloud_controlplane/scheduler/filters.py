"""Which hosts will do. A filter is a function from arrays to a mask, with a sentence for the rest.

To add one: write the function, and add it to FILTERS at the place where it is to be applied (the
cheap and the telling first: the explanation counts what each one removed of what was left).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from mcloud_controlplane.scheduler.hosts import DIMENSIONS, DISK, MEMORY, VCPU, Bools, Hosts, Need
from mcloud_controlplane.scheduler.server_group import AFFINITY, ANTI_AFFINITY

_RECENTLY_US = 120_000_000  # that a host which has fallen silent may be heard of again


@dataclass(frozen=True)
class Filter:
    """`mask` is True for hosts that pass; `reason` says why, of those left before, none did.

    Where nothing is wished for that hosts could fail, there is no mask.
    """

    name: str
    mask: Callable[[Hosts, Need], Bools | None]
    reason: Callable[[Hosts, Need, Bools], str]


def alive(hosts: Hosts, need: Need) -> Bools:
    """Pass hosts that have reported lately, and not before a clock was set back."""
    times, most = hosts.report_time, need.silent_after_us
    return np.asarray((times >= need.now - most) & (times <= need.now + most))


def all_just_fell_silent(hosts: Hosts, need: Need) -> bool:
    """Tell whether no host is alive, and some were a moment ago.

    So it is after the database was away, when no host's report could be written down.
    """
    age = need.now - hosts.report_time
    return bool(not alive(hosts, need).any() and (np.abs(age) <= _RECENTLY_US).any())


def enabled(hosts: Hosts, need: Need) -> Bools:
    """Pass hosts that the operator has not disabled."""
    return hosts.enabled


def target(hosts: Hosts, need: Need) -> Bools | None:
    """Pass the host that was asked for, if one was."""
    return _only(hosts, [need.host_id]) if need.host_id else None


def excluded(hosts: Hosts, need: Need) -> Bools | None:
    """Stop hosts that have refused this instance already."""
    return ~_only(hosts, need.excluded) if need.excluded else None


def _only(hosts: Hosts, ids: Iterable[str]) -> Bools:
    mask = np.zeros(len(hosts), np.bool_)
    mask[hosts.find(ids)] = True
    return mask


def zone(hosts: Hosts, need: Need) -> Bools | None:
    """Pass hosts of the availability zone that was asked for, if one was."""
    if not need.zone:
        return None
    return np.asarray(hosts.zones == hosts.words.find(need.zone))


def arch(hosts: Hosts, need: Need) -> Bools | None:
    """Pass hosts whose processor runs the image."""
    if not need.arch:
        return None
    return np.asarray(hosts.archs == hosts.words.find(need.arch))


def _room(dimension: int) -> Callable[[Hosts, Need], Bools]:
    def mask(hosts: Hosts, need: Need) -> Bools:
        return np.asarray(hosts.free[dimension] >= need.resources[dimension])

    return mask


def _no_room(dimension: int) -> Callable[[Hosts, Need, Bools], str]:
    def reason(hosts: Hosts, need: Need, left: Bools) -> str:
        largest = hosts.free[dimension][left].max(initial=0)
        return (
            f"no host has {need.resources[dimension]:.0f} {DIMENSIONS[dimension]} free "
            f"(largest: {max(largest, 0):.0f})"
        )

    return reason


def server_group(hosts: Hosts, need: Need) -> Bools | None:
    """Pass hosts where the hard rule of the server group, if it has one, allows one more member."""
    group = need.group
    if group is None or not group.members:
        return None
    # All hosts without members are alike, and of these there may be 10,000.
    if group.policy == AFFINITY:
        return _only(hosts, group.members)
    if group.policy == ANTI_AFFINITY:
        return ~_only(hosts, [id_ for id_, count in group.members.items() if count >= group.most])
    return None


def _no_host_for_group(hosts: Hosts, need: Need, left: Bools) -> str:
    group = need.group
    assert group is not None
    if group.policy == ANTI_AFFINITY:
        count = np.count_nonzero(left)
        return (
            f"anti-affinity: {count} host(s) with room for it run {group.most} or more members of "
            f"server group {group.id} each"
        )
    names = sorted(hosts.names[number] for number in hosts.find(group.members))
    return (
        f"affinity: server group {group.id} runs on {', '.join(names) or 'a host that is gone'}, "
        "which does not take it"
    )


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
    # Last, so that its sentence speaks of hosts that would do but for the rule.
    Filter("server_group", server_group, _no_host_for_group),
)
