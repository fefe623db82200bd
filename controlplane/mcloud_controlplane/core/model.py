"""Tables: peewee's models, with the way that most reads take made short.

Of the time that a row took to be read, SQLite had a tenth. So a select begins as a copy of one that
was made before; what a row's values are to become is found out once for each selection, and is
nothing for texts and numbers; and a row becomes an object without a call for each of its columns.
Objects of several tables, and what is no field, are read by peewee.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self, cast

import peewee

from mcloud_controlplane.core import statements

_AS_THEY_ARE = (peewee.TextField, peewee.IntegerField, peewee.BigIntegerField, peewee.BlobField)
_MOST_PLANS = 1000
_MOST_VALUES = 50  # of a query that is built once

Make = Callable[[Any], Any]  # what a row of the database's becomes


class Model(peewee.Model):
    """A table."""

    @classmethod
    def fresh(cls, **values: Any) -> Self:
        """Make a row that is not written yet, of these values and the defaults of the others.

        The class itself makes a call for each of them.
        """
        found, meta = object.__new__(cls), cast(Any, cls)._meta
        data = meta.get_default_dict() | values
        found.__dict__.update(__data__=data, __rel__={}, _dirty=set(data))
        return found

    @classmethod
    def select(cls, *fields: Any) -> peewee.ModelSelect[Self]:
        """Begin a query for rows, with all fields or with these."""
        if fields:
            return cast("peewee.ModelSelect[Self]", Select(cls, fields))
        first = _FIRST.get(cls)
        if first is None:
            every = cls._meta.sorted_fields
            first = _FIRST[cls] = Select(cls, every, is_default=True)
        return cast("peewee.ModelSelect[Self]", first.clone())

    @classmethod
    def get_by_id(cls, pk: Any) -> Self:
        """Return a row by its key.

        Raises:
            peewee.DoesNotExist: of the model.
        """
        found = cls.find(pk)
        if found is None:
            model: Any = cls
            raise model.DoesNotExist(f"no such row of {model.__name__}")
        return found

    @classmethod
    def find(cls, pk: Any) -> Self | None:
        """Return a row by its key, or None."""
        return cls._find(pk, locks=False)

    @classmethod
    def find_locked(cls, pk: Any) -> Self | None:
        """Return a row by its key, or None; over PostgreSQL locked until the commit."""
        return cls._find(pk, locks=bool(cls._meta.database.for_update))

    @classmethod
    def _find(cls, pk: Any, *, locks: bool) -> Self | None:
        query = _BY_KEY.get((cls, locks))
        if query is None:

            def build(keys: Sequence[Any]) -> Any:
                key: Any = cls._meta.primary_key
                found = cls.select().where(key == keys[0])
                return found.for_update() if locks else found

            query = _BY_KEY[cls, locks] = Prepared(cls, build)
        rows: list[Self] = query.rows([pk])
        return rows[0] if rows else None

    def save(self, force_insert: bool = False, only: Any = None) -> Any:
        """Write the row, whole; return how many were written."""
        row: Any = self
        kind: Any = type(self)
        data: dict[str, Any] = row.__data__
        key = kind._meta.primary_key
        keyed = force_insert or not kind._meta.composite_key and data.get(key.name) is not None
        computed = any(isinstance(value, peewee.Node) for value in data.values())
        if only is not None or kind._meta.auto_increment or not keyed or computed:
            return super().save(force_insert=force_insert, only=only)
        names = tuple(data)
        kept = _SAVES.get((kind, names, force_insert))
        if kept is None:
            kept = _SAVES[kind, names, force_insert] = _saving(kind, names, force_insert)
        keys = [] if force_insert else [data[key.name]]
        cursor = kept.cursor(kind._meta.database, list(data.values()), keys)
        row._dirty.clear()
        return cursor.rowcount


class Select(peewee.ModelSelect):
    """A query for rows of a table."""

    def clone(self) -> Self:
        """Return a copy, that has not been run."""
        found = object.__new__(type(self))
        state = found.__dict__ = self.__dict__.copy()
        state["_cursor_wrapper"] = None
        state["_from_list"] = list(state["_from_list"])
        state["_joins"] = {source: list(joins) for source, joins in state["_joins"].items()}
        return found

    def get(self, database: Any = None) -> Any:
        """Return the first row.

        Raises:
            peewee.DoesNotExist: of the model.
        """
        query = self.clone()
        query.__dict__["_limit"] = 1
        rows = query.execute(database)
        if not rows:
            model: Any = self.model
            raise model.DoesNotExist(f"no such row of {model.__name__}")
        return rows[0]

    def _execute(self, database: Any) -> Any:
        state = self.__dict__
        if state["_cursor_wrapper"] is not None:
            return state["_cursor_wrapper"]
        make = _plan(state)
        if make is None:
            return super()._execute(database)  # type: ignore[misc]
        rows = state["_cursor_wrapper"] = _Rows(map(make, database.execute(self).fetchall()))
        return rows


class Prepared:
    """A query of the busiest paths that yields rows, built once for each number of values.

    Args:
        model: whose rows it reads, or changes and returns.
        build: makes the query of lists of values.
    """

    def __init__(self, model: Any, build: Callable[..., Any]) -> None:
        self._model = model
        self._build = build
        self._kept = statements.Kept(build)
        self._makes: dict[str, Make] = {}  # by the statement

    def rows(self, *lists: Sequence[Any]) -> list[Any]:
        """Return what it finds for these values."""
        if sum(map(len, lists)) > _MOST_VALUES:  # a text for each number would be too many
            return list(self._build(*lists))
        database = self._model._meta.database
        text = self._kept.text(database, lists)
        make = self._makes.get(text.sql)
        if make is None:
            make = self._makes[text.sql] = self._made(text)
        return list(map(make, text.cursor(database, lists).fetchall()))

    @staticmethod
    def _made(text: statements.Text) -> Make:
        make = _plan(text.query.__dict__)
        assert make is not None, "peewee would have to read it"
        return make


class _Rows(list[Any]):
    """What a query has found, as peewee asks for it."""

    def fill_cache(self, count: float = 0) -> None:
        """Have everything: it is there."""

    @property
    def row_cache(self) -> list[Any]:
        return self

    def iterator(self) -> Iterator[Any]:
        return iter(self)


def _saving(kind: Any, names: Sequence[str], inserts: bool) -> statements.Kept:
    """Return the statement that writes these columns of a row, given their values and the key's."""
    fields = [kind._meta.fields[name] for name in names]
    key = kind._meta.primary_key

    def build(values: Sequence[Any], keys: Sequence[Any]) -> Any:
        row = dict(zip(fields, values, strict=True))
        if inserts:
            return kind.insert(row)
        del row[key]
        return kind.update(row).where(key == keys[0])

    return statements.Kept(build)


