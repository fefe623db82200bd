"""Serves mcloud.identity.v1.EndpointService."""

from __future__ import annotations

from importlib import metadata

from mcloud.identity.v1 import endpoint_service_pb2, endpoint_service_pb2_grpc
from mcloud_controlplane.core.auth import Context
from mcloud_controlplane.settings import SERVICES, Settings


class EndpointServicer(endpoint_service_pb2_grpc.EndpointServiceServicer):
    """Where the services are."""

    def __init__(self, settings: Settings) -> None:
        self._answer = endpoint_service_pb2.ListEndpointsResponse(
            endpoints=[
                endpoint_service_pb2.Endpoint(
                    service=name, address=settings.public_endpoints.get(name, "")
                )
                for name in SERVICES
            ],
            version=_version(),
        )

    async def ListEndpoints(
        self, request: endpoint_service_pb2.ListEndpointsRequest, context: Context
    ) -> endpoint_service_pb2.ListEndpointsResponse:
        """Return them all."""
        return self._answer


def _version() -> str:
    try:
        return metadata.version("mcloud")
    except metadata.PackageNotFoundError:  # run from its sources
        return "unknown"
