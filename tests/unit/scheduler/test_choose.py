"""The decision: what is refused and why, what is preferred, and what the explanation says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mcloud_controlplane.scheduler import choose
from mcloud_controlplane.scheduler.filters import FILTERS, all_just_fell_silent
from mcloud_controlplane.scheduler.hosts import HostRecord, Hosts, Need

NOW = 1_000_000_000_000
HOST = HostRecord(
    id="h-1", name="one", enabled=True, zone="a", arch="x86_64", limit=(16.0, 32_768.0, 100.0),
    claimed=(0.0, 0.0, 0.0), instance_count=0, failure_count=0, report_time=NOW,
)  # fmt: skip
NEED = Need(resources=(2.0, 2048.0, 10.0), now=NOW)


def decide(*records: HostRecord, need: Need = NEED, **options: int) -> choose.Choice:
    return choose.choose(Hosts.of(records), need, **options)


@pytest.mark.parametrize(
    ("host", "need", "by", "reason"),
    [
        (replace(HOST, report_time=NOW - 31_000_000), NEED, "alive", "no host has reported lately"),
        (replace(HOST, enabled=False), NEED, "enabled", "every host is disabled"),
        (HOST, replace(NEED, host_id="h-2"), "target", "host h-2 is not among them"),
        (
            HOST,
            replace(NEED, excluded=frozenset({"h-1"})),
            "excluded",
            "every host has refused the instance",
        ),
        (HOST, replace(NEED, zone="b"), "zone", "no host is in zone b"),
        (
            replace(HOST, zone="z" * 255),
            replace(NEED, zone="z" * 254),
            "zone",
            f"no host is in zone {'z' * 254}",
        ),
        (HOST, replace(NEED, arch="aarch64"), "arch", "no host runs aarch64"),
        (
            HOST,
            replace(NEED, resources=(17.0, 1.0, 1.0)),
            "vcpu",
            "no host has 17 vcpus free (largest: 16)",
        ),
        (
            replace(HOST, claimed=(0.0, 30_721.0, 0.0)),
            NEED,
            "memory",
            "no host has 2048 MiB of memory free (largest: 2047)",
        ),
        (
            replace(HOST, claimed=(0.0, 0.0, 120.0)),
            NEED,
            "disk",
            "no host has 10 GiB of disk free (largest: 0)",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and value.isalpha() else "",
)
def test_the_filter_that_removes_the_last_host_says_why(
    host: HostRecord, need: Need, by: str, reason: str
) -> None:
    found = decide(host, need=need)
    assert found.candidates == []
    last = found.explanation.filters[-1]
    assert (last.name, last.reason, last.removed_count, last.left_count) == (by, reason, 1, 0)
    assert all(not item.reason for item in found.explanation.filters[:-1])


@pytest.mark.parametrize(
    ("host", "need"),
    [
        (replace(HOST, report_time=NOW - 30_000_000), NEED),
        (HOST, replace(NEED, host_id="h-1")),
        (replace(HOST, zone="z" * 255), replace(NEED, zone="z" * 255)),
        (HOST, replace(NEED, arch="x86_64")),
        (HOST, replace(NEED, resources=HOST.limit)),
        (HOST, replace(NEED, excluded=frozenset({"h-unknown"}))),
    ],
)
def test_what_is_just_enough_passes(host: HostRecord, need: Need) -> None:
    assert decide(host, need=need).candidates == ["h-1"]


def test_without_hosts_nothing_is_considered() -> None:
    found = decide()
    assert found.candidates == []
    assert found.explanation.considered_count == 0
    assert [item.name for item in found.explanation.filters] == ["alive"]


@pytest.mark.parametrize(
    "worse",
    [
        replace(HOST, id="h-2", claimed=(0.0, 16_384.0, 0.0)),
        replace(HOST, id="h-2", claimed=(8.0, 0.0, 0.0)),
        # A refusal counts for more than any emptiness.
        replace(HOST, id="h-2", failure_count=1),
    ],
)
def test_the_emptier_and_the_one_that_did_not_refuse_is_preferred(worse: HostRecord) -> None:
    for turn in range(4):
        assert decide(worse, HOST, turn=turn).candidates == ["h-1", "h-2"]


def test_a_host_that_refused_is_still_better_than_none() -> None:
    full = replace(HOST, id="h-2", claimed=(15.0, 0.0, 0.0))
    assert decide(replace(HOST, failure_count=50), full).candidates == ["h-1"]


# -- properties ------------------------------------------------------------------------------------

_limits = st.tuples(*[st.integers(0, 64).map(float)] * 3)
_records = st.lists(
    st.builds(
        HostRecord,
        id=st.just(""),
        name=st.just(""),
        enabled=st.booleans(),
        zone=st.sampled_from(["", "a", "b"]),
        arch=st.sampled_from(["x86_64", "aarch64"]),
        limit=_limits,
        claimed=_limits,
        instance_count=st.integers(0, 9),
        failure_count=st.integers(0, 20),
        report_time=st.sampled_from([NOW, NOW - 29_000_000, NOW - 31_000_000]),
    ),
    max_size=12,
).map(lambda found: [replace(r, id=f"h-{n}", name=f"n{n}") for n, r in enumerate(found)])
_needs = st.builds(
    Need,
    resources=st.tuples(*[st.integers(0, 32).map(float)] * 3),
    host_id=st.sampled_from(["", "", "", "h-0", "h-99"]),
    zone=st.sampled_from(["", "", "a", "c"]),
    arch=st.sampled_from(["", "x86_64"]),
    excluded=st.frozensets(st.sampled_from(["h-0", "h-1", "h-77"])),
    now=st.just(NOW),
)


@settings(max_examples=100, deadline=None)
@given(_records, _needs, st.integers(0, 1000))
def test_candidates_pass_every_filter_and_the_counts_add_up(
    records: list[HostRecord], need: Need, turn: int
) -> None:
    hosts = Hosts.of(records)
    found = choose.choose(hosts, need, turn=turn, limit=32)
    passing = np.ones(len(hosts), np.bool_)
    for rule in FILTERS:
        mask = rule.mask(hosts, need)
        passing &= True if mask is None else mask
    assert set(found.candidates) == {records[place].id for place in np.flatnonzero(passing)}
    assert len(found.candidates) == len(set(found.candidates))
    left = found.explanation.considered_count
    assert left == len(records)
    for item in found.explanation.filters:
        left -= item.removed_count
        assert item.left_count == left
        assert bool(item.reason) == bool(item.removed_count and not left)
    assert left == len(found.candidates)
    top = [item.host_id for item in found.explanation.top_hosts]
    assert top == found.candidates[: len(top)]
    scores = [item.score for item in found.explanation.top_hosts]
    assert scores == sorted(scores, reverse=True)


@settings(max_examples=100, deadline=None)
@given(_records, st.integers(0, 30), st.integers(1, 12))
def test_the_best_are_those_that_sorting_all_would_find(
    records: list[HostRecord], turn: int, limit: int
) -> None:
    need = replace(NEED, resources=(1.0, 1.0, 1.0))
    everyone = choose.choose(Hosts.of(records), need, turn=turn, limit=12)
    scores = {host.host_id: round(host.score, 9) for host in everyone.explanation.top_hosts}
    some = choose.choose(Hosts.of(records), need, turn=turn, limit=limit).candidates
    assert some == everyone.candidates[:limit]
    places = {record.id: number for number, record in enumerate(records)}
    known = [id_ for id_ in everyone.candidates if id_ in scores]
    assert known == sorted(
        known, key=lambda id_: (-scores[id_], (places[id_] - turn) % len(records))
    )


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 8), st.integers(1, 5), st.integers(0, 100))
def test_equal_hosts_are_filled_evenly_in_a_burst(count: int, each: int, first: int) -> None:
    records = [replace(HOST, id=f"h-{n}") for n in range(count)]
    hosts = Hosts.of(records)
    need = replace(NEED, resources=(1.0, 1.0, 1.0))
    for turn in range(count * each):
        hosts.claim(choose.choose(hosts, need, turn=first + turn).candidates[0], need.resources)
    assert set(hosts.claimed[0]) == {each}


def test_a_burst_is_spread_even_before_the_claims_are_seen() -> None:
    hosts = Hosts.of([replace(HOST, id=f"h-{n}") for n in range(8)])
    first = {choose.choose(hosts, NEED, turn=turn).candidates[0] for turn in range(8)}
    assert len(first) == 8


@settings(max_examples=60, deadline=None)
@given(_records, _needs)
def test_capacity_is_what_repeated_claims_are_granted(
    records: list[HostRecord], need: Need
) -> None:
    need = replace(need, resources=(max(need.resources[0], 1.0), *need.resources[1:]))
    hosts = Hosts.of(records)
    count, host_count = choose.capacity(hosts, need)
    used, granted = set(), 0
    while found := choose.choose(hosts, need, turn=granted).candidates:
        used.add(found[0])
        hosts.claim(found[0], need.resources)
        granted += 1
    assert (count, host_count) == (granted, len(used))


@settings(max_examples=60, deadline=None)
@given(_records, _needs)
def test_what_a_choice_counted_on_can_be_given_back(records: list[HostRecord], need: Need) -> None:
    hosts, like = Hosts.of(records), Hosts.of(records)
    for record in records:
        hosts.claim(record.id, need.resources)
    for record in records:
        hosts.give_back(record.id, need.resources)
    for name in ("claimed", "free", "free_share"):
        assert np.array_equal(getattr(hosts, name), getattr(like, name))


@settings(max_examples=60, deadline=None)
@given(_records, st.lists(st.tuples(st.integers(0, 14), st.booleans(), _limits), max_size=6))
def test_a_view_that_was_updated_is_as_one_that_was_made(
    records: list[HostRecord], changes: list[tuple[int, bool, tuple[float, float, float]]]
) -> None:
    known = {record.id: record for record in records}
    hosts = Hosts.of(records)
    for number, gone, claimed in changes:
        id_ = f"h-{number}"
        record = None if gone else replace(known.get(id_, HOST), id=id_, claimed=claimed)
        hosts = hosts.update({id_: record})
        if record is None:
            known.pop(id_, None)
        else:
            known[id_] = record
        seen = {each: hosts.record(place) for each, place in hosts.index.items()}
        assert seen == known
        assert len(hosts) == len(hosts.ids) == len(known)


def test_ten_thousand_hosts() -> None:
    records = [
        replace(HOST, id=f"h-{n}", zone=f"z{n % 10}", claimed=(n % 16, n % 32_768, n % 100))
        for n in range(10_000)
    ]
    hosts = Hosts.of(records)
    found = choose.choose(hosts, replace(NEED, zone="z3"), turn=7, limit=32)
    assert len(found.candidates) == 32
    assert all(int(id_[2:]) % 10 == 3 for id_ in found.candidates)
    assert found.explanation.considered_count == 10_000
    assert choose.capacity(hosts, NEED)[0] > 10_000


@pytest.mark.parametrize(
    ("ages_s", "expected"),
    [([], False), ([31], True), ([31, 600], True), ([31, 1], False), ([121], False)],
)
def test_hosts_that_have_just_fallen_silent_are_told_from_none(
    ages_s: list[int], expected: bool
) -> None:
    records = [
        replace(HOST, id=f"h-{number}", report_time=NOW - age * 1_000_000)
        for number, age in enumerate(ages_s)
    ]
    assert all_just_fell_silent(Hosts.of(records), NEED) is expected
