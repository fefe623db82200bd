"""Writes requests for any rpc from its descriptors: sound, at the bounds, hostile, or garbled.

Everything is drawn from one generator of random numbers, so a seed and a number name a request.
"""

from __future__ import annotations

import base64
import json
import string
from random import Random
from typing import Any

from google.protobuf import descriptor, message_factory
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from mcloud.common.v1 import options_pb2
from mcloud_base import ids

TEXTS = [
    "", " ", "x", "0", "-1", "\0", "a\0b", "\n", "\r\n", "\t", "\u2028", "\ufeff", "\u202e",
    "\u202eevil\u202c", "é", "e\u0301", "日本", "🙂", "👩\u200d👩\u200d👧", "\u200b",
    "a" + "\u0301" * 300,
    "ﷺ" * 80, "\U000e0001", "\ufffd", "\uffff", "\U0010ffff", "İ", "ß", "Ⅷ", "١٢٣", "１",
    "%", "_", "\\", "'", '"', "'; DROP TABLE instance; --", '" OR 1=1', "../../etc/passwd",
    "/etc/passwd", "${HOME}", "$(id)", "`id`", "{}", "[]", "null", "None", "true", "undefined",
    "<script>", "name=", 'name="', 'name="x" AND', 'labels.a="b"', 'state="ACTIVE"', 'name!=""',
    'labels.%="_"', " AND ".join(['name="x"'] * 60), "name desc", "create_time desc",
    "create_time asc", "id; --", "NaN", "inf", "1e309", "-0", "0x10", "1_000",
    "10.0.0.0/8", "10.0.0.1/8", "0.0.0.0/0", "::/0", "fe80::1%eth0", "255.255.255.255", "::1",
    "::ffff:10.0.0.1", "10.0.0.0/33", "010.0.0.1", "fd00::/128", "127.0.0.1", "224.0.0.1",
    "52:54:00:00:00:01", "00:00:00:00:00:00", "999999999999999999999999", "9" * 18, "9" * 5000,
    "x" * 255, "x" * 256, "x" * 1024, "é" * 4096, "x" * 4097, "W10=", "WyJhIiwxLCJiIl0=", "%s%n",
    "\x7f", "\x85", "\x1b[31m", "[" * 5000, "{" * 4000, "(" * 900, "=" * 1024,
]  # fmt: skip
_NUMBERS = [0, 1, -1, 7, 65_535, 65_536, 2**31 - 1, -(2**31), 2**32 - 1, 2**63 - 1, -(2**63)]
_FLOATS = [0.0, -0.0, 1.5, -1.0, 1e308, 5e-324, float("inf"), float("-inf"), float("nan")]
_RANGES = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}
_PATHS = ["name", "labels", "spec", "spec.description", "spec.disabled", "", "x" * 4096, "é" * 999]
_PATHS += ["spec.", ".spec", "*", "metadata.id", "spec.description.x", "request_id", "\u202espec"]
_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIFL+PBUWRwLpJsk0qZCz0ytS6RbVKMuHBbU2ZQKrCd5W me"
_SOUND = {
    "cidr": ["10.0.0.0/24", "0.0.0.0/0", "10.0.0.0/32", "fd00::/64", "10.1.0.0/16"],
    "ip": ["10.0.0.7", "0.0.0.0", "fd00::1", "255.255.255.255", "10.0.0.255"],
    "mac": ["52:54:00:00:00:01", "ff:ff:ff:ff:ff:ff"],
}
_DEEP = 5  # messages within messages, where the contract could go on for ever


