"""Chance of simulated hosts: the same at each run, another for each host and event."""

from __future__ import annotations

import math

import pytest

from mcloud_agents.simulate.draws import Draws


def test_a_seed_draws_the_same_again() -> None:
    first, again = Draws(1, 7), Draws(1, 7)
    assert [first.number("crash") for _ in range(9)] == [again.number("crash") for _ in range(9)]


def test_other_events_do_not_change_a_draw() -> None:
    alone, among = Draws(1, 7), Draws(1, 7)
    drawn = []
    for _ in range(9):
        among.number("latency 10")
        drawn.append(among.number("crash"))
    assert drawn == [alone.number("crash") for _ in range(9)]


def test_hosts_and_seeds_differ() -> None:
    drawn = {Draws(seed, host).number("crash") for seed in range(10) for host in range(10)}
    assert len(drawn) == 100


def test_what_happens_so_often_does() -> None:
    draws = Draws(1, 1)
    waits = [draws.wait_s("crash", 60) for _ in range(5000)]
    assert sum(waits) / len(waits) == pytest.approx(60, rel=0.05)
    assert sum(draws.happens("refusal", 0.25) for _ in range(5000)) == pytest.approx(1250, rel=0.1)
    assert all(3 <= draws.between("latency", 3, 5) < 5 for _ in range(100))
    assert draws.wait_s("crash", 0) == math.inf
