"""What simulated hosts have done, counted."""

from __future__ import annotations

import asyncio
import resource
import time
from collections import Counter
from dataclasses import dataclass, field

import grpc
from google.rpc import status_pb2

from mcloud_base import errors, rpc

_LOOK_S = 0.1  # between two looks at calls that have ended


@dataclass
class Tally:
    """Counts since the start of the program."""

    calls: Counter[str] = field(default_factory=Counter)  # that have ended, by method
    errors: Counter[str] = field(default_factory=Counter)  # of calls, by reason
    refusals: int = 0
    disconnects: int = 0
    crashes: int = 0
    _start: float = field(default_factory=time.monotonic)
    _ended: list[grpc.aio.Call] = field(default_factory=list)  # not looked at yet
    _looking: asyncio.Task[None] | None = None

    def told(self, method: str, call: grpc.aio.Call) -> None:
        """Count a call that has ended (link.Told)."""
        self.calls[method.rpartition(".")[2]] += 1
        # Its status is there, but only a coroutine may say it: a task for many.
        self._ended.append(call)
        if self._looking is None:
            self._looking = asyncio.get_running_loop().create_task(self._look())

    async def _look(self) -> None:
        await asyncio.sleep(_LOOK_S)
        ended, self._ended, self._looking = self._ended, [], None
        for call in ended:
            code = await call.code()
            if code is not grpc.StatusCode.OK:
                metadata = await call.trailing_metadata()
                self.errors[_reason(metadata) or code.name] += 1

    def summary(self) -> dict[str, object]:
        """Return everything, and what the program has used of the machine."""
        used = resource.getrusage(resource.RUSAGE_SELF)
        return {
            "duration_s": round(time.monotonic() - self._start, 1),
            "cpu_s": round(used.ru_utime + used.ru_stime, 1),
            "memory_mib": used.ru_maxrss >> 10,
            "calls": dict(self.calls.most_common()),
            "errors": dict(self.errors.most_common()),
            "refusals": self.refusals,
            "disconnects": self.disconnects,
            "crashes": self.crashes,
        }


def _reason(metadata: object) -> str:
    for key, value in metadata or ():  # type: ignore[attr-defined]
        if key == rpc.STATUS_KEY and isinstance(value, bytes):
            return errors.from_status(status_pb2.Status.FromString(value)).reason
    return ""