class Author:
    """Writes one request.

    Args:
        random: where its choices come from.
        known: ids of what exists, by prefix.
        care: the share of fields that keep to what the contract allows; 0 to 1.
    """

    def __init__(self, random: Random, known: dict[str, list[str]], *, care: float) -> None:
        self._random = random
        self._known = known
        self._care = care

    @property
    def _careful(self) -> bool:
        return self._random.random() < self._care

    def fill(self, message: Any, depth: int = 0) -> None:
        name = message.DESCRIPTOR.full_name
        if name in ("google.protobuf.Duration", "google.protobuf.Timestamp"):
            self._fill_time(message)
            return
        if name == "google.protobuf.Any":
            self._fill_any(message, depth)
            return
        groups: dict[str, FieldDescriptor] = {}
        for field in message.DESCRIPTOR.fields:
            of = field.containing_oneof
            if of is not None and len(of.fields) > 1:
                groups.setdefault(of.name, self._random.choice(of.fields))
                if groups[of.name] is not field:
                    continue
            self._fill_field(message, field, depth, asked=of is not None and len(of.fields) > 1)

    def _fill_field(self, message: Any, field: FieldDescriptor, depth: int, *, asked: bool) -> None:
        rules = field.GetOptions().Extensions[options_pb2.rules]
        inner = field.message_type
        chance = 0.995 if rules.required or asked else 0.5
        if self._random.random() > chance or depth > _DEEP:
            return
        if inner is not None and inner.GetOptions().map_entry:
            if inner.fields_by_name["value"].message_type is None:
                count = 1 if self._careful else self._random.choice([0, 1, 70])
                for number in range(count):
                    key = "env" if self._careful else f"{self._random.choice(TEXTS)[:99]}{number}"
                    getattr(message, field.name)[key] = self._random.choice(TEXTS)[:4096]
        elif field.is_repeated:
            self._fill_many(getattr(message, field.name), field, depth)
        elif inner is None:
            setattr(message, field.name, self._value(field, rules))
        else:
            getattr(message, field.name).SetInParent()
            self.fill(getattr(message, field.name), depth + 1)

    def _fill_many(self, many: Any, field: FieldDescriptor, depth: int) -> None:
        rules = field.GetOptions().Extensions[options_pb2.rules]
        counts = [1, 1, 2] if self._careful or depth > 1 else [0, 1, 2, 40, rules.max_items + 1]
        for _ in range(min(self._random.choice(counts), 1100)):
            if field.message_type is not None:
                self.fill(many.add(), depth + 1)
            elif field.name == "paths":
                many.append(self._random.choice(_PATHS))
            else:
                many.append(self._value(field, rules))

    def _fill_time(self, message: Any) -> None:
        if self._careful:
            message.seconds = self._random.choice([0, 1, 60])
            return
        message.seconds = self._random.choice([*_NUMBERS, 315_576_000_000, 253_402_300_800])
        message.nanos = self._random.choice([0, 1, -1, 999_999_999, 2**31 - 1, -(2**31)])

    def _fill_any(self, message: Any, depth: int) -> None:
        if self._careful:
            message.type_url = "type.googleapis.com/mcloud.common.v1.Operation"
            return
        message.type_url = self._random.choice([*TEXTS[:40], "type.googleapis.com/" + "x" * 99])
        message.value = self._random.randbytes(self._random.choice([0, 1, 30]))

    def _value(self, field: FieldDescriptor, rules: options_pb2.FieldRules) -> Any:
        kind, random = field.cpp_type, self._random
        if kind == FieldDescriptor.CPPTYPE_BOOL:
            return random.random() < 0.5
        if kind == FieldDescriptor.CPPTYPE_ENUM:
            known = list(field.enum_type.values_by_number)
            return random.choice(
                known[1:] if self._careful else [*known, 77, -1, 2**31 - 1, -(2**31)]
            )
        if kind in (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE):
            return random.choice(_FLOATS)
        if kind in _RANGES:
            low, high = _RANGES[kind]
            bounds = [rules.min, rules.max] if rules.HasField("max") else [rules.min, 1, 4]
            if not self._careful:
                bounds += [rules.max + 1, rules.min - 1, *_NUMBERS]
            return random.choice([number for number in bounds if low <= number <= high])
        if field.type == FieldDescriptor.TYPE_BYTES:
            return random.choice(
                [b"", b"\0", b"x", b"\xff\xfe", random.randbytes(300), b"x" * 70_000]
            )
        return self._text(field.name, rules)

    def _text(self, name: str, rules: options_pb2.FieldRules) -> str:
        random = self._random
        if not self._careful and random.random() < 0.3:
            return random.choice(TEXTS)
        if name == "page_token" and random.random() < 0.7:
            return _page_token(random)
        if rules.id:
            known = self._known.get(rules.id) or [f"{rules.id}-{'0' * 20}"]
            return random.choice(known[-5:])
        if rules.uuid:
            return ids.request_id() if random.random() < 0.9 else str(ids.request_id()).upper()
        if rules.name:
            return "".join(random.choices(string.printable.strip(), k=random.randint(1, 20)))
        for rule, values in _SOUND.items():
            if getattr(rules, rule):
                return random.choice(values)
        if rules.pattern == "[0-9a-f]{64}":
            return "0" * 64
        return random.choice(["", "x", _KEY] if self._careful else TEXTS)


def _page_token(random: Random) -> str:
    """Return something like a token of a page, tampered with."""
    values = [random.choice([*_NUMBERS, None, "x", [], {}, 1.5, True, "\0"]) for _ in range(3)]
    token = base64.urlsafe_b64encode(json.dumps(values).encode()).decode()
    return random.choice([token, token[:-1], token + "=", token * 9, "e30=", "bnVsbA=="])


def mangled(random: Random, message: Message) -> bytes:
    """Return a message's bytes, cut, turned over, repeated or followed by what nobody knows."""
    raw = bytearray(message.SerializeToString())
    kind = random.randrange(6)
    if kind == 0:
        return bytes(raw[: random.randint(0, len(raw))])
    if kind == 1 and raw:
        for _ in range(random.randint(1, 8)):
            raw[random.randrange(len(raw))] = random.randrange(256)
    elif kind == 2:
        raw = raw * random.randint(2, 50)
    elif kind == 3:
        # Groups within groups of an unknown number, deeper than a parser goes.
        raw += b"\xfb\x7f" * random.choice([10, 90, 5000])
    elif kind == 4:
        raw += b"\xfa\x7f\x05hello" * random.randint(1, 2000)  # an unknown field, well-formed
    else:
        raw += random.randbytes(random.randint(1, 200))
    return bytes(raw)


def written(
    random: Random, method: descriptor.MethodDescriptor, known: dict[str, list[str]]
) -> tuple[Message, bytes]:
    """Return a request for an rpc, and the bytes to send: mostly, but not always, those of it."""
    message: Message = message_factory.GetMessageClass(method.input_type)()
    Author(random, known, care=random.choice([1.0, 1.0, 0.9, 0.9, 0.2])).fill(message)
    if random.random() < 0.08:
        return message, mangled(random, message)
    return message, message.SerializeToString()
