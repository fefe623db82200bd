"""What the descriptors say: who may call, what a field takes, what is secret.

The options are those of mcloud/common/v1/options.proto; nothing here knows any one rpc.
"""

from __future__ import annotations

import hmac
import ipaddress
import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any, NamedTuple, TypeVar

from google.protobuf import descriptor, descriptor_pool
from google.protobuf.message import Message
from google.rpc import error_details_pb2

from mcloud.common.v1 import options_pb2
from mcloud_base import errors, ids

MessageT = TypeVar("MessageT", bound=Message)
Check = Callable[[Any], str]  # of one value: what is wrong with it, or ""

_NAME = re.compile(r"\S(.*\S)?", re.DOTALL)
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")
_STRING_LIMIT = 4096  # where the contract says nothing
_MAP_LIMIT = 16_384  # so that a page of what carries labels fits in a message
MASK = "***"


@cache
def method(path: str) -> descriptor.MethodDescriptor | None:
    """Return the descriptor of "/package.Service/Method" of mcloud's, or None."""
    name = path.lstrip("/").replace("/", ".")
    if not name.startswith("mcloud."):
        return None
    try:
        return descriptor_pool.Default().FindMethodByName(name)
    except KeyError:
        return None


def rule(of: descriptor.MethodDescriptor) -> options_pb2.Rule:
    """Return the policy of an rpc."""
    return of.GetOptions().Extensions[options_pb2.rule]


@cache
def stays(of: descriptor.MethodDescriptor) -> bool:
    """Tell whether a call may last: it is a stream, or says for how long it waits."""
    waits = of.input_type.fields_by_name.get("timeout")
    return of.client_streaming or of.server_streaming or waits is not None


def validate(message: Message) -> None:
    """Check a request against the constraints of its fields.

    Raises:
        errors.InvalidArgument: BAD_REQUEST, with every violation as BadRequest.
    """
    violations = [
        error_details_pb2.BadRequest.FieldViolation(field=path, description=text)
        for path, text in _violations(message, "")
        if _counts(message, path)
    ]
    if violations:
        first = violations[0]
        raise errors.InvalidArgument(
            "BAD_REQUEST",
            f"{first.field}: {first.description}",
            details=(error_details_pb2.BadRequest(field_violations=violations[:20]),),
            field=first.field,
        )


def masked(message: MessageT) -> MessageT:
    """Return a copy whose secrets are masked; the message itself if none of its kind has any."""
    if not _has_secrets(message.DESCRIPTOR):
        return message
    copy = type(message)()
    copy.CopyFrom(message)
    _mask(copy)
    return copy


def digest(message: Message, key: bytes) -> str:
    """Return an HMAC of a request without its request_id and validate_only."""
    copy = type(message)()
    copy.CopyFrom(message)
    for field in ("request_id", "validate_only"):
        if field in copy.DESCRIPTOR.fields_by_name:
            copy.ClearField(field)
    return hmac.digest(key, copy.SerializeToString(deterministic=True), "sha256").hex()


def enum_name(value: int, enum: Any) -> str:
    """Return the name of an enum value without the prefix that Buf asks for: "ACTIVE"."""
    name = str(enum.Name(value))
    return name.removeprefix(_enum_prefix(enum.DESCRIPTOR.name))


@cache
def enum_value(name: str, enum: Any) -> Any:
    """Return the value of an enum by its name without the prefix."""
    return enum.Value(_enum_prefix(enum.DESCRIPTOR.name) + name)


@cache
def _enum_prefix(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).upper() + "_"


def _counts(message: Message, path: str) -> bool:
    """Tell whether a field is asked for: of an update's spec only what its mask names is."""
    if "update_mask" not in message.DESCRIPTOR.fields_by_name or not path.startswith("spec."):
        return True
    named: list[str] = list(getattr(message, "update_mask").paths)  # noqa: B009 (of some messages)
    return any((path + ".").startswith(name + ".") or path.startswith(name + "[") for name in named)


