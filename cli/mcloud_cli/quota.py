"""mcloud quota."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from mcloud_cli import builder, follow, kinds, output

if TYPE_CHECKING:
    from mcloud_cli.session import Session

# Of each service: what its limits are called here, and what of the contract they are.
_LIMITS = {
    "compute": {
        "instances": "instance_count",
        "vcpus": "vcpu_count",
        "memory": "memory_mib",
        "keypairs": "key_pair_count",
        "server_groups": "server_group_count",
    },
    "image": {"images": "image_count", "image_gib": "image_bytes"},
    "network": {
        "networks": "network_count",
        "subnets": "subnet_count",
        "ports": "port_count",
        "security_groups": "security_group_count",
        "security_group_rules": "security_group_rule_count",
        "routers": "router_count",
        "floating_ips": "floating_ip_count",
    },
    "volume": {"volumes": "volume_count", "volume_gib": "volume_gib"},
}
_UNITS = {"memory": "In MiB; ", "image_gib": "In GiB; ", "volume_gib": "In GiB; "}
_GIB = 1 << 30
_MOST = 1 << 32  # also of GiB, as bytes in 64 bits


group = builder.group("quota", "What a project may have at once.", example="quota show")


@group.command()
@click.argument("project", default="", type=builder.Named(kinds.PROJECT), required=False)
@output.option
@click.pass_obj
def show(session: Session, project: str, form: str) -> None:
    """Show limits and use, of your project or another.

    Example: mcloud quota show norprod
    """
    project_id = session.resolve(kinds.PROJECT, project)
    found = {
        service: session.call(
            f"{service}.QuotaService/GetQuota", project_id=project_id, as_system=bool(project)
        )
        for service in _LIMITS
    }
    if form == "table":
        rows = [
            [_label(name), _text(name, getattr(quota.usage, name)), _limit(quota, name)]
            for quota in found.values()
            for name in (field.name for field in quota.limits.DESCRIPTOR.fields)
        ]
        output.table(["OF", "USED", "LIMIT"], rows)
    elif form in ("name", "id"):
        click.echo(found["compute"].project_id)
    else:
        output.data({service: output.as_dict(quota) for service, quota in found.items()}, form)


def _label(name: str) -> str:
    for ending, unit in (("_count", ""), ("_mib", " (MiB)"), ("_gib", " (GiB)")):
        if name.endswith(ending):
            return name.removesuffix(ending).replace("_", " ") + unit
    return name.replace("_", " ")


def _limit(quota: Any, name: str) -> str:
    limit = getattr(quota.limits, name)
    return "none" if limit < 0 else _text(name, limit)


def _text(name: str, value: int) -> str:
    return output.size(value) if name.endswith("_bytes") else str(value)


class _Number(click.ParamType[int]):
    """A limit; the help says it without its bounds, which are the same for all."""

    name = "number"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """Return it as a number."""
        return click.IntRange(-1, _MOST).convert(value, param, ctx)


def _options(function: Any) -> Any:
    """Give a command an option for each limit."""
    for name in reversed([name for names in _LIMITS.values() for name in names]):
        function = click.option(
            f"--{name.replace('_', '-')}",
            type=_Number(),
            help=f"{_UNITS.get(name, '')}-1: no limit.",
        )(function)
    return function


@group.command("set")
@click.argument("project", type=builder.Named(kinds.PROJECT))
@_options
@output.option
@click.pass_obj
def set_(session: Session, /, project: str, form: str, **given: int | None) -> None:
    """Set limits of a project; needs a role on the system.

    Example: mcloud quota set norprod --instances 1000 --ports 2000 --memory -1
    """
    wanted: dict[str, dict[str, int]] = {}
    for service, names in _LIMITS.items():
        for name, field in names.items():
            value = given[name]
            if value is not None:
                in_bytes = field.endswith("_bytes") and value > 0
                wanted.setdefault(service, {})[field] = value * _GIB if in_bytes else value
    if not wanted:
        raise click.UsageError("say what to set; see --help")
    project_id = session.resolve(kinds.PROJECT, project)
    done = {}
    for service, limits in wanted.items():
        operation = session.call(
            f"{service}.QuotaService/UpdateQuota",
            project_id=project_id,
            update_mask={"paths": list(limits)},
            limits=limits,
        )
        done[service] = follow.finish(session, operation, None, form)
    if form == "table":
        click.echo(f"Set the quota of {project}")
    elif form in ("name", "id"):
        click.echo(project_id)
    else:
        output.data({service: output.as_dict(each) for service, each in done.items()}, form)
