"""Statements whose text is made once are those that peewee makes each time."""

from __future__ import annotations

from typing import Any

import peewee
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mcloud_controlplane.core import statements, tables
from mcloud_controlplane.core.model import Model, Prepared

database = peewee.DatabaseProxy()


class Thing(tables.Resource):
    size = peewee.IntegerField(default=0)
    host_id = peewee.TextField(default="")

    class Meta:
        database = database


class Mark(Model):
    thing_id = peewee.TextField()
    word = peewee.TextField()

    class Meta:
        database = database
        primary_key = peewee.CompositeKey("thing_id", "word")


class Engine(peewee.SqliteDatabase):
    """Counts what peewee was left with."""

    left = 0

    def execute(self, query: Any, **options: Any) -> Any:
        made = statements.made(self, query)
        if made is None:
            self.left += 1
            return super().execute(query, **options)  # type: ignore[no-untyped-call]
        return self.execute_sql(*made)  # type: ignore[no-untyped-call]


@pytest.fixture
def engine() -> Any:
    opened = Engine(":memory:")
    database.initialize(opened)
    opened.create_tables([Thing, Mark])
    opened.left = 0
    yield opened
    opened.close()


WORDS = st.text("ab'\"?%", max_size=2)
SIZES = st.integers(-2, 2)
CONDITIONS = st.recursive(
    st.one_of(
        WORDS.map(lambda word: Thing.host_id == word),
        SIZES.map(lambda size: Thing.size <= size),
        st.lists(WORDS, max_size=3).map(lambda words: Thing.name.in_(words)),
        st.lists(SIZES, max_size=2).map(lambda sizes: Thing.size.not_in(tuple(sizes))),
        st.booleans().map(lambda is_null: Thing.delete_time.is_null(is_null)),
        WORDS.map(lambda word: Thing.name.startswith(word)),
        WORDS.map(lambda word: Thing.id.in_(Mark.select(Mark.thing_id).where(Mark.word == word))),
    ),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map(lambda pair: pair[0] & pair[1]),
        st.tuples(inner, inner).map(lambda pair: pair[0] | pair[1]),
        inner.map(lambda one: ~one),
    ),
    max_leaves=5,
)
ORDERS = st.sampled_from([(), (Thing.id,), (Thing.size.desc(), Thing.id), (Thing.name.asc(),)])


@st.composite
def queries(draw: st.DrawFn) -> Any:
    condition = draw(CONDITIONS)
    match draw(st.integers(0, 6)):
        case 0:
            query = Thing.select().where(condition).order_by(*draw(ORDERS))
            return query.limit(draw(st.integers(1, 3))) if draw(st.booleans()) else query
        case 1:
            count = peewee.fn.SUM(Thing.size)
            return Thing.select(Thing.host_id, count).where(condition).group_by(Thing.host_id)
        case 2:
            joined = Thing.select(Thing.id, Mark.word).join(Mark, on=Mark.thing_id == Thing.id)
            return joined.where(condition & (Mark.word != draw(WORDS))).tuples()
        case 3:
            values = {"size": Thing.size + draw(SIZES), "name": draw(WORDS)}
            values["labels"] = {draw(WORDS): draw(SIZES)}
            values["delete_time"] = draw(st.none() | SIZES)
            return Thing.update(values).where(condition)
        case 4:
            return Thing.delete().where(condition)
        case 5:
            made = Thing.insert(id=draw(WORDS), create_time=1, update_time=draw(SIZES), spec=b"s")
            size = draw(st.just(peewee.EXCLUDED.size) | SIZES.map(lambda more: Thing.size + more))
            return made.on_conflict(conflict_target=[Thing.id], update={Thing.size: size})
        case _:
            rows = draw(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3))
            return Mark.insert_many(rows, [Mark.thing_id, Mark.word]).on_conflict_ignore()


@given(found=st.lists(queries(), min_size=1, max_size=10))
@settings(max_examples=200, deadline=None)
def test_texts_and_parameters_are_peewees(found: list[Any]) -> None:
    opened = peewee.SqliteDatabase(":memory:")
    database.initialize(opened)
    for query in found:
        made = statements.made(opened, query)
        theirs = query.sql()
        if made is not None:
            assert made[0] == theirs[0]
            assert [_plain(each) for each in made[1]] == [_plain(each) for each in theirs[1]]


