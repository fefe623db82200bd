"""Serves SchemaService, the same for every package that has a database."""

from __future__ import annotations

from typing import Any

from mcloud.common.v1 import schema_pb2
from mcloud_controlplane.core import convert, database, migrations, processes, tables
from mcloud_controlplane.core.auth import Context

_MIGRATE = "run: mcloud-controlplane migrate"


class SchemaServicer:
    """Tells where the tables of one database are on the way from release to release."""

    def __init__(
        self,
        name: str,
        opened: database.Database,
        shared: tables.Tables,
        process: processes.Process,
    ) -> None:
        self._name = name
        self._database = opened
        self._tables = shared
        self._release = process.release
        self._migrator = migrations.Migrator(name, opened, shared, process.release)

    async def GetSchema(
        self, request: schema_pb2.GetSchemaRequest, context: Context
    ) -> schema_pb2.Schema:
        """Return it."""
        return await self._database.read(self._read)

    def _read(self) -> schema_pb2.Schema:
        history = self._migrator.history()
        pending = self._migrator.pending()
        living = processes.living(self._tables)
        contracts = [each for each in pending if each.kind == migrations.Kind.CONTRACT]
        older = self._migrator.older(contracts[-1]) if contracts else []
        filling = [row for row in history if not row.filled]
        releases = {row.release for row in living}
        summaries = {each.number: each.summary for each in self._migrator.known}
        return schema_pb2.Schema(
            database=self._name,
            number=history[-1].number,
            release=self._release.version,
            migrations=[_done(row, summaries) for row in history] + list(map(_pending, pending)),
            processes=list(map(_process, living)),
            upgrade_ready=not pending and not filling and len(releases) == 1,
            contract_ready=bool(contracts) and not older and not filling,
            next_step=_next_step(contracts, older, filling, releases),
        )


def _next_step(
    contracts: list[migrations.Migration], older: list[Any], filling: list[Any], releases: set[str]
) -> str:
    if filling:
        return f"wait until {filling[0].name} has filled its rows"
    if older:
        return f"upgrade or stop {'; '.join(map(processes.text, older))}; then {_MIGRATE}"
    if contracts:
        return _MIGRATE
    if len(releases) > 1:
        return f"upgrade until every process is of one release; now {', '.join(sorted(releases))}"
    return "nothing; the next release may be started"


def _done(row: Any, summaries: dict[int, str]) -> schema_pb2.SchemaMigration:
    return schema_pb2.SchemaMigration(
        number=row.number,
        name=row.name,
        kind=schema_pb2.SchemaMigration.Kind.Value(f"KIND_{row.kind}"),
        since=row.since,
        summary=summaries.get(row.number, ""),
        run_time=convert.timestamp(row.time),
        run_release=row.release,
        filling=not row.filled,
    )


def _pending(migration: migrations.Migration) -> schema_pb2.SchemaMigration:
    return schema_pb2.SchemaMigration(
        number=migration.number,
        name=migration.name,
        kind=schema_pb2.SchemaMigration.Kind.Value(f"KIND_{migration.kind}"),
        since=migration.since,
        summary=migration.summary,
    )


def _process(row: Any) -> schema_pb2.ControlPlaneProcess:
    return schema_pb2.ControlPlaneProcess(
        id=row.id,
        release=row.release,
        host=row.host,
        pid=row.pid,
        services=row.services.split(","),
        schema_number=row.schema_number,
        start_time=convert.timestamp(row.start_time),
        heartbeat_time=convert.timestamp(row.heartbeat_time),
    )
