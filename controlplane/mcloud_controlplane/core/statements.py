"""SQL of peewee's queries, made once for each shape of query and not each time.

Making the text of a statement took peewee up to a millisecond, fifty times as long as SQLite took
to run it, and was most of what the control plane used of the CPU. Two queries that differ in
nothing but their values have one text. So a query is walked, which yields its shape and, in the
order of the walk, its values; the text is looked up by the shape. A shape that is new is made into
text by peewee, from a copy of the query with a slot in place of each value, which tells where each
value goes and what converts it. What the walk does not know (a kind of node that is not in
`_PARTS`, a very long list) is left to peewee.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import peewee

_MOST_VALUES = 600  # of a query whose text is kept
MOST_ROWS = 20  # of an insert
_MOST_SHAPES = 5000

# Of each kind of node that is known: what of it is part of the text, then what is walked. Of what
# columns are set to (_ASSIGNED), whatever is no node is one value: a list, too, is a document then.
_ASSIGNED = ("_update", "_insert")
_Parts = tuple[tuple[str, ...], tuple[str, ...]]
_SELECT = (
    "_from_list", "_where", "_group_by", "_having",
    "_order_by", "_limit", "_offset", "_for_update", "_windows", "_cte_list",
)  # fmt: skip
_PARTS: dict[type, _Parts] = {
    peewee.Expression: (("op", "flat"), ("lhs", "rhs")),
    peewee.Negated: ((), ("node",)),
    peewee.Ordering: (("direction", "collation", "nulls"), ("node",)),
    peewee.Alias: (("_alias",), ("node",)),
    peewee.Cast: (("_cast",), ("node",)),
    peewee.SQL: (("sql", "params"), ()),
    peewee.Function: (("name", "_coerce"), ("arguments", "_filter", "_order_by")),
    peewee.NodeList: (("glue", "parens"), ("nodes",)),
    peewee.Join: (("join_type",), ("lhs", "rhs", "_on")),
    peewee.ForUpdate: (("_expr", "_nowait", "_skip_locked"), ("_of",)),
    peewee.OnConflict: (
        ("_action",),
        (
            "_update", "_preserve", "_where",
            "_conflict_target", "_conflict_where", "_conflict_constraint",
        ),
    ),
    peewee.Select: (
        ("_simple_distinct", "_alias", "_lateral"), ("_returning", "_distinct", *_SELECT),
    ),
    peewee.ModelSelect: (
        ("_simple_distinct", "_alias", "_lateral", "_is_default"),
        ("model", "_returning", "_distinct", *_SELECT),
    ),
    peewee.ModelUpdate: (
        (),
        (
            "model", "_update", "_from", "_where",
            "_order_by", "_limit", "_returning", "_cte_list",
        ),
    ),
    peewee.ModelInsert: (
        (), ("model", "_insert", "_columns", "_on_conflict", "_returning", "_cte_list")
    ),
    peewee.ModelDelete: (
        (), ("model", "_where", "_order_by", "_limit", "_returning", "_cte_list")
    ),
}  # fmt: skip


# Of a select of every field of a model.
_EVERY_FIELD: _Parts = (
    ("_simple_distinct", "_alias", "_lateral", "_is_default"), ("model", "_distinct", *_SELECT),
)  # fmt: skip


class Text(NamedTuple):
    """A statement's text, and how its parameters come from a query's values.

    Args:
        parameters: of each, which value it is and what converts it; or itself, as it is.
        query: whose shape it is; kept, since a shape has the ids of what it names.
    """

    sql: str
    parameters: list[tuple[int, Callable[[Any], Any] | None] | tuple[None, Any]]
    query: Any

    def cursor(self, database: Any, lists: Sequence[Sequence[Any]]) -> Any:
        """Run it with these values; return the driver's cursor."""
        values = [*itertools.chain.from_iterable(lists)]
        return database.execute_sql(self.sql, _parameters(self, values))


class _UnknownError(Exception):
    """The walk does not know what it has come to."""


class _Slot:
    """Stands for a value."""

    def __init__(self, number: int) -> None:
        self.number = number


class _Recorder(peewee.Context):
    """Makes text of a query with slots; its parameters are slots, each with its converter."""

    __slots__ = ()

    def value(self, value: Any, converter: Any = None, add_param: bool = True) -> Any:
        if not isinstance(value, _Slot):
            return super().value(value, converter, add_param)
        if self.state.value_literals or not add_param:
            raise _UnknownError
        if converter is None:
            converter = self.state.converter
        self._values.append((value.number, converter or None))  # type: ignore[attr-defined]
        return self.literal(self.state.param or "?")


# Compare each statement with what peewee makes of the query; the tests do.
checking = False

_texts: dict[Any, Text | None] = {}
_MISSING: Any = object()


