"""Serves mcloud.conductor.v1, and runs the workflows of instances."""

from __future__ import annotations

import socket
from collections.abc import Collection

import structlog

from mcloud.common.v1 import operation_pb2
from mcloud.conductor.v1 import (
    domain_pb2,
    domain_service_pb2,
    domain_service_pb2_grpc,
    verify_service_pb2_grpc,
)
from mcloud.identity.v1 import token_service_pb2, token_service_pb2_grpc
from mcloud_base import rpc
from mcloud_controlplane.compute import model
from mcloud_controlplane.conductor import domain_view, repair, store
from mcloud_controlplane.conductor.adoption import Adopter
from mcloud_controlplane.conductor.change_power import ChangePower
from mcloud_controlplane.conductor.change_volume import ChangeVolume
from mcloud_controlplane.conductor.create_instance import CreateInstance
from mcloud_controlplane.conductor.delete_instance import DeleteInstance
from mcloud_controlplane.conductor.domains import Domains
from mcloud_controlplane.conductor.host_listings import HostListings
from mcloud_controlplane.conductor.neighbours import Neighbours
from mcloud_controlplane.conductor.reclaimer import Reclaimer
from mcloud_controlplane.conductor.sweeper import Sweeper
from mcloud_controlplane.conductor.verify import VerifyServicer
from mcloud_controlplane.core import auth, convert, database, invariants, sessions
from mcloud_controlplane.core import workflow as workflows
from mcloud_controlplane.core.auth import Context
from mcloud_controlplane.core.database import Database
from mcloud_controlplane.core.mutation import Frame
from mcloud_controlplane.core.runtime import Runtime

log = structlog.get_logger()


class DomainServicer(domain_service_pb2_grpc.DomainServiceServicer):
    """Tells hosts what their domains are."""

    def __init__(
        self, opened: Database, tokens: token_service_pb2_grpc.TokenServiceAsyncStub
    ) -> None:
        self._database = opened
        self._tokens = tokens

    async def GetDomainSpec(
        self, request: domain_service_pb2.GetDomainSpecRequest, context: Context
    ) -> domain_pb2.DomainSpec:
        """Answer a host that has picked a domain up (step 9)."""
        certificate = auth.caller().certificate
        assert certificate is not None
        spec = await self._database.read_few(store.domain_spec, certificate.host_id, request)
        token = await rpc.call(
            self._tokens.CreateDelegatedToken,
            token_service_pb2.CreateDelegatedTokenRequest(
                host_id=certificate.host_id,
                certificate_sha256=certificate.fingerprint,
                project_id=spec.project_id,
                domain_id=spec.domain_id,
                generation=spec.generation,
                image_ids=[spec.root_disk.image_id],
                port_ids=[nic.port_id for nic in spec.nics],
                attachment_ids=[disk.attachment_id for disk in spec.disks],
            ),
            timeout_s=5,
        )
        spec.delegated_token = token.token
        spec.token_expire_time.CopyFrom(token.expire_time)
        step = operation_pb2.OperationStep(
            number=9,
            name="answer: spec, delegated token",
            service="conductor",
            host=socket.gethostname(),
            state=operation_pb2.OperationStep.STATE_DONE,
            start_time=convert.timestamp(auth.call().receive_time),
            end_time=convert.timestamp(database.now()),
        )
        auth.call().hand_over(step)
        return spec

    async def GetDomain(
        self, request: domain_service_pb2.GetDomainRequest, context: Context
    ) -> domain_pb2.Domain:
        """Return one."""
        return await self._database.read_few(domain_view.get_message, request.id)

    async def ListDomains(
        self, request: domain_service_pb2.ListDomainsRequest, context: Context
    ) -> domain_service_pb2.ListDomainsResponse:
        """Return a page."""
        return await self._database.read(domain_view.list_page, auth.caller(), request)


def workflows_of_instances(
    opened: Database, neighbours: Neighbours, domains: Domains
) -> dict[str, workflows.Workflow]:
    """Return every workflow that the conductor runs, by name."""
    tables = [
        CreateInstance(opened, neighbours, domains).workflow(),
        DeleteInstance(opened, neighbours, domains).workflow(),
        *ChangePower(opened, domains).workflows(),
        *ChangeVolume(opened, neighbours, domains).workflows(),
    ]
    names = {repair.WORKFLOW, *(table.name for table in tables)}
    mender = repair.Mender(opened, neighbours, domains, own_invariants(names))
    tables.append(repair.RepairFindings(mender).workflow())
    return {table.name: table for table in tables}


def own_invariants(names: Collection[str]) -> tuple[invariants.Invariant, ...]:
    """Return what the compute database proves of itself, given the names of its workflows."""
    return (invariants.of_operations(model.shared, names),)


def register(runtime: Runtime) -> None:
    """Offer the conductor's services and run its workflows."""
    opened = runtime.database("compute", model.open_database)
    neighbours = Neighbours(runtime)
    domains = Domains(opened, neighbours)
    tokens = token_service_pb2_grpc.TokenServiceStub(runtime.channel("identity"))
    hosts = sessions.Sessions(opened, model.shared, store.DomainSource(), types=("domain",))
    runtime.add(
        domain_service_pb2_grpc.add_DomainServiceServicer_to_server, DomainServicer(opened, tokens)
    )
    runtime.add(domain_service_pb2_grpc.add_SessionServiceServicer_to_server, hosts)
    table = workflows_of_instances(opened, neighbours, domains)
    own = own_invariants(table)
    listings = HostListings(opened, hosts, runtime.settings.verify_host_wait_s)
    frame = Frame(opened, model.shared, "cop", runtime.settings.operation_deadline_s)
    runtime.add(
        verify_service_pb2_grpc.add_VerifyServiceServicer_to_server,
        VerifyServicer(opened, frame, neighbours, listings, own, runtime.settings.verify_confirm_s),
    )
    runtime.run_workflows(opened, model.shared, table)
    runtime.background(Reclaimer(opened, neighbours, domains).run(), "reclaimer")
    adopter = Adopter(opened, listings, runtime.settings.operation_deadline_s)
    runtime.background(adopter.run(), "adoption of restored domains")
    runtime.background(listings.serve(), "listings of hosts")
    mender = repair.Mender(opened, neighbours, domains, own)
    runtime.background(
        Sweeper(opened, neighbours, mender, runtime.settings).run(), "sweeper of instances"
    )
