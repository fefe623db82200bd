"""What a process under test is to do at its probes; in files, so that it survives the process."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from dataclasses import asdict, dataclass
from pathlib import Path

from mcloud_base import errors

Place = tuple[str, ...]  # ("create_instance", "1", "undo", "after"), ("16", "after")


@dataclass
class Blow:
    """One thing that is to happen."""

    place: Place
    what: str  # "fail", "repeat", "kill", "stand"
    times: int = 1  # -1: always


class Plan:
    """A directory that a test and a process share."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._blows = directory / "blows.json"
        self._visited = directory / "visited"

    def arm(self, *blows: Blow) -> None:
        """Have these happen, and nothing else."""
        new = self._blows.with_suffix(".new")
        new.write_text(json.dumps([asdict(blow) for blow in blows]))
        new.rename(self._blows)

    def pending(self) -> list[Blow]:
        """Return what has not happened yet."""
        if not self._blows.exists():
            return []
        blows = [Blow(**fields) for fields in json.loads(self._blows.read_text())]
        return [Blow(tuple(blow.place), blow.what, blow.times) for blow in blows]

    def visited(self) -> set[Place]:
        """Return every place that a process came by."""
        if not self._visited.exists():
            return set()
        return {tuple(line.split("\t")) for line in self._visited.read_text().splitlines()}

    async def _stand(self) -> None:
        """Stand still until this process gets a SIGUSR1."""
        released = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGUSR1, released.set)
        (self._visited.parent / "standing").touch()
        await released.wait()

    def is_standing(self) -> bool:
        """Tell, once, whether a process has come to stand."""
        mark = self._visited.parent / "standing"
        if not mark.exists():
            return False
        mark.unlink()
        return True

    async def probe(self, *place: str) -> None:
        """Note the place, and do what the plan says.

        Raises:
            errors.Internal: INJECTED_FAILURE, for "fail".
            errors.Unavailable: INJECTED_REPEAT, for "repeat": the caller tries again.
        """
        with self._visited.open("a") as file:
            file.write("\t".join(place) + "\n")
        blows = self.pending()
        blow = next((blow for blow in blows if blow.place == place and blow.times), None)
        if blow is None:
            return
        blow.times -= blow.times > 0
        self.arm(*(each for each in blows if each.times))  # first: it must not happen again
        if blow.what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if blow.what == "stand":
            await self._stand()
            return
        if blow.what == "repeat":
            raise errors.Unavailable("INJECTED_REPEAT", f"to be repeated: {' '.join(place)}")
        raise errors.Internal("INJECTED_FAILURE", f"made to fail: {' '.join(place)}")
