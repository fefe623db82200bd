"""One run: things to use, users, faults, and what is there at the end."""

from __future__ import annotations

import asyncio
import hashlib
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.client import Client

from faults import audit
from faults.processes import Copies, Postgresql, Program, RealHost, send
from faults.users import Tally, Things, User, everyone_acts
from mcloud.compute.v1 import (
    flavor_pb2,
    flavor_service_pb2,
    flavor_service_pb2_grpc,
    host_pb2,
    host_service_pb2,
    host_service_pb2_grpc,
)
from mcloud.conductor.v1 import verify_service_pb2, verify_service_pb2_grpc
from mcloud.image.v1 import image_pb2, image_service_pb2, image_service_pb2_grpc
from mcloud.network.v1 import (
    network_pb2,
    network_service_pb2,
    network_service_pb2_grpc,
    subnet_pb2,
    subnet_service_pb2,
    subnet_service_pb2_grpc,
)
from mcloud_base import errors, rpc

SETTLE_S = 240.0  # within which all is as it should be, once nothing fails any more
LONGEST_FREEZE_S = 12.0  # longer than a lease: another copy takes over, and this one wakes up
LONGEST_ABSENCE_S = 3.0  # before a supervisor starts again what was killed
PAUSE_S = 2.0  # of a user, at most


class Run:
    """A cloud that is up, and what is done to it.

    Args:
        say: is told what happens.
    """

    def __init__(
        self,
        seed: int,
        server: Postgresql,
        copies: Copies,
        host: RealHost,
        say: Callable[[str], object],
    ) -> None:
        self._seed = seed
        self._random = random.Random(f"{seed} faults")  # noqa: S311 (not a secret)
        self._server = server
        self._copies = copies
        self._host = host
        self._say = say
        self._supervised = [server.program, *copies.programs, host.libvirtd, host.agent]
        self._not_before: dict[str, float] = {}  # when a program may be started again
        self._faults: Counter[str] = Counter()
        self._tally = Tally()

    async def go(self, faults: int, duration_s: float, user_count: int) -> dict[str, Any]:
        """Do it all; return the counts."""
        async with Client(self._copies.plane) as client:
            things = await furnish(client, self._host.state.parent)
            await await_hosts(client, 1)
            users = [
                User(f"user{number}", f"{self._seed} {number}", client, things, self._tally)
                for number in range(user_count)
            ]
            supervisor = asyncio.create_task(
                supervise(self._supervised, self._not_before, self._say)
            )
            stopped = asyncio.Event()
            using = asyncio.create_task(everyone_acts(users, stopped, PAUSE_S))
            await self._break(faults, duration_s, using)
            stopped.set()
            self._say("no more faults; users finish")
            await using
            began = time.monotonic()
            for user in users:
                for wanted in list(user.instances):
                    await user.settle(wanted)
            await self._agree(client, users, "with everything there")
            settled = time.monotonic() - began
            for user in users:
                for wanted in list(user.instances):
                    await user.remove(wanted)
                for volume in list(user.volumes):
                    await user.remove_volume(volume)
            await self._agree(client, users, "with everything deleted")
            supervisor.cancel()
        return {
            "seed": self._seed,
            "faults": dict(self._faults),
            "outcomes": {f"{a}: {b}": n for (a, b), n in self._tally.outcomes.items()},
            "reasons": dict(self._tally.reasons),
            "settled_s": round(settled, 1),
            "wrong": self._tally.wrong,
        }

    # --- faults ---------------------------------------------------------------------------------

    async def _break(self, count: int, duration_s: float, using: asyncio.Task[None]) -> None:
        frozen: set[asyncio.Task[None]] = set()
        began = time.monotonic()
        moments = sorted(self._random.uniform(0, duration_s) for _ in range(count))
        for moment in [*moments, duration_s]:
            await asyncio.sleep(max(began + moment - time.monotonic(), 0))
            if using.done() or moment == duration_s:
                break
            name, pids, whole = self._victim()
            if not pids:
                self._faults[f"nothing to break: {name}"] += 1
                continue
            if self._random.random() < 0.6:
                self._faults[f"killed: {name}"] += 1
                self._not_before[whole] = time.monotonic() + self._random.uniform(
                    0, LONGEST_ABSENCE_S
                )
                send(pids, signal.SIGKILL)
            else:
                self._faults[f"frozen: {name}"] += 1
                pause_s = self._random.uniform(0.5, LONGEST_FREEZE_S)
                task = asyncio.create_task(_freeze(pids, pause_s))
                frozen.add(task)
                task.add_done_callback(frozen.discard)
        if frozen:
            await asyncio.wait(frozen)

    def _victim(self) -> tuple[str, list[int], str]:
        """Draw what is broken next: (kind, processes, program that is started again)."""
        programs: list[tuple[str, Program]] = [
            ("PostgreSQL", self._server.program),
            ("libvirtd", self._host.libvirtd),
            ("agent", self._host.agent),
            *(("control plane", copy) for copy in self._copies.programs),
        ]
        number = self._random.randrange(len(programs) + 2)
        choice = self._random.random()
        if number < len(programs):
            name, program = programs[number]
            return name, program.pids(), program.name
        name = ("qemu-system-x86_64", "qemu-storage-daemon")[number - len(programs)]
        found = self._host.named(name)
        label = ("guest", "volume server")[number - len(programs)]
        return label, [found[int(choice * len(found))]] if found else [], ""

    # --- the end --------------------------------------------------------------------------------

    async def _agree(self, client: Client, users: list[User], when: str) -> None:
        """Wait until verify and the independent reading find nothing; or note what they find."""
        end = time.monotonic() + SETTLE_S
        while True:
            found = await asyncio.to_thread(
                audit.differences, self._host, self._server.url, users, self._tally.created
            )
            found += await self._verify(client)
            if not found:
                return
            if time.monotonic() > end:
                self._tally.wrong += [f"{when}: {each}" for each in found]
                return
            await asyncio.sleep(1)  # what is left over goes by itself, and nothing tells when

    async def _verify(self, client: Client) -> list[str]:
        stub = verify_service_pb2_grpc.VerifyServiceStub(client.channel)
        found = []
        try:
            stream = stub.Verify(
                verify_service_pb2.VerifyRequest(),
                timeout=60,
                metadata=client.metadata(system=True),
            )
            async for answer in rpc.received(stream):
                if answer.HasField("finding"):
                    found.append(f"verify: {answer.finding.message}")
                elif answer.summary.silent_host_ids:
                    found.append("verify: the host has not answered")
        except errors.Error as error:
            found.append(f"verify: {error}")
        return found


