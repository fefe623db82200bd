"""Pages, filters and orders."""

from __future__ import annotations

import asyncio
import base64
import json
from typing import Any

import pytest

from mcloud_base import errors
from service.core.cloud import Client, Rule, refused
from service.core.keys import Keys, new_project


@pytest.fixture
async def keys(client: Client) -> Keys:
    project = new_project()
    return Keys(client.public, await client.make_user(project, Rule.ROLE_MEMBER, project))


async def pages(keys: Keys, **values: Any) -> list[list[str]]:
    found, token = [], ""
    while True:
        answer = await keys.list(page_token=token, **values)
        found.append([key.metadata.name for key in answer.key_pairs])
        token = answer.next_page_token
        if not token:
            return found


@pytest.mark.parametrize("order", ["", "create_time", "create_time desc", "name", "name desc"])
async def test_pages_hold_every_row_once(keys: Keys, order: str) -> None:
    names = ["c", "a", "é", "b", "A"]
    for name in names:
        await keys.create(name)
    found = await pages(keys, page_size=2, order_by=order)
    assert [len(page) for page in found] == [2, 2, 1]
    flat = [name for page in found for name in page]
    assert sorted(flat) == sorted(names)
    whole = await keys.names(order_by=order)
    assert flat == whole
    if order in ("", "create_time"):
        assert flat == names
    if order.endswith(" desc"):
        assert flat == (await keys.names(order_by=order.removesuffix(" desc")))[::-1]


async def test_nothing_is_twice_or_missing_while_rows_come_and_go(keys: Keys) -> None:
    steady = [f"steady-{number:02}" for number in range(12)]
    for name in steady:
        await keys.create(name)
    for order in ("name", "name desc"):
        found: list[str] = []
        token = ""
        for number in range(100):
            answer = await keys.list(page_size=3, page_token=token, order_by=order)
            found += [key.metadata.name for key in answer.key_pairs]
            token = answer.next_page_token
            if not token:
                break
            # Before, among and after what has been read.
            made = await asyncio.gather(
                *(keys.create(f"{at}{order}{number}") for at in ("a", "steady-05x", "z"))
            )
            await keys.delete(made[1].resource.id)
        assert len(found) == len(set(found))
        assert [name for name in found if name in steady] == sorted(steady, reverse="desc" in order)


async def test_filters(keys: Keys) -> None:
    await keys.create("one", labels={"env": "prod", "tier": "a"})
    await keys.create("two", labels={"env": "test"})
    await keys.create('th"ree', labels={"env": 'say "hi" \\ %_', "größe": "ä"})
    for text, names in {
        'name="one"': ["one"],
        "name=one": ["one"],
        ' name = "one" ': ["one"],
        'name!="one"': ["two", 'th"ree'],
        'name="th\\"ree"': ['th"ree'],
        'labels.env="prod"': ["one"],
        'labels.env="PROD"': [],
        'labels.env="pro"': [],
        'labels.env="prod" AND labels.tier="a"': ["one"],
        'labels.env="prod" AND labels.tier!="a"': [],
        'labels.env!="prod"': ["two", 'th"ree'],
        'labels.env="%"': [],
        'labels.env="say \\"hi\\" \\\\ %_"': ['th"ree'],
        'name="none"': [],
        'name="\'; DROP TABLE keypair; --"': [],
    }.items():
        assert await keys.names(filter=text) == names, text
    assert await keys.names(filter='labels.env="prod"', page_size=1, order_by="name") == ["one"]


@pytest.mark.parametrize(
    "text",
    [
        "name", "name=", "=x", 'name="x', 'name="x" OR name="y"', 'name="x" AND', 'name="x"name=y',
        'secret="x"', "name~x", 'name="x" and name="x"', "(name=x)", "project_id=p", "1=1",
    ],
)  # fmt: skip
async def test_bad_filters(keys: Keys, text: str) -> None:
    error = await refused(keys.list(filter=text))
    assert (type(error), error.reason) == (errors.InvalidArgument, "BAD_FILTER")


@pytest.mark.parametrize("text", ["secret", "name up", "name desc desc", "id", " name", "name,id"])
async def test_bad_orders(keys: Keys, text: str) -> None:
    assert (await refused(keys.list(order_by=text))).reason == "BAD_ORDER"


async def test_bad_page_tokens(keys: Keys) -> None:
    for name in "abc":
        await keys.create(name)
    token = (await keys.list(page_size=1)).next_page_token
    assert await keys.names(page_size=1, page_token=token) == ["b"]
    scope, key, id_ = json.loads(base64.urlsafe_b64decode(token))
    forged = [
        [scope, key, 7], [scope, str(key), id_], [scope, None, id_], [scope, True, id_],
        [scope, 1 << 80, id_], [scope, 1.5, id_], [scope, key, "\0"], [scope, {}, id_],
        ["x", key, id_], [scope, key], [scope, key, id_, 1], {}, 7, "x",
    ]  # fmt: skip
    texts = [base64.urlsafe_b64encode(json.dumps(each).encode()).decode() for each in forged]
    for text in [*texts, "x", "====", token[:-4], "é", token + token]:
        assert (await refused(keys.list(page_token=text))).reason == "BAD_PAGE_TOKEN", text
    # A page belongs to its filter and its order.
    for other in ({"order_by": "name"}, {"filter": 'name="b"'}):
        error = await refused(keys.list(page_token=token, **other))
        assert error.reason == "BAD_PAGE_TOKEN"
    by_name = (await keys.list(page_size=1, order_by="name")).next_page_token
    scope, key, id_ = json.loads(base64.urlsafe_b64decode(by_name))
    forged_name = base64.urlsafe_b64encode(json.dumps([scope, 7, id_]).encode()).decode()
    error = await refused(keys.list(page_token=forged_name, order_by="name"))
    assert error.reason == "BAD_PAGE_TOKEN"


@pytest.mark.parametrize("size", [-1, 1001, -(2**31), 2**31 - 1])
async def test_bad_page_sizes(keys: Keys, size: int) -> None:
    assert (await refused(keys.list(page_size=size))).reason == "BAD_REQUEST"
