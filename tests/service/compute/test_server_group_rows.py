"""Server groups with very many members, in the tables: SQLite and PostgreSQL."""

from __future__ import annotations

from mcloud.common.v1 import options_pb2
from mcloud.compute.v1 import server_group_service_pb2
from mcloud_base import ids
from mcloud_controlplane.compute import model, server_group_store
from mcloud_controlplane.core import auth, database
from mcloud_controlplane.core.database import Database
from service.compute import server_groups
from service.compute.tables import counted

PROJECT = "p-many"
CALLER = auth.Caller(
    kind=options_pb2.Rule.CALLER_USER,
    principal_id="u-many",
    project_id=PROJECT,
    role=options_pb2.Rule.ROLE_READER,
    system=False,
)


def join(group_id: str, count: int, *, deleted: bool = False) -> list[str]:
    """Insert instances that are members; return their ids, oldest first."""
    moment, made = database.now(), [ids.new("i") for _ in range(count)]
    for id_ in made:
        model.Instance.create(
            id=id_, name=id_, project_id=PROJECT, create_time=moment, update_time=moment,
            state="ACTIVE", flavor_id="", flavor_name="", image_id="", vcpu_count=1, memory_mib=64,
            disk_gib=1, hostname="a", server_group_id=group_id,
            delete_time=moment if deleted else None,
        )  # fmt: skip
    return made


def test_a_page_takes_as_many_statements_whatever_the_members(opened: Database) -> None:
    def prepare() -> tuple[list[str], list[str], list[str]]:
        groups = [server_groups.insert(PROJECT, "SOFT_AFFINITY") for _ in range(12)]
        many = join(groups[0], 230)
        join(groups[1], 5, deleted=True)
        return groups, many, join(groups[2], 3)

    groups, many, few = opened.write_now(prepare)
    counts = []
    for size in (3, 12):
        request = server_group_service_pb2.ListServerGroupsRequest(page_size=size)
        with counted(opened) as statements:
            page = opened.read_now(server_group_store.list_page, CALLER, request)
        counts.append(len(statements))
        found = {each.metadata.id: each.status for each in page.server_groups}
        assert sorted(found) == sorted(groups)[:size]
        assert (found[groups[0]].instance_count, list(found[groups[0]].instance_ids)) == (
            230,
            many[:100],
        )
        assert (found[groups[1]].instance_count, list(found[groups[1]].instance_ids)) == (0, [])
        assert list(found[groups[2]].instance_ids) == few
    assert counts[0] == counts[1]