_BY_KEY: dict[tuple[type, bool], Prepared] = {}
_SAVES: dict[tuple[type, tuple[str, ...], bool], statements.Kept] = {}
_FIRST: dict[type, Select] = {}
_PLANS: dict[Any, tuple[Make | None, list[Any]]] = {}


def _plan(state: dict[str, Any]) -> Make | None:
    """Return what a row becomes; None: peewee is to find that out."""
    model, fields, kind = state["model"], state["_returning"], state["_row_type"]
    if kind != peewee.ROW.TUPLE and (state.get("_joins") or state.get("_load_tree")):
        return None
    is_default = state.get("_is_default")  # of a select
    key = (model, kind, None if is_default else tuple([id(each) for each in fields]))
    found = _PLANS.get(key)
    if found is None:
        if len(_PLANS) > _MOST_PLANS:
            _PLANS.clear()
        # The fields are kept: an id is that of one object while it lives.
        found = _PLANS[key] = (_planned(model, fields, kind), list(fields))
    return found[0]


def _planned(model: Any, fields: Any, kind: Any) -> Make | None:
    if not all(_is_plain(each) for each in fields):
        return None
    converters = [
        (index, each.python_value)
        for index, each in enumerate(fields)
        if type(each) not in _AS_THEY_ARE
    ]
    if kind == peewee.ROW.TUPLE:
        return _tuples(converters)
    if kind not in (None, peewee.ROW.MODEL) or any(each.model is not model for each in fields):
        return None
    return _objects(model, [each.name for each in fields], converters)


def _is_plain(node: Any) -> bool:
    return isinstance(node, peewee.Field) and bool(node._coerce)  # type: ignore[attr-defined]


def _tuples(converters: list[tuple[int, Make]]) -> Make:
    if not converters:
        return tuple

    def make(row: Any) -> Any:
        values = list(row)
        for index, convert in converters:
            values[index] = convert(values[index])
        return tuple(values)

    return make


def _objects(model: Any, names: list[str], converters: list[tuple[int, Make]]) -> Make:
    named = [(names[index], convert) for index, convert in converters]

    def make(row: Any) -> Any:
        found = object.__new__(model)
        data = dict(zip(names, row, strict=True))
        for name, convert in named:
            data[name] = convert(data[name])
        found.__dict__.update(__data__=data, __rel__={}, _dirty=set())
        return found

    return make


statements.know_select(Select)
