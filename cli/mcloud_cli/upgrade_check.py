"""mcloud admin upgrade-check."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from mcloud_cli import output

if TYPE_CHECKING:
    from mcloud_cli.session import Session

_DATABASES = ("identity", "compute", "image", "network", "volume")


@click.command("upgrade-check")
@click.option(
    "-o",
    "--output",
    "form",
    type=click.Choice(["table", "json", "yaml"]),
    default="table",
    help="How to print it.",
    show_default=True,
)
@click.pass_obj
def upgrade_check(session: Session, form: str) -> None:
    """Say which releases run, how far the databases are, and whether the next release may start.

    Exits 1 while it may not.

    Example: mcloud admin upgrade-check
    """
    schemas = [
        session.call(f"{name}.SchemaService/GetSchema", as_system=True) for name in _DATABASES
    ]
    hosts = _hosts(session)
    ready = all(schema.upgrade_ready for schema in schemas)
    if form == "table":
        _print(schemas, hosts)
    else:
        answer = {
            "databases": [output.as_dict(schema) for schema in schemas],
            "hosts": [
                {
                    "id": host.metadata.id,
                    "name": host.metadata.name,
                    "agent_version": host.status.agent_version,
                    "state": output.state(host.status),
                }
                for host in hosts
            ],
            "upgrade_ready": ready,
        }
        output.data(answer, form)
    if not ready:
        raise click.exceptions.Exit(1)


def _hosts(session: Session) -> list[Any]:
    found: list[Any] = []
    token = ""
    while True:
        page = session.call("compute.HostService/ListHosts", page_token=token, as_system=True)
        found += page.hosts
        token = page.next_page_token
        if not token:
            return found


def _print(schemas: list[Any], hosts: list[Any]) -> None:
    rows = [
        [schema.database, str(schema.number), _pending(schema), schema.next_step]
        for schema in schemas
    ]
    output.table(["DATABASE", "SCHEMA", "PENDING", "NEXT STEP"], rows)
    click.echo()
    output.table(["RELEASE", "HOST", "PROCESS", "SERVICES", "UP"], _processes(schemas))
    if hosts:
        click.echo()
        rows = [
            [host.status.agent_version or "-", host.metadata.name, output.state(host.status)]
            for host in hosts
        ]
        output.table(["AGENT", "HOST", "STATE"], rows)


def _pending(schema: Any) -> str:
    pending = [each for each in schema.migrations if not each.HasField("run_time")]
    return ", ".join(f"{each.name} ({output.state(each, 'kind')})" for each in pending) or "-"


def _processes(schemas: list[Any]) -> list[list[str]]:
    """Return a row for each process; one that serves several services uses several databases."""
    found = {each.id: each for schema in schemas for each in schema.processes}
    rows = []
    for each in sorted(found.values(), key=lambda each: each.start_time.seconds):
        services = ",".join(each.services)
        rows.append([each.release, each.host, str(each.pid), services, output.age(each.start_time)])
    return rows
