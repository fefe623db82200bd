"""The contract keeps its own rules: every rpc, walked by its kind."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from google.protobuf import descriptor
from google.protobuf.descriptor import FieldDescriptor

import mcloud_base
from mcloud.common.v1 import operation_pb2, options_pb2

ROOT = Path(mcloud_base.__file__).parents[1]
DOMAINS = ("identity", "compute", "scheduler", "conductor", "image", "network", "volume")
Rule = options_pb2.Rule
OPERATION = operation_pb2.Operation.DESCRIPTOR.full_name


def files() -> list[descriptor.FileDescriptor]:
    """Return every file of the contract."""
    return [
        importlib.import_module(
            str(path.relative_to(ROOT).with_suffix("")).replace("/", ".") + "_pb2"
        ).DESCRIPTOR
        for path in sorted(ROOT.glob("mcloud/**/*.proto"))
    ]


def rpcs() -> list[descriptor.MethodDescriptor]:
    """Return every rpc."""
    return [
        method
        for file in files()
        for service in file.services_by_name.values()
        for method in service.methods
    ]


def rule(method: descriptor.MethodDescriptor) -> options_pb2.Rule:
    return method.GetOptions().Extensions[options_pb2.rule]


def of_kind(kind: Rule.Kind.ValueType) -> list[descriptor.MethodDescriptor]:
    found = [method for method in rpcs() if rule(method).kind == kind]
    assert found, "the walk must see something"
    return found


def test_every_package_has_services() -> None:
    seen = {method.containing_service.file.package for method in rpcs()}
    assert seen == {f"mcloud.{domain}.v1" for domain in DOMAINS}
    assert len(rpcs()) > 100


@pytest.mark.parametrize("method", rpcs(), ids=lambda method: method.full_name)
def test_an_rpc_says_who_may_call_it(method: descriptor.MethodDescriptor) -> None:
    option = rule(method)
    assert option.kind != Rule.KIND_UNSPECIFIED
    assert option.callers
    assert Rule.CALLER_UNSPECIFIED not in option.callers
    if Rule.CALLER_USER in option.callers:
        assert option.role != Rule.ROLE_UNSPECIFIED
    if option.kind != Rule.KIND_INTERNAL:
        assert Rule.CALLER_USER in option.callers or option.kind in (Rule.KIND_READ,)


def test_mutations_can_be_repeated_and_tried() -> None:
    for method in of_kind(Rule.KIND_MUTATE):
        fields = method.input_type.fields_by_name
        assert fields["request_id"].GetOptions().Extensions[options_pb2.rules].uuid, (
            method.full_name
        )
        assert fields["request_id"].GetOptions().Extensions[options_pb2.rules].required
        assert fields["validate_only"].type == FieldDescriptor.TYPE_BOOL
        assert method.output_type.full_name == OPERATION, method.full_name


def test_issues_carry_a_request_id_and_return_a_secret() -> None:
    for method in of_kind(Rule.KIND_ISSUE):
        assert method.input_type.fields_by_name["request_id"]
        secrets = [
            field
            for field in method.output_type.fields
            if field.GetOptions().Extensions[options_pb2.sensitive]
        ]
        assert secrets, method.full_name


def test_streams_work_on_an_id_with_an_offset() -> None:
    for method in of_kind(Rule.KIND_STREAM):
        names = {field.name for field in all_fields(method.input_type)}
        assert {"id", "offset"} <= names, method.full_name


def test_internal_calls_are_not_for_users() -> None:
    for method in of_kind(Rule.KIND_INTERNAL):
        assert Rule.CALLER_USER not in rule(method).callers, method.full_name


def test_lists_page() -> None:
    lists = [
        method for method in of_kind(Rule.KIND_READ)
        if method.name.startswith("List") and Rule.CALLER_USER in rule(method).callers
    ]  # fmt: skip
    assert len(lists) > 15
    for method in lists:
        assert {"page_size", "page_token", "filter", "order_by"} <= set(
            method.input_type.fields_by_name
        ), method.full_name
        assert {"next_page_token", "revision"} <= set(method.output_type.fields_by_name)


def test_gets_return_the_resource() -> None:
    gets = [method for method in of_kind(Rule.KIND_READ) if method.name.startswith("Get")]
    assert len(gets) > 15
    for method in gets:
        noun = method.name.removeprefix("Get")
        assert method.output_type.name in (noun, f"Get{noun}Response"), method.full_name


def test_fields_that_need_one_have_a_constraint() -> None:
    checked = 0
    for message in requests():
        for field in message.fields:
            options = field.GetOptions().Extensions[options_pb2.rules]
            if field.name in ("page_token", "filter", "order_by", "name", "request_id"):
                assert options.ByteSize(), f"{message.full_name}.{field.name}"
                checked += 1
            if field.name.endswith("_id") and field.name not in NOT_IDS:
                assert options.id or options.uuid or options.ByteSize(), (
                    f"{message.full_name}.{field.name}"
                )
                checked += 1
            if field.is_repeated and field.message_type is None:
                assert options.HasField("max_items"), f"{message.full_name}.{field.name}"
                checked += 1
    assert checked > 200


NOT_IDS = ("instance_id",)  # of a status message, inside a report


def test_passwords_secrets_and_tokens_are_sensitive() -> None:
    found = 0
    for file in files():
        for message in file.message_types_by_name.values():
            for field in message.fields:
                if field.name in (
                    "password",
                    "new_password",
                    "current_password",
                    "secret",
                    "user_data",
                    "delegated_token",
                ) and field.type in (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES):
                    assert field.GetOptions().Extensions[options_pb2.sensitive], field.full_name
                    found += 1
    assert found >= 8


def test_the_contract_is_what_was_reviewed(golden: Callable[[str, str], None]) -> None:
    """One line a field and an rpc: what a change means stands in the golden file's diff."""
    lines: list[str] = []
    for file in files():
        for enum in file.enum_types_by_name.values():
            lines += enum_lines(enum)
        for message in file.message_types_by_name.values():
            lines += message_lines(message)
        for service in file.services_by_name.values():
            lines += [rpc_line(method) for method in service.methods]
    golden("api.txt", "\n".join(lines) + "\n")


