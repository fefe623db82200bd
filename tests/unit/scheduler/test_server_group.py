"""What a server group's rule makes of a choice, beside an oracle that looks at each host."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mcloud_controlplane.scheduler import choose
from mcloud_controlplane.scheduler.hosts import HostRecord, Hosts, Need
from mcloud_controlplane.scheduler.server_group import (
    AFFINITY,
    ANTI_AFFINITY,
    SOFT_AFFINITY,
    SOFT_ANTI_AFFINITY,
    Group,
)

HOST = HostRecord(
    id="h-0", name="n0", enabled=True, zone="", arch="x86_64", limit=(8.0, 8.0, 8.0),
    claimed=(0.0, 0.0, 0.0), instance_count=0, failure_count=0, report_time=0,
)  # fmt: skip
ONE = (1.0, 1.0, 1.0)
ID = "grp-1"

_hosts = st.lists(
    st.builds(
        replace,
        st.just(HOST),
        enabled=st.sampled_from([True, True, True, False]),
        claimed=st.integers(0, 8).map(lambda used: (float(used), 0.0, 0.0)),
    ),
    min_size=1,
    max_size=8,
).map(lambda found: [replace(r, id=f"h-{n}", name=f"n{n}") for n, r in enumerate(found)])
_groups = st.builds(
    Group,
    id=st.just(ID),
    policy=st.sampled_from([AFFINITY, ANTI_AFFINITY, SOFT_AFFINITY, SOFT_ANTI_AFFINITY]),
    most=st.integers(1, 3),
    # h-9 is not in the view: it has been deleted, or is not known yet.
    members=st.dictionaries(st.sampled_from(["h-0", "h-1", "h-2", "h-9"]), st.integers(1, 4)),
)


def allowed(group: Group, host_id: str) -> bool:
    """Tell what the rule says of one host, by its words."""
    if group.policy == AFFINITY:
        return {*group.members, host_id} == {host_id} or host_id in group.members
    return group.policy != ANTI_AFFINITY or group.members.get(host_id, 0) + 1 <= group.most


@settings(max_examples=200, deadline=None)
@given(_hosts, _groups, st.integers(0, 20), st.frozensets(st.sampled_from(["h-0", "h-1"])))
def test_candidates_are_those_that_the_rule_leaves(
    records: list[HostRecord], group: Group, turn: int, refused: frozenset[str]
) -> None:
    hosts, need = Hosts.of(records), Need(resources=ONE, excluded=refused)
    without = choose.choose(hosts, need, turn=turn, limit=99)
    found = choose.choose(hosts, replace(need, group=group), turn=turn, limit=99)
    assert set(found.candidates) == {id_ for id_ in without.candidates if allowed(group, id_)}
    assert all(group.admits(id_) == allowed(group, id_) for id_ in hosts.ids)
    if without.candidates:
        last = found.explanation.filters[-1]
        assert last.name == "server_group"
        assert last.left_count == len(found.candidates)
        assert bool(last.reason) == (not found.candidates)


@settings(max_examples=100, deadline=None)
@given(_hosts, _groups, st.integers(1, 20))
def test_a_burst_keeps_the_rule_and_gives_all_that_it_allows(
    records: list[HostRecord], group: Group, count: int
) -> None:
    hosts, before = Hosts.of(records), dict(group.members)
    fits, _ = choose.capacity(hosts, Need(resources=ONE, group=group))
    placed: Counter[str] = Counter()
    for turn in range(count):
        candidates = choose.choose(hosts, Need(resources=ONE, group=group), turn=turn).candidates
        if not candidates:
            break
        assert allowed(group, candidates[0])
        hosts.claim(candidates[0], ONE)
        group.add(candidates[0])
        placed[candidates[0]] += 1
    assert group.members == dict(Counter(before) + placed)
    if before or group.policy != AFFINITY:
        assert placed.total() == min(count, fits)
    room = {r.id: int(8 - r.claimed[0]) for r in records if r.enabled}
    if group.policy == AFFINITY and not before:
        assert len(placed) <= 1
    elif group.policy == AFFINITY:
        assert placed.total() == min(count, sum(room.get(id_, 0) for id_ in before))
    elif group.policy == ANTI_AFFINITY:
        free = {id_: max(group.most - before.get(id_, 0), 0) for id_ in room}
        assert placed.total() == min(count, sum(min(room[id_], free[id_]) for id_ in room))
    else:
        assert placed.total() == min(count, sum(room.values()))


@pytest.mark.parametrize(
    ("policy", "expected"), [(SOFT_AFFINITY, "h-0"), (SOFT_ANTI_AFFINITY, "h-2")]
)
def test_a_wish_goes_before_emptiness_and_not_before_soundness(policy: str, expected: str) -> None:
    group = Group(ID, policy, members={"h-0": 2, "h-1": 1})
    records = [
        replace(HOST, id="h-0", claimed=(6.0, 6.0, 0.0)),
        replace(HOST, id="h-1"),
        replace(HOST, id="h-2", claimed=(7.0, 7.0, 0.0)),
    ]
    need = Need(resources=ONE, group=group)
    assert choose.choose(Hosts.of(records), need).candidates[0] == expected
    broken = [replace(r, failure_count=3) if r.id == expected else r for r in records]
    assert choose.choose(Hosts.of(broken), need).candidates[0] != expected


def test_why_not_tells_the_rule_and_the_hosts() -> None:
    hosts = Hosts.of([replace(HOST, id=f"h-{n}", name=f"n{n}") for n in range(3)])

    def why(group: Group, **values: frozenset[str]) -> str:
        found = choose.choose(hosts, Need(resources=ONE, group=group, **values))  # type: ignore[arg-type]
        assert not found.candidates
        return found.explanation.filters[-1].reason

    full = Group(ID, ANTI_AFFINITY, 2, {"h-0": 2, "h-1": 3, "h-2": 2})
    assert why(full) == (
        "anti-affinity: 3 host(s) with room for it run 2 or more members of server group grp-1 each"
    )
    home = Group(ID, AFFINITY, members={"h-1": 1})
    assert why(home, excluded=frozenset({"h-1"})) == (
        "affinity: server group grp-1 runs on n1, which does not take it"
    )
    gone = Group(ID, AFFINITY, members={"h-9": 1})
    assert why(gone) == (
        "affinity: server group grp-1 runs on a host that is gone, which does not take it"
    )


@pytest.mark.parametrize(
    ("group", "expected"),
    [
        (Group(ID, AFFINITY), []),
        (Group(ID, AFFINITY, members={"h-1": 5}), []),
        (Group(ID, AFFINITY, members={"h-1": 1, "h-2": 5, "h-3": 1}), ["h-1", "h-3"]),
        (Group(ID, ANTI_AFFINITY, 2, {"h-1": 2, "h-2": 1}), []),
        (Group(ID, ANTI_AFFINITY, 1, {"h-1": 2, "h-2": 1}), ["h-1"]),
        (Group(ID, SOFT_AFFINITY, members={"h-1": 1, "h-2": 1}), []),
        (Group(ID, SOFT_ANTI_AFFINITY, members={"h-1": 9}), []),
    ],
)
def test_members_that_are_where_they_must_not_be(group: Group, expected: list[str]) -> None:
    assert group.misplaced() == expected
