"""What an agent keeps about its host and of its domains, in the simulator's file."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable
from dataclasses import asdict

from google.protobuf.message import Message

from mcloud.common.v1 import operation_pb2
from mcloud.conductor.v1 import domain_pb2
from mcloud.network.v1 import port_service_pb2
from mcloud_agents.compute.record import Record
from mcloud_agents.enrolment import Membership
from mcloud_agents.simulate.state_file import StateFile
from mcloud_base import tls

IDENTITY, RECORD = "identity", "record"


class Keep:
    """A host's key and certificates (enrolment.Keep)."""

    def __init__(self, file: StateFile, host: int) -> None:
        self._file = file
        self._host = host

    def key(self) -> bytes:
        """See enrolment.Keep."""
        known = self._file.read(self._host, "key").get("")
        if known is None:
            known = tls.new_key()
            self._file.write(self._host, "key", "", known)
        return known

    def load(self) -> tuple[tls.Identity, Membership] | None:
        """See enrolment.Keep."""
        saved = self._file.read(self._host, IDENTITY).get("")
        if saved is None:
            return None
        values = json.loads(saved)
        identity = tls.Identity(
            self.key(), values["certificate"].encode(), values["authority"].encode()
        )
        return identity, Membership(**values["membership"])

    def save(self, identity: tls.Identity, membership: Membership) -> None:
        """See enrolment.Keep."""
        values = {
            "certificate": identity.certificate.decode(),
            "authority": identity.authority.decode(),
            "membership": asdict(membership),
        }
        self._file.write(self._host, IDENTITY, "", json.dumps(values).encode())

    def publish(self, identity: tls.Identity) -> None:
        """See enrolment.Keep: nobody else is there."""


class State:
    """A host's incarnation and epochs (agent.State)."""

    def __init__(self, file: StateFile, host: int) -> None:
        self._file = file
        self._host = host
        self._epochs = file.read(host, "epoch")

    def next_incarnation(self) -> int:
        """See agent.State."""
        last = int(self._file.read(self._host, "incarnation").get("", b"0"))
        self._file.write(self._host, "incarnation", "", b"%d" % (last + 1))
        return last + 1

    def epoch(self, session: str) -> str:
        """See agent.State."""
        return self._epochs.get(session, b"").decode()

    def remember_epoch(self, session: str, epoch: str) -> None:
        """See agent.State."""
        if self.epoch(session) != epoch:
            self._file.write(self._host, "epoch", session, epoch.encode())
            self._epochs[session] = epoch.encode()


class Records:
    """A host's domains, as its agent remembers them (compute.record.Records)."""

    def __init__(self, file: StateFile, host: int) -> None:
        self._file = file
        self._host = host

    def load(self) -> Iterable[Record]:
        """See compute.record.Records."""
        for _, body in sorted(self._file.read(self._host, RECORD).items()):
            yield _decode(body)

    async def save(self, saved: Record) -> None:
        """See compute.record.Records."""
        self._file.write(self._host, RECORD, saved.domain_id, _encode(saved))

    def remove(self, domain_id: str) -> None:
        """See compute.record.Records."""
        self._file.remove(self._host, RECORD, domain_id)

    def last_boot(self) -> str:
        """See compute.record.Records: a simulated machine never boots anew."""
        return ""

    def note_boot(self, boot_id: str) -> None:
        """See compute.record.Records."""


def _encode(saved: Record) -> bytes:
    """Return a record; its messages as they are on the wire: nobody reads them in this file.

    As JSON (record.encode) they would take twenty times as long.
    """
    values = {
        **vars(saved),
        "spec": _text(saved.spec) if saved.spec else None,
        "bindings": [_text(binding) for binding in saved.bindings],
        "steps": [_text(step) for step in saved.steps],
    }
    return json.dumps(values).encode()


def _decode(body: bytes) -> Record:
    values = json.loads(body)
    spec, bindings, steps = values.pop("spec"), values.pop("bindings"), values.pop("steps")
    binding, step = port_service_pb2.BindPortResponse, operation_pb2.OperationStep
    return Record(
        **values,
        spec=domain_pb2.DomainSpec.FromString(base64.b64decode(spec)) if spec else None,
        bindings=[binding.FromString(base64.b64decode(each)) for each in bindings],
        steps=[step.FromString(base64.b64decode(each)) for each in steps],
    )


def _text(message: Message) -> str:
    return base64.b64encode(message.SerializeToString()).decode()
