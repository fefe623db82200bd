"""Pages of rows that are equal in what they are ordered by."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import peewee
import pytest

from mcloud.compute.v1 import instance_service_pb2
from mcloud_controlplane.core import auth, listing, tables

database = peewee.DatabaseProxy()
CALLER = auth.Caller(kind=auth.Rule.CALLER_USER, project_id="p-1")


class Thing(tables.Resource):
    class Meta:
        database = database


@pytest.fixture(autouse=True)
def things(tmp_path: Path) -> Iterator[None]:
    opened = peewee.SqliteDatabase(tmp_path / "things.db")
    database.initialize(opened)
    with opened:
        opened.create_tables([Thing])
        for number in range(10):
            moment = number // 4
            Thing.create(id=f"t-{number}", project_id="p-1", create_time=moment, update_time=moment)
        yield


@pytest.mark.parametrize("direction", ["", " desc"])
@pytest.mark.parametrize("size", [1, 2, 3, 10])
def test_each_of_them_comes_once_and_in_order(direction: str, size: int) -> None:
    found: list[str] = []
    token = ""
    while True:
        request = instance_service_pb2.ListInstancesRequest(
            page_size=size, page_token=token, order_by=f"create_time{direction}"
        )
        page = listing.page(Thing, request, CALLER, fields={})
        found += [row.id for row in page.rows]
        token = page.next_page_token
        if not token:
            break
    assert found == sorted(found, reverse=bool(direction))
    assert len(found) == 10
