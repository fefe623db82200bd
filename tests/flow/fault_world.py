"""The one instance, volume and fault that cases are tried on, in a cloud of their own."""

from __future__ import annotations

from typing import Any

from fakes.acts import ACTS, GONE, REMOVERS, Act
from flow.fault_cloud import FaultCloud, Operation
from flow.small_image import upload_zeros
from mcloud.image.v1 import image_service_pb2_grpc
from mcloud_base import errors, ids
from mcloud_controlplane.compute import model
from mcloud_controlplane.settings import Settings


class World(FaultCloud):
    """A cloud that is furnished, and its subjects; an empty id: there is none."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.subjects = {"instance": "", "volume": "", "fault": ""}
        self.baseline: set[str] = set()
        self._number = 0

    async def start(self) -> None:
        await super().start()
        await self._furnish()
        # Once there and gone again: image and whatever else stays is in place.
        await self.prepare("delete_instance")
        await self.run("delete_instance")
        self.baseline = await self.until(self._only_volumes)

    async def _only_volumes(self) -> set[str] | None:
        """Return the inventory when no instance has left anything in it."""
        found = await self.inventory()
        kinds = {tuple(line.split()[:2]) for line in found}
        return found if kinds == {("volume", "volume"), ("host", "volume")} else None

    async def _furnish(self) -> None:
        images = image_service_pb2_grpc.ImageServiceStub(self.cloud.channel)
        self.image_id = await upload_zeros(images, await self.cloud.token())
        flavor = {"vcpu_count": 1, "memory_mib": 64, "disk_gib": 1}
        self.flavor_id = (
            await self.mutate(
                "compute.FlavorService/CreateFlavor", name="tiny", spec=flavor, system=True
            )
        ).resource.id
        network = await self.mutate("network.NetworkService/CreateNetwork", name="lan", spec={})
        self.network_id = network.resource.id
        spec = {"network_id": self.network_id, "cidr": "10.10.0.0/24"}
        await self.mutate("network.SubnetService/CreateSubnet", name="lan", spec=spec)
        self.first_volume, self.second_volume = [
            await self.make_volume(name) for name in ("first", "second")
        ]

    async def make_volume(self, name: str) -> str:
        operation = await self.mutate(
            "volume.VolumeService/CreateVolume", name=name, spec={"size_gib": 1}
        )
        assert (await self.ended(operation)).state == Operation.STATE_SUCCEEDED
        return str(operation.resource.id)

    async def begin(self, name: str, *, doomed: str = "") -> Operation:
        """Begin a workflow on its subject, or on a new one.

        Args:
            doomed: a volume that a new instance has, and that is to go with it.
        """
        act = ACTS[name]
        fields: dict[str, Any] = dict(act.fields)
        if act.second_volume:
            fields["volume_id"] = self.second_volume
        if act.makes:
            self._number += 1
            fields["name"] = f"{act.subject}-{self._number}"
            fields["spec"] = (
                self._instance_spec(doomed) if act.subject == "instance" else {"size_gib": 1}
            )
        elif act.subject == "fault":
            return await self.mutate(act.method, system=True)
        else:
            fields["id"] = self.subjects[act.subject]
        operation = await self.mutate(act.method, **fields)
        self.subjects[act.subject] = operation.resource.id
        return operation

    def new_instance(self) -> dict[str, Any]:
        """Return the fields of a request for an instance."""
        self._number += 1
        name = f"instance-{self._number}"
        return {"request_id": ids.request_id(), "name": name, "spec": self._instance_spec("")}

    def by_id(self, subject: str) -> dict[str, Any]:
        """Return the fields of a request about a subject."""
        return {"request_id": ids.request_id(), "id": self.subjects[subject]}

    def _instance_spec(self, doomed: str) -> dict[str, Any]:
        volumes: list[dict[str, Any]] = [{"volume_id": self.first_volume}]
        if doomed:
            volumes.append({"volume_id": doomed, "delete_with_instance": True})
        return {
            "flavor_id": self.flavor_id,
            "image_id": self.image_id,
            "nics": [{"network_id": self.network_id}],
            "volumes": volumes,
            "config_drive": True,
        }

    async def run(self, name: str, *, doomed: str = "") -> None:
        ended = await self.ended(await self.begin(name, doomed=doomed))
        assert ended.state == Operation.STATE_SUCCEEDED, ended
        assert await self.state(ACTS[name]) in ACTS[name].ends

    async def prepare(self, name: str) -> None:
        """Have the subject that a workflow needs, and not the other."""
        act = ACTS[name]
        for other in self.subjects.keys() - {act.subject}:
            if self.subjects[other]:
                await self.run(REMOVERS[other])
        if act.subject == "fault":
            if not self.subjects["fault"]:
                await self.plant()
            return
        state = await self.state(act)
        if act.makes:
            if state != GONE:
                await self.run(REMOVERS[act.subject])
            return
        if state in (GONE, "ERROR"):
            if state == "ERROR":
                await self.run(REMOVERS[act.subject])
            await self.run(f"create_{act.subject}")
        if act.second_volume and await self.has_second_volume() != (
            act.second_volume == "attached"
        ):
            attached = await self.has_second_volume()
            await self.run("detach_volume" if attached else "attach_volume")
        state = await self.state(act)
        if state != act.needs:
            await self.run({"ACTIVE": "start_instance", "SHUTOFF": "stop_instance"}[act.needs])

    async def plant(self) -> None:
        """Leave a claim without a domain, as no program does."""
        self.subjects["fault"] = ids.new("d")

        def leave() -> None:
            model.Claim.create(
                domain_id=self.subjects["fault"],
                instance_id=ids.new("i"),
                host_id=self.host.id,
                vcpu_count=1,
                memory_mib=64,
                disk_gib=1,
                create_time=0,
            )

        await self.database("compute").write(leave)

    async def state(self, act: Act) -> str:
        """Return the state of an act's subject, or GONE."""
        if act.subject == "fault":
            if any(self.subjects["fault"] in line for line in await self.inventory()):
                return "PLANTED"
            self.subjects["fault"] = ""
            return GONE
        found = await self.find(act.subject)
        if found is None:
            self.subjects[act.subject] = ""
            return GONE
        return type(found.status).State.Name(found.status.state).removeprefix("STATE_")

    async def find(self, subject: str) -> Any:
        """Return the instance or the volume; None if it is gone."""
        id_ = self.subjects[subject]
        return await self._find(subject, id_) if id_ else None

    async def _find(self, subject: str, id_: str) -> Any:
        method = {
            "instance": "compute.InstanceService/GetInstance",
            "volume": "volume.VolumeService/GetVolume",
        }[subject]
        try:
            return await self.call(method, id=id_)
        except errors.NotFound:
            return None

    async def is_gone(self, subject: str, id_: str) -> bool:
        return await self._find(subject, id_) is None

    async def has_second_volume(self) -> bool:
        found = await self.find("instance")
        return self.second_volume in {each.volume_id for each in found.status.volumes}

    async def require_clean(self) -> None:
        """Nothing is left but what was there at first, and verify finds nothing."""
        seen: set[str] = set()

        async def look() -> bool:
            seen.clear()
            seen.update(await self.inventory())
            return seen == self.baseline

        try:
            await self.until(look)
        except TimeoutError:
            left, missing = sorted(seen - self.baseline), sorted(self.baseline - seen)
            raise AssertionError("\n".join(["left:", *left, "missing:", *missing])) from None
        await self.require_verified()
