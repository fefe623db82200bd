"""mcloud-controlplane whose machine's clock is set: `python -m fakes.stepped_controlplane CONFIG`.

The file `clock` beside CONFIG says by how many seconds the clock is off; it may change at any time.
Clocks that are never set (monotonic ones) go on as they are, and so do those of TLS and gRPC, which
reads `time.time` against a clock of its own.
"""

from __future__ import annotations

import datetime
import sys
import time
from pathlib import Path
from typing import Any

from jwt import api_jwt

from mcloud_controlplane.__main__ import main

_FILE = Path(sys.argv[1]).parent / "clock"
_true_time_ns = time.time_ns


def _time_ns() -> int:
    return _true_time_ns() + int(_FILE.read_text()) * 1_000_000_000


class _Datetime(datetime.datetime):
    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> Any:
        return datetime.datetime.fromtimestamp(_time_ns() / 1e9, tz)


time.time_ns = _time_ns
api_jwt.datetime = _Datetime  # type: ignore[misc]

if __name__ == "__main__":
    main(["--config", sys.argv[1]])