def made(database: Any, query: Any) -> tuple[str, list[Any]] | None:
    """Return a query's SQL and parameters; None: peewee is to make them."""
    values: list[Any] = []
    try:
        shape = (database.param, _walk(query, values))
        text = _texts.get(shape, _MISSING)
    except (_UnknownError, TypeError):  # or its shape has a list
        return None
    if text is _MISSING:
        text = _make(database, query)
        if len(_texts) > _MOST_SHAPES:
            _texts.clear()
        _texts[shape] = text
    if text is None:
        return None
    parameters = _parameters(text, values)
    if checking:
        sql, theirs = database.get_sql_context().sql(query).query()
        assert text.sql == sql, f"{text.sql} is not {sql}"
        assert list(map(_plain, parameters)) == list(map(_plain, theirs)), f"of {sql}"
    return text.sql, parameters


def padded(values: Sequence[Any]) -> list[Any]:
    """Return values for an IN, the last of them repeated, so that lists have few lengths."""
    if not values:
        return []
    length = 1 << (len(values) - 1).bit_length()
    return [*values, *[values[-1]] * (length - len(values))]


def know_select(kind: type) -> None:
    """Have another kind of select known: with `_is_default`, of all fields of its model."""
    _PARTS[kind] = _PARTS[peewee.ModelSelect]
    _SELECTS.add(kind)


_SELECTS: set[type] = set()


def remember_columns() -> None:
    """Have peewee find out once which column of a result is which field, and not for each result.

    It took longer than to run the statement. What is told apart are the fields that were selected
    and the names that the database gives them; where something else was selected than fields,
    peewee finds out as before.
    """
    library: Any = peewee
    find: Callable[..., Any] = library._resolve_model_columns
    if hasattr(find, "remembered"):
        return

    def remembered(cursor: Any, model: Any, select: Any) -> Any:
        if not all(type(node) in _FIELDS for node in select):
            return find(cursor, model, select)
        names = tuple([column[0] for column in cursor.description])
        key = (id(model), names, tuple([id(node) for node in select]))
        if key not in _columns:
            if len(_columns) > _MOST_SHAPES:
                _columns.clear()
            # The fields are kept: an id is that of one object while it lives.
            _columns[key] = (find(cursor, model, select), list(select))
        return _columns[key][0]

    remembered.remembered = True  # type: ignore[attr-defined]
    library._resolve_model_columns = remembered
    library.make_identifier = functools.cache(library.make_identifier)


_columns: dict[Any, tuple[Any, list[Any]]] = {}


class Kept:
    """A query of the busiest paths, that is built once for each number of values, not each time.

    What a model gives by default stays what it was then.

    Args:
        build: makes the query of lists of values.
    """

    def __init__(self, build: Callable[..., Any]) -> None:
        self._build = build
        self._texts: dict[Any, Text] = {}

    def run(self, database: Any, *lists: Sequence[Any]) -> list[Any]:
        """Run it with these values; return the rows as they are in the database."""
        cursor = self.cursor(database, *lists)
        return list(cursor.fetchall()) if cursor.description else []

    def cursor(self, database: Any, *lists: Sequence[Any]) -> Any:
        """Run it with these values; return the driver's cursor."""
        return self.text(database, lists).cursor(database, lists)

    def text(self, database: Any, lists: Sequence[Sequence[Any]]) -> Text:
        """Return its text for as many values."""
        shape = (database.param, *map(len, lists))
        text = self._texts.get(shape)
        if text is None:
            text = self._texts[shape] = self._make(database, lists)
        return text

    def _make(self, database: Any, lists: Sequence[Sequence[Any]]) -> Text:
        numbers = itertools.count()
        query = self._build(*([_Slot(next(numbers)) for _ in values] for values in lists))
        context = _Recorder(**database.get_context_options())
        sql, parameters = context.sql(query).query()  # type: ignore[no-untyped-call]
        return _text(sql, parameters, query)


def _text(sql: str, parameters: Sequence[Any], query: Any) -> Text:
    return Text(
        sql,
        [each if isinstance(each, tuple) else (None, each) for each in parameters],
        query,
    )


def _parameters(text: Text, values: Sequence[Any]) -> list[Any]:
    return [
        convert if number is None else convert(values[number]) if convert else values[number]
        for number, convert in text.parameters
    ]


def _plain(parameter: Any) -> Any:
    """Return a parameter so that it can be compared: bytes come wrapped."""
    found = getattr(parameter, "obj", parameter)
    return type(found), found


