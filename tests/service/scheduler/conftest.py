"""A control plane for each module, over SQLite and PostgreSQL."""

from service.core.plane import client, plane, postgresql_server  # noqa: F401
