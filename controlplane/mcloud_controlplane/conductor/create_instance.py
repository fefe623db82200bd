"""How an instance comes to be: the sixteen steps.

 1 cli        authenticate: ask identity for a token          identity/token_service.py
 2 cli        request: CreateInstance with the token          cli/mcloud_cli/instance.py
 3 compute    authorize: token checked, policy applied        core/gate.py
 4 compute    record: instance, operation, ids, quota         compute/instance_store.py
   conductor  reserve: ports, attachments, use of the image   here
 5 conductor  ask the scheduler for a host                    here
 6 scheduler  take the request from the queue                 scheduler/service.py
 7 scheduler  filter, weigh, claim; queue the domain          scheduler/choose.py, store.py
 8 agent      pick the domain up; ask for its spec            agents: compute/agent.py
 9 conductor  answer: the spec, a delegated token             conductor/service.py
10 agent      ask image for metadata and bytes                agents: compute/image_cache.py
11 image      authorize, answer; digest checked at the host   image/image_service.py
12 agent      ask network to bind the ports                   agents: compute/agent.py
13 network    authorize, answer: address, MAC, rules          network/port_service.py
14 agent      ask volume to connect the attachments           agents: compute/agent.py
15 volume     authorize, answer: connection info              volume/attachment_service.py
16 agent      define and start; events stream back; ACTIVE    agents: compute/libvirt_driver.py

Rows 1 to 3 stand in the trace because compute saved them with 4; 6 and 7 come with the scheduler's
answer, 8 to 16 with the host's report.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from mcloud.compute.v1 import instance_pb2
from mcloud.image.v1 import image_pb2
from mcloud.network.v1 import port_pb2
from mcloud.scheduler.v1 import placement_pb2, placement_service_pb2
from mcloud_base import errors
from mcloud_controlplane.compute import instance_store
from mcloud_controlplane.conductor import store
from mcloud_controlplane.conductor.domains import (
    REMOVE_S,
    STORAGE_SILENT,
    Domains,
    HostSilent,
    is_overdue,
    left,
)
from mcloud_controlplane.conductor.neighbours import Neighbours, together
from mcloud_controlplane.core import contract, database
from mcloud_controlplane.core.database import Database
from mcloud_controlplane.core.workflow import Job, Step, Workflow

_GIB = 1 << 30
_START_S = 300.0


class CreateInstance:
    """The steps, bound to what they need. `job.data` holds `domain_id`."""

    def __init__(self, opened: Database, neighbours: Neighbours, domains: Domains) -> None:
        self._database = opened
        self._neighbours = neighbours
        self._domains = domains

    async def reserve(self, job: Job) -> None:
        """4. Record the instance's claims in the services that own the things.

        Keyed by ids that were made with the instance; so a repeat finds what it made.

        Raises:
            errors.NotFound: NETWORK_NOT_FOUND, PORT_NOT_FOUND, VOLUME_NOT_FOUND, IMAGE_NOT_FOUND, …
            errors.WrongState: VOLUME_IN_USE, PORT_IN_USE, IMAGE_NOT_ACTIVE.
            errors.Exhausted: QUOTA_EXCEEDED, NO_FREE_ADDRESS.
            errors.InvalidArgument: FLAVOR_TOO_SMALL.
        """
        instance = await self._instance(job)
        spec = instance_pb2.InstanceSpec.FromString(bytes(instance.spec))
        image, *ports = await together(
            self._neighbours.ensure_image_use(job, instance.image_id),
            *(self._reserve_port(job, instance, nic, spec) for nic in instance.nics),
            *(self._reserve_volume(job, volume) for volume in instance.volumes),
        )
        _check_fit(instance, image)
        described = {port.metadata.id: port for port in ports if port is not None}
        job.with_save(partial(_record_reserved, instance, image, described))
        counts = f"{len(instance.nics)} port(s), {len(instance.volumes)} volume(s)"
        job.detail = f"{counts}, image {image.metadata.name}"

    async def _instance(self, job: Job) -> Any:
        """Return the instance, of which what the first steps need does not change.

        It is read where another process has recorded it, or has done the step before.
        """
        if "instance" not in job.known:
            job.known["instance"] = await self._database.read_few(
                store.get_instance, job.resource_id
            )
        return job.known["instance"]

    async def _reserve_port(
        self, job: Job, instance: Any, nic: dict[str, Any], spec: instance_pb2.InstanceSpec
    ) -> port_pb2.Port:
        wanted = port_pb2.PortSpec(
            network_id=nic["network_id"], security_group_ids=spec.security_group_ids
        )
        if nic.get("ip"):
            wanted.fixed_ips.add(ip_address=nic["ip"])
        return await self._neighbours.ensure_port(job, nic, wanted, instance.hostname)

    async def _reserve_volume(self, job: Job, volume: dict[str, Any]) -> None:
        await self._neighbours.ensure_attachment(
            job,
            volume["attachment_id"],
            volume["volume_id"],
            delete_with_instance=volume["delete_with_instance"],
        )

    async def release(self, job: Job) -> None:
        """Undo 4. Give everything back, and retire the ids."""
        if job.data.get("held"):
            return  # the host is silent: the reclaimer does it when it has answered
        instance = await self._database.read_few(store.get_instance, job.resource_id)
        await release_reservations(self._neighbours, job, instance)
        await self._database.write(store.change_instance, job, reserved=False)

    async def claim_host(self, job: Job) -> None:
        """5 to 7. Ask the scheduler for a host; it claims one and queues the domain there.

        Keyed by the domain's id, so that a repeat returns the same claim.

        Raises:
            errors.Exhausted: NO_VALID_HOST, with the explanation: hosts removed by each filter.
        """
        instance = await self._instance(job)
        spec = instance_pb2.InstanceSpec.FromString(bytes(instance.spec))
        answer = await self._neighbours.select_destination(
            placement_service_pb2.SelectDestinationsRequest(
                domain_id=job.data["domain_id"],
                instance_id=instance.id,
                project_id=instance.project_id,
                resources=placement_pb2.Resources(
                    vcpu_count=instance.vcpu_count,
                    memory_mib=instance.memory_mib,
                    disk_gib=instance.disk_gib,
                ),
                host_id=spec.placement.host_id,
                availability_zone=spec.placement.availability_zone,
                server_group_id=spec.placement.server_group_id,
                lease_number=job.lease_number,
                operation_id=job.operation_id,
            )
        )
        job.trace.extend(answer.steps)
        job.detail = answer.claim.host_name

    async def remove_domain(self, job: Job) -> None:
        """Undo 5 to 16. Have the host remove the domain, then give the room back."""
        instance = await self._database.read_few(store.get_instance, job.resource_id)
        domain_id = job.data["domain_id"]
        try:
            await self._domains.remove(job, instance, domain_id, timeout_s=left(job, REMOVE_S))
        except HostSilent as error:
            job.data["held"] = job.detail = error.message
        except errors.Unavailable as error:
            if error.reason not in STORAGE_SILENT or not is_overdue(job):
                raise
            job.data["held"] = job.detail = error.message

    async def await_running(self, job: Job) -> None:
        """8 to 16. The agent does them; wait for its report.

        Raises:
            errors.Unavailable: HYPERVISOR_REFUSED, and whatever else the host could not get over.
            errors.DeadlineExceeded: HOST_SILENT.
        """
        await self._domains.await_generation(
            job,
            job.data["domain_id"],
            1,
            state="RUNNING",
            timeout_s=left(job, _START_S - 5, share=0.5),
        )

    def succeed(self, job: Job) -> None:
        """Make the instance ACTIVE, in the operation's last transaction."""
        instance = store.end_operation(job, state="ACTIVE", launch_time=database.now(), fault=None)
        hosts = instance_store.find_hosts([instance])
        if any(host.failure_count for host in hosts.values()):
            store.forget_failures(instance.host_id)
        job.response = instance_store.messages([instance], hosts)[0]

    def fail(self, job: Job) -> None:
        """Make the instance say why it is not; nothing of it is left, or it says where."""
        if not isinstance(job.error, errors.Cancelled):
            store.count_failure(job.data["domain_id"])
        fail_instance(job)

    def workflow(self) -> Workflow:
        """Return the table of the steps that the conductor runs."""
        return Workflow(
            "create_instance",
            (
                Step(4, "record, reserve", "conductor", self.reserve, undo=self.release),
                Step(5, "ask for a host", "conductor", self.claim_host, undo=self.remove_domain),
                Step(0, "agent's part", "agent", self.await_running, deadline_s=_START_S),
            ),
            on_done=self.succeed,
            on_failed=self.fail,
        )


