"""A contract that is not the one of this tree: messages and rpcs made from its descriptors alone.

A client of another release is played with them: what it sends and reads are its own messages.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

BASELINE = Path(__file__).parents[2] / "protos" / "baseline.binpb"  # of the last release


class Contract:
    """The contract of a descriptor set."""

    def __init__(self, path: Path = BASELINE) -> None:
        self._pool = descriptor_pool.DescriptorPool()
        for file in descriptor_pb2.FileDescriptorSet.FromString(path.read_bytes()).file:
            self._pool.Add(file)

    def message(self, name: str, **fields: Any) -> Any:
        """Make a message: `message("compute.v1.InstanceSpec", flavor_id=…)`."""
        found = self._pool.FindMessageTypeByName(f"mcloud.{name}")
        return message_factory.GetMessageClass(found)(**fields)

    def value(self, enum: str, name: str) -> int:
        """Return the number of an enum's value."""
        found: int = self._pool.FindEnumTypeByName(f"mcloud.{enum}").values_by_name[name].number
        return found

    def method(self, channel: Any, name: str) -> tuple[Any, Any]:
        """Return the callable and the request's class of "compute.v1.InstanceService/GetInstance".

        It is of whichever of the four forms the contract says.
        """
        service, _, rpc = name.partition("/")
        found = self._pool.FindServiceByName(f"mcloud.{service}").methods_by_name[rpc]
        forms = {
            (False, False): channel.unary_unary,
            (False, True): channel.unary_stream,
            (True, False): channel.stream_unary,
            (True, True): channel.stream_stream,
        }
        request = message_factory.GetMessageClass(found.input_type)
        answer: Any = message_factory.GetMessageClass(found.output_type)
        callable_ = forms[found.client_streaming, found.server_streaming](
            f"/mcloud.{name}",
            request_serializer=request.SerializeToString,
            response_deserializer=answer.FromString,
        )
        return callable_, request
