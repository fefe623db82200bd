"""The tables that every database has beside its own, and the columns of every resource.

`bind` makes them for one database. Times are microseconds since 1970, UTC.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from typing import Any

import peewee

from mcloud_controlplane.core import database
from mcloud_controlplane.core.model import Model
from mcloud_controlplane.core.unit import Unit

SESSION_LEASE_S = 30  # for how long a host counts as connected after it was last heard


DESIRED = "desired"  # the type of the changes that wake a host's stream (`wake_host`)

# `not_before` of an operation that waits until its host says what a restore has found there.
HELD = 1 << 62


class Deployment(Model):
    """One row: which incarnation of the data this is, and its revision counter."""

    id = peewee.IntegerField(primary_key=True, default=1)
    epoch = peewee.TextField()  # replaced by a restore; numbers are compared within it
    revision = peewee.BigIntegerField(default=0)
    schema_version = peewee.IntegerField()  # the number of the last migration
    request_key = peewee.TextField()  # of the digests of requests


class Change(Model):
    """The log that watches follow, in the order of commits. Each change has a revision of its own.

    The revision counter's row is the last that a transaction locks; with a sequence, watchers on
    PostgreSQL lost changes.
    """

    revision = peewee.BigIntegerField()
    number = peewee.IntegerField()  # 0; it once counted within the revision of a transaction
    type = peewee.TextField()  # of the resource: "instance"
    resource_id = peewee.TextField()
    project_id = peewee.TextField()
    change = peewee.TextField()  # ADDED, MODIFIED, DELETED
    time = peewee.BigIntegerField()

    class Meta:
        primary_key = peewee.CompositeKey("revision", "number")
        indexes = ((("type", "revision"), False),)


class Request(Model):
    """A mutation that was accepted, so that its repeat finds it."""

    project_id = peewee.TextField()
    principal_id = peewee.TextField()
    method = peewee.TextField()
    request_id = peewee.TextField()
    hash = peewee.TextField()
    operation_id = peewee.TextField()  # or, of an ISSUE, what it made
    time = peewee.BigIntegerField(index=True)

    class Meta:
        primary_key = peewee.CompositeKey("project_id", "principal_id", "method", "request_id")


class Operation(Model):
    """A receipt; while it runs also the workflow's durable state and lease."""

    id = peewee.TextField(primary_key=True)
    project_id = peewee.TextField(index=True)
    method = peewee.TextField()
    resource_type = peewee.TextField(default="")
    resource_id = peewee.TextField(default="", index=True)
    resource_name = peewee.TextField(default="")
    principal_id = peewee.TextField()
    request_id = peewee.TextField()
    state = peewee.TextField()  # names of mcloud.common.v1.Operation.State
    cancel_requested = peewee.BooleanField(default=False)
    error = peewee.BlobField(null=True)  # google.rpc.Status
    request = peewee.BlobField(null=True)  # google.protobuf.Any, secrets masked
    response = peewee.BlobField(null=True)  # google.protobuf.Any
    workflow = peewee.TextField(default="")  # registered name; empty: it was quick
    job = peewee.TextField(default="{}")  # JSON: the ids that were made before the first effect
    position = peewee.IntegerField(default=0)  # steps that are done (undone ones are subtracted)
    attempt = peewee.IntegerField(default=1)
    trace_id = peewee.TextField(default="")
    create_time = peewee.BigIntegerField()
    end_time = peewee.BigIntegerField(null=True)
    deadline = peewee.BigIntegerField(null=True)
    not_before = peewee.BigIntegerField(default=0)  # of the next try
    lease_owner = peewee.TextField(default="")
    lease_number = peewee.BigIntegerField(default=0)
    lease_expire_time = peewee.BigIntegerField(default=0)
    parent_id = peewee.TextField(null=True)  # the operation that it is a part of

    class Meta:
        indexes = ((("state", "lease_expire_time"), False),)


class OperationStep(Model):
    """A row of an operation's trace."""

    operation_id = peewee.TextField()
    number = peewee.IntegerField()
    attempt = peewee.IntegerField()
    name = peewee.TextField()
    service = peewee.TextField()
    host = peewee.TextField(default="")
    state = peewee.TextField()  # names of mcloud.common.v1.OperationStep.State
    start_time = peewee.BigIntegerField()
    end_time = peewee.BigIntegerField(null=True)
    detail = peewee.TextField(default="")

    class Meta:
        primary_key = peewee.CompositeKey("operation_id", "number", "attempt")


