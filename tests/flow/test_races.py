"""Two processes race for what only one of them may have: on SQLite and on PostgreSQL.

Claim, rules of server groups, quota, request id, revision order, an operation's lease, an
instance's exclusive operation.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fixtures_postgresql import postgresql_server, postgresql_url  # noqa: F401
from flow.race_worker import PROJECT
from mcloud.compute.v1 import flavor_pb2
from mcloud_base import ids
from mcloud_controlplane.compute import model
from mcloud_controlplane.core import database
from mcloud_controlplane.core.database import Database
from mcloud_controlplane.scheduler import server_group_store
from service.compute import server_groups

_DEADLINE_S = 120
_TESTS = Path(__file__).parents[1]


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite://{tmp_path}/compute.db"
    return str(request.getfixturevalue("postgresql_url")).replace("{name}", "compute")


@pytest.fixture
def opened(url: str) -> Iterator[Database]:
    made = model.open_database(url)
    yield made
    made.close()


class Racer:
    """A process of flow/race_worker.py."""

    def __init__(self, scenario: str, url: str, **arguments: Any) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "flow.race_worker", scenario, url, json.dumps(arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(_TESTS), *sys.path])},
        )

    def expect(self, word: str) -> None:
        assert self._line() == word

    def tell(self, word: str) -> None:
        assert self._process.stdin
        self._process.stdin.write(word + "\n")
        self._process.stdin.flush()

    def result(self) -> dict[str, Any]:
        found = json.loads(self._line())
        assert self._process.wait(timeout=_DEADLINE_S) == 0
        self._close()
        return dict(found)

    def end(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
            self._close()

    def _line(self) -> str:
        assert self._process.stdout
        return self._process.stdout.readline().strip()

    def _close(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe
            pipe.close()


def race(*racers: Racer) -> list[dict[str, Any]]:
    """Start them together; return what each tells."""
    try:
        for racer in racers:
            racer.expect("ready")
        for racer in racers:
            racer.tell("go")
        return [racer.result() for racer in racers]
    finally:
        for racer in racers:
            racer.end()


def make_flavor() -> str:
    moment = database.now()
    spec = flavor_pb2.FlavorSpec(vcpu_count=1, memory_mib=64, disk_gib=1)
    row = model.Flavor.create(
        id=ids.new("flv"), name="m1.race", create_time=moment, update_time=moment,
        spec=spec.SerializeToString(),
    )  # fmt: skip
    return str(row.id)


def make_instances(count: int) -> list[str]:
    """Record running instances, each with a domain."""
    moment, made = database.now(), []
    for number in range(count):
        id_, domain_id = ids.new("i"), ids.new("d")
        model.Instance.create(
            id=id_, name=f"a{number}", project_id=PROJECT, create_time=moment, update_time=moment,
            state="ACTIVE", flavor_id="", flavor_name="", image_id="", vcpu_count=1, memory_mib=64,
            disk_gib=1, hostname="a", domain_id=domain_id, host_id="h-1",
        )  # fmt: skip
        model.Domain.create(
            id=domain_id, instance_id=id_, project_id=PROJECT, host_id="h-1", generation=1,
            create_time=moment,
        )  # fmt: skip
        made.append(id_)
    return made


def make_hosts(names: str) -> None:
    moment = database.now()
    for name in names:
        model.Host.create(
            id=ids.new("h"), name=name, create_time=moment, update_time=moment,
            report_time=moment, vcpu_count=20, memory_mib=1 << 20, disk_gib=1 << 10,
            cpu_allocation_ratio=1.0,
        )  # fmt: skip


def test_claims_fill_hosts_exactly(opened: Database, url: str) -> None:
    opened.write_now(make_hosts, "abc")
    results = race(Racer("claim", url, count=200), Racer("claim", url, count=200))
    found = Counter(outcome for result in results for outcome in result["outcomes"])
    refused = found.pop("NO_VALID_HOST")
    print(f"claims: {refused + found.total()} tried, 60 room, {found.total()} granted")  # noqa: T201
    assert sorted(found.values()) == [20, 20, 20]
    assert refused == 340
    rows = opened.read_now(lambda: Counter(row.host_id for row in model.Claim.select()))
    assert rows == found


def test_a_claim_that_fits_is_granted(opened: Database, url: str) -> None:
    opened.write_now(make_hosts, "a")
    results = race(Racer("claim", url, count=10), Racer("claim", url, count=10))
    found = Counter(outcome for result in results for outcome in result["outcomes"])
    print(f"claims: 20 tried, 20 room on one host, {max(found.values())} granted")  # noqa: T201
    assert "NO_VALID_HOST" not in found
    assert list(found.values()) == [20]


def test_batches_with_requests_of_every_kind_fill_hosts_exactly(opened: Database, url: str) -> None:
    def prepare() -> tuple[str, list[str]]:
        make_hosts("abc")
        retired, moment = [ids.new("d") for _ in range(10)], database.now()
        for id_ in retired:
            model.Domain.create(
                id=id_, instance_id=ids.new("i"), project_id=PROJECT, host_id="", generation=1,
                absent=True, create_time=moment, absent_time=moment,
            )  # fmt: skip
        return _record_operation(), retired

    operation_id, retired = opened.write_now(prepare)
    number = opened.read_now(lambda: model.shared.operation.get_by_id(operation_id).lease_number)
    shared = [{"domain_id": ids.new("d"), "instance_id": ids.new("i")} for _ in range(20)]
    stale = [{"operation_id": operation_id, "lease_number": number + 5} for _ in range(10)]
    removed = [{"domain_id": id_} for id_ in retired]
    owned = [{"operation_id": operation_id, "lease_number": number} for _ in range(100)]
    requests = [*stale, *removed, *shared, *shared, *owned]
    results = race(*(Racer("claim_together", url, requests=requests) for _ in range(2)))

    first, second = (result["outcomes"] for result in results)
    full = {"NO_VALID_HOST"}
    assert {*first[:10], *second[:10]} - full == {"STALE_LEASE"}
    assert {*first[10:20], *second[10:20]} - full == {"ID_RETIRED"}
    assert first[20:40] == first[40:60] == second[20:40] == second[40:60]
    granted = Counter(first[20:40] + first[60:] + second[60:])
    refused = granted.pop("NO_VALID_HOST")
    print(f"claims: {refused + granted.total()} tried, 60 room, {granted.total()} granted")  # noqa: T201
    assert sorted(granted.values()) == [20, 20, 20]
    rows = opened.read_now(lambda: Counter(row.host_id for row in model.Claim.select()))
    assert rows == granted


@pytest.mark.parametrize(
    ("policy", "most", "hosts", "granted"),
    [("ANTI_AFFINITY", 1, 12, 12), ("ANTI_AFFINITY", 3, 5, 15), ("AFFINITY", 1, 5, 20)],
)
def test_schedulers_keep_the_rules_of_server_groups(
    opened: Database, url: str, policy: str, most: int, hosts: int, granted: int
) -> None:
    def prepare() -> list[str]:
        make_hosts("abcdefghijkl"[:hosts])
        return [server_groups.insert(PROJECT, policy, most) for _ in range(3)]

    group_ids = opened.write_now(prepare)
    # Each of the three is asked for more than its rule allows, by both, among each other.
    requests = [{"server_group_id": id_} for _ in range(granted) for id_ in group_ids]
    results = race(*(Racer("claim_together", url, requests=requests) for _ in range(2)))
    found = Counter(outcome for result in results for outcome in result["outcomes"])
    refused = found.pop("NO_VALID_HOST")
    print(f"{policy}: {refused + found.total()} tried, {found.total()} granted")  # noqa: T201
    groups = opened.read_now(server_group_store.load, opened, group_ids)
    for group in groups.values():
        assert not group.misplaced()
        if policy == "AFFINITY":
            assert 0 < sum(group.members.values()) <= 20
        else:
            assert sum(group.members.values()) == granted
    assert sum(sum(group.members.values()) for group in groups.values()) == found.total()


def test_a_server_group_with_members_is_not_deleted(opened: Database, url: str) -> None:
    def prepare() -> tuple[str, list[str]]:
        model.Quota.create(project_id=PROJECT, instance_count=-1, vcpu_count=-1, memory_mib=-1)
        return make_flavor(), [server_groups.insert(PROJECT, "AFFINITY", 1) for _ in range(40)]

    flavor_id, group_ids = opened.write_now(prepare)
    joined, deleted = race(
        Racer("create", url, count=40, flavor_id=flavor_id, server_group_ids=group_ids),
        Racer("delete_server_groups", url, server_group_ids=group_ids[::-1]),
    )
    found = list(zip(joined["outcomes"], deleted["outcomes"][::-1], strict=True))
    for join, delete in found:
        assert join.startswith("cop-") != delete.startswith("cop-"), (join, delete)
        assert {join, delete} & {"SERVER_GROUP_NOT_FOUND", "SERVER_GROUP_IN_USE"}
    left = opened.read_now(lambda: {row.id for row in model.ServerGroup.select()})
    members = opened.read_now(lambda: {row.server_group_id for row in model.Instance.select()})
    print(f"server groups: 40, {len(left)} joined, {40 - len(left)} deleted")  # noqa: T201
    assert members == left


def test_a_quota_is_used_up_exactly(opened: Database, url: str) -> None:
    def prepare() -> str:
        model.Quota.create(project_id=PROJECT, instance_count=20)
        return make_flavor()

    flavor_id = opened.write_now(prepare)
    racers = [Racer("create", url, count=60, flavor_id=flavor_id) for _ in range(2)]
    found = [outcome for result in race(*racers) for outcome in result["outcomes"]]
    granted = [outcome for outcome in found if outcome.startswith("cop-")]
    print(f"quota: {len(found)} tried, 20 allowed, {len(granted)} granted")  # noqa: T201
    assert len(granted) == 20
    assert Counter(found)["QUOTA_EXCEEDED"] == 100
    assert opened.read_now(lambda: model.Instance.select().count()) == 20


def test_a_request_id_makes_one_operation(opened: Database, url: str) -> None:
    def prepare() -> str:
        model.Quota.create(project_id=PROJECT, instance_count=-1)
        return make_flavor()

    flavor_id = opened.write_now(prepare)
    arguments = {
        "flavor_id": flavor_id,
        "image_id": ids.new("img"),
        "request_ids": [ids.request_id() for _ in range(50)],
    }
    first, second = race(Racer("create", url, **arguments), Racer("create", url, **arguments))
    made = opened.read_now(lambda: {row.id for row in model.shared.operation.select()})
    print(f"request ids: 100 sent, 50 different, {len(made)} operations")  # noqa: T201
    assert first == second
    assert set(first["outcomes"]) == made
    assert len(made) == 50
    assert opened.read_now(lambda: model.Instance.select().count()) == 50


def test_watchers_see_every_change_in_the_order_of_commits(opened: Database, url: str) -> None:
    revision = str(opened.read_now(model.shared.revision))
    arguments = {"revision": revision, "count": 150, "expected": 300}
    results = race(*(Racer("write_and_watch", url, **arguments) for _ in range(2)))
    made = {id_ for result in results for id_ in result["made"]}
    assert len(made) == 300
    for result in results:
        revisions = [number for number, _ in result["seen"]]
        seen = [id_ for _, id_ in result["seen"]]
        print(f"changes: 300 written by two, {len(set(seen))} seen, {len(seen)} sent")  # noqa: T201
        assert revisions == sorted(revisions)
        assert len(seen) == 300
        assert set(seen) == made
    assert results[0]["seen"] == results[1]["seen"]


def test_an_operation_is_run_by_one_runner(opened: Database, url: str) -> None:
    made = [opened.write_now(_record_operation) for _ in range(80)]
    results = race(Racer("run_workflows", url), Racer("run_workflows", url))
    ran = Counter(id_ for result in results for id_, _ in result["ran"])
    shares = [len(result["ran"]) for result in results]
    print(f"operations: 80 to run, {ran.total()} steps ran, {shares} by each")  # noqa: T201
    assert set(ran) == set(made)
    assert set(ran.values()) == {1}


def test_a_runner_that_was_overtaken_saves_nothing(opened: Database, url: str) -> None:
    id_ = opened.write_now(_record_operation)
    table = model.shared.operation
    slow, quick = Racer("stall", url), Racer("run_workflows", url)
    try:
        for racer in (slow, quick):
            racer.expect("ready")
        slow.tell("go")
        slow.expect("holding")

        def expire() -> int:
            table.update(lease_expire_time=0).where(table.id == id_).execute()
            return int(table.get_by_id(id_).lease_number)

        number = opened.write_now(expire)
        quick.tell("go")
        taken = quick.result()
        ended = opened.read_now(lambda: table.get_by_id(id_))
        slow.tell("go on")
        late = slow.result()
    finally:
        slow.end()
        quick.end()
    after = opened.read_now(lambda: table.get_by_id(id_))
    print(f"lease: {number} stalled, {after.lease_number} took over")  # noqa: T201
    assert taken["ran"] == [[id_, ended.lease_number]]
    assert late == {"number": number, "effect": "STALE_LEASE", "done": False}
    assert number < ended.lease_number
    assert ended.state == "SUCCEEDED"
    assert after.__data__ == ended.__data__


def test_an_instance_has_one_operation_at_a_time(opened: Database, url: str) -> None:
    made = opened.write_now(make_instances, 50)
    results = race(*(Racer("stop", url, instance_ids=made) for _ in range(2)))
    found = Counter(
        "begun" if outcome.startswith("cop-") else outcome
        for result in results
        for outcome in result["outcomes"]
    )
    print(f"exclusive operations: 100 asked, 50 instances, {dict(found)}")  # noqa: T201
    assert found == {"begun": 50, "OPERATION_IN_PROGRESS": 50}
    table = model.shared.operation
    running = opened.read_now(lambda: {row.resource_id for row in table.select()})
    assert running == set(made)


def test_a_users_change_overwrites_nothing_of_a_workflow(opened: Database, url: str) -> None:
    made = opened.write_now(make_instances, 4)
    results = race(
        Racer("label", url, instance_ids=made, rounds=25),
        Racer("settle", url, instance_ids=made, rounds=25),
    )
    assert all(outcome.startswith("cop-") for outcome in results[0]["outcomes"])
    rows = opened.read_now(lambda: list(model.Instance.select()))
    print(f"changes of one row: 25 and 25 each, versions {[r.version for r in rows]}")  # noqa: T201
    assert {row.boot_number for row in rows} == {26}
    assert {row.version for row in rows} == {51}


def _record_operation() -> str:
    moment = database.now()
    row = model.shared.operation(
        id=ids.new("cop"), project_id=PROJECT, method="race", principal_id="u-race",
        request_id=ids.request_id(), state="RUNNING", workflow="race", create_time=moment,
    )  # fmt: skip
    row.save(force_insert=True)
    return str(row.id)