def _violations(message: Message, prefix: str) -> Iterator[tuple[str, str]]:
    for field in _plan(message.DESCRIPTOR):
        if field.has_presence:
            present = message.HasField(field.name)
        else:
            present = bool(getattr(message, field.name))
        if not present:
            if field.missing:
                yield prefix + field.name, field.missing
            continue
        path, value = prefix + field.name, getattr(message, field.name)
        if field.is_map:
            yield from _map_violations(value, path, field.rules)
        elif field.is_repeated:
            if field.rules.HasField("max_items") and len(value) > field.rules.max_items:
                yield path, f"has {len(value)} entries; at most {field.rules.max_items}"
                continue
            for index, item in enumerate(value):
                if field.is_message:
                    yield from _violations(item, f"{path}[{index}].")
                else:
                    for check in field.checks:
                        if text := check(item):
                            yield f"{path}[{index}]", text
        elif field.is_message:
            yield from _violations(value, path + ".")
        else:
            for check in field.checks:
                if text := check(value):
                    yield path, text


def _map_violations(
    value: Any, path: str, rules: options_pb2.FieldRules
) -> Iterator[tuple[str, str]]:
    if rules.HasField("max_items") and len(value) > rules.max_items:
        yield path, f"has {len(value)} entries; at most {rules.max_items}"
        return
    if sum(len(key) + len(str(item)) for key, item in value.items()) > _MAP_LIMIT:
        yield path, f"keys and values have at most {_MAP_LIMIT} characters together"
        return
    for key, item in value.items():
        if not 1 <= len(key) <= 255 or not key.isprintable():
            yield path, "keys are 1 to 255 printable characters"
        if isinstance(item, str) and (len(item) > _STRING_LIMIT or "\0" in item):
            yield path, f"values have at most {_STRING_LIMIT} characters and no NUL"


class _Field(NamedTuple):
    """What is checked of a field: every message of every stream is, so it is worked out once."""

    name: str
    rules: options_pb2.FieldRules
    checks: tuple[Check, ...]
    missing: str  # what is said if it is not set; empty: nothing
    has_presence: bool
    is_map: bool
    is_repeated: bool
    is_message: bool  # with fields of its own


@cache
def _plan(of: descriptor.Descriptor) -> tuple[_Field, ...]:
    return tuple(filter(None, map(_planned, of.fields)))


def _planned(field: descriptor.FieldDescriptor) -> _Field | None:
    """Return what is checked of a field; None: nothing."""
    rules = field.GetOptions().Extensions[options_pb2.rules]
    inner = field.message_type
    is_map = inner is not None and inner.GetOptions().map_entry
    # Any carries what other messages constrain; well-known types constrain themselves.
    ours = inner is None or is_map or inner.full_name.startswith("mcloud.")
    if not ours and not rules.required:
        return None
    checks = tuple(_checks(field, rules)) if ours else ()
    missing = ""
    if rules.required:
        missing = "must be set"
    elif rules.defined:
        missing = "must be one of the known values"
    is_message = inner is not None and ours
    if not (missing or is_message or checks or rules.HasField("max_items")):
        return None
    return _Field(
        field.name,
        rules,
        checks,
        missing,
        field.has_presence,
        is_map,
        field.is_repeated,
        is_message,
    )


def _checks(field: descriptor.FieldDescriptor, rules: options_pb2.FieldRules) -> Iterator[Check]:
    if field.enum_type is not None:
        known = field.enum_type.values_by_number
        yield lambda value: "" if value in known else "must be one of the known values"
    if field.cpp_type == field.CPPTYPE_STRING:
        yield from _string_checks(field, rules)
    elif rules.pattern:
        number = re.compile(rules.pattern)
        yield lambda value: "" if number.fullmatch(str(value)) else f"must match {rules.pattern}"
    if rules.HasField("min"):
        yield lambda value: "" if value >= rules.min else f"must be at least {rules.min}"
    if rules.HasField("max"):
        yield lambda value: "" if value <= rules.max else f"must be at most {rules.max}"