def _walk(part: Any, values: list[Any]) -> Any:
    """Return the shape of a part of a query; add its values."""
    if part is None:
        return None
    kind = type(part)
    if kind in _SCALARS:
        values.append(part)
        return 0
    if kind in _FIELDS:
        return id(part)  # they live as long as the program, or the text
    known = _PARTS.get(kind)
    if known is not None:
        state = part.__dict__
        if kind in _SELECTS and state["_is_default"]:
            known = _EVERY_FIELD
        shape: list[Any] = [id(kind)]
        shape += [state[name] for name in known[0]]
        for name in known[1]:
            value = state[name]
            if value is None:
                shape.append(None)
            elif name in _ASSIGNED:
                shape.append(_walk_assigned(value, values))
            else:
                shape.append(_walk(value, values))
        return tuple(shape)
    if kind is peewee.Value:
        walked = part.values if part.multi else part.value
        return ("value", part.multi, part.converter, _walk(walked, values))
    if kind is peewee.NamespaceAttribute:  # EXCLUDED, of an insert on conflict
        return ("of", part._namespace._name, part._attribute)
    if kind is list or kind is tuple:
        if len(part) + len(values) > _MOST_VALUES:
            raise _UnknownError
        return (kind.__name__, *[_walk(each, values) for each in part])
    return _walk_key(part)


def _walk_assigned(part: Any, values: list[Any]) -> Any:
    """Return the shape of what columns are set to: of a row by column, or of rows."""
    if isinstance(part, dict):
        shape: list[Any] = ["row"]
        for key, each in part.items():
            shape.append(id(key) if type(key) in _FIELDS else _walk_key(key))
            if each is None or isinstance(each, peewee.Node):
                shape.append(_walk(each, values))
            else:
                values.append(each)
                shape.append(0)
        return tuple(shape)
    if isinstance(part, list) and all(isinstance(row, dict | tuple) for row in part):
        if len(part) > MOST_ROWS:
            raise _UnknownError
        return (
            "rows",
            *[
                _walk_assigned(row, values)
                if isinstance(row, dict)
                else tuple([_walk_one(each, values) for each in row])
                for row in part
            ],
        )
    if part is None:
        return None
    raise _UnknownError


def _walk_one(part: Any, values: list[Any]) -> Any:
    if part is None or isinstance(part, peewee.Node):
        return _walk(part, values)
    values.append(part)
    return 0


def _walk_key(part: Any) -> Any:
    """Return what stands for a field, a model or a name."""
    if isinstance(part, str):
        return part
    if id(part) in _MODELS:
        return id(part)
    if isinstance(part, peewee.Field) and type(part).__sql__ is peewee.Field.__sql__:
        _FIELDS.add(type(part))
        return id(part)
    if isinstance(part, type) and issubclass(part, peewee.Model):
        if any(map(callable, part._meta.defaults.values())) and not _has_plain_defaults(part):
            raise _UnknownError
        _MODELS[id(part)] = part
        return id(part)
    raise _UnknownError


def _has_plain_defaults(model: Any) -> bool:
    """Tell whether the defaults of a model's fields are the same at each insert."""
    return all(each in (dict, list) for each in model._meta.defaults.values() if callable(each))


_SCALARS = frozenset((str, int, float, bool, bytes))
_MODELS: dict[int, Any] = {}  # that were met, by id; kept, since they are known by it
_FIELDS: set[type] = set()  # kinds of fields that were met: those that stand for a column


def _make(database: Any, query: Any) -> Text | None:
    numbers = itertools.count()
    slotted = _slotted(query, lambda value: _Slot(next(numbers)))
    context = _Recorder(**database.get_context_options())
    try:
        sql, parameters = context.sql(slotted).query()  # type: ignore[no-untyped-call]
    except _UnknownError:
        return None
    return _text(sql, parameters, slotted)


def _slotted(part: Any, slot: Callable[[Any], _Slot]) -> Any:
    """Return a copy with a slot for each value; in the order of `_walk`."""
    kind = type(part)
    if part is None:
        return None
    if kind in _SCALARS:
        return slot(part)
    known = _PARTS.get(kind)
    if known is not None:
        found = _copied(part)
        for name in known[1]:
            replace = _slotted_assigned if name in _ASSIGNED else _slotted
            found.__dict__[name] = replace(part.__dict__[name], slot)
        return found
    if kind is peewee.Value:
        found = _copied(part)
        name = "values" if part.multi else "value"
        setattr(found, name, _slotted(getattr(part, name), slot))
        return found
    if kind is list or kind is tuple:
        return kind(_slotted(each, slot) for each in part)
    return part


def _copied(part: Any) -> Any:
    found = object.__new__(type(part))  # (copy.copy asks a Function for what it takes for SQL)
    found.__dict__.update(part.__dict__)
    return found


def _slotted_assigned(part: Any, slot: Callable[[Any], _Slot]) -> Any:
    if isinstance(part, dict):
        return {key: _slotted_one(each, slot) for key, each in part.items()}
    if isinstance(part, list):
        return [
            _slotted_assigned(row, slot)
            if isinstance(row, dict)
            else tuple([_slotted_one(each, slot) for each in row])
            for row in part
        ]
    return part


def _slotted_one(part: Any, slot: Callable[[Any], _Slot]) -> Any:
    return _slotted(part, slot) if part is None or isinstance(part, peewee.Node) else slot(part)
