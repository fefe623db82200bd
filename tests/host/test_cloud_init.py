"""Stock Debian with stock cloud-init takes hostname, key and user data from us. Minutes long."""

from __future__ import annotations

import pytest

from fakes.host_cloud import HostCloud
from fakes.real_guest import boot, build
from mcloud.compute.v1 import flavor_pb2

pytestmark = [pytest.mark.host, pytest.mark.slow]

BOOT_S = 900  # systemd and cloud-init, emulated


def test_stock_cloud_init_takes_what_we_tell(
    host_cloud: HostCloud, tmp_path_factory: pytest.TempPathFactory
) -> None:
    guest = boot(
        host_cloud,
        build("cloud-image", "cloud.qcow2", timeout_s=1800),
        tmp_path_factory.mktemp("keys"),
        flavor=flavor_pb2.FlavorSpec(vcpu_count=1, memory_mib=768, disk_gib=4),
        user_data=b"#!/bin/sh\necho told by user data > /told\n",
        user="debian",
        patience_s=90,  # OpenSSH under emulation takes its time
    )
    assert guest.says("hostname", BOOT_S) == "stack-testvm"
    assert guest.says("cloud-init status --wait | tail -1", BOOT_S) == "status: done"
    assert guest.says("cat /told") == "told by user data"
    assert "OpenStack" in guest.says("cloud-id; cat /run/cloud-init/result.json")
