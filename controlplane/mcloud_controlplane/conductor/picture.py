"""Everything that verify compares, as it is at about one moment.

What other services and hosts have is read first and our own rows last, so that an owner which
appears meanwhile is found.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from mcloud.common.v1 import invariant_pb2
from mcloud.conductor.v1 import verify_service_pb2
from mcloud.image.v1 import image_service_pb2
from mcloud.network.v1 import invariant_service_pb2 as network_pb2
from mcloud.network.v1 import port_service_pb2
from mcloud.volume.v1 import attachment_service_pb2
from mcloud.volume.v1 import invariant_service_pb2 as volume_pb2
from mcloud_base import rpc
from mcloud_controlplane.compute.model import Claim, Domain, Instance, shared
from mcloud_controlplane.conductor.host_listings import HostListings, Listings
from mcloud_controlplane.conductor.neighbours import Neighbours
from mcloud_controlplane.core import database
from mcloud_controlplane.core.invariants import RUNNING

Finding = verify_service_pb2.Finding

_TIMEOUT_S = 30
# For so long after its end a domain's things are the reclaimer's, which is quicker.
_SETTLED_US = 60_000_000


@dataclass(frozen=True)
class Others:
    """What the other services and the hosts say. Dicts are by id; dataplanes by host."""

    ports: dict[str, Any]
    attachments: dict[str, Any]
    uses: list[Any]
    volumes: dict[str, Any]
    dataplanes: dict[str, Any]
    violations: list[tuple[str, invariant_pb2.Violation]]  # with the service that has found it
    listings: Listings
    silent: list[str]
    checked: int


@dataclass(frozen=True)
class Rows:
    """The compute database's own, by id; read within one unit."""

    instances: dict[str, Any]  # without the DELETED
    domains: dict[str, Any]  # those that their host has not reported absent
    settling: set[str]  # domains that have been reported absent just now
    claims: dict[str, Any]
    running: set[str]  # ids of operations
    worked_on: set[str]  # ids of what running operations work on
    being_attached: set[str]  # ids of attachments that they add, or have just taken off

    def is_held(self, instance_id: str) -> bool:
        """Tell whether an operation works on an instance: what belongs to it is in flight."""
        return instance_id in self.worked_on


def rows() -> Rows:
    """Read our own. Within a unit."""
    table = shared.operation
    operations = list(
        table.select(table.id, table.resource_id, table.job).where(table.state.in_(RUNNING))
    )
    jobs = [json.loads(row.job) for row in operations]
    recently = Domain.absent_time > database.now() - _SETTLED_US
    return Rows(
        instances={row.id: row for row in Instance.select().where(Instance.state != "DELETED")},
        domains={row.id: row for row in Domain.select().where(Domain.absent_time.is_null())},
        settling={row.id for row in Domain.select(Domain.id).where(recently)},
        claims={row.domain_id: row for row in Claim.select()},
        running={row.id for row in operations},
        worked_on={row.resource_id for row in operations},
        being_attached={job["volume"]["attachment_id"] for job in jobs if "volume" in job},
    )


async def others(neighbours: Neighbours, hosts: HostListings, host_id: str) -> Others:
    """Ask everybody else, at the same time.

    Raises:
        errors.Unavailable: a service does not answer.
    """
    asked = await asyncio.gather(
        _ports(neighbours),
        _attachments(neighbours),
        _uses(neighbours),
        _volumes(neighbours),
        _dataplanes(neighbours),
        _violations(neighbours),
    )
    ports, attachments, uses, volumes, dataplanes, (violations, checked) = asked
    # After the rows of the services: what has reached a host by then is in theirs.
    listings, silent = await hosts.ask(host_id)
    count = checked + len(ports) + len(attachments) + len(uses)
    return Others(
        ports={port.metadata.id: port for port in ports},
        attachments={attachment.metadata.id: attachment for attachment in attachments},
        uses=uses,
        volumes={volume.volume_id: volume for volume in volumes},
        dataplanes={each.host_id: each for each in dataplanes},
        violations=violations,
        listings=listings,
        silent=silent,
        checked=count + sum(map(len, listings.values())),
    )


async def _violations(
    neighbours: Neighbours,
) -> tuple[list[tuple[str, invariant_pb2.Violation]], int]:
    request = invariant_pb2.ListViolationsRequest()
    services = sorted(neighbours.invariants)
    answers = await asyncio.gather(
        *(
            rpc.call(neighbours.invariants[each].ListViolations, request, timeout_s=_TIMEOUT_S)
            for each in services
        )
    )
    found = [
        (service, violation)
        for service, answer in zip(services, answers, strict=True)
        for violation in answer.violations
    ]
    return found, sum(answer.checked_count for answer in answers)


async def _ports(neighbours: Neighbours) -> list[Any]:
    async def page(after: str) -> Any:
        request = port_service_pb2.ListOwnedPortsRequest(after_id=after)
        return (await _call(neighbours.ports.ListOwnedPorts, request)).ports

    return await _pages(page, lambda port: port.metadata.id)


async def _attachments(neighbours: Neighbours) -> list[Any]:
    async def page(after: str) -> Any:
        request = attachment_service_pb2.ListInstanceAttachmentsRequest(after_id=after)
        answer = await _call(neighbours.attachments.ListInstanceAttachments, request)
        return answer.attachments

    return await _pages(page, lambda attachment: attachment.metadata.id)


async def _uses(neighbours: Neighbours) -> list[Any]:
    async def page(after: str) -> Any:
        request = image_service_pb2.ListImageUsesRequest(after_instance_id=after)
        return (await _call(neighbours.images.ListImageUses, request)).uses

    return await _pages(page, lambda use: use.instance_id)


async def _volumes(neighbours: Neighbours) -> list[Any]:
    async def page(after: str) -> Any:
        request = volume_pb2.ListStoredVolumesRequest(after_id=after)
        return (await _call(neighbours.volume_invariants.ListStoredVolumes, request)).volumes

    return await _pages(page, lambda volume: volume.volume_id)


async def _dataplanes(neighbours: Neighbours) -> list[Any]:
    async def page(after: str) -> Any:
        request = network_pb2.ListHostDataplanesRequest(after_host_id=after)
        answer = await _call(neighbours.network_invariants.ListHostDataplanes, request)
        return answer.dataplanes

    return await _pages(page, lambda dataplane: dataplane.host_id)


async def _call(method: Any, request: Any) -> Any:
    return await rpc.call(method, request, timeout_s=_TIMEOUT_S)


async def _pages(page: Callable[[str], Awaitable[Any]], key: Callable[[Any], str]) -> list[Any]:
    found: list[Any] = []
    while more := await page(key(found[-1]) if found else ""):
        found += more
    return found