class Effect(Model):
    """What has been seen of the workflows of other databases, for each id that they work with.

    The highest lease number, and whether the id is retired (effects.py).
    """

    id = peewee.TextField(primary_key=True)
    lease_number = peewee.BigIntegerField()
    retired = peewee.BooleanField(default=False)
    time = peewee.BigIntegerField()


class HostSession(Model):
    """Which stream of a host is the current one. Taking it increments the number."""

    host_id = peewee.TextField(primary_key=True)
    number = peewee.BigIntegerField()
    process = peewee.TextField()
    incarnation = peewee.BigIntegerField(default=0)
    underlay_ip = peewee.TextField(default="")
    certificate_subject = peewee.TextField(default="")
    agent_version = peewee.TextField(default="")
    lease_expire_time = peewee.BigIntegerField()
    storage = peewee.BooleanField(default=False)


class SchemaMigration(Model):
    """A change of the tables that has run (migrations.py)."""

    number = peewee.IntegerField(primary_key=True)
    name = peewee.TextField()
    kind = peewee.TextField()  # EXPAND, CONTRACT
    since = peewee.TextField()  # the release that brought it
    release = peewee.TextField()  # of the process that ran it
    time = peewee.BigIntegerField()
    filled = peewee.BooleanField()


class Process(Model):
    """A process that uses the database (processes.py)."""

    id = peewee.TextField(primary_key=True)
    release = peewee.TextField()
    host = peewee.TextField()
    pid = peewee.IntegerField()
    services = peewee.TextField()  # comma-separated
    schema_number = peewee.IntegerField()  # the newest that its release knows
    start_time = peewee.BigIntegerField()
    heartbeat_time = peewee.BigIntegerField()


class Lease(Model):
    """Which process does a work that one at a time is to do (leases.py)."""

    name = peewee.TextField(primary_key=True)
    owner = peewee.TextField()
    expire_time = peewee.BigIntegerField()


_EMPTY: dict[Any, Any] = {"{}": dict, "[]": list}  # most documents are
encode = json.JSONEncoder(sort_keys=True).encode  # json.dumps would make one for each document


class JsonField(peewee.TextField):
    """A small JSON document."""

    def db_value(self, value: Any) -> Any:
        """Return the text."""
        return None if value is None else encode(value)

    def python_value(self, value: Any) -> Any:
        """Return the document."""
        empty = _EMPTY.get(value)
        if empty is not None:
            return empty()
        return None if value is None else json.loads(value)


class Resource(Model):
    """The columns behind ResourceMetadata, and the spec as the user gave it.

    What is searched, joined or counted has a column of its own in the subclass; `spec` keeps the
    message whole, so that a field that is only handed through needs no column.
    """

    id = peewee.TextField(primary_key=True)
    name = peewee.TextField(default="")
    project_id = peewee.TextField(default="", index=True)
    labels = JsonField(default=dict)
    version = peewee.BigIntegerField(default=1)
    generation = peewee.BigIntegerField(default=1)
    create_time = peewee.BigIntegerField()
    update_time = peewee.BigIntegerField()
    delete_time = peewee.BigIntegerField(null=True)
    spec = peewee.BlobField(default=b"")


# A lease that ends later than any that is given now was given before the clock was set back.
_LONGEST = 2 * SESSION_LEASE_S * 1_000_000


def is_connected(end: int, moment: int) -> bool:
    """Tell whether a host renews its session, whose lease ends then."""
    return moment < end < moment + _LONGEST


