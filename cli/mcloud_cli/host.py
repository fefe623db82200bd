"""mcloud host."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from mcloud_cli import builder, kinds, output
from mcloud_cli.output import Column

if TYPE_CHECKING:
    from mcloud_cli.session import Session


group = builder.group(
    "host",
    "Hypervisors. A machine becomes one with a join token; see mcloud join-token.",
    example="host list",
)


def _room(field: str, unit: str) -> Column:
    def text(item: Any) -> str:
        status = item.status
        usable = getattr(status.total, field) - getattr(status.reserved, field)
        return f"{getattr(status.claimed, field)}/{usable}{unit}"

    return Column(field.split("_")[0].upper().replace("VCPU", "VCPUS"), text)


builder.add_list(
    group,
    kinds.HOST,
    (
        Column("STATE", lambda item: output.state(item.status), is_state=True),
        Column("ENABLED", lambda item: "no" if item.spec.disabled else "yes"),
        _room("vcpu_count", ""),
        _room("memory_mib", " MiB"),
        _room("disk_gib", " GiB"),
        Column("INSTANCES", lambda item: str(item.status.instance_count)),
        Column("REPORT", lambda item: output.age(item.status.last_report_time)),
    ),
    long=(
        Column("UNDERLAY", lambda item: str(item.status.underlay_ip)),
        Column("HYPERVISOR", lambda item: str(item.status.hypervisor_type)),
        Column("ZONE", lambda item: str(item.spec.availability_zone)),
        Column("AGENT", lambda item: str(item.status.agent_version)),
    ),
    all_projects=False,
)
builder.add_show(group, kinds.HOST, example="host-1")


@group.command()
@builder.named(kinds.HOST)
@output.option
@click.pass_obj
def enable(session: Session, host: str, form: str) -> None:
    """Let a host get new instances.

    Example: mcloud host enable host-1
    """
    changes = {"spec.disabled": False, "spec.disabled_reason": ""}
    builder.update(session, kinds.HOST, host, form, changes)


@group.command()
@builder.named(kinds.HOST)
@click.option("--reason", default="", help="For people.")
@output.option
@click.pass_obj
def disable(session: Session, host: str, reason: str, form: str) -> None:
    """Give a host no new instances; those that are there stay.

    Example: mcloud host disable host-1 --reason "new disks"
    """
    changes = {"spec.disabled": True, "spec.disabled_reason": reason}
    builder.update(session, kinds.HOST, host, form, changes)


@group.command()
@builder.named(kinds.HOST)
@click.option("--availability-zone", default=None, help="Where it stands.")
@click.option("--cpu-ratio", type=float, default=None, help="Virtual processors per real one.")
@click.option("--memory-ratio", type=float, default=None, help="Memory handed out per real one.")
@click.option("--disk-ratio", type=float, default=None, help="Disk handed out per real one.")
@builder.labels
@output.option
@click.pass_obj
def update(
    session: Session,
    host: str,
    availability_zone: str | None,
    cpu_ratio: float | None,
    memory_ratio: float | None,
    disk_ratio: float | None,
    labels: dict[str, str],
    form: str,
) -> None:
    """Change what the scheduler knows of a host.

    Example: mcloud host update host-1 --availability-zone north --cpu-ratio 8
    """
    changes = {
        "spec.availability_zone": availability_zone,
        "spec.cpu_allocation_ratio": cpu_ratio,
        "spec.memory_allocation_ratio": memory_ratio,
        "spec.disk_allocation_ratio": disk_ratio,
        "labels": labels,
    }
    builder.update(session, kinds.HOST, host, form, changes)


builder.add_delete(group, kinds.HOST, example="host-1")
