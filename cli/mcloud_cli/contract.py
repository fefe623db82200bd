"""The contract, read at run time: an rpc's messages and its rule, from its name alone."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from google.protobuf import descriptor_pool, message_factory
from google.protobuf.message import Message

from mcloud.common.v1 import options_pb2

Rule = options_pb2.Rule


@dataclass(frozen=True)
class Method:
    """One rpc."""

    path: str  # "/mcloud.compute.v1.InstanceService/ListInstances"
    request: Callable[..., Any]
    response: Any
    rule: Rule

    @property
    def has_request_id(self) -> bool:
        """Tell whether a repeat is known by a request id."""
        return self.rule.kind in (Rule.KIND_MUTATE, Rule.KIND_ISSUE)


def method(name: str) -> Method:
    """Return the rpc of a name: "compute.InstanceService/ListInstances"."""
    service, _, rpc = name.partition("/")
    domain, _, service = service.partition(".")
    load(f"mcloud.{domain}.v1.{service}")
    found = descriptor_pool.Default().FindMethodByName(f"mcloud.{domain}.v1.{service}.{rpc}")
    return Method(
        path=f"/mcloud.{domain}.v1.{service}/{rpc}",
        request=message_factory.GetMessageClass(found.input_type),
        response=message_factory.GetMessageClass(found.output_type),
        rule=found.GetOptions().Extensions[options_pb2.rule],
    )


def load(service: str) -> None:
    """Import the messages of a service: "mcloud.compute.v1.InstanceService"."""
    package, _, name = service.rpartition(".")
    importlib.import_module(f"{package}.{snake(name)}_pb2")


def unpack(packed: Any) -> Message | None:
    """Return what a google.protobuf.Any holds; None if it is empty."""
    if not packed.type_url:
        return None
    found = descriptor_pool.Default().FindMessageTypeByName(packed.TypeName())
    message: Message = message_factory.GetMessageClass(found)()
    packed.Unpack(message)
    return message


def snake(name: str) -> str:
    """Return SecurityGroup as security_group."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
