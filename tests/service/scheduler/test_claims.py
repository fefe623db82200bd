"""Many claims in one transaction, each with an outcome of its own: SQLite and PostgreSQL."""

from __future__ import annotations

from typing import Any

from mcloud.scheduler.v1 import placement_pb2, placement_service_pb2
from mcloud_base import errors, ids
from mcloud_controlplane.compute import model
from mcloud_controlplane.core import database
from mcloud_controlplane.core.database import Database
from mcloud_controlplane.scheduler import claims, server_group_store, store
from mcloud_controlplane.scheduler.claims import Wish
from mcloud_controlplane.settings import Settings
from service.compute import server_groups
from service.compute.tables import counted

PROJECT = "p-claims"
SETTINGS = Settings.model_validate({})


def make_host(vcpus: int, *, disabled: bool = False) -> str:
    moment, id_ = database.now(), ids.new("h")
    model.Host.create(
        id=id_, name=id_, create_time=moment, update_time=moment, report_time=moment,
        vcpu_count=vcpus, memory_mib=1 << 20, disk_gib=1 << 10, cpu_allocation_ratio=1.0,
        disabled=disabled,
    )  # fmt: skip
    return id_


def make_instance() -> str:
    moment, id_ = database.now(), ids.new("i")
    model.Instance.create(
        id=id_, name=id_, project_id=PROJECT, create_time=moment, update_time=moment,
        state="BUILD", flavor_id="", flavor_name="", image_id="", vcpu_count=1, memory_mib=64,
        disk_gib=1, hostname="a",
    )  # fmt: skip
    return id_


def make_operation(lease_number: int) -> str:
    id_ = ids.new("cop")
    model.shared.operation.create(
        id=id_, project_id=PROJECT, method="test", principal_id="u", request_id=ids.request_id(),
        state="RUNNING", create_time=database.now(), lease_number=lease_number,
    )  # fmt: skip
    return id_


def wish(host_id: str, **values: Any) -> Wish:
    request = placement_service_pb2.SelectDestinationsRequest(
        **{"domain_id": ids.new("d"), "instance_id": make_instance(), "project_id": PROJECT}
        | values,
        resources=placement_pb2.Resources(vcpu_count=1, memory_mib=64, disk_gib=1),
    )
    return Wish(request, host_id, placement_pb2.PlacementExplanation())


def kind(outcome: claims.Outcome) -> str:
    if isinstance(outcome, errors.Error):
        return outcome.reason
    return _KINDS[outcome] if isinstance(outcome, str) else "claimed"


_KINDS = {claims.TAKEN: "taken", claims.RULE_BROKEN: "rule"}


def test_each_of_a_batch_has_an_outcome_of_its_own(opened: Database) -> None:
    def prepare() -> tuple[list[Wish], list[str]]:
        large, small, off = make_host(40), make_host(2), make_host(40, disabled=True)
        operation_id = make_operation(lease_number=7)
        owned = {"operation_id": operation_id, "lease_number": 7}
        removed = wish("h-none")
        model.Domain.create(
            id=removed.request.domain_id, instance_id=removed.request.instance_id,
            project_id=PROJECT, host_id="", generation=1, absent=True, create_time=database.now(),
        )  # fmt: skip
        made = [
            *(wish(large, **owned) for _ in range(25)),
            *(wish(small) for _ in range(3)),
            wish(large, operation_id=operation_id, lease_number=6),
            Wish(removed.request, large, removed.explanation),
            wish(off),
            wish("h-gone"),
        ]
        return made, [large, small, off]

    wishes, host_ids = opened.write_now(prepare)
    expected = ["claimed"] * 27 + ["taken", "STALE_LEASE", "ID_RETIRED", "taken", "taken"]

    found = opened.write_now(claims.claim, opened, SETTINGS, wishes)
    assert [kind(each) for each in found.outcomes] == expected
    recorded = opened.read_now(store.load_hosts, SETTINGS, host_ids)
    assert found.hosts == recorded, "the view takes over what the transaction has written"
    assert [recorded[id_].claimed[0] for id_ in host_ids if recorded[id_]] == [25, 2, 0]  # type: ignore[union-attr]

    def check() -> None:
        for each, outcome in zip(wishes, found.outcomes, strict=True):
            instance = model.Instance.get_by_id(each.request.instance_id)
            placements = list(
                model.Placement.select().where(model.Placement.domain_id == each.request.domain_id)
            )
            if kind(outcome) == "claimed":
                domain = model.Domain.get_by_id(each.request.domain_id)
                assert (instance.host_id, instance.domain_id) == (each.host_id, domain.id)
                assert (domain.host_id, domain.generation, instance.version) == (each.host_id, 1, 2)
                stored = placement_pb2.PlacementExplanation.FromString(placements[0].explanation)
                assert (stored.chosen_host_id, stored.attempt) == (each.host_id, 1)
            else:
                assert (instance.host_id, instance.version, placements) == ("", 1, [])
        changed = {(row.type, row.resource_id) for row in model.shared.change.select()}
        # A domain and an instance each; the hosts, which also are woken.
        assert len(changed) == 2 * 27 + 2 * 2

    opened.read_now(check)
    again = opened.write_now(claims.claim, opened, SETTINGS, wishes)
    assert [kind(each) for each in again.outcomes] == expected
    assert again.outcomes[:27] == found.outcomes[:27], "a repeat finds what there is"
    assert again.hosts[host_ids[1]] == found.hosts[host_ids[1]]


