"""Databases that nobody has used, in the session's PostgreSQL."""

from __future__ import annotations

from itertools import count

from fixtures_postgresql import DATABASES, Server

_schemas = count(1)


def new_schema(server: Server) -> str:
    """Return databases that nobody has used, as settings.database takes them."""
    schema = f"flow{next(_schemas)}"
    for name in DATABASES:
        server.execute(f"CREATE SCHEMA {schema}", name)
    return server.url("{name}", schema)
