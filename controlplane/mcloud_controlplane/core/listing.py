"""Pages by keyset, filters, orders and watches, the same for every resource.

Source: https://google.aip.dev/158 (pages), https://google.aip.dev/160 (filters, a subset:
comparisons of a field with a literal by = and !=, joined by AND).
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, TypeVar

import peewee
from google.protobuf.message import Message

from mcloud.common.v1 import metadata_pb2
from mcloud_base import errors
from mcloud_controlplane.core import auth, database, tables

T = TypeVar("T")

_COMPARISON = re.compile(
    r"""\s*([A-Za-z_][\w.\-/]*)\s*(!=|=)\s*(?:"((?:[^"\\]|\\.)*)"|([^\s"]+))\s*""", re.ASCII
)
_BOOKMARK_S = 5.0
_BATCH = 500
_LENGTHY = frozenset((str, bytes, memoryview))
_PAGE_BYTES = 1 << 20  # of rows; their messages are larger, and clients take 4 MiB


@dataclass(frozen=True)
class Page:
    """Rows of one page, and the token of the next; empty on the last."""

    rows: list[Any]  # with the model's fields, to be read only
    next_page_token: str


def page(
    table: Any,
    request: Any,
    caller: auth.Caller,
    *,
    fields: Mapping[str, Any],
    orders: Mapping[str, Any] | None = None,
    default_order: str = "create_time",
    where: Any = None,
    visible: Any = None,
) -> Page:
    """Return the page of `table` that a List request asks for, in one statement.

    It is shorter than asked for where the rows are large.

    Args:
        fields: what `filter` may name, and the column (or a function from value to condition).
        orders: what `order_by` may name; "create_time" and "name" if not given.
        where: a further condition.
        visible: what the caller sees instead of its project's rows; None for those.

    Raises:
        errors.InvalidArgument: BAD_PAGE_TOKEN, BAD_FILTER, BAD_ORDER.
    """
    columns = table
    size = request.page_size or 100
    orders = orders or {"create_time": columns.create_time, "name": columns.name}
    order = request.order_by or default_order
    name, _, direction = order.partition(" ")
    if name not in orders or direction not in ("", "desc", "asc"):
        raise errors.InvalidArgument(
            "BAD_ORDER", f"order_by must be one of {', '.join(orders)}, with desc or without"
        )
    key, descending = orders[name], direction == "desc"
    query = table.select().where(_conditions(request.filter, fields, columns))
    if where is not None:
        query = query.where(where)
    everything = getattr(request, "all_projects", False)
    if everything and not caller.system:
        raise errors.PermissionDenied(
            "ROLE_REQUIRED", "all_projects needs a role on the system; log in with --system"
        )
    if not everything and hasattr(columns, "project_id"):
        query = query.where(
            (columns.project_id == caller.project_id) if visible is None else visible
        )
    scope = hashlib.sha256(f"{order}|{request.filter}|{everything}".encode()).hexdigest()[:16]
    if request.page_token:
        last_key, last_id = _read_token(request.page_token, scope, key)
        # The first of the two is what an index can begin at.
        after = (
            (key <= last_key) & ((key < last_key) | (columns.id < last_id))
            if descending
            else (key >= last_key) & ((key > last_key) | (columns.id > last_id))
        )
        query = query.where(after)
    query = (
        query.order_by(key.desc(), columns.id.desc())
        if descending
        else query.order_by(key, columns.id)
    )
    # Plain objects: a model's fields note each value that they are given.
    rows = list(query.limit(size + 1).objects(SimpleNamespace))
    token = ""
    fit = min(size, _fit(rows))
    if len(rows) > fit:
        rows = rows[:fit]
        token = _write_token([getattr(rows[-1], key.name), rows[-1].id], scope)
    return Page(rows, token)


def _fit(rows: list[Any]) -> int:
    """Return how many of the rows go into one message; one always does."""
    size = 0
    for count, row in enumerate(rows):
        for value in vars(row).values():
            kind = type(value)
            if kind is dict:
                size += sum(len(key) + len(str(item)) for key, item in value.items())
            elif kind in _LENGTHY:
                size += len(value)
        if count and size > _PAGE_BYTES:
            return count
    return len(rows)


def _conditions(text: str, fields: Mapping[str, Any], columns: Any) -> Any:
    condition: Any = peewee.SQL("1 = 1")
    position = 0
    while position < len(text.rstrip()):
        match = _COMPARISON.match(text, position)
        if match is None:
            raise _bad_filter(fields)
        name, operator, quoted, plain = match.groups()
        value = re.sub(r"\\(.)", r"\1", quoted) if quoted is not None else plain
        condition &= _condition(name, operator, value, fields, columns)
        position = match.end()
        if position < len(text.rstrip()):
            if not re.compile(r"AND\s").match(text, position):
                raise _bad_filter(fields)
            position += 3
    return condition


def _condition(
    name: str, operator: str, value: str, fields: Mapping[str, Any], columns: Any
) -> Any:
    if name.startswith("labels.") and hasattr(columns, "labels"):
        # The stored JSON has sorted keys and json.dumps' separators, so a pair is a substring.
        pair = json.dumps({name.removeprefix("labels."): value})[1:-1]
        # (LIKE would ignore case.)
        without = peewee.fn.REPLACE(columns.labels.cast("text"), pair, "")
        same = without == columns.labels.cast("text")
        return ~same if operator == "=" else same
    column = fields.get(name)
    if column is None:
        raise _bad_filter(fields)
    if isinstance(column, peewee.BooleanField):
        if value.lower() not in ("true", "false"):
            raise _bad_filter(fields)
        typed: Any = value.lower() == "true"
    elif isinstance(column, peewee.IntegerField):
        if not re.fullmatch(r"-?\d{1,18}", value):
            raise _bad_filter(fields)
        typed = int(value)
    else:
        typed = value
    if not isinstance(column, peewee.Field):
        found = column(typed)
        return found if operator == "=" else ~found
    return column == typed if operator == "=" else column != typed


def _bad_filter(fields: Mapping[str, Any]) -> errors.InvalidArgument:
    return errors.InvalidArgument(
        "BAD_FILTER",
        'filter must be comparisons like name="x" joined by AND, over '
        f"{', '.join(fields)}, labels.KEY",
    )


def _write_token(position: list[Any], scope: str) -> str:
    return base64.urlsafe_b64encode(json.dumps([scope, *position]).encode()).decode()


def _read_token(token: str, scope: str, column: Any) -> tuple[Any, str]:
    """Return the position; a forged one is at worst another position in the caller's own rows."""
    try:
        found, key, id_ = json.loads(base64.urlsafe_b64decode(token.encode()))
    except (ValueError, TypeError) as error:
        raise _bad_token() from error
    if isinstance(column, peewee.IntegerField):
        fits = type(key) is int and abs(key) < 1 << 63
    else:
        fits = isinstance(key, str) and key.isprintable()
    if found != scope or not fits or not isinstance(id_, str) or not id_.isprintable():
        raise _bad_token()
    return key, id_


