"""The compute API: registers the services of mcloud.compute.v1."""

from __future__ import annotations

from mcloud.compute.v1 import (
    flavor_service_pb2_grpc,
    host_service_pb2_grpc,
    instance_service_pb2_grpc,
    key_pair_service_pb2_grpc,
    operation_service_pb2_grpc,
    quota_service_pb2_grpc,
    schema_service_pb2_grpc,
    server_group_service_pb2_grpc,
)
from mcloud.scheduler.v1 import placement_service_pb2_grpc
from mcloud_controlplane.compute import model, pruning, quota_store
from mcloud_controlplane.compute.flavor_service import FlavorServicer
from mcloud_controlplane.compute.host_service import HostServicer
from mcloud_controlplane.compute.instance_service import InstanceServicer
from mcloud_controlplane.compute.key_pair_service import KeyPairServicer
from mcloud_controlplane.compute.server_group_service import ServerGroupServicer
from mcloud_controlplane.core.mutation import Frame
from mcloud_controlplane.core.operations import OperationServicer
from mcloud_controlplane.core.pruner import Pruner
from mcloud_controlplane.core.quotas import QuotaServicer
from mcloud_controlplane.core.runtime import Runtime
from mcloud_controlplane.core.schema_service import SchemaServicer


def register(runtime: Runtime) -> None:
    """Offer the compute API."""
    opened = runtime.database("compute", model.open_database)
    frame = Frame(opened, model.shared, "cop", runtime.settings.operation_deadline_s)
    placement = placement_service_pb2_grpc.PlacementServiceStub(runtime.channel("scheduler"))
    runtime.add(
        instance_service_pb2_grpc.add_InstanceServiceServicer_to_server,
        InstanceServicer(opened, frame, placement),
    )
    runtime.add(
        flavor_service_pb2_grpc.add_FlavorServiceServicer_to_server, FlavorServicer(opened, frame)
    )
    runtime.add(
        key_pair_service_pb2_grpc.add_KeyPairServiceServicer_to_server,
        KeyPairServicer(opened, frame),
    )
    runtime.add(
        server_group_service_pb2_grpc.add_ServerGroupServiceServicer_to_server,
        ServerGroupServicer(opened, frame),
    )
    runtime.add(
        host_service_pb2_grpc.add_HostServiceServicer_to_server, HostServicer(opened, frame)
    )
    runtime.add(
        quota_service_pb2_grpc.add_QuotaServiceServicer_to_server,
        QuotaServicer(opened, frame, quota_store.QUOTAS),
    )
    runtime.add(
        operation_service_pb2_grpc.add_OperationServiceServicer_to_server,
        OperationServicer(opened, model.shared),
    )
    runtime.add(
        schema_service_pb2_grpc.add_SchemaServiceServicer_to_server,
        SchemaServicer("compute", opened, model.shared, runtime.process),
    )
    pruner = Pruner(
        opened,
        model.shared,
        runtime.settings,
        still_needed=pruning.needed_operations,
        also=pruning.prunes(runtime.settings),
    )
    runtime.background(pruner.run(), "pruner of compute")
