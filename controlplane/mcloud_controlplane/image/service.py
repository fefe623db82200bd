"""Puts the image service into a process."""

from __future__ import annotations

from mcloud.image.v1 import (
    image_service_pb2_grpc,
    invariant_service_pb2_grpc,
    operation_service_pb2_grpc,
    quota_service_pb2_grpc,
    schema_service_pb2_grpc,
)
from mcloud_controlplane.core import invariants as core_invariants
from mcloud_controlplane.core import operations
from mcloud_controlplane.core.mutation import Frame
from mcloud_controlplane.core.pruner import Pruner
from mcloud_controlplane.core.quotas import QuotaServicer
from mcloud_controlplane.core.runtime import Runtime
from mcloud_controlplane.core.schema_service import SchemaServicer
from mcloud_controlplane.image import invariants, model, quota_store, sweeper
from mcloud_controlplane.image.contents import Contents
from mcloud_controlplane.image.image_service import ImageServicer


def register(runtime: Runtime) -> None:
    """Offer the image service."""
    database = runtime.database("image", model.open_database)
    frame = Frame(database, model.shared, "mop")
    contents = Contents(runtime.settings.image_store or runtime.settings.state_dir / "images")
    runtime.add(
        image_service_pb2_grpc.add_ImageServiceServicer_to_server,
        ImageServicer(database, frame, contents),
    )
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
        SchemaServicer("image", database, model.shared, runtime.process),
    )
    runtime.add(
        invariant_service_pb2_grpc.add_InvariantServiceServicer_to_server,
        core_invariants.InvariantServicer(database, invariants.INVARIANTS, invariants.count),
    )
    runtime.background(sweeper.sweep_forever(database, contents), "image sweeper")
    runtime.background(Pruner(database, model.shared, runtime.settings).run(), "pruner of image")
