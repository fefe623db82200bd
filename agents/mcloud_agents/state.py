"""What the agent keeps on disk about itself: its incarnation, its epochs, that it runs once."""

from __future__ import annotations

import fcntl
import os
import re
from pathlib import Path

from mcloud_base import errors, tls


class State:
    """The agent's own files under `state_dir`.

    Args:
        directory: private to the host; made if missing.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory / "agent"
        self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock = -1

    def lock(self) -> None:
        """Make sure that no other agent works on this host, for the life of the process.

        Raises:
            WrongState: AGENT_RUNNING.
        """
        path = self._directory / "lock"
        self._lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._lock)
            raise errors.WrongState(
                "AGENT_RUNNING", f"another agent holds {path}; end it first", path=path
            ) from error

    def is_locked(self) -> bool:
        """Tell whether an agent works on this host now."""
        try:
            self.lock()
        except errors.WrongState:
            return True
        self.unlock()
        return False

    def unlock(self) -> None:
        """Let another agent work."""
        os.close(self._lock)

    def next_incarnation(self) -> int:
        """Return a number higher than at every start before; on disk before it is returned.

        Raises:
            DataLoss: INCARNATION_DAMAGED: reports with a lower one would be ignored.
        """
        path = self._directory / "incarnation"
        try:
            last = int(path.read_text())
        except FileNotFoundError:
            last = 0
        except ValueError as error:
            raise errors.DataLoss(
                "INCARNATION_DAMAGED", f"{path} holds no number; write a high one", path=path
            ) from error
        tls.write_private(path, b"%d\n" % (last + 1))
        return last + 1

    def epoch(self, session: str) -> str:
        """Return the epoch that was last remembered for a session, or the empty string."""
        path = self._epoch_path(session)
        return path.read_text().strip() if path.exists() else ""

    def remember_epoch(self, session: str, epoch: str) -> None:
        """Keep a session's epoch."""
        if self.epoch(session) != epoch:
            tls.write_private(self._epoch_path(session), epoch.encode())

    def _epoch_path(self, session: str) -> Path:
        if not re.fullmatch("[a-z]+", session):
            raise ValueError(session)
        return self._directory / f"epoch-{session}"
