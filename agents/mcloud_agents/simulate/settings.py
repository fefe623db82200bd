"""What simulated hosts are like."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path

from mcloud_agents import settings as agent_settings

# Of hosts' underlays. Nothing is ever sent there: RFC 2544 keeps these for benchmarks.
UNDERLAY = ipaddress.ip_network("198.18.0.0/15")
MOST_HOSTS = UNDERLAY.num_addresses - 2


@dataclass(frozen=True)
class Settings:
    """Of all simulated hosts. Sizes are of each."""

    control_plane: str  # host:port of the public port
    state_dir: Path
    host_count: int = 10
    seed: int = 1
    prefix: str = "sim-"
    vcpu_count: int = 32
    memory_mib: int = 131_072
    disk_gib: int = 2_000
    latency_ms: tuple[float, float] = (1.0, 10.0)  # of each step, from .. to
    refusal_probability: float = 0.0  # of each step of bringing a domain up
    disconnects_per_hour: float = 0.0
    crashes_per_hour: float = 0.0
    report_interval_s: float = 10.0
    download: bool = False  # the bytes of each image, once a host; they are checked, not kept
    storage: bool = True  # it stores volumes, too

    def name(self, number: int) -> str:
        """Return the name of a host, counted from 1."""
        return f"{self.prefix}{number:05d}"

    def of_host(self, number: int) -> agent_settings.Settings:
        """Return what the agent of a host is told."""
        return agent_settings.Settings(
            control_plane=self.control_plane,
            name=self.name(number),
            underlay_ip=str(UNDERLAY[number]),
            reserved_memory_mib=0,
            reserved_disk_gib=0,
            state_dir=self.state_dir,
            run_dir=self.state_dir,
            pki_dir=self.state_dir,
            storage_enabled=self.storage,
            report_interval_s=self.report_interval_s,
        )
