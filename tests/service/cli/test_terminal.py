"""On a terminal: waiting is the default, steps are shown in place, states have colours."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from service.cli.conftest import Cli

_LONGEST_S = 60.0


@contextmanager
def _terminal(cli: Cli, *arguments: str, **environment: str) -> Iterator[tuple[int, str]]:
    """Run a command on a terminal of its own; yield its exit code and all it wrote."""
    own, its = pty.openpty()
    env = {
        "MCLOUD_CONFIG_DIR": str(cli.home),
        "PYTHONPATH": ":".join(sys.path),
        "PATH": os.environ["PATH"],
        "TERM": "xterm",
        "COLUMNS": "120",
        **environment,
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "mcloud_cli.main", *arguments],
        stdin=its,
        stdout=its,
        stderr=its,
        env=env,
    )
    os.close(its)
    written = b""
    end = time.monotonic() + _LONGEST_S
    try:
        while time.monotonic() < end:
            try:
                chunk = os.read(own, 65_536)
            except OSError:  # the other end is closed
                break
            if not chunk:
                break
            written += chunk
        yield process.wait(_LONGEST_S), written.decode()
    finally:
        os.close(own)
        process.kill()
        process.wait()


def test_boot_is_followed_in_place_and_list_has_colours(cli: Cli, tmp_path: Path) -> None:
    disk = tmp_path / "disk.raw"
    disk.write_bytes(os.urandom(1 << 20))
    cli.run("flavor", "create", "tiny", "--vcpus", "1", "--memory", "64", "--disk", "1")
    upload = ("image", "create", "small", "--file", str(disk), "--disk-format", "raw")
    with _terminal(cli, *upload) as (code, text):
        assert code == 0, text
        assert "Uploading disk.raw" in text
    cli.run("network", "create", "wire")
    cli.run("subnet", "create", "wire4", "--network", "wire", "--cidr", "10.9.0.0/24")

    boot = ("boot", "--flavor", "tiny", "--image", "small", "--nic", "net-id=wire", "shown")
    with _terminal(cli, *boot) as (code, text):
        assert code == 1, text
        assert re.search(r"\x1b\[31m  5  ask for a host +conductor@\S+ .* FAILED", text), text
        assert "(NO_VALID_HOST)" in text
        assert "\x1b[" in text
    with _terminal(cli, "list") as (code, text):
        assert code == 0
        assert "\x1b[31mERROR" in text
    with _terminal(cli, "list", NO_COLOR="1") as (code, text):
        assert code == 0
        assert "\x1b[" not in text
    with _terminal(cli, "list", COLUMNS="50") as (code, text):
        assert max(len(line.rstrip()) for line in re.sub(r"\x1b\[\d*m", "", text).split("\n")) <= 50

    cli.run("delete", "shown", "--wait")
    cli.run("subnet", "delete", "wire4")
    cli.run("network", "delete", "wire")
    cli.run("image", "delete", "small")
    cli.run("flavor", "delete", "tiny")