def _string_checks(
    field: descriptor.FieldDescriptor, rules: options_pb2.FieldRules
) -> Iterator[Check]:
    is_bytes = field.type == field.TYPE_BYTES
    unit = "bytes" if is_bytes else "characters"
    limit = rules.max_len if rules.HasField("max_len") else _STRING_LIMIT
    nul = b"" if is_bytes else "\0"

    def check(value: Any) -> str:  # of each text that comes, so in one
        if len(value) > limit:
            return f"must have at most {limit} {unit}"
        return "must not contain NUL" if nul and nul in value else ""

    yield check
    if rules.HasField("min_len"):
        yield (
            lambda value: (
                ""
                if len(value) >= rules.min_len
                else (f"must have at least {rules.min_len} {unit}")
            )
        )
    if is_bytes:
        return
    if rules.name:
        yield (
            lambda value: (
                ""
                if (len(value) <= 255 and value.isprintable() and _NAME.fullmatch(value))
                else "must be 1 to 255 printable characters with no space at either end"
            )
        )
    if rules.id:
        yield (
            lambda value: (
                ""
                if ids.is_id(value, rules.id)
                else (f"must be the id of a {ids.PREFIXES.get(rules.id, rules.id)}: {rules.id}-…")
            )
        )
    if rules.uuid:
        yield lambda value: "" if _is_uuid(value) else "must be a UUID"
    if rules.pattern:
        pattern = re.compile(rules.pattern)
        yield lambda value: "" if pattern.fullmatch(value) else f"must match {rules.pattern}"
    if rules.cidr:
        yield (
            lambda value: (
                ""
                if _parses(ipaddress.ip_network, value) and "/" in value
                else ("must be an IP network without host bits, like 10.0.0.0/24")
            )
        )
    if rules.ip:
        yield lambda value: "" if _parses(ipaddress.ip_address, value) else "must be an IP address"
    if rules.mac:
        yield (
            lambda value: (
                ""
                if _MAC.fullmatch(value)
                else ("must be six lower-case octets, like 52:54:00:12:34:56")
            )
        )


def _is_uuid(text: str) -> bool:
    try:
        return str(uuid.UUID(text)) == text
    except ValueError:
        return False


def _parses(parse: Callable[[str], object], text: str) -> bool:
    try:
        parse(text)
    except ValueError:
        return False
    return True


def _mask(message: Message) -> None:
    for field, sensitive in _secret_fields(message.DESCRIPTOR):
        name, is_repeated = field.name, field.is_repeated
        if field.has_presence and not message.HasField(name):
            continue
        value = getattr(message, name)
        if sensitive:
            if not value:
                continue
            message.ClearField(name)
            if field.type == field.TYPE_BYTES and not is_repeated:
                setattr(message, name, MASK.encode())
            elif field.type == field.TYPE_STRING and not is_repeated:
                setattr(message, name, MASK)
        elif isinstance(value, Mapping):
            for item in value.values():
                _mask(item)
        elif is_repeated:
            for item in value:
                _mask(item)
        else:
            _mask(value)


@cache
def _has_secrets(of: descriptor.Descriptor) -> bool:
    return bool(_secret_fields(of))


@cache
def _secret_fields(
    of: descriptor.Descriptor,
) -> tuple[tuple[descriptor.FieldDescriptor, bool], ...]:
    """Return the fields that are secret (True), or messages in which there may be some."""
    return tuple(
        (field, _is_sensitive(field))
        for field in of.fields
        if _is_sensitive(field) or _leads_to_secrets(field, frozenset({of.full_name}))
    )


def _leads_to_secrets(field: descriptor.FieldDescriptor, seen: frozenset[str]) -> bool:
    """Tell whether a message of this field may have a secret, however deep; kinds may recur."""
    inner = field.message_type
    if inner is None or inner.full_name in seen:
        return False
    seen |= {inner.full_name}
    return any(_is_sensitive(each) or _leads_to_secrets(each, seen) for each in inner.fields)


def _is_sensitive(field: descriptor.FieldDescriptor) -> bool:
    return bool(field.GetOptions().Extensions[options_pb2.sensitive])
