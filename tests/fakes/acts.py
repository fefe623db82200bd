"""How each workflow is begun, and what is there when it has ended.

The workflows are found in the program's own registry; one without an act here fails a test.
"""

from __future__ import annotations

import asyncio
import importlib
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from mcloud_controlplane.core.runtime import Runtime
from mcloud_controlplane.core.workflow import Workflow
from mcloud_controlplane.settings import Settings

GONE = "gone"


@dataclass(frozen=True)
class Act:
    """One way to begin a workflow. States are those of the contract, or GONE."""

    method: str  # "compute.InstanceService/StopInstance"
    ends: tuple[str, ...]  # after success
    fails: tuple[str, ...]  # after failure or cancellation
    needs: str = "ACTIVE"  # state of the subject before
    fields: tuple[tuple[str, object], ...] = ()
    second_volume: str = ""  # "attached" or "free" before; or no matter
    # The state of a guest without an OS, in which it lets go of a disk.
    needs_without_os: str = ""

    @property
    def service(self) -> str:
        """Whose method it is: "compute"."""
        return self.method.partition(".")[0]

    @property
    def subject(self) -> str:
        """What it works on: "instance", "volume", or "fault", which is planted in the records."""
        return {"compute": "instance", "volume": "volume", "conductor": "fault"}[self.service]

    @property
    def is_of_operators(self) -> bool:
        return self.subject == "fault"

    @property
    def makes(self) -> bool:
        return self.needs == GONE


_LIVING = ("ACTIVE", "SHUTOFF")
_INSTANCES, _VOLUMES = "compute.InstanceService/", "volume.VolumeService/"

ACTS = {
    "create_instance": Act(_INSTANCES + "CreateInstance", ("ACTIVE",), ("ERROR",), needs=GONE),
    "delete_instance": Act(_INSTANCES + "DeleteInstance", (GONE,), (GONE,)),
    "start_instance": Act(_INSTANCES + "StartInstance", ("ACTIVE",), _LIVING, needs="SHUTOFF"),
    # There may be no OS that would hear of it: by force.
    "stop_instance": Act(
        _INSTANCES + "StopInstance", ("SHUTOFF",), _LIVING, fields=(("force", True),)
    ),
    "reboot_instance": Act(
        _INSTANCES + "RebootInstance", ("ACTIVE",), _LIVING, fields=(("hard", True),)
    ),
    "attach_volume": Act(
        _INSTANCES + "AttachVolume", ("ACTIVE",), ("ACTIVE",), second_volume="free"
    ),
    "detach_volume": Act(
        _INSTANCES + "DetachVolume", ("ACTIVE",), ("ACTIVE",), second_volume="attached",
        needs_without_os="SHUTOFF",
    ),
    "create_volume": Act(_VOLUMES + "CreateVolume", ("AVAILABLE",), ("ERROR",), needs=GONE),
    "delete_volume": Act(_VOLUMES + "DeleteVolume", (GONE,), (GONE,), needs="AVAILABLE"),
    "repair": Act(
        "conductor.VerifyService/Repair", (GONE,), (GONE, "PLANTED"), needs="PLANTED"
    ),
}  # fmt: skip


# The workflows by which a subject goes.
REMOVERS = {"instance": "delete_instance", "volume": "delete_volume", "fault": "repair"}


@cache
def registered() -> dict[str, Workflow]:
    """Return every workflow that a process with all services registers, by name.

    Nothing of it is run: it is for reading the tables.
    """

    async def read() -> dict[str, Workflow]:
        with tempfile.TemporaryDirectory() as directory:
            runtime = Runtime(Settings(state_dir=Path(directory)))
            try:
                for name in runtime.settings.services:
                    importlib.import_module(f"mcloud_controlplane.{name}.service").register(runtime)
                return runtime.workflows()
            finally:
                await runtime.stop(0)

    return asyncio.run(read())