@dataclass(frozen=True)
class Tables:
    """The shared tables of one database."""

    deployment: type[Deployment]
    change: type[Change]
    request: type[Request]
    operation: type[Operation]
    operation_step: type[OperationStep]
    effect: type[Effect]
    host_session: type[HostSession]
    schema_migration: type[SchemaMigration]
    process: type[Process]
    lease: type[Lease]

    def models(self) -> list[type[peewee.Model]]:
        """Return all of them."""
        return [getattr(self, name) for name in self.__dataclass_fields__]

    def epoch(self) -> str:
        """Return the database's epoch, which only a restore changes. Within a unit."""
        return str(database.constant(_EPOCH))

    def request_key(self) -> bytes:
        """Return the key of the digests of requests. Within a unit."""
        return str(database.constant(_REQUEST_KEY)).encode()

    def revision(self) -> int:
        """Return the revision up to which everything is committed. Within a unit."""
        ((revision,),) = database.execute(_REVISION).fetchall()
        return int(revision)

    def connected(self) -> Any:
        """Return the condition on sessions that their hosts renew them. Within a unit."""
        moment = database.now()
        end = self.host_session.lease_expire_time
        return (end > moment) & (end < moment + _LONGEST)

    def log_changes(self, unit: Unit, notice: str | None) -> None:
        """Write what a unit changed under the next revisions; its transaction's last writes.

        Each transaction does this, so its SQL is not made anew.

        Args:
            notice: for other processes; None: not over PostgreSQL, they see the commit.
        """
        moment = database.now()
        changes = dict.fromkeys(unit.changes)
        rows = [(number, *change, moment) for number, change in enumerate(changes, 1)]
        count = len(rows)
        if notice is None:
            ((last,),) = database.execute(_NEXT_REVISIONS, [count]).fetchall()
        else:  # all of it, but for what is too much for one statement
            some, rows = rows[:_CHANGES_AT_ONCE], rows[_CHANGES_AT_ONCE:]
            statement = _LOG_AND_NOTIFY.format(", ".join([_TYPED_PLACES] * len(some)))
            parameters = [count, count, *(value for row in some for value in row)]
            told = database.execute(statement, [*parameters, database.CHANNEL, notice])
            ((last, _),) = told.fetchall()
        before = last - count
        for first in range(0, len(rows), _CHANGES_AT_ONCE):
            some = rows[first : first + _CHANGES_AT_ONCE]
            places = ", ".join([_CHANGE_PLACES] * len(some))
            parameters = [value for row in some for value in (before + row[0], *row[1:])]
            database.execute(f"{_INSERT_CHANGES} VALUES {places}", parameters)


_EPOCH = "SELECT epoch FROM deployment WHERE id = 1"
_REQUEST_KEY = "SELECT request_key FROM deployment WHERE id = 1"
_REVISION = "SELECT revision FROM deployment WHERE id = 1"
_NEXT_REVISIONS = "UPDATE deployment SET revision = revision + ? WHERE id = 1 RETURNING revision"
_INSERT_CHANGES = (
    "INSERT INTO change (revision, number, type, resource_id, project_id, change, time)"
)
_CHANGE_PLACES = "(?, 0, ?, ?, ?, ?, ?)"
_TYPED_PLACES = "(?::int, ?::text, ?::text, ?::text, ?::text, ?::bigint)"
_LOG_AND_NOTIFY = (
    f"WITH next AS ({_NEXT_REVISIONS}), logged AS ("  # noqa: S608 (of constants)
    f"{_INSERT_CHANGES} SELECT next.revision - ?::int + line.number, 0, type, resource_id,"
    " project_id, change, time FROM next, (VALUES {})"
    " AS line (number, type, resource_id, project_id, change, time)"
    ") SELECT next.revision, pg_notify(?, ?) FROM next"
)
_CHANGES_AT_ONCE = 500


def bind(proxy: peewee.DatabaseProxy) -> Tables:
    """Make the shared tables for one database."""

    def bound(base: type[peewee.Model], name: str) -> Any:
        meta = type("Meta", (), {"database": proxy, "table_name": name})
        return type(base.__name__, (base,), {"Meta": meta, "__module__": base.__module__})

    operation = bound(Operation, "operation")
    of_parts = operation.parent_id.is_null(False)
    operation.add_index(operation.parent_id, operation.state, where=of_parts)
    return Tables(
        deployment=bound(Deployment, "deployment"),
        change=bound(Change, "change"),
        request=bound(Request, "request"),
        operation=operation,
        operation_step=bound(OperationStep, "operation_step"),
        effect=bound(Effect, "effect"),
        host_session=bound(HostSession, "host_session"),
        schema_migration=bound(SchemaMigration, "schema_migration"),
        process=bound(Process, "process"),
        lease=bound(Lease, "lease"),
    )


def changed(type_: str, resource_id: str, project_id: str, change: str = "MODIFIED") -> None:
    """Log a change of a resource with the running unit's revision."""
    database.unit().changes.append((type_, resource_id, project_id, change))


def wake_runners(operation_id: str, project_id: str) -> None:
    """Log that an operation waits for a runner, or is to end early.

    Who runs operations hears of nothing else: of each of their steps there are several changes.
    """
    changed("work", operation_id, project_id)


def wake_host(host_id: str) -> None:
    """Log that somebody waits for a host to do something, which is desired of it from now on."""
    changed(DESIRED, host_id, "")


def tell_end(operation_id: str, project_id: str) -> None:
    """Log that an operation has ended, for who waits for just that."""
    changed("end", operation_id, project_id)


def new_epoch() -> str:
    """Make an epoch."""
    return secrets.token_hex(8)