def requests() -> list[descriptor.Descriptor]:
    """Return every message that a client sends, with the messages inside."""
    seen: dict[str, descriptor.Descriptor] = {}

    def add(message: descriptor.Descriptor) -> None:
        if message.full_name in seen or not message.full_name.startswith("mcloud."):
            return
        seen[message.full_name] = message
        for field in message.fields:
            if field.message_type is not None and not field.message_type.GetOptions().map_entry:
                add(field.message_type)

    for method in rpcs():
        if rule(method).kind in (Rule.KIND_MUTATE, Rule.KIND_ISSUE, Rule.KIND_READ):
            add(method.input_type)
    return list(seen.values())


def all_fields(message: descriptor.Descriptor) -> Iterator[FieldDescriptor]:
    for field in message.fields:
        yield field
        if field.message_type is not None and field.message_type.full_name.startswith("mcloud."):
            yield from all_fields(field.message_type)


def enum_lines(enum: descriptor.EnumDescriptor) -> list[str]:
    return [f"enum {enum.full_name} {value.number} {value.name}" for value in enum.values]


def message_lines(message: descriptor.Descriptor) -> list[str]:
    if message.GetOptions().map_entry:
        return []
    lines = [f"message {message.full_name}"]
    for field in message.fields:
        kind = field.message_type or field.enum_type
        type_ = kind.full_name if kind else FIELD_TYPES[field.type]
        many = "repeated " if field.is_repeated else ""
        rules = str(field.GetOptions().Extensions[options_pb2.rules]).replace("\n", " ").strip()
        secret = " sensitive" if field.GetOptions().Extensions[options_pb2.sensitive] else ""
        lines.append(
            f"  {field.number} {many}{type_} {field.name}{secret}{f' [{rules}]' if rules else ''}"
        )
    for enum in message.enum_types:
        lines += enum_lines(enum)
    for nested in message.nested_types:
        lines += message_lines(nested)
    return lines


def rpc_line(method: descriptor.MethodDescriptor) -> str:
    option = rule(method)
    callers = ",".join(Rule.Caller.Name(c).removeprefix("CALLER_") for c in option.callers)
    streams = ("stream " * method.client_streaming, "stream " * method.server_streaming)
    return (
        f"rpc {method.full_name}({streams[0]}{method.input_type.full_name}) "
        f"-> {streams[1]}{method.output_type.full_name} "
        f"{Rule.Kind.Name(option.kind)} {callers} {Rule.Role.Name(option.role)} "
        f"{Rule.Scope.Name(option.scope)}"
    )


FIELD_TYPES = {
    getattr(FieldDescriptor, name): name.removeprefix("TYPE_").lower()
    for name in dir(FieldDescriptor)
    if name.startswith("TYPE_")
}