async def release_reservations(neighbours: Neighbours, job: Job, instance: Any) -> None:
    """Give back what was reserved for an instance whose domain is gone."""
    await together(
        neighbours.release_ports(job, instance.nics),
        neighbours.release_attachments(
            job,
            [volume["attachment_id"] for volume in instance.volumes],
            instance_deleted=instance.delete_time is not None,
        ),
        neighbours.release_image_use(job, instance.image_id),
    )


def fail_instance(job: Job) -> None:
    """Put an instance into ERROR with the operation's error as its fault. Within a unit."""
    assert job.error is not None
    message = "; ".join(filter(None, (job.error.message, job.data.get("held"))))
    fault = {"reason": job.error.reason, "message": message, "time": database.now()}
    store.end_operation(job, state="ERROR", fault=fault)


def _check_fit(instance: Any, image: image_pb2.Image) -> None:
    disk = max(image.spec.min_disk_gib, -(-image.status.virtual_size_bytes // _GIB))
    if instance.disk_gib < disk:
        raise errors.InvalidArgument(
            "FLAVOR_TOO_SMALL",
            f"image {image.metadata.name} needs {disk} GiB of disk, "
            f"flavor {instance.flavor_name} has {instance.disk_gib}; choose a larger flavor",
        )
    if instance.memory_mib < image.spec.min_memory_mib:
        raise errors.InvalidArgument(
            "FLAVOR_TOO_SMALL",
            f"image {image.metadata.name} needs {image.spec.min_memory_mib} MiB of memory, "
            f"flavor {instance.flavor_name} has {instance.memory_mib}; choose a larger flavor",
        )


def _record_reserved(
    instance: Any, image: image_pb2.Image, ports: dict[str, port_pb2.Port]
) -> None:
    nics = []
    for nic in instance.nics:
        port = ports[nic["port_id"]]
        nics.append(
            {
                **nic,
                "network_id": port.spec.network_id,
                "mac": port.status.mac,
                "addresses": [fixed.ip_address for fixed in port.status.fixed_ips],
            }
        )
    known = {
        "sha256": image.status.sha256,
        "format": contract.enum_name(image.spec.disk_format, image_pb2.DiskFormat).lower(),
        "size_bytes": image.status.size_bytes,
    }
    store.record_reserved(instance.id, nics, known)
