"""A control plane for each module, a compute database for each test: SQLite and PostgreSQL."""

from service.compute.tables import opened, postgresql_url  # noqa: F401
from service.core.plane import client, plane, postgresql_server  # noqa: F401
