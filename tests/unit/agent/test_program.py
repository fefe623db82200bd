"""Settings, state, handlers and commands of mcloud-agent."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner

from fakes import pki
from mcloud.common.v1 import session_pb2
from mcloud.conductor.v1 import domain_pb2
from mcloud.network.v1 import dataplane_pb2
from mcloud.scheduler.v1 import placement_pb2
from mcloud_agents import __main__, handlers, settings
from mcloud_agents.compute.driver import HostFacts
from mcloud_agents.enrolment import Files, Membership
from mcloud_agents.network.dataplane import InPlace
from mcloud_agents.state import State
from mcloud_base import errors, tls

# --- settings -----------------------------------------------------------------------------------


def _load(directory: Path, text: str) -> settings.Settings:
    path = directory / "agent.toml"
    path.write_text(text)
    return settings.load(path)


def test_one_setting_is_enough(tmp_path: Path) -> None:
    loaded = _load(tmp_path, 'underlay_ip = "192.0.2.1"')
    assert loaded.report_interval_s == 10
    assert loaded.physical_networks == {"external": "br-ex"}
    assert loaded.state_dir == Path("/var/lib/mcloud")


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ('underlay_ip = "192.0.2.1"\nlibvirt_url = "x"', "unknown setting libvirt_url"),
        ("", "underlay_ip is missing"),
        ('underlay_ip = "nowhere"', "underlay_ip: "),
        ('underlay_ip = "192.0.2.1"\nhypervisor = "xen"', "hypervisor: "),
        (
            'underlay_ip = "192.0.2.1"\nnbd_port_first = 20\nnbd_port_last = 10',
            "nbd_port_first is higher",
        ),
        ("underlay_ip = ", "Invalid value"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, fault: str) -> None:
    with pytest.raises(errors.InvalidArgument, match="BAD_SETTINGS") as caught:
        _load(tmp_path, text)
    assert fault in caught.value.message
    assert "agent.toml" in caught.value.message


def test_the_environment_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NAME", "elsewhere")
    monkeypatch.setenv("STATE_DIR", "/elsewhere")
    loaded = _load(tmp_path, 'underlay_ip = "192.0.2.1"\nname = "here"')
    assert (loaded.name, loaded.state_dir) == ("here", Path("/var/lib/mcloud"))


# --- state --------------------------------------------------------------------------------------


def test_each_start_has_a_higher_incarnation(tmp_path: Path) -> None:
    assert [State(tmp_path).next_incarnation() for _ in range(3)] == [1, 2, 3]


def test_a_damaged_incarnation_is_not_guessed(tmp_path: Path) -> None:
    State(tmp_path).next_incarnation()
    (tmp_path / "agent" / "incarnation").write_text("")
    with pytest.raises(errors.DataLoss, match="INCARNATION_DAMAGED"):
        State(tmp_path).next_incarnation()


def test_one_agent_a_host(tmp_path: Path) -> None:
    first, second = State(tmp_path), State(tmp_path)
    first.lock()
    assert second.is_locked()
    with pytest.raises(errors.WrongState, match="AGENT_RUNNING"):
        second.lock()
    first.unlock()
    second.lock()
    second.unlock()


def test_epochs_are_remembered_by_session(tmp_path: Path) -> None:
    state = State(tmp_path)
    assert state.epoch("volume") == ""
    state.remember_epoch("volume", "e1")
    assert State(tmp_path).epoch("volume") == "e1"
    assert State(tmp_path).epoch("network") == ""


# --- handlers -----------------------------------------------------------------------------------


class Network:
    """Takes documents; refuses those with too many networks."""

    def __init__(self) -> None:
        self.documents: list[dataplane_pb2.HostDataplane] = []
        self.finishing: asyncio.Event | None = None  # what is to go goes after this

    async def apply(
        self, desired: dataplane_pb2.HostDataplane, in_place: InPlace
    ) -> dataplane_pb2.HostDataplaneStatus:
        if len(desired.networks) > 1:
            raise errors.Unavailable("NO_BRIDGE", "no bridge")
        await in_place([port.port_id for port in desired.ports])
        if self.finishing is not None:
            await self.finishing.wait()
        self.documents.append(desired)
        return dataplane_pb2.HostDataplaneStatus(network_count=len(desired.networks))

    async def artifacts(self) -> Sequence[session_pb2.Artifact]:
        return []


def _document(
    generation: int, networks: int = 1, *port_ids: str, absent: bool = False
) -> session_pb2.Desired:
    desired = session_pb2.Desired(id="h-1", epoch="e1", generation=generation, absent=absent)
    if not absent:
        desired.spec.Pack(
            dataplane_pb2.HostDataplane(
                networks=[dataplane_pb2.NetworkSegment()] * networks,
                ports=[dataplane_pb2.PortBinding(port_id=port_id) for port_id in port_ids],
            )
        )
    return desired


async def test_who_waits_for_a_port_is_woken_when_its_generation_is_in_place() -> None:
    handler = handlers.DataplaneHandler(Network())
    waiter = asyncio.create_task(handler.wait_ports(["port-1"], 2, 20))
    await handler.apply(_document(1, 1, "port-1"))
    assert not waiter.done()
    observed = await handler.apply(_document(3, 1, "port-1", "port-2"))
    await waiter
    assert (observed.generation, [*await handler.observe_all()]) == (3, [observed])


async def test_who_waits_for_a_port_does_not_wait_for_what_is_to_go() -> None:
    network = Network()
    network.finishing = asyncio.Event()
    handler = handlers.DataplaneHandler(network)
    applying = asyncio.create_task(handler.apply(_document(1, 1, "port-1")))
    await handler.wait_ports(["port-1"], 1, 20)
    assert not applying.done()
    assert await handler.observe_all() == []  # the document is not reached yet
    network.finishing.set()
    await applying


async def test_a_port_that_no_document_names_is_not_in_place() -> None:
    handler = handlers.DataplaneHandler(Network())
    await handler.apply(_document(3, 1, "port-1"))
    with pytest.raises(errors.Unavailable, match="port-2"):
        await handler.wait_ports(["port-1", "port-2"], 2, 0.01)


async def test_a_generation_that_failed_is_not_reached() -> None:
    handler = handlers.DataplaneHandler(Network())
    with pytest.raises(errors.Unavailable, match="NO_BRIDGE"):
        await handler.apply(_document(1, 2, "port-1"))
    with pytest.raises(errors.Unavailable, match="DATAPLANE_BEHIND"):
        await handler.wait_ports(["port-1"], 1, 0.01)
    assert await handler.observe_all() == []


async def test_a_network_tombstone_empties_the_host() -> None:
    network = Network()
    handler = handlers.DataplaneHandler(network)
    observed = await handler.apply(_document(4, absent=True))
    assert observed.absent
    assert network.documents == [dataplane_pb2.HostDataplane()]


async def test_an_unknown_document_is_refused() -> None:
    handler = handlers.DataplaneHandler(Network())
    desired = session_pb2.Desired(id="h-1", epoch="e1", generation=1)
    desired.spec.Pack(domain_pb2.DomainDesired())
    with pytest.raises(errors.InvalidArgument, match="UNKNOWN_SPEC"):
        await handler.apply(desired)


def test_a_host_report_names_what_is_here() -> None:
    facts = HostFacts(4, 8192, 100, "qemu", "7.2", "x86_64", ("HYPERVISOR_TCG",))
    states = domain_pb2.DomainStatus.State
    report = handlers.host_report(
        facts,
        placement_pb2.Resources(memory_mib=512),
        [("d-1", states.STATE_RUNNING, 2), ("d-2", states.STATE_PREPARING, 0)],
    )
    assert (report.total.memory_mib, report.reserved.memory_mib) == (8192, 512)
    assert [(d.domain_id, d.state, d.generation) for d in report.domains] == [
        ("d-1", "RUNNING", 2),
        ("d-2", "PREPARING", 0),
    ]


# --- commands -----------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "agent.toml"
    path.write_text(
        f'underlay_ip = "192.0.2.1"\nname = "node-1"\nstate_dir = "{tmp_path}/lib"\n'
        f'run_dir = "{tmp_path}/run"\npki_dir = "{tmp_path}/pki"\n'
    )
    return path


def test_status_before_enrolment_says_what_to_do(config: Path) -> None:
    result = CliRunner().invoke(__main__.main, ["status", "--config", str(config)])
    assert result.exit_code == 1
    assert "mcloud-agent enrol" in result.output


def test_run_before_enrolment_says_what_to_do(config: Path) -> None:
    result = CliRunner().invoke(__main__.main, ["run", "--config", str(config)])
    assert result.exit_code == 1
    assert "NOT_ENROLLED" in result.output


def test_status_shows_the_host(config: Path, tmp_path: Path) -> None:
    files = Files(tmp_path / "lib" / "identity", tmp_path / "pki")
    authority = pki.Authority()
    certificate = authority.sign(tls.signing_request(files.key(), "h-1"), "h-1")
    identity = tls.Identity(files.key(), certificate, authority.certificate)
    files.save(identity, Membership("h-1", "node-1", "192.0.2.9:7700", "192.0.2.9:7701"))
    (tmp_path / "lib" / "compute" / "instances" / "d-7").mkdir(parents=True)
    result = CliRunner().invoke(__main__.main, ["status", "--config", str(config)])
    assert result.exit_code == 0, result.output
    lines = dict(line.split(":", 1) for line in result.output.splitlines())
    assert {key: value.strip() for key, value in lines.items()}["domains"] == "d-7"
    assert "192.0.2.9:7701" in lines["internal port"]
    assert "not running" in lines["agent"]


def test_help_waits_for_no_library() -> None:
    code = (
        "import sys; from mcloud_agents.__main__ import main;"
        "main(['--help'], standalone_mode=False);"
        "print([m for m in ('grpc', 'libvirt', 'pydantic', 'pyroute2') if m in sys.modules])"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60
    )
    assert output.stdout.endswith("[]\n"), output.stderr