def _bad_token() -> errors.InvalidArgument:
    return errors.InvalidArgument(
        "BAD_PAGE_TOKEN", "page_token is not of a page with this filter and order; start again"
    )


@dataclass(frozen=True)
class Event:
    """A change that a watch sends."""

    type: metadata_pb2.ChangeType.ValueType
    resource_id: str
    message: Any  # of the resource's type; only metadata.id when DELETED; None in a BOOKMARK
    revision: str


async def watch(
    store: database.Database,
    shared: tables.Tables,
    type_: str,
    kind: type[Message],
    request: Any,
    caller: auth.Caller,
    load: Callable[[list[str]], Mapping[str, Message]],
    *,
    everybody: bool = False,
    with_shared: bool = False,
) -> AsyncIterator[Event]:
    """Follow the changes of a type of resource, in the order of their commits, for ever.

    What has not been sent yet stays in the log: a watch holds one batch at a time, and one that is
    not read is ended by the gate (SLOW_WATCHER).

    Args:
        load: returns the messages of those ids that still exist, in a constant number of
            statements; called within a unit.
        everybody: the resources have no project, or are seen by all.
        with_shared: changes logged without a project are of resources that all see.

    Raises:
        errors.OutOfRange: REVISION_COMPACTED.
    """
    every = everybody or getattr(request, "all_projects", False)
    if every and not everybody and not caller.system:
        raise errors.PermissionDenied(
            "ROLE_REQUIRED", "all_projects needs a role on the system; log in with --system"
        )

    def batch(after: int | None) -> tuple[int, bool, list[Event]]:
        table = shared.change
        head = shared.revision()
        if after is None:
            return head, False, []
        oldest = table.select(peewee.fn.MIN(table.revision)).scalar()
        if after > head or (after < head and (oldest is None or after + 1 < oldest)):
            raise errors.OutOfRange(
                "REVISION_COMPACTED",
                f"changes after revision {after} are no longer known; list again",
            )
        # Not beyond the head: what is committed while this runs would be sent again next time.
        query = table.select().where((table.type == type_) & (table.revision > after))
        query = query.where(table.revision <= head)
        if request.id:
            query = query.where(table.resource_id == request.id)
        if not every:
            projects = [caller.project_id, ""] if with_shared else [caller.project_id]
            query = query.where(table.project_id.in_(projects))
        query = query.order_by(table.revision, table.number)
        rows = list(query.limit(_BATCH))
        more = len(rows) == _BATCH
        if more:
            # A watch resumes between revisions, so none is cut in two.
            head = rows[-1].revision
            rows += query.where((table.revision == head) & (table.number > rows[-1].number))
        messages = load(list({row.resource_id for row in rows}))
        return head, more, [_event(row, kind, messages.get(row.resource_id)) for row in rows]

    position = _revision(request.from_revision)
    with store.listening(type_) as event:
        while True:
            event.clear()
            async with store.background_reads:
                position, more, found = await store.read(batch, position)
            for change in found:
                yield change
            if more:
                continue
            try:
                async with asyncio.timeout(_BOOKMARK_S):
                    await event.wait()
            except TimeoutError:
                yield Event(metadata_pb2.CHANGE_TYPE_BOOKMARK, "", None, str(position))


def _event(row: Any, kind: type[Message], found: Message | None) -> Event:
    change = metadata_pb2.ChangeType.Value(f"CHANGE_TYPE_{row.change}")
    message: Any = found
    if found is None or row.change == "DELETED":
        change = metadata_pb2.CHANGE_TYPE_DELETED
        message = kind()
        message.metadata.id = row.resource_id
    return Event(change, row.resource_id, message, str(row.revision))


def _revision(text: str) -> int | None:
    if not text:
        return None
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise errors.InvalidArgument(
            "BAD_REVISION", "from_revision must be one that a list or watch gave"
        )
    return int(text)
