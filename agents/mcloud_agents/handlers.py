"""What fits the parts of the agent to their sessions (session.Handler) and to each other."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Protocol

from mcloud.common.v1 import session_pb2
from mcloud.conductor.v1 import domain_pb2
from mcloud.network.v1 import dataplane_pb2
from mcloud.scheduler.v1 import placement_pb2, placement_service_pb2
from mcloud_base import errors

if TYPE_CHECKING:
    from mcloud_agents.compute.driver import HostFacts
    from mcloud_agents.network.dataplane import InPlace
    from mcloud_agents.session import Handler

State = domain_pb2.DomainStatus.State


class Dataplane(Protocol):
    """What is used of network.dataplane.Dataplane."""

    async def apply(
        self, desired: dataplane_pb2.HostDataplane, in_place: InPlace
    ) -> dataplane_pb2.HostDataplaneStatus:
        """Bring the host to a document, or raise one of errors.

        Args:
            desired: the document.
            in_place: told the ids of the ports that guests may be plugged into, as soon as they
                may; what is to go may still be there.
        """
        ...

    async def artifacts(self) -> Sequence[session_pb2.Artifact]:
        """Return everything of the network's that is on the host."""
        ...


class DataplaneHandler:
    """The network part; also tells others how far it is."""

    def __init__(self, dataplane: Dataplane) -> None:
        self._dataplane = dataplane
        self._changed = asyncio.Condition()
        self._last = session_pb2.Observed()  # of the document that has been reached
        self._in_place: tuple[int, Collection[str]] = (0, ())  # a generation, its ports

    async def apply(self, desired: session_pb2.Desired) -> session_pb2.Observed:
        """Bring the network to the document; a tombstone stands for the empty one."""
        document = dataplane_pb2.HostDataplane()
        if not desired.absent and not desired.spec.Unpack(document):
            raise errors.InvalidArgument(
                "UNKNOWN_SPEC", f"{desired.spec.type_url} is not known to this agent"
            )
        status = await self._dataplane.apply(document, partial(self._tell, desired.generation))
        observed = session_pb2.Observed(
            id=desired.id,
            epoch=desired.epoch,
            generation=desired.generation,
            absent=desired.absent,
        )
        observed.status.Pack(status)
        self._last = observed
        return observed

    async def _tell(self, generation: int, port_ids: Collection[str]) -> None:
        async with self._changed:
            self._in_place = (generation, port_ids)
            self._changed.notify_all()

    async def observe_all(self) -> Sequence[session_pb2.Observed]:
        """Return the document that has been reached since the agent's start."""
        return [self._last] if self._last.id else []

    async def artifacts(self) -> Sequence[session_pb2.Artifact]:
        """Return everything of the network's."""
        return await self._dataplane.artifacts()

    async def wait_ports(
        self, port_ids: Collection[str], generation: int, deadline_s: float
    ) -> None:
        """Return once guests may be plugged into ports, as this or a later generation has them.

        Raises:
            Unavailable: DATAPLANE_BEHIND: they may not, by the deadline.
        """
        wanted = set(port_ids)

        def are_in_place() -> bool:
            reached, present = self._in_place
            return reached >= generation and wanted <= set(present)

        try:
            async with asyncio.timeout(deadline_s), self._changed:
                await self._changed.wait_for(are_in_place)
        except TimeoutError as error:
            raise errors.Unavailable(
                "DATAPLANE_BEHIND",
                f"the host's network is at generation {self._in_place[0]} after "
                f"{deadline_s:.0f} s; ports {', '.join(sorted(wanted))} should be in place at "
                f"{generation}",
                generation=self._in_place[0],
            ) from error


class WholeHost:
    """The compute part, for the session with the conductor: it is told of all that is here."""

    def __init__(self, domains: Handler, others: Sequence[Handler]) -> None:
        self._domains = domains
        self._others = others

    async def apply(self, desired: session_pb2.Desired) -> session_pb2.Observed | None:
        """Work on a domain."""
        return await self._domains.apply(desired)

    async def observe_all(self) -> Sequence[session_pb2.Observed]:
        """Return every domain."""
        return await self._domains.observe_all()

    async def artifacts(self) -> Sequence[session_pb2.Artifact]:
        """Return everything of mcloud's on the host."""
        parts = (self._domains, *self._others)
        found = await asyncio.gather(*(part.artifacts() for part in parts))
        return [artifact for part in found for artifact in part]


def host_report(
    facts: HostFacts,
    reserved: placement_pb2.Resources,
    domains: Iterable[tuple[str, State.ValueType, int]],
) -> placement_service_pb2.ReportHostRequest:
    """Return what the scheduler is to know; who the host is, is filled in by the caller.

    Args:
        facts: about the host.
        reserved: of it, for the host itself.
        domains: that are here: (id, state, generation that has been reached).
    """
    report = placement_service_pb2.ReportHostRequest(
        total=placement_pb2.Resources(
            vcpu_count=facts.vcpu_count, memory_mib=facts.memory_mib, disk_gib=facts.disk_gib
        ),
        reserved=reserved,
        hypervisor_type=facts.hypervisor_type,
        hypervisor_version=facts.hypervisor_version,
        cpu_arch=facts.cpu_arch,
        traits=facts.traits,
    )
    for id_, state, generation in domains:
        report.domains.add(
            domain_id=id_, state=State.Name(state).removeprefix("STATE_"), generation=generation
        )
    return report
