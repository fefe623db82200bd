"""Everything that instances leave traces of: in the databases, on the host."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

from fakes.host_cloud import HostCloud

# What a row is, and which rows are meant.
ROWS = {
    "compute": {
        "claim": "SELECT domain_id, host_id FROM claim",
        "domain": "SELECT id, state FROM domain WHERE absent_time IS NULL",
        "instance": "SELECT id, state FROM instance WHERE state != 'DELETED' OR reserved",
        "operation": "SELECT id, workflow FROM operation WHERE state IN ('RUNNING', 'UNDOING')",
    },
    "network": {
        "port": "SELECT id, owner_id FROM port",
        "address": "SELECT ip_address, port_id FROM address",
        "port group": "SELECT port_id FROM port_group",
    },
    "volume": {
        "attachment": "SELECT id, instance_id FROM attachment",
        "volume": "SELECT id, state, attachment_id FROM volume",
        "operation": "SELECT id, workflow FROM operation WHERE state IN ('RUNNING', 'UNDOING')",
    },
    "image": {"use": "SELECT image_id, instance_id FROM image_use"},
}
_COMMANDS = {
    "domain": "virsh list --all --name",
    "interface": "ip -o link | sed 's/^[0-9]*: //; s/[:@].*//'",
    "namespace": "ip netns | sed 's/ .*//'",
    "process": "cat /proc/[0-9]*/comm | grep -E 'qemu|dnsmasq' || true",
}
_FILES = (
    "lib/compute/instances/*",
    "lib/compute/instances/*/*",
    "lib/volumes/*",
    "run/volumes/*",
    "run/network/dhcp/*",
)


def take(cloud: HostCloud) -> set[str]:
    """Return it, a line each."""
    found = {f"{line}" for line in _of_databases(cloud.state_dir)}
    return found | _of_host(cloud)


def _of_databases(state_dir: Path) -> set[str]:
    found = set()
    for name, queries in ROWS.items():
        connection = sqlite3.connect(f"file:{state_dir / name}.db?mode=ro", uri=True, timeout=20)
        try:
            for what, query in queries.items():
                rows = connection.execute(query).fetchall()
                found |= {f"{name} {what} {' '.join(map(str, row))}" for row in rows}
        finally:
            connection.close()
    return found


def _of_host(cloud: HostCloud) -> set[str]:
    script = "; echo --; ".join([*_COMMANDS.values(), "nft -j list ruleset"])
    *parts, ruleset = cloud.host.run("sh", "-c", script).split("--\n")
    found = set()
    for what, part in zip(_COMMANDS, parts, strict=True):
        found |= {f"host {what} {line}" for line in part.splitlines() if line}
    found |= {f"host rule {line}" for line in _rules(ruleset)}
    top = cloud.host.state / "hosts" / "h1" / "mcloud"
    for pattern in _FILES:
        found |= {f"host file {path.relative_to(top)}" for path in top.glob(pattern)}
    for path in top.glob("run/network/dhcp/*/hosts"):
        found |= {f"host dhcp {line}" for line in path.read_text().splitlines()}
    return found


def _rules(ruleset: str) -> list[str]:
    lines = []
    for item in json.loads(ruleset)["nftables"]:
        if "metainfo" not in item:
            lines.append(json.dumps(_plain(item), sort_keys=True))
    return lines


def _plain(value: Any) -> Any:
    """Leave out what changes by itself."""
    if isinstance(value, dict):
        return {
            key: _plain(each)
            for key, each in value.items()
            if key not in ("handle", "packets", "bytes")
        }
    if isinstance(value, list):
        plain = [_plain(each) for each in value]
        return sorted(plain, key=json.dumps) if all(isinstance(x, str) for x in plain) else plain
    return value