def test_an_attempt_is_recorded_under_the_next_number(opened: Database) -> None:
    def attempt(each: Wish) -> list[int]:
        claims.record_placements(opened, [(each.request, each.explanation)])
        query = model.Placement.select().where(model.Placement.domain_id == each.request.domain_id)
        return sorted(row.attempt for row in query)

    first = opened.write_now(wish, "h-1")
    assert opened.write_now(attempt, first) == [1]
    assert opened.write_now(attempt, first) == [1, 2]


def test_rules_of_server_groups_are_decided_by_the_claim(opened: Database) -> None:
    def prepare() -> list[Wish]:
        a, b, small = make_host(40), make_host(40), make_host(1)
        together, apart, pairs, soft = (
            server_groups.insert(PROJECT, "AFFINITY"),
            server_groups.insert(PROJECT, "ANTI_AFFINITY"),
            server_groups.insert(PROJECT, "ANTI_AFFINITY", 2),
            server_groups.insert(PROJECT, "SOFT_ANTI_AFFINITY"),
        )
        return [
            wish(small),
            wish(small, server_group_id=together),  # no room: it is the next one who is the first
            *(wish(each, server_group_id=together) for each in (a, b, a)),
            *(wish(each, server_group_id=apart) for each in (a, a, b)),
            *(wish(each, server_group_id=pairs) for each in (a, a, a, b)),
            *(wish(a, server_group_id=soft) for _ in range(2)),
        ]

    wishes = opened.write_now(prepare)
    expected = [
        "claimed", "taken",
        "claimed", "rule", "claimed",
        "claimed", "rule", "claimed",
        "claimed", "claimed", "rule", "claimed",
        "claimed", "claimed",
    ]  # fmt: skip
    found = opened.write_now(claims.claim, opened, SETTINGS, wishes)
    assert [kind(each) for each in found.outcomes] == expected
    again = opened.write_now(claims.claim, opened, SETTINGS, wishes)
    assert [kind(each) for each in again.outcomes] == expected, "members are not counted twice"
    named = [each.request.server_group_id for each in wishes if each.request.server_group_id]
    groups = opened.read_now(server_group_store.load, opened, {*named, "grp-none"})
    assert [sum(groups[id_].members.values()) for id_ in dict.fromkeys(named)] == [2, 2, 3, 2]
    assert not any(group.misplaced() for group in groups.values())


def test_server_groups_take_four_statements_more_and_others_none(opened: Database) -> None:
    def prepare() -> tuple[list[str], list[str]]:
        hosts = [make_host(40) for _ in range(8)]
        return hosts, [server_groups.insert(PROJECT, "ANTI_AFFINITY", 40) for _ in range(8)]

    host_ids, group_ids = opened.write_now(prepare)
    counts = []
    for groups in ([""] * 8, group_ids, group_ids[:1] * 8):
        wishes = opened.write_now(
            lambda groups=groups: [
                wish(host_id, server_group_id=group_id)
                for host_id, group_id in zip(host_ids, groups, strict=True)
            ]
        )
        with counted(opened) as statements:
            opened.write_now(claims.claim, opened, SETTINGS, wishes)
        counts.append(len(statements))
    assert counts[1] == counts[2] == counts[0] + 2
    with counted(opened) as statements:
        opened.read_now(server_group_store.load, opened, group_ids)
    assert len(statements) == 2
