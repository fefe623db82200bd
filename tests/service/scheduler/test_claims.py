"""Many claims in one transaction, each with an outcome of its own: SQLite and PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fixtures_postgresql import postgresql_server, postgresql_url  # noqa: F401
from mcloud.scheduler.v1 import placement_pb2, placement_service_pb2
from mcloud_base import errors, ids
from mcloud_controlplane.compute import model
from mcloud_controlplane.core import database
from mcloud_controlplane.core.database import Database
from mcloud_controlplane.scheduler import claims, store
from mcloud_controlplane.scheduler.claims import Wish
from mcloud_controlplane.settings import Settings

PROJECT = "p-claims"
SETTINGS = Settings.model_validate({})


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    url = f"sqlite://{tmp_path}/compute.db"
    if request.param == "postgresql":
        url = str(request.getfixturevalue("postgresql_url")).replace("{name}", "compute")
    made = model.open_database(url)
    yield made
    made.close()


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
    return "taken" if outcome is None else "claimed"


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
        assert len(changed) == 2 * 27 + 2  # a domain and an instance each, and the hosts

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
