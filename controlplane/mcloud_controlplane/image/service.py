"""Puts the image service into a process."""

from __future__ import annotations

from mcloud.image.v1 import image_service_pb2_grpc, operation_service_pb2_grpc
from mcloud_controlplane.core import operations
from mcloud_controlplane.core.mutation import Frame
from mcloud_controlplane.core.runtime import Runtime
from mcloud_controlplane.image import model, sweeper
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
        operation_service_pb2_grpc.add_OperationServiceServicer_to_server,
        operations.OperationServicer(database, model.shared),
    )
    runtime.background(sweeper.sweep_forever(database, contents), "image sweeper")
