"""Many instances at once: clients that each create one after the other until all are there.

Meanwhile the hosts are listed, page by page, as operators do. Every instance has a NIC.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from benchmarks import images
from benchmarks.client import Client
from mcloud.compute.v1 import (
    flavor_pb2,
    flavor_service_pb2,
    flavor_service_pb2_grpc,
    host_service_pb2,
    host_service_pb2_grpc,
    instance_pb2,
    instance_service_pb2,
    instance_service_pb2_grpc,
    quota_pb2,
    quota_service_pb2,
    quota_service_pb2_grpc,
)
from mcloud.network.v1 import (
    network_pb2,
    network_service_pb2,
    network_service_pb2_grpc,
    subnet_pb2,
    subnet_service_pb2,
    subnet_service_pb2_grpc,
)
from mcloud.network.v1 import quota_pb2 as network_quota_pb2
from mcloud.network.v1 import quota_service_pb2 as network_quota_service_pb2
from mcloud.network.v1 import quota_service_pb2_grpc as network_quota_service_pb2_grpc
from mcloud_base import errors, ids

_IMAGE_BYTES = 1 << 20
_PAGE_SIZE = 500

T = TypeVar("T")


@dataclass
class Outcome:
    """What came of a storm. Times in seconds, one for each that succeeded."""

    seconds: float = 0.0
    succeeded: list[float] = field(default_factory=list)
    failed: Counter[str] = field(default_factory=Counter)  # by reason
    listings: list[float] = field(default_factory=list)
    host_count: int = 0

    def summary(self) -> dict[str, object]:
        """Return the figures that matter."""
        return {
            "succeeded": len(self.succeeded),
            "failed": dict(self.failed),
            "seconds": round(self.seconds, 1),
            "per_second": round(len(self.succeeded) / max(self.seconds, 1e-9), 2),
            "median_s": _at(self.succeeded, 50),
            "p95_s": _at(self.succeeded, 95),
            "hosts_listed": self.host_count,
            "listings": len(self.listings),
            "listing_median_s": _at(self.listings, 50),
            "listing_longest_s": round(max(self.listings, default=0.0), 3),
        }


class Storm:
    """Instances of one flavor and image, on networks of their own."""

    def __init__(self, client: Client, *, network_count: int = 1) -> None:
        self._client = client
        self._network_count = network_count
        self._mark = ids.request_id()[:8]  # so that storms may follow each other
        self.specs: list[instance_pb2.InstanceSpec] = []
        self._stub = instance_service_pb2_grpc.InstanceServiceStub(client.channel)

    async def prepare(self) -> None:
        """Make what instances need, and lift the project's limits."""
        client, mark = self._client, f"storm-{self._mark}"
        await self._lift_quota()
        flavor = await client.mutate(
            flavor_service_pb2_grpc.FlavorServiceStub(client.channel).CreateFlavor,
            flavor_service_pb2.CreateFlavorRequest(
                name=mark, spec=flavor_pb2.FlavorSpec(vcpu_count=1, memory_mib=512, disk_gib=1)
            ),
            flavor_pb2.Flavor,
            system=True,
        )
        image = await images.make(client, mark, bytes(_IMAGE_BYTES))
        for number in range(self._network_count):
            network = await client.mutate(
                network_service_pb2_grpc.NetworkServiceStub(client.channel).CreateNetwork,
                network_service_pb2.CreateNetworkRequest(
                    name=f"{mark}-{number}", spec=network_pb2.NetworkSpec()
                ),
                network_pb2.Network,
            )
            await client.mutate(
                subnet_service_pb2_grpc.SubnetServiceStub(client.channel).CreateSubnet,
                subnet_service_pb2.CreateSubnetRequest(
                    name=f"{mark}-{number}",
                    spec=subnet_pb2.SubnetSpec(
                        network_id=network.metadata.id, cidr=f"10.{number + 1}.0.0/16"
                    ),
                ),
                subnet_pb2.Subnet,
            )
            self.specs.append(
                instance_pb2.InstanceSpec(
                    flavor_id=flavor.metadata.id,
                    image_id=image,
                    nics=[instance_pb2.InstanceNic(network_id=network.metadata.id)],
                )
            )

    async def create(
        self, number: int, *, clients: int = 32, first: int = 0, listed: bool = True
    ) -> Outcome:
        """Create instances; each is counted when its operation has ended.

        Args:
            first: number of the first one; names that are taken are not taken again.
            listed: whether hosts are listed meanwhile.
        """

        async def create_one(index: int) -> None:
            await self._client.mutate(
                self._stub.CreateInstance,
                instance_service_pb2.CreateInstanceRequest(
                    name=f"storm-{self._mark}-{index}", spec=self.specs[index % len(self.specs)]
                ),
                instance_pb2.Instance,
            )

        return await self._blow(create_one, range(first, first + number), clients, listed=listed)

    async def create_at_once(self, count: int) -> Outcome:
        """Create instances by one request; they are counted when all have ended."""
        outcome = Outcome()
        begin = time.perf_counter()
        request = instance_service_pb2.CreateInstanceRequest(
            request_id=ids.request_id(),
            name=f"storm-{self._mark}-at-once-{ids.request_id()[:8]}",
            spec=self.specs[0],
            count=count,
        )
        operation = await self._client.call(self._stub.CreateInstance, request)
        try:
            operation = await self._client.ended(operation)
        except errors.Error as error:
            outcome.failed[error.reason] += 1
        outcome.seconds = time.perf_counter() - begin
        outcome.succeeded = [outcome.seconds] * operation.parts.succeeded_count
        return outcome

    async def delete(self, *, clients: int = 32, listed: bool = True) -> Outcome:
        """Delete every instance that storms have left."""
        left = {instance.metadata.id for instance in await self.instances()}

        async def delete_one(id_: str) -> None:
            await self._client.mutate(
                self._stub.DeleteInstance,
                instance_service_pb2.DeleteInstanceRequest(id=id_),
                instance_pb2.Instance,
            )

        return await self._blow(delete_one, sorted(left), clients, listed=listed)

    async def instances(self) -> list[instance_pb2.Instance]:
        """Return the instances of all storms."""
        found: list[instance_pb2.Instance] = []
        token = ""
        while True:
            answer = await self._client.call(
                self._stub.ListInstances,
                instance_service_pb2.ListInstancesRequest(page_size=_PAGE_SIZE, page_token=token),
            )
            found += [each for each in answer.instances if each.metadata.name.startswith("storm-")]
            token = answer.next_page_token
            if not token:
                return found

    async def _blow(
        self,
        work: Callable[[T], Awaitable[None]],
        items: Sequence[T],
        clients: int,
        *,
        listed: bool = True,
    ) -> Outcome:
        outcome = Outcome()
        waiting = iter(items)

        async def one_client() -> None:
            for item in waiting:
                begin = time.perf_counter()
                try:
                    await work(item)
                except errors.Error as error:
                    outcome.failed[error.reason] += 1
                else:
                    outcome.succeeded.append(time.perf_counter() - begin)

        listing = asyncio.create_task(self._list_hosts(outcome)) if listed else None
        begin = time.perf_counter()
        await asyncio.gather(*(one_client() for _ in range(clients)))
        outcome.seconds = time.perf_counter() - begin
        if listing:
            listing.cancel()
            await asyncio.gather(listing, return_exceptions=True)
        return outcome

    async def _list_hosts(self, outcome: Outcome) -> None:
        """List all hosts, again and again, as `mcloud host list` does."""
        stub = host_service_pb2_grpc.HostServiceStub(self._client.channel)
        while True:
            begin, token, found = time.perf_counter(), "", 0
            while True:
                answer = await self._client.call(
                    stub.ListHosts,
                    host_service_pb2.ListHostsRequest(page_size=_PAGE_SIZE, page_token=token),
                    system=True,
                )
                found += len(answer.hosts)
                token = answer.next_page_token
                if not token:
                    break
            outcome.listings.append(time.perf_counter() - begin)
            outcome.host_count = found
            await asyncio.sleep(0.5)

    async def _lift_quota(self) -> None:
        client = self._client
        instances = quota_service_pb2.UpdateQuotaRequest(
            project_id=client.project_id,
            update_mask={"paths": ["instance_count", "vcpu_count", "memory_mib"]},
            limits=quota_pb2.QuotaLimits(instance_count=-1, vcpu_count=-1, memory_mib=-1),
        )
        stub = quota_service_pb2_grpc.QuotaServiceStub(client.channel)
        await client.mutate(stub.UpdateQuota, instances, quota_pb2.Quota, system=True)
        ports = network_quota_service_pb2.UpdateQuotaRequest(
            project_id=client.project_id,
            update_mask={"paths": ["network_count", "subnet_count", "port_count"]},
            limits=network_quota_pb2.QuotaLimits(network_count=-1, subnet_count=-1, port_count=-1),
        )
        of_network = network_quota_service_pb2_grpc.QuotaServiceStub(client.channel)
        await client.mutate(of_network.UpdateQuota, ports, network_quota_pb2.Quota, system=True)


def _at(values: Sequence[float], percent: int) -> float:
    if len(values) < 2:
        return round(max(values, default=0.0), 3)
    return round(statistics.quantiles(values, n=100)[percent - 1], 3)