async def supervise(
    programs: list[Program], not_before: dict[str, float], say: Callable[[str], object]
) -> None:
    """Start again what has ended, as systemd would; for ever.

    Args:
        not_before: a program's name → when it may be; monotonic seconds.
    """
    while True:
        await asyncio.sleep(0.1)
        for program in programs:
            if program.lives or time.monotonic() < not_before.get(program.name, 0):
                continue
            try:
                await asyncio.to_thread(program.start)
            except RuntimeError as error:  # it was killed in the midst of its start
                say(f"{program.name} did not start: {error}")


async def _freeze(pids: list[int], pause_s: float) -> None:
    send(pids, signal.SIGSTOP)
    try:
        await asyncio.sleep(pause_s)
    finally:
        send(pids, signal.SIGCONT)


# --- the beginning --------------------------------------------------------------------------


async def furnish(client: Client, place: Path) -> Things:
    """Make what instances need: an image without an OS, a flavor, a network."""
    image = await _upload(client, place)
    flavor = await client.mutate(
        flavor_service_pb2_grpc.FlavorServiceStub(client.channel).CreateFlavor,
        flavor_service_pb2.CreateFlavorRequest(
            name="tiny",
            spec=flavor_pb2.FlavorSpec(vcpu_count=1, memory_mib=64, disk_gib=1),
        ),
        flavor_pb2.Flavor,
        system=True,
    )
    network = await client.mutate(
        network_service_pb2_grpc.NetworkServiceStub(client.channel).CreateNetwork,
        network_service_pb2.CreateNetworkRequest(name="private", spec=network_pb2.NetworkSpec()),
        network_pb2.Network,
    )
    await client.mutate(
        subnet_service_pb2_grpc.SubnetServiceStub(client.channel).CreateSubnet,
        subnet_service_pb2.CreateSubnetRequest(
            name="private",
            spec=subnet_pb2.SubnetSpec(network_id=network.metadata.id, cidr="10.10.0.0/20"),
        ),
        subnet_pb2.Subnet,
    )
    return Things(flavor.metadata.id, image, network.metadata.id)


async def await_hosts(client: Client, host_count: int) -> None:
    """Wait until so many hosts are up."""
    hosts = host_service_pb2_grpc.HostServiceStub(client.channel)
    end = time.monotonic() + SETTLE_S
    while True:
        request = host_service_pb2.ListHostsRequest(page_size=1000)
        answer = await client.call(hosts.ListHosts, request, system=True)
        up = [h for h in answer.hosts if h.status.state == host_pb2.HostStatus.STATE_UP]
        if len(up) == host_count:
            return
        if time.monotonic() > end:
            raise RuntimeError("the hosts do not come up")
        await asyncio.sleep(0.2)


async def _upload(client: Client, place: Path) -> str:
    path = place / "image.qcow2"
    command = ["qemu-img", "create", "-q", "-f", "qcow2", str(path), "1M"]
    subprocess.run(command, check=True, timeout=60)  # noqa: ASYNC221 (nothing runs beside it)
    content = path.read_bytes()
    images = image_service_pb2_grpc.ImageServiceStub(client.channel)
    image = await client.mutate(
        images.CreateImage,
        image_service_pb2.CreateImageRequest(
            name="empty", spec=image_pb2.ImageSpec(disk_format=image_pb2.DISK_FORMAT_QCOW2)
        ),
        image_pb2.Image,
    )

    def parts() -> Iterator[image_service_pb2.UploadImageDataRequest]:
        kind = image_service_pb2.UploadImageDataRequest
        yield kind(start=image_service_pb2.UploadStart(id=image.metadata.id, offset=0))
        yield kind(chunk=content)
        digest = hashlib.sha256(content).hexdigest()
        yield kind(end=image_service_pb2.UploadEnd(sha256=digest))

    await images.UploadImageData(parts(), timeout=60, metadata=client.metadata())
    return str(image.metadata.id)
