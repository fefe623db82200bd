"""Puts the volume service into a process."""

from __future__ import annotations

from mcloud.volume.v1 import (
    attachment_service_pb2_grpc,
    invariant_service_pb2_grpc,
    operation_service_pb2_grpc,
    quota_service_pb2_grpc,
    schema_service_pb2_grpc,
    session_service_pb2_grpc,
    volume_service_pb2_grpc,
)
from mcloud_controlplane.core import operations, sessions
from mcloud_controlplane.core.mutation import Frame
from mcloud_controlplane.core.pruner import Pruner
from mcloud_controlplane.core.quotas import QuotaServicer
from mcloud_controlplane.core.runtime import Runtime
from mcloud_controlplane.core.schema_service import SchemaServicer
from mcloud_controlplane.volume import (
    invariants,
    model,
    quota_store,
    storage_store,
    volume_workflow,
)
from mcloud_controlplane.volume.attachment_service import AttachmentServicer
from mcloud_controlplane.volume.volume_service import VolumeServicer


def register(runtime: Runtime) -> None:
    """Offer the volume service and run its workflows."""
    database = runtime.database("volume", model.open_database)
    frame = Frame(database, model.shared, "vop", runtime.settings.operation_deadline_s)
    hosts = sessions.Sessions(
        database,
        model.shared,
        storage_store.VolumeSource(),
        on_hello=storage_store.on_hello,
    )
    runtime.add(
        volume_service_pb2_grpc.add_VolumeServiceServicer_to_server,
        VolumeServicer(database, frame),
    )
    runtime.add(
        attachment_service_pb2_grpc.add_AttachmentServiceServicer_to_server,
        AttachmentServicer(database),
    )
    runtime.add(session_service_pb2_grpc.add_SessionServiceServicer_to_server, hosts)
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
        SchemaServicer("volume", database, model.shared, runtime.process),
    )
    runtime.add(
        invariant_service_pb2_grpc.add_InvariantServiceServicer_to_server,
        invariants.InvariantServicer(database, invariants.INVARIANTS, invariants.count),
    )
    runtime.run_workflows(database, model.shared, volume_workflow.workflows(database))
    runtime.background(Pruner(database, model.shared, runtime.settings).run(), "pruner of volume")
