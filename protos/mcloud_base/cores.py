"""No core files: they would hold the keys and tokens that a daemon has in memory."""

from __future__ import annotations

import resource
from contextlib import suppress
from pathlib import Path

_FILTER = Path("/proc/self/coredump_filter")


def forbid() -> None:
    """Have this process, and what it starts, leave no core.

    A core that goes to a program (`kernel.core_pattern = |…`) is made whatever the limit is; hence
    the filter, which leaves nothing of the memory in it. Debuggers are not kept out: who may attach
    one reads the memory anyway. Source: core(5).
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(OSError):  # a kernel without CONFIG_ELF_CORE makes none
        _FILTER.write_text("0")
