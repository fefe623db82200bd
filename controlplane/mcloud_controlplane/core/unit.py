"""What a unit of work gathers while it runs, for the end of its transaction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Unit:
    """A running unit of work.

    Args:
        changes: of resources, for the log: (type, id, project, kind of change).
        after_commit: what is to happen then.
        rollback: leave everything as it was, without an error.
    """

    changes: list[tuple[str, str, str, str]] = field(default_factory=list)
    after_commit: list[Callable[[], None]] = field(default_factory=list)
    rollback: bool = False

    def changed(self) -> set[tuple[str, str]]:
        """Return the resources that it has changed: (type, id)."""
        return {(type_, id_) for type_, id_, *_ in self.changes}