ROWS = st.fixed_dictionaries(
    {
        "name": WORDS,
        "host_id": WORDS,
        "size": SIZES,
        "labels": st.dictionaries(WORDS, WORDS, max_size=2),
        "spec": st.binary(max_size=2),
        "delete_time": st.none() | SIZES,
    }
)


@st.composite
def selects(draw: st.DrawFn) -> Any:
    some = [Thing.labels, Thing.id, Thing.spec, Thing.size]
    fields = draw(st.sampled_from([(), (Thing.id,), some, (Thing.id, Thing.size + 1)]))
    if draw(st.booleans()):
        joined = Thing.select(Mark.word, Thing.labels).join(Mark, on=Mark.thing_id == Thing.id)
        return joined.where(draw(CONDITIONS)).order_by(Thing.id, Mark.word).tuples()
    query = Thing.select(*fields).where(draw(CONDITIONS)).order_by(Thing.id)
    return query.tuples() if draw(st.booleans()) else query


@given(rows=st.lists(ROWS, max_size=4), query=selects())
@settings(max_examples=200, deadline=None)
def test_rows_are_peewees(rows: list[dict[str, Any]], query: Any) -> None:
    opened = peewee.SqliteDatabase(":memory:")
    database.initialize(opened)
    opened.create_tables([Thing, Mark])
    for number, row in enumerate(rows):
        Thing.create(id=f"t-{number}", create_time=number, update_time=number, **row)
        Mark.insert_many([(f"t-{number}", word) for word in "ab"]).execute()
    theirs = object.__new__(peewee.ModelSelect)
    theirs.__dict__ = query.clone().__dict__
    found, expected = list(query), list(theirs)
    assert [_values(each) for each in found] == [_values(each) for each in expected]
    assert list(query) == found
    assert len(query) == len(found)
    assert query.count() == len(found)
    assert query.exists() == bool(found)
    first = query.get_or_none()
    assert _values(first) == (_values(found[0]) if found else None)
    opened.close()


@given(before=ROWS, after=ROWS)
@settings(max_examples=50, deadline=None)
def test_saved_rows_are_read_again(before: dict[str, Any], after: dict[str, Any]) -> None:
    opened = peewee.SqliteDatabase(":memory:")
    database.initialize(opened)
    opened.create_tables([Thing])
    Thing.create(id="other", create_time=1, update_time=1)
    row = Thing.create(id="t-1", create_time=1, update_time=1, **before)
    assert _values(Thing.get_by_id("t-1")) == _values(row)
    for name, value in after.items():
        setattr(row, name, value)
    assert row.save() == 1
    found = Thing.get_by_id("t-1")
    assert {name: getattr(found, name) for name in after} == after
    assert found.version == 1
    with pytest.raises(peewee.IntegrityError):
        Thing.create(id="t-1", create_time=1, update_time=1)
    found.id = "gone"
    assert found.save() == 0
    assert (Thing.get_by_id("other").name, Thing.get_by_id("other").labels) == ("", {})
    opened.close()


@given(values=ROWS)
@settings(max_examples=50, deadline=None)
def test_a_fresh_row_is_as_its_class_makes_it(values: dict[str, Any]) -> None:
    opened = peewee.SqliteDatabase(":memory:")
    database.initialize(opened)
    opened.create_tables([Thing])
    row = {"id": "t-1", "create_time": 1, "update_time": 2, **values}
    fresh, made = Thing.fresh(**row), Thing(**row)
    assert _values(fresh) == _values(made)
    assert fresh.dirty_fields == made.dirty_fields
    assert fresh.labels is not Thing.fresh(**row).labels or "labels" in values
    fresh.save(force_insert=True)
    assert Thing.get_by_id("t-1").__data__ == made.__data__
    opened.close()


