"""Key pairs, as a resource that needs nothing but a project."""

from __future__ import annotations

import base64
import itertools
import os
from typing import Any

from mcloud.common.v1 import operation_pb2
from mcloud.compute.v1 import key_pair_service_pb2, key_pair_service_pb2_grpc
from mcloud_base import ids, rpc

_names = itertools.count(1)


def new_project() -> str:
    """Return a name that no other test uses."""
    return f"project-{os.getpid()}-{next(_names)}"


def public_key() -> str:
    """Return a key that is well-formed and opens nothing."""
    blob = b"\0\0\0\x0bssh-ed25519\0\0\0\x20" + os.urandom(32)
    return "ssh-ed25519 " + base64.b64encode(blob).decode()


def create_request(name: str, **values: Any) -> key_pair_service_pb2.CreateKeyPairRequest:
    request = key_pair_service_pb2.CreateKeyPairRequest(
        **{"request_id": ids.request_id(), "name": name, **values}
    )
    request.spec.public_key = public_key()
    return request


class Keys:
    """The service of key pairs, as one caller sees it."""

    def __init__(self, channel: Any, who: rpc.Metadata) -> None:
        self.channel = channel
        self.stub = key_pair_service_pb2_grpc.KeyPairServiceStub(channel)
        self.who = who

    async def create(self, name: str, **values: Any) -> operation_pb2.Operation:
        return await self.send(create_request(name, **values))

    async def send(
        self, request: key_pair_service_pb2.CreateKeyPairRequest
    ) -> operation_pb2.Operation:
        return await rpc.call(self.stub.CreateKeyPair, request, metadata=self.who)

    async def delete(self, id_: str) -> operation_pb2.Operation:
        request = key_pair_service_pb2.DeleteKeyPairRequest(request_id=ids.request_id(), id=id_)
        return await rpc.call(self.stub.DeleteKeyPair, request, metadata=self.who)

    async def list(self, **values: Any) -> key_pair_service_pb2.ListKeyPairsResponse:
        request = key_pair_service_pb2.ListKeyPairsRequest(**values)
        return await rpc.call(self.stub.ListKeyPairs, request, metadata=self.who)

    async def names(self, **values: Any) -> list[str]:
        return [key.metadata.name for key in (await self.list(**values)).key_pairs]

    def list_request(self) -> key_pair_service_pb2.ListKeyPairsRequest:
        return key_pair_service_pb2.ListKeyPairsRequest()

    def watch(self, **values: Any) -> Any:
        request = key_pair_service_pb2.WatchKeyPairsRequest(**values)
        return self.stub.WatchKeyPairs(request, metadata=tuple(self.who))
