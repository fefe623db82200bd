"""The compute agent's workflow: steps 8 to 16, tombstones, restarts, failures."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from fakes import domains
from fakes.compute_services import TOKEN
from fakes.driver import FakeDriver
from mcloud.common.v1 import operation_pb2, session_pb2
from mcloud.conductor.v1 import domain_pb2
from mcloud_agents.compute import qcow2
from mcloud_agents.compute.driver import IO_ERROR, State
from mcloud_base import errors, ids
from unit.compute_agent.conftest import Bench

Step = operation_pb2.OperationStep
NICS = [domain_pb2.DomainNic(port_id=f"port-{number:020}") for number in (1, 2)]
DISKS = [domain_pb2.DomainDisk(attachment_id="att-1", volume_id="vol-1", device="vdb")]
CONFIG = domain_pb2.GuestConfig(config_drive=True, user_data=b"#!/bin/sh\n")


def rows(status: domain_pb2.DomainStatus) -> dict[int, Step]:
    return {row.number: row for row in status.steps}


def times(row: Step) -> tuple[int, int]:
    return row.start_time.ToNanoseconds(), row.end_time.ToNanoseconds()


async def test_all_steps_of_the_host_are_done_and_told(bench: Bench) -> None:
    spec = bench.place(nics=NICS, disks=DISKS, config=CONFIG)
    observed, status = await bench.reach(spec)

    assert status.state == State.STATE_RUNNING
    assert status.boot_number == 1
    assert status.instance_id == spec.instance_id
    assert not observed.HasField("error")
    found = rows(status)
    assert sorted(found) == [8, 10, 11, 12, 13, 14, 15, 16]
    assert len(status.steps) == 8, "a number twice"
    assert {row.state for row in found.values()} == {Step.STATE_DONE}
    assert {row.attempt for row in found.values()} == {1}
    for first, then in ((8, 10), (8, 12), (8, 14), (10, 16), (12, 16), (14, 16)):
        assert times(found[first])[1] <= times(found[then])[0]
    for outer, inner in ((10, 11), (12, 13), (14, 15)):
        assert times(found[outer])[0] <= times(found[inner])[0]
        assert times(found[inner])[1] <= times(found[outer])[1]
    assert found[8].host == "host-1"
    assert [*bench.agent.states()] == [(spec.domain_id, State.STATE_RUNNING, 1)]
    assert bench.ports.waited == [42], "it must wait for the later of both"
    directory = bench.directory(spec)
    assert qcow2.read_backing(directory / "root.qcow2") == next(
        (bench.settings.state_dir / "images").iterdir()
    )
    assert (directory / "config-drive.iso").stat().st_mode & 0o777 == 0o600


async def test_what_was_not_asked_for_is_skipped_with_a_reason(bench: Bench) -> None:
    _, status = await bench.reach(bench.place())
    found = rows(status)
    assert sorted(found) == [8, 10, 11, 12, 13, 14, 15, 16]
    for number, reason in ((12, "NIC"), (13, "NIC"), (14, "volume"), (15, "volume")):
        assert found[number].state == Step.STATE_SKIPPED
        assert reason in found[number].detail


async def test_a_cached_image_is_still_asked_for(bench: Bench) -> None:
    await bench.reach(bench.place())
    _, status = await bench.reach(bench.place())
    assert bench.images.offsets == [0, len(bench.images.content)], "bytes were sent twice"
    found = rows(status)
    assert found[11].state == Step.STATE_DONE
    assert found[10].detail == "cached"


async def test_progress_is_told_while_it_goes_on(bench: Bench) -> None:
    bench.ports.gate.open.clear()
    spec = bench.place(nics=NICS)
    bench.desire(spec)
    observed, status = await bench.reports.until(lambda _, status: 12 in rows(status))
    assert observed.generation == 0
    assert status.state == State.STATE_PREPARING
    assert rows(status)[12].state == Step.STATE_RUNNING
    bench.ports.gate.open.set()


async def test_a_failure_is_told_and_tried_again(bench: Bench) -> None:
    bench.attachments.gate.errors.append(errors.Unavailable("STORAGE_HOST_SILENT", "no answer"))
    spec = bench.place(disks=DISKS)
    bench.desire(spec)

    observed, status = await bench.reports.until(lambda observed, _: observed.HasField("error"))
    assert errors.from_status(observed.error).reason == "STORAGE_HOST_SILENT"
    assert rows(status)[14].state == Step.STATE_FAILED
    observed, status = await bench.reports.until(lambda observed, _: observed.generation == 1)
    assert not observed.HasField("error")
    last = [row for row in status.steps if row.attempt == 2]
    assert [row.number for row in last] == [8, 10, 11, 12, 13, 14, 15, 16]
    assert rows(status)[10].state == Step.STATE_SKIPPED, "the root disk is there already"


async def test_a_download_goes_on_where_it_broke(bench: Bench) -> None:
    bench.images.chunk = 1 << 14
    bench.images.break_at = 1 << 16
    await bench.reach(bench.place())
    assert bench.images.offsets == [0, 1 << 16]


async def test_an_image_of_other_bytes_is_never_used(bench: Bench) -> None:
    genuine = bench.images.content
    bench.images.content = bytes(len(genuine))
    spec = bench.place()
    bench.desire(spec)
    observed, _ = await bench.reports.until(lambda observed, _: observed.HasField("error"))
    assert errors.from_status(observed.error).reason == "IMAGE_CORRUPT"
    bench.images.content = genuine
    _, status = await bench.reports.until(lambda observed, _: observed.generation == 1)
    assert status.state == State.STATE_RUNNING


async def test_a_tombstone_leaves_nothing(bench: Bench) -> None:
    spec = bench.place(nics=NICS, config=CONFIG)
    await bench.reach(spec)
    bench.desire(spec, generation=2, absent=True)
    observed, status = await bench.reports.until(lambda observed, _: observed.absent)

    assert observed.generation == 2
    assert status.state == State.STATE_ABSENT
    assert await bench.driver.list() == []
    assert not bench.directory(spec).exists()
    assert bench.agent.documents(NICS[0].port_id) is None
    assert await bench.agent.artifacts() == []
    assert [*bench.agent.states()] == []

    bench.desire(spec, generation=1)  # late
    bench.desire(spec, generation=2)
    bench.desire(spec, generation=2, absent=True)  # repeated: answered again
    await bench.reports.until(lambda observed, _: observed.absent and observed.generation == 2)
    assert await bench.driver.list() == []


async def test_a_tombstone_for_what_was_never_here_is_answered(bench: Bench) -> None:
    spec = domains.spec()
    bench.desire(spec, generation=7, absent=True)
    observed, _ = await bench.reports.until(lambda observed, _: observed.absent)
    assert (observed.id, observed.generation) == (spec.domain_id, 7)


async def test_a_tombstone_ends_a_build(bench: Bench) -> None:
    bench.images.gate.open.clear()
    spec = bench.place()
    bench.desire(spec)
    await bench.images.gate.waiting.wait()
    bench.desire(spec, generation=2, absent=True)
    await bench.reports.until(lambda observed, _: observed.absent)
    assert await bench.driver.list() == []
    assert not bench.directory(spec).exists()


async def test_the_newest_order_wins(bench: Bench) -> None:
    spec = bench.place()
    await bench.reach(spec)
    spec.generation, spec.power_state = 3, domain_pb2.POWER_STATE_SHUTOFF
    bench.desire(spec, generation=2)
    _, status = await bench.reports.until(lambda observed, _: observed.generation == 3)
    assert status.state == State.STATE_SHUTOFF
    calls = bench.conductor.gate.calls
    bench.desire(spec, generation=1)
    bench.desire(spec, generation=3)
    await bench.reports.until(lambda observed, _: observed.generation == 3)
    assert bench.conductor.gate.calls == calls, "worked on what was done"


async def test_a_new_epoch_accepts_lower_generations(bench: Bench) -> None:
    spec = bench.place(generation=9)
    await bench.reach(spec)
    spec.generation = 1
    bench.desire(spec, epoch="epoch-2")
    observed, _ = await bench.reports.until(
        lambda observed, _: observed.epoch == "epoch-2" and observed.generation == 1
    )
    assert not observed.HasField("error")


# Libvirt's test driver forgets its domains with the connection; over QEMU: test_guest_domain.py.
@pytest.mark.parametrize("make_driver", ["fake"], indirect=True)
async def test_a_restarted_agent_adopts_its_guests(bench: Bench) -> None:
    spec = bench.place(nics=NICS, config=CONFIG)
    await bench.reach(spec)
    gone = bench.place()
    bench.desire(gone, generation=4, absent=True)
    await bench.reports.until(lambda observed, _: observed.absent)
    documents = bench.agent.documents(NICS[1].port_id)
    text = "".join(path.read_text() for path in bench.settings.state_dir.glob("domains/*"))
    assert TOKEN not in text
    for path in bench.settings.state_dir.glob("domains/*"):
        assert path.stat().st_mode & 0o777 == 0o600
    await bench.agent.close()

    bench.conductor.gate.open.clear()  # the control plane is away
    await bench.start()
    assert bench.agent.documents(NICS[1].port_id) == documents
    observed = {each.id: each for each in await bench.agent.observe_all()}
    status = domain_pb2.DomainStatus()
    observed[spec.domain_id].status.Unpack(status)
    assert status.state == State.STATE_RUNNING
    assert rows(status)[16].state == Step.STATE_DONE
    assert observed[spec.domain_id].generation == 1
    assert observed[gone.domain_id].absent
    assert observed[gone.domain_id].generation == 4
    assert isinstance(bench.driver, FakeDriver)
    (guest,) = bench.driver.guests.values()
    assert guest.boot_count == 1, "the guest was touched"
    bench.conductor.gate.open.set()


async def test_a_restarted_agent_goes_on_with_what_was_not_finished(bench: Bench) -> None:
    bench.ports.gate.open.clear()
    spec = bench.place(nics=NICS)
    bench.desire(spec)
    await bench.ports.gate.waiting.wait()
    await bench.agent.close()
    bench.ports.gate.open.set()
    await bench.start()  # no order is repeated
    observed, status = await bench.reports.until(lambda observed, _: observed.generation == 1)
    assert status.state == State.STATE_RUNNING
    assert {row.attempt for row in status.steps} == {2}


async def test_a_lost_root_disk_is_not_replaced(bench: Bench) -> None:
    spec = bench.place()
    await bench.reach(spec)
    os.unlink(bench.directory(spec) / "root.qcow2")
    spec.generation = 2
    bench.desire(spec)
    observed, _ = await bench.reports.until(lambda observed, _: observed.HasField("error"))
    assert errors.from_status(observed.error).reason == "ROOT_DISK_LOST"
    assert not (bench.directory(spec) / "root.qcow2").exists()


async def test_unknown_domains_are_left_alone_and_listed(bench: Bench, tmp_path: Path) -> None:
    known = bench.place(config=CONFIG)
    await bench.reach(known)
    unknown = domains.spec()
    await bench.driver.ensure(domains.resolved(tmp_path, unknown))
    spec = bench.place()
    await bench.reach(spec)

    found = await bench.agent.artifacts()
    kinds = session_pb2.Artifact
    domain_owners = {each.owner_id for each in found if each.kind == kinds.KIND_DOMAIN}
    assert domain_owners == {known.domain_id, unknown.domain_id, spec.domain_id}
    overlay_owners = {each.owner_id for each in found if each.kind == kinds.KIND_OVERLAY}
    assert overlay_owners == {known.domain_id, spec.domain_id}
    drive_owners = {each.owner_id for each in found if each.kind == kinds.KIND_CONFIG_DRIVE}
    assert drive_owners == {known.domain_id}
    assert await bench.driver.find(unknown.domain_id) is not None
    await bench.driver.ensure_absent(unknown.domain_id, domains.EPOCH, 1)


async def test_a_vanished_domain_is_made_again_on_its_disk(bench: Bench) -> None:
    spec = bench.place()
    await bench.reach(spec)
    overlay = bench.directory(spec) / "root.qcow2"
    inode = overlay.stat().st_ino
    await bench.driver.ensure_absent(spec.domain_id, domains.EPOCH, 1)
    await bench.reports.until(lambda observed, _: observed.generation == 0)
    await bench.reports.until(lambda observed, _: observed.generation == 1)
    found = await bench.driver.find(spec.domain_id)
    assert found is not None
    assert found.state == State.STATE_RUNNING
    assert overlay.stat().st_ino == inode


@pytest.mark.parametrize("make_driver", ["fake"], indirect=True)
async def test_a_guest_that_shuts_itself_down_is_reported_and_stays_off(bench: Bench) -> None:
    assert isinstance(bench.driver, FakeDriver)
    spec = bench.place()
    await bench.reach(spec)
    bench.driver.change(spec.domain_id, State.STATE_SHUTOFF, "guest shut down")
    observed, status = await bench.reports.until(
        lambda _, status: status.state == State.STATE_SHUTOFF
    )
    assert status.reason == "guest shut down"
    assert observed.generation == 1


@pytest.mark.parametrize("make_driver", ["fake"], indirect=True)
async def test_a_guest_stopped_by_its_disk_runs_on(bench: Bench) -> None:
    assert isinstance(bench.driver, FakeDriver)
    spec = bench.place()
    await bench.reach(spec)
    bench.driver.change(spec.domain_id, State.STATE_PAUSED, IO_ERROR)
    _, status = await bench.reports.until(lambda _, status: status.state == State.STATE_PAUSED)
    assert status.reason == IO_ERROR
    await bench.reports.until(lambda _, status: status.state == State.STATE_RUNNING)


@pytest.mark.parametrize("make_driver", ["fake"], indirect=True)
async def test_guests_are_started_again_after_the_machine_was(bench: Bench) -> None:
    assert isinstance(bench.driver, FakeDriver)
    spec, off = bench.place(), bench.place(power_state=domain_pb2.POWER_STATE_SHUTOFF)
    await bench.reach(spec)
    await bench.reach(off)
    await bench.agent.close()
    (bench.settings.state_dir / "boot_id").write_text("another")
    bench.driver.change(spec.domain_id, State.STATE_SHUTOFF, "")
    await bench.start()
    await bench.reports.until(
        lambda o, status: o.id == spec.domain_id and status.state == State.STATE_RUNNING
    )
    found = await bench.driver.find(off.domain_id)
    assert found is not None
    assert found.state == State.STATE_SHUTOFF


@pytest.mark.parametrize("make_driver", ["fake"], indirect=True)
async def test_documents_are_served_while_the_hypervisor_is_away(bench: Bench) -> None:
    assert isinstance(bench.driver, FakeDriver)
    spec = bench.place(nics=NICS)
    await bench.reach(spec)
    await bench.agent.close()
    bench.driver.reachable.clear()
    await bench.start()
    documents = bench.agent.documents(NICS[0].port_id)
    assert documents is not None
    assert json.loads(documents["openstack/latest/meta_data.json"])["uuid"] == spec.uuid
    bench.driver.reachable.set()


@pytest.mark.parametrize("make_driver", ["fake"], indirect=True)
async def test_bad_ids_reach_no_path(bench: Bench) -> None:
    bench.agent.desire(session_pb2.Desired(id="../../etc", epoch="e", generation=1, absent=True))
    observed, _ = await bench.reports.until(lambda observed, _: True)
    assert errors.from_status(observed.error).reason == "BAD_ID"
    assert await bench.agent.observe_all() == []


@pytest.mark.parametrize("make_driver", ["fake"], indirect=True)
async def test_many_domains_do_not_wait_for_one(bench: Bench) -> None:
    bench.attachments.gate.open.clear()
    stuck = bench.place(disks=DISKS)
    bench.desire(stuck)
    await bench.attachments.gate.waiting.wait()
    for _ in range(20):
        await bench.reach(bench.place())
    assert len(await bench.driver.list()) == 20
    assert ids.is_id(stuck.domain_id, "d")
    bench.attachments.gate.open.set()