def test_a_prepared_select_is_built_once_for_each_number_of_values(engine: Engine) -> None:
    built = []

    def build(ids: list[str]) -> Any:
        built.append(len(ids))
        return Thing.select().where(Thing.id.in_(ids)).order_by(Thing.id)

    for number in range(60):
        Thing.create(id=f"t-{number:02}", create_time=1, update_time=1, labels={"n": number})
    query = Prepared(Thing, build)
    assert [row.labels for row in query.rows(["t-01", "t-02"])] == [{"n": 1}, {"n": 2}]
    assert [row.id for row in query.rows(["t-03", "none"])] == ["t-03"]
    assert built == [2]
    # A text for each number of very many would be too much.
    many = [f"t-{number:02}" for number in range(60)]
    assert [row.id for row in query.rows(many)] == many
    found = Thing.find("t-05")
    assert found is not None
    assert _values(found) == _values(Thing.get_by_id("t-05"))
    assert Thing.find("none") is None
    with pytest.raises(peewee.DoesNotExist):
        Thing.get_by_id("none")


def _values(row: Any) -> Any:
    return row if row is None or isinstance(row, tuple) else (type(row), row.__data__, row._dirty)


def _plain(parameter: Any) -> Any:
    found = getattr(parameter, "obj", parameter)  # bytes come wrapped
    return type(found), found


def test_rows_come_and_go(engine: Engine) -> None:
    Thing.create(id="t-1", create_time=1, update_time=1, labels={"a": 1}, spec=b"\0x")
    row = Thing.get_by_id("t-1")
    assert (row.labels, bytes(row.spec), row.delete_time) == ({"a": 1}, b"\0x", None)
    row.size, row.delete_time = 3, 7
    row.save()
    assert Thing.select(Thing.size).where(Thing.id == "t-1").scalar() == 3
    assert Thing.get_or_none((Thing.id == "t-1") & (Thing.delete_time == 8)) is None
    Thing.insert(id="t-1", create_time=1, update_time=1, size=4).on_conflict(
        conflict_target=[Thing.id], update={Thing.size: peewee.EXCLUDED.size}
    ).execute()
    assert Thing.get_by_id("t-1").size == 4
    assert Thing.delete().where(Thing.id.in_(["t-1", "t-2"])).execute() == 1
    assert engine.left == 0


def test_what_is_not_known_is_left_to_peewee(engine: Engine) -> None:
    other = Thing.alias()
    query = Thing.select().join(other, on=other.host_id == Thing.id)
    assert list(query) == []
    assert list(Thing.select().where(Thing.id.in_([str(n) for n in range(700)]))) == []
    assert engine.left == 2


def test_a_default_that_is_made_anew_is_left_to_peewee(engine: Engine) -> None:
    numbers = iter(range(5))

    class Numbered(peewee.Model):
        number = peewee.IntegerField(default=lambda: next(numbers))
        word = peewee.TextField()

        class Meta:
            database = engine

    engine.create_tables([Numbered])
    Numbered.insert(word="a").execute()
    Numbered.insert(word="b").execute()
    assert [row.number for row in Numbered.select()] == [0, 1]


def test_a_kept_query_is_built_once_for_each_number_of_values(engine: Engine) -> None:
    built = []

    def build(ids: list[str], sizes: list[int]) -> Any:
        built.append((len(ids), len(sizes)))
        return Thing.select(Thing.id).where(Thing.id.in_(ids) & (Thing.size > sizes[0]))

    rows = [{"id": f"t-{n}", "size": n, "create_time": 0, "update_time": 0} for n in range(4)]
    Thing.insert_many(rows).execute()
    found = statements.Kept(build)
    assert found.run(engine, ["t-1", "t-2"], [0]) == [("t-1",), ("t-2",)]
    assert found.run(engine, ["t-2", "t-3"], [2]) == [("t-3",)]
    assert found.run(engine, ["t-0"], [-1]) == [("t-0",)]
    assert built == [(2, 1), (1, 1)]


def test_a_kept_insert_has_the_defaults_of_its_model(engine: Engine) -> None:
    fields = [Thing.id, Thing.create_time, Thing.update_time]
    kept = statements.Kept(lambda *rows: Thing.insert_many(rows, fields=fields))
    assert kept.run(engine, ("t-1", 5, 6), ("t-2", 7, 8)) == []
    row = Thing.get_by_id("t-2")
    assert (row.create_time, row.update_time, row.labels, row.version) == (7, 8, {}, 1)


@pytest.mark.parametrize(("count", "length"), [(0, 0), (1, 1), (2, 2), (3, 4), (5, 8), (64, 64)])
def test_lists_of_an_in_have_few_lengths(count: int, length: int) -> None:
    found = statements.padded(list(range(count)))
    assert len(found) == length
    assert set(found) == set(range(count))
