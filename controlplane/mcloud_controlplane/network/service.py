"""The network service: what it offers, over which database."""

from __future__ import annotations

from mcloud.common.v1 import session_pb2
from mcloud.network.v1 import (
    floating_ip_service_pb2_grpc,
    invariant_service_pb2_grpc,
    network_service_pb2_grpc,
    operation_service_pb2_grpc,
    port_service_pb2_grpc,
    quota_service_pb2_grpc,
    router_service_pb2_grpc,
    schema_service_pb2_grpc,
    security_group_service_pb2_grpc,
    session_service_pb2_grpc,
    subnet_service_pb2_grpc,
)
from mcloud_controlplane.core import operations
from mcloud_controlplane.core.mutation import Frame
from mcloud_controlplane.core.pruner import Pruner
from mcloud_controlplane.core.quotas import QuotaServicer
from mcloud_controlplane.core.runtime import Runtime
from mcloud_controlplane.core.schema_service import SchemaServicer
from mcloud_controlplane.core.sessions import Sessions
from mcloud_controlplane.network import (
    dataplane_store,
    invariants,
    model,
    quota_store,
    router_store,
)
from mcloud_controlplane.network.floating_ip_service import FloatingIpServicer
from mcloud_controlplane.network.network_service import NetworkServicer
from mcloud_controlplane.network.port_service import PortServicer
from mcloud_controlplane.network.router_service import RouterServicer
from mcloud_controlplane.network.security_group_service import SecurityGroupServicer
from mcloud_controlplane.network.subnet_service import SubnetServicer


def register(runtime: Runtime) -> None:
    """Add the network service to a process."""
    database = runtime.database("network", model.open_database)
    frame = Frame(database, model.shared, "nop")
    networks = NetworkServicer(database, frame, underlay_mtu=runtime.settings.underlay_mtu)
    runtime.add(network_service_pb2_grpc.add_NetworkServiceServicer_to_server, networks)
    for add, servicer in (
        (subnet_service_pb2_grpc.add_SubnetServiceServicer_to_server, SubnetServicer),
        (port_service_pb2_grpc.add_PortServiceServicer_to_server, PortServicer),
        (
            security_group_service_pb2_grpc.add_SecurityGroupServiceServicer_to_server,
            SecurityGroupServicer,
        ),
        (router_service_pb2_grpc.add_RouterServiceServicer_to_server, RouterServicer),
        (
            floating_ip_service_pb2_grpc.add_FloatingIpServiceServicer_to_server,
            FloatingIpServicer,
        ),
    ):
        runtime.add(add, servicer(database, frame))
    runtime.add(
        quota_service_pb2_grpc.add_QuotaServiceServicer_to_server,
        QuotaServicer(database, frame, quota_store.QUOTAS),
    )
    runtime.add(
        operation_service_pb2_grpc.add_OperationServiceServicer_to_server,
        operations.OperationServicer(database, model.shared),
    )
    runtime.add(
        schema_service_pb2_grpc.add_SchemaServiceServicer_to_server,
        SchemaServicer("network", database, model.shared, runtime.process),
    )
    runtime.add(
        invariant_service_pb2_grpc.add_InvariantServiceServicer_to_server,
        invariants.InvariantServicer(database, invariants.INVARIANTS, invariants.count),
    )
    sessions = Sessions(
        database, model.shared, dataplane_store.Source(), on_hello=_join, types=("dataplane",)
    )
    runtime.add(session_service_pb2_grpc.add_SessionServiceServicer_to_server, sessions)
    runtime.background(Pruner(database, model.shared, runtime.settings).run(), "pruner of network")


def _join(host_id: str, hello: session_pb2.Hello) -> None:
    """Note a host whose session begins, and let it carry routers that wait for a host."""
    dataplane_store.join(host_id, hello)
    router_store.place_waiting(host_id)
