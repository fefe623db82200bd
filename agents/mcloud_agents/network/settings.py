"""What a host's dataplane is told by configuration; everything else stands in its document."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Settings:
    """Times in seconds.

    Args:
        underlay_ip: at which the other hosts' VXLAN packets arrive.
        underlay_device: has that address; empty lets the routing table choose.
        physical_networks: bridge on this host, by the name of the outside network it leads to.
        state_dir: what must outlive a boot: the last document and the numbers given out.
        runtime_dir: what a boot may take away. DHCP servers read it without root's rights, so
            others must be able to pass through it.
        dns_domain: of the guests' names.
    """

    underlay_ip: str
    underlay_device: str = ""
    physical_networks: Mapping[str, str] = field(default_factory=dict)
    state_dir: Path = Path("/var/lib/mcloud/network")
    runtime_dir: Path = Path("/run/mcloud/network")
    dns_domain: str = "mcloud.internal"
    vxlan_port: int = 4789
    reconcile_interval_s: float = 60.0  # how often the kernel is compared with the document
    apply_timeout_s: float = 120.0
