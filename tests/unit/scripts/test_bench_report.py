"""What scripts/bench says of its figures: targets, ratios, the law of a curve, JSON."""

from __future__ import annotations

import json

import pytest
from benchmarks import ALL, report
from benchmarks.report import Curve, Machine, Report
from benchmarks.targets import TARGETS

MACHINE = Machine("cpu", 2, 1024, "6.1", "3.11", (0.1, 0.2, 0.3))


def test_a_figure_is_the_median_beside_that_of_its_yardstick() -> None:
    made = report.figure("boot_bare", [3, 1, 2, 100], "s", yardstick=[1, 1, 4])
    assert (made.value, made.yardstick, made.ratio) == (2.5, 1, 2.5)
    assert made.spread == 25.5  # between the quartiles
    assert (made.target, made.met) == (None, None)


@pytest.mark.parametrize(
    ("name", "value", "yardstick", "met"),
    [
        ("create_accepted_p50", 6, (), True),
        ("create_accepted_p50", 6.1, (), False),
        ("storm_rate", 60, (), True),
        ("storm_rate", 59, (), False),
        ("get_rate", 40, (100,), True),
        ("get_rate", 39, (100,), False),
        ("get_rate", 1e9, (), False),  # of nothing it is no part
    ],
)
def test_a_target_is_met_at_its_bound(
    name: str, value: float, yardstick: tuple[float, ...], met: bool
) -> None:
    assert report.figure(name, [value], "", yardstick=yardstick).met is met


def test_a_target_is_missed_where_what_it_takes_for_granted_does_not_hold() -> None:
    assert report.figure("storm_rate", [100], "/s", holds=False).met is False


def test_small_sizes_meet_and_miss_no_target() -> None:
    quick = Report(MACHINE, quick=True)
    (added,) = quick.add([report.figure("storm_rate", [100], "/s")], "sqlite")
    assert (added.met, added.target) == (None, ">= 60")
    assert "MISSED" not in quick.table([added])


def test_json_has_every_key_of_every_figure() -> None:
    made = Report(MACHINE)
    made.add([report.figure("get_rate", [30, 40], "/s", yardstick=[100])], "postgresql")
    made.curves.append(Curve("list_p50", "ms", "instances", [(10, 1), (100, 10)]))
    content = json.loads(made.json())
    assert content["machine"]["cores"] == 2
    assert content["figures"] == [
        {
            "name": "get_rate",
            "value": 35,
            "unit": "/s",
            "spread": 5,
            "yardstick": 100,
            "ratio": 0.35,
            "target": "ratio >= 0.4",
            "met": False,
            "database": "postgresql",
        }
    ]
    assert content["growth"][0]["exponent"] == 1


@pytest.mark.parametrize(("power", "exponent"), [(0, 0), (1, 1), (2, 2), (0.5, 0.5)])
def test_a_curve_finds_the_law_it_follows(power: float, exponent: float) -> None:
    points = [(size, 3 * size**power) for size in (10, 100, 1_000, 10_000)]
    assert Curve("x", "ms", "hosts", points).exponent == exponent


def test_a_percentile_of_few_samples_is_among_them() -> None:
    assert report.percentile([5], 99) == 5
    assert 3.9 < report.percentile([1, 2, 3, 4], 99) <= 4


def test_every_target_is_of_a_figure_that_a_benchmark_names() -> None:
    named = {figure for benchmark in ALL.values() for figure in benchmark.figures}
    assert set(TARGETS) <= named
