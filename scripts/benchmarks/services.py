"""Calling a control plane's internal port as one of its services does."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc

from benchmarks.cloud import ADDRESS, ControlPlane
from mcloud_base import endpoints, rpc
from mcloud_controlplane.core import pki


@asynccontextmanager
async def channel(plane: ControlPlane) -> AsyncIterator[grpc.aio.Channel]:
    """Give a channel with a service's certificate."""
    identity = pki.Authority(plane.directory / "pki").issue_service("bench", [ADDRESS])
    credentials = identity.channel_credentials()
    where = f"{ADDRESS}:7701"
    async with rpc.channel(where, credentials, server_name=endpoints.SERVICE_NAME) as found:
        yield found
