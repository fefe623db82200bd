"""A server group in a decision: its rule, and how many members each host has."""

from __future__ import annotations

from dataclasses import dataclass, field

AFFINITY, ANTI_AFFINITY = "AFFINITY", "ANTI_AFFINITY"
SOFT_AFFINITY, SOFT_ANTI_AFFINITY = "SOFT_AFFINITY", "SOFT_ANTI_AFFINITY"
HARD = (AFFINITY, ANTI_AFFINITY)


@dataclass
class Group:
    """A server group. A member is a claim: who is being deleted counts until the host lets it go.

    Args:
        most: members that a host may have, with ANTI_AFFINITY.
        members: how many there are, by host; at least 1.
    """

    id: str
    policy: str  # names of mcloud.compute.v1.ServerGroupSpec.Policy
    most: int = 1
    members: dict[str, int] = field(default_factory=dict)

    def admits(self, host_id: str) -> bool:
        """Tell whether the rule, if it is a hard one, allows one more member on a host."""
        if self.policy == AFFINITY:
            return not self.members or host_id in self.members
        if self.policy == ANTI_AFFINITY:
            return self.members.get(host_id, 0) < self.most
        return True

    def add(self, host_id: str) -> None:
        """Count one more member."""
        self.members[host_id] = self.members.get(host_id, 0) + 1

    def misplaced(self) -> list[str]:
        """Return the hosts with members that the rule does not allow."""
        if self.policy == AFFINITY:  # the most are where they should be, or the first of these
            best = max(self.members, key=lambda id_: (self.members[id_], id_), default="")
            return sorted(self.members.keys() - {best})
        if self.policy == ANTI_AFFINITY:
            return sorted(id_ for id_, count in self.members.items() if count > self.most)
        return []
