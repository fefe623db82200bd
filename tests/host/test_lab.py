"""`scripts/lab`: hosts come up, work, and go without a trace, and nothing else notices.

The "machine" here is a network namespace of its own, with an uplink to a small internet, so that
no test meets what the real one is used for. Processes, mounts and files are the real machine's.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.host,
    pytest.mark.skipif(os.geteuid() != 0, reason="namespaces need root"),
]

SCRIPT = Path(__file__).parents[2] / "scripts" / "lab"
SERVER = "203.0.113.1"  # in the internet
QEMU = "/usr/bin/qemu-system-x86_64"
TINY_DOMAIN = """
<domain type='qemu'>
  <name>{name}</name>
  <memory unit='MiB'>16</memory>
  <os><type arch='x86_64' machine='pc'>hvm</type></os>
  <devices><emulator>/usr/bin/qemu-system-x86_64</emulator></devices>
</domain>
"""


def until(condition: Callable[[], object], deadline_s: float = 60) -> None:
    """Wait until the condition holds."""
    deadline = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < deadline, f"still not so after {deadline_s} s"
        time.sleep(0.002)


class Namespace:
    """A network namespace that lasts as long as a process of ours."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(["unshare", "--net", "--", "sleep", "infinity"])
        until(lambda: Path(f"/proc/{self.process.pid}/comm").read_text() == "sleep\n")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()

    def command(self, *arguments: object) -> list[str]:
        return ["nsenter", f"--net=/proc/{self.process.pid}/ns/net", "--", *map(str, arguments)]

    def run(self, *arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
        result = subprocess.run(
            self.command(*arguments), capture_output=True, text=True, timeout=300, check=False
        )
        assert result.returncode == code, (arguments, result.stdout, result.stderr)
        return result

    def output(self, command: str) -> str:
        return self.run(*command.split()).stdout

    def shell(self, script: str) -> None:
        self.run("sh", "-ec", script)

    def sysctl(self, path: str) -> str:
        return self.output(f"cat /proc/sys/{path}").strip()


@contextmanager
def new_machine() -> Iterator[Namespace]:
    """A machine with an uplink to an internet that knows the machine's own address only."""
    internet, machine = Namespace(), Namespace()
    try:
        internet.shell(
            f"""
            ip link set lo up
            ip link add wire type veth peer eth0 netns {machine.process.pid}
            ip link set wire up
            ip address add 198.51.100.1/24 dev wire
            ip address add {SERVER}/32 dev lo
            """
        )
        machine.shell(  # without IPv6, whose link-local addresses come by and by, like changes
            """
            for switch in /proc/sys/net/ipv6/conf/*/disable_ipv6; do
                test ! -e $switch || echo 1 > $switch
            done
            ip link set lo up
            ip link set eth0 up
            ip address add 198.51.100.2/24 dev eth0
            ip route add default via 198.51.100.1
            """
        )
        machine.output(f"ping -c1 -W5 -q {SERVER}")
        yield machine
    finally:
        machine.close()
        internet.close()


@dataclass(frozen=True)
class Lab:
    """A lab on that machine, with ranges of its own."""

    machine: Namespace
    state: Path
    number: int = 1
    prefix: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "prefix", f"t{os.getpid() % 100_000}x{self.number}")

    @property
    def link(self) -> str:
        return f"{self.prefix}0"

    def arguments(self, command: str, *arguments: object) -> list[object]:
        return [sys.executable, SCRIPT, command, "--state", self.state, *arguments]

    def run(
        self, command: str, *arguments: object, code: int = 0
    ) -> subprocess.CompletedProcess[str]:
        return self.machine.run(*self.arguments(command, *arguments), code=code)

    def up_arguments(self, hosts: int = 1) -> list[object]:
        return self.arguments(
            "up", "--hosts", hosts, "--prefix", self.prefix,
            "--underlay", f"10.199.{self.number}.0/24", "--external", f"172.30.{self.number}.0/24",
        )  # fmt: skip

    def up(self, hosts: int = 1, code: int = 0) -> str:
        """Bring it up and return its warnings."""
        return self.machine.run(*self.up_arguments(hosts), code=code).stderr

    def address(self, host: int = 1) -> str:
        return f"10.199.{self.number}.{10 + host}"

    def floating(self, last: int) -> str:
        return f"172.30.{self.number}.{last}"

    def inside(self, *command: object, host: str = "h1", code: int = 0) -> str:
        return self.run("exec", host, "--", *command, code=code).stdout

    def uri(self, host: str = "h1") -> str:
        return f"qemu+unix:///system?socket={self.state}/hosts/{host}/run/libvirt-sock"

    def init(self, name: str = "h1") -> int:
        init: int = json.loads((self.state / "undo.json").read_text())["inits"][name]["pid"]
        return init

    def processes(self) -> dict[int, str]:
        """Every process that is in a host, or was started for this lab, by what it runs."""
        found = {}
        hosts = "/".join(["", *self.state.parts[-3:], "hosts", ""])
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                mounts = (entry / "mountinfo").read_text()
                command = (entry / "cmdline").read_text().replace("\0", " ")
            except OSError:
                continue  # ended meanwhile; a zombie has no mounts
            named = str(self.state) in command or command.startswith(f"{self.prefix}-")
            if named or hosts in mounts:
                found[int(entry.name)] = command
        return found

    def process(self, name: str) -> int:
        """Return the first process of that name; libvirtd has short-lived children."""
        return min(p for p, command in self.processes().items() if command.split()[:1] == [name])


def assert_no_trace(lab: Lab) -> None:
    until(lambda: not lab.processes())  # what was never recorded ends by itself, a moment later
    assert not lab.state.exists()
    assert lab.link not in lab.machine.output("ip link show")
    assert lab.prefix not in lab.machine.output("nft list ruleset")


@contextmanager
def new_lab(machine: Namespace, directory: Path, number: int = 1) -> Iterator[Lab]:
    """A lab that is not up yet, and down afterwards."""
    lab = Lab(machine, directory / f"lab{number}", number)
    try:
        yield lab
    finally:
        lab.run("down")


@pytest.fixture(scope="module")
def machine() -> Iterator[Namespace]:
    with new_machine() as machine:
        yield machine


@pytest.fixture
def lab(machine: Namespace, tmp_path: Path) -> Iterator[Lab]:
    with new_lab(machine, tmp_path) as lab:
        yield lab


@pytest.fixture
def other_lab(machine: Namespace, tmp_path: Path) -> Iterator[Lab]:
    with new_lab(machine, tmp_path, 2) as lab:
        yield lab


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """Two hosts, on a machine of their own, for the tests that leave them as they are."""
    with new_machine() as machine, new_lab(machine, tmp_path_factory.mktemp("lab"), 3) as lab:
        lab.up(hosts=2)
        yield lab


# --- a host works ---------------------------------------------------------------------------------


def test_libvirt_answers_from_outside_and_starts_a_domain(running: Lab) -> None:
    libvirt = pytest.importorskip("libvirt")
    connection = libvirt.open(running.uri())
    domain = connection.defineXML(TINY_DOMAIN.format(name="tiny"))

    domain.create()

    assert connection.getHostname() == "h1"
    assert domain.isActive()
    assert "qemu-system" in " ".join(running.processes().values())
    domain.destroy()
    domain.undefine()
    connection.close()


def test_the_machine_and_the_hosts_reach_each_other_and_the_internet(running: Lab) -> None:
    for host in (1, 2):
        running.machine.output(f"ping -c1 -W5 -q {running.address(host)}")
    running.inside("ping", "-c1", "-W5", "-q", running.address(2))
    running.inside("ping", "-c1", "-W5", "-q", SERVER)


def test_a_frame_of_the_overlay_fits_and_a_smaller_port_does_not_change_that(running: Lab) -> None:
    running.inside("sh", "-ec", "ip link add p0 type veth peer p1; ip link set p0 master br-ex up")

    running.inside("ping", "-c1", "-W5", "-q", "-Mdo", "-s1572", running.address(2))

    running.inside("ip", "link", "delete", "p0")


def test_a_router_in_a_host_answers_on_a_floating_address(running: Lab) -> None:
    address = running.floating(10)
    running.inside(
        "sh", "-ec",
        f"""
        ip netns add router
        ip link add plug type veth peer port netns router
        ip link set plug master br-ex up
        ip -n router link set port up
        ip -n router address add {address}/24 dev port
        ip -n router route add default via {running.floating(1)}
        """,
    )  # fmt: skip

    running.machine.output(f"ping -c1 -W5 -q {address}")
    running.inside("ip", "netns", "exec", "router", "ping", "-c1", "-W5", "-q", SERVER)
    assert "router" not in running.machine.output("ip netns list").split()
    running.inside("sh", "-ec", "ip link delete plug; ip netns delete router")


def test_a_host_knows_the_names_of_all_hosts_and_has_its_files_to_itself(running: Lab) -> None:
    assert running.inside("hostname") == "h1\n"
    for name, address in (("h1", running.address(1)), ("h2", running.address(2))):
        assert running.inside("getent", "hosts", name).split() == [address, name]
    running.inside("touch", "/etc/mcloud/here", "/var/lib/mcloud/here", "/etc/pki/qemu/here")
    running.inside("test", "-e", "/etc/mcloud/here", host="h2", code=1)
    assert not Path("/etc/mcloud/here").exists()
    assert (running.state / "hosts/h1/mcloud/etc/here").exists()


def test_status_tells_what_is_up(running: Lab) -> None:
    lines = running.run("status").stdout.splitlines()

    assert [line.split(":")[0] for line in lines] == ["h1", "h2"]
    assert all("libvirtd up" in line for line in lines)


# --- exec -----------------------------------------------------------------------------------------


def test_exec_passes_on_the_exit_code(running: Lab) -> None:
    running.inside("sh", "-c", "exit 7", code=7)
    running.inside("sh", "-c", "kill -KILL $$", code=128 + signal.SIGKILL)
    running.inside("no-such-program", code=127)


def test_exec_passes_signals_on(running: Lab) -> None:
    script = "trap 'exit 9' TERM; echo ready; while :; do read -t 1 line; done"
    command = running.machine.command(*running.arguments("exec", "h1", "--", "bash", "-c", script))
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.readline() == b"ready\n"

        process.send_signal(signal.SIGTERM)

        assert process.wait(timeout=60) == 9


def test_a_command_does_not_outlive_a_killed_exec(running: Lab) -> None:
    command = running.machine.command(
        *running.arguments("exec", "h1", "--", "bash", "-c", "echo ready; exec -a orphan sleep 999")
    )
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.readline() == b"ready\n"
        process.kill()

    until(lambda: "orphan 999 " not in running.processes().values())


def test_a_detached_command_is_the_hosts_own_child(running: Lab, tmp_path: Path) -> None:
    pid_file, log = tmp_path / "pid", tmp_path / "log"
    running.run(
        "exec", "--detach", "--pid-file", pid_file, "--log", log,
        "h1", "--", "sh", "-c", "echo hello; exec sleep 999",
    )  # fmt: skip
    pid = int(pid_file.read_text())

    until(lambda: log.read_text() == "hello\n")
    status = Path(f"/proc/{pid}/status").read_text()
    assert f"PPid:\t{running.init()}\n" in status
    os.kill(pid, signal.SIGTERM)


def test_exec_names_the_way_out(lab: Lab, running: Lab) -> None:
    assert "lab up" in lab.run("exec", "h1", "true", code=1).stderr
    assert "running: switch, h1, h2" in running.run("exec", "h9", "true", code=1).stderr


# --- up again -------------------------------------------------------------------------------------


def test_up_again_changes_nothing(lab: Lab) -> None:
    lab.up()
    before = lab.init("switch"), lab.init(), lab.process("libvirtd")

    lab.up()

    assert (lab.init("switch"), lab.init(), lab.process("libvirtd")) == before


def test_up_again_adds_hosts(lab: Lab) -> None:
    lab.up()
    first = lab.init()

    lab.up(hosts=2)

    assert lab.init() == first
    assert lab.inside("getent", "hosts", "h2").split() == [lab.address(2), "h2"]


def test_up_again_restarts_libvirtd_and_leaves_its_domains(lab: Lab) -> None:
    libvirt = pytest.importorskip("libvirt")
    lab.up()
    connection = libvirt.open(lab.uri())
    connection.defineXML(TINY_DOMAIN.format(name="tiny")).create()
    guest = lab.process(QEMU)
    connection.close()
    libvirtd = lab.process("libvirtd")
    os.kill(libvirtd, signal.SIGKILL)
    until(lambda: libvirtd not in lab.processes())
    assert "libvirtd down" in lab.run("status", code=1).stdout

    lab.up()

    connection = libvirt.open(lab.uri())
    assert connection.lookupByName("tiny").isActive()
    assert lab.process(QEMU) == guest
    connection.close()


def test_a_guest_whose_start_was_cut_short_can_be_started(lab: Lab) -> None:
    """As libvirtd leaves it when it is killed before there is a process."""
    libvirt = pytest.importorskip("libvirt")
    lab.up()
    connection = libvirt.open(lab.uri())
    connection.defineXML(TINY_DOMAIN.format(name="tiny")).create()
    connection.close()
    for name in ("libvirtd", QEMU):
        pid = lab.process(name)
        os.kill(pid, signal.SIGKILL)
        until(lambda pid=pid: pid not in lab.processes())  # type: ignore[misc]
    status = lab.state / "hosts/h1/run/qemu/tiny.xml"
    text = re.sub(
        r"<domstatus state='\w+' reason='[\w ]+' pid='\d+'>",
        "<domstatus state='paused' reason='starting up' pid='0'>",
        status.read_text(),
    )
    assert "pid='0'" in text
    job = "<job type='none' async='start' flags='0x0' asyncStarted='1795416478239'/>"
    status.write_text(re.sub(r"<job [^>]*/>", job, text))

    lab.up()

    connection = libvirt.open(lab.uri())
    domain = connection.lookupByName("tiny")
    assert not domain.isActive()
    domain.create()
    domain.destroy()
    connection.close()


@pytest.mark.parametrize("name", ["switch", "h1"])
def test_up_again_replaces_what_has_died(lab: Lab, name: str) -> None:
    lab.up()
    dead = lab.init(name)
    os.kill(dead, signal.SIGKILL)
    until(lambda: dead not in lab.processes())

    lab.up()

    lab.machine.output(f"ping -c1 -W5 -q {lab.address()}")


def test_up_refuses_what_is_not_its_own(lab: Lab, other_lab: Lab, tmp_path: Path) -> None:
    lab.machine.shell(f"ip link add {lab.link} type bridge")
    assert "choose another --prefix" in lab.up(code=1)
    assert not lab.state.exists()
    assert lab.link in lab.machine.output("ip link show")
    lab.machine.shell(f"ip link delete {lab.link}")

    lab.machine.shell(f"nft add table ip {lab.prefix}_lab")
    assert "choose another --prefix" in lab.up(code=1)
    lab.machine.shell(f"nft delete table ip {lab.prefix}_lab")
    assert not lab.state.exists()

    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    full = Lab(lab.machine, tmp_path / "full")
    assert "choose another --state" in full.up(code=1)
    full.run("down")
    assert (tmp_path / "full" / "file").exists()

    lab.up()
    assert "lab down" in lab.run("up", "--prefix", "another", code=1).stderr
    in_use = other_lab.run("up", "--prefix", "another", "--underlay", "10.199.1.128/25", code=1)
    assert f"10.199.1.0/24 through {lab.link}" in in_use.stderr


# --- down -----------------------------------------------------------------------------------------


def test_down_removes_everything(lab: Lab, tmp_path: Path) -> None:
    mounts = Path("/proc/self/mountinfo").read_text()
    before = observe(lab.machine, lab)
    lab.up(hosts=2)
    lab.inside("ip", "netns", "add", "router")
    command = ["h1", "ip", "netns", "exec", "router", "sleep", "999"]
    lab.run("exec", "--detach", "--pid-file", tmp_path / "pid", *command)
    inner = int((tmp_path / "pid").read_text())
    until(lambda: inner in lab.processes() and lab.processes()[inner] == "sleep 999 ")
    lab.machine.shell(f"ip link add canary type veth peer far netns {inner}")
    # Three inits, the children of two, two of libvirtd, and the one above.
    assert len(lab.processes()) >= 8

    lab.run("down")

    assert_no_trace(lab)
    # An interface goes with the namespace that its other end is in.
    until(lambda: "canary" not in lab.machine.output("ip link show"))
    assert observe(lab.machine, lab) == before
    assert Path("/proc/self/mountinfo").read_text() == mounts


def test_down_on_nothing_is_harmless(lab: Lab) -> None:
    assert "nothing to do" in lab.run("down").stdout
    lab.up()
    lab.run("down")
    assert "nothing to do" in lab.run("down").stdout


def test_down_can_keep_the_hosts_files(lab: Lab) -> None:
    lab.up()
    kept = lab.state / "hosts/h1/host_uuid"
    identity = kept.read_text()
    (lab.state / "hosts/h1/run/stale").touch()

    lab.run("down", "--keep-state")
    until(lambda: not lab.processes())
    assert lab.link not in lab.machine.output("ip link show")
    lab.run("status", code=1)
    lab.up()

    assert kept.read_text() == identity
    assert not (lab.state / "hosts/h1/run/stale").exists()


def test_down_spares_a_process_that_got_the_number_of_an_init(lab: Lab) -> None:
    lab.up()
    journal = lab.state / "undo.json"
    saved = journal.read_text()
    with subprocess.Popen(["sleep", "infinity"]) as bystander:
        content = json.loads(saved)
        init = content["inits"]["h1"]["pid"]
        content["inits"]["h1"]["pid"] = bystander.pid  # with the start time of another
        journal.write_text(json.dumps(content))
        os.kill(init, signal.SIGKILL)

        lab.run("down")

        assert bystander.poll() is None
        bystander.kill()


def recorded(lab: Lab, name: str) -> bool:
    journal = lab.state / "undo.json"
    return journal.exists() and f'"{name}": {{' in journal.read_text()


KILL_POINTS: dict[str, Callable[[Lab], bool]] = {
    "settings": lambda lab: (lab.state / "lab.json").exists(),
    "switch": lambda lab: recorded(lab, "switch"),
    "link": lambda lab: f'"{lab.link}"' in lab.machine.output("ip -json link show"),
    "table": lambda lab: lab.prefix in lab.machine.output("nft list tables"),
    "host": lambda lab: recorded(lab, "h1"),
    "second host": lambda lab: recorded(lab, "h2"),
    "libvirtd": lambda lab: (lab.state / "hosts/h1/run/libvirt-sock").exists(),
}


@pytest.fixture(params=KILL_POINTS)
def half_up(request: pytest.FixtureRequest, lab: Lab) -> Lab:
    """A lab whose `up` was killed when it had got that far."""
    with subprocess.Popen(
        lab.machine.command(*lab.up_arguments(hosts=2)), stdout=subprocess.DEVNULL
    ) as process:
        until(lambda: KILL_POINTS[request.param](lab))
        process.kill()
    return lab


def test_down_cleans_up_after_a_killed_up(half_up: Lab) -> None:
    half_up.run("down")

    assert_no_trace(half_up)
    assert half_up.machine.sysctl("net/ipv4/conf/eth0/forwarding") == "0"


def test_up_completes_a_killed_up(half_up: Lab) -> None:
    half_up.up(hosts=2)

    half_up.run("status")
    for host in (1, 2):
        half_up.machine.output(f"ping -c1 -W5 -q {half_up.address(host)}")
    half_up.run("down")
    assert_no_trace(half_up)


# --- others on the machine ------------------------------------------------------------------------


VOLATILE = re.compile(r"timer$|^(stats|stats64)$")


def observe(machine: Namespace, *labs: Lab) -> dict[str, list[Any]]:
    """Everything in the machine's network namespace that is not of these labs."""
    own = {lab.link for lab in labs}
    tables = [
        line for line in machine.output("nft list tables").splitlines()
        if line.split()[2] not in {f"{lab.prefix}_lab" for lab in labs}
    ]  # fmt: skip
    details = json.loads(machine.output("ip -json -details address show"))
    links = [link for link in details if link["ifname"] not in own]
    for link in links:
        data = link.get("linkinfo", {}).get("info_data", {})
        for name in [name for name in data if VOLATILE.search(name)]:
            del data[name]
    routes = machine.output("ip -4 route show table all").splitlines()
    sysctls = machine.run(
        "grep", "-rs", "", "/proc/sys/net/ipv4/conf", "/proc/sys/net/ipv4/ip_forward",
        "/proc/sys/net/bridge",
    ).stdout.splitlines()  # fmt: skip
    return {
        "ruleset": [machine.output(f"nft -s list {table}") for table in tables],
        "links": links,
        "routes": [r for r in routes if not own & set(r.split())],
        "sysctls": [s for s in sysctls if not own & set(s.split("/"))],
    }


@pytest.fixture
def foreign(machine: Namespace) -> Iterator[None]:
    """A firewall, a bridge and the FORWARD policy of somebody else."""
    machine.shell(
        """
        ip link add foreignbr0 type bridge
        ip link set foreignbr0 up
        ip address add 192.168.77.1/24 dev foreignbr0
        echo 1 > /proc/sys/net/ipv4/conf/foreignbr0/forwarding
        nft add table inet foreign
        nft add chain inet foreign input '{ type filter hook input priority 10; policy accept; }'
        nft add rule inet foreign input tcp dport 2222 drop
        nft add table ip filter
        nft add chain ip filter FORWARD '{ type filter hook forward priority 0; policy drop; }'
        """
    )
    yield
    machine.shell(
        "ip link delete foreignbr0; nft delete table inet foreign; nft delete table ip filter"
    )


def test_what_others_have_on_the_machine_stays_as_it_is(
    lab: Lab, other_lab: Lab, foreign: None
) -> None:
    libvirt = pytest.importorskip("libvirt")
    other_lab.up()
    connection = libvirt.open(other_lab.uri())
    domain = connection.defineXML(TINY_DOMAIN.format(name="theirs"))
    domain.create()
    before = observe(lab.machine, lab)
    their_guest, their_domain = other_lab.process(QEMU), domain.XMLDesc()

    lab.up(hosts=2)
    during = observe(lab.machine, lab)
    domain_during = domain.XMLDesc()
    lab.run("down")

    assert during == before
    assert observe(lab.machine, lab) == before
    assert their_domain == domain_during == domain.XMLDesc()
    assert other_lab.process(QEMU) == their_guest
    lab.machine.output(f"ping -c1 -W5 -q {other_lab.address()}")
    connection.close()


def test_only_the_uplinks_forwarding_changes_and_changes_back(lab: Lab, foreign: None) -> None:
    before = observe(lab.machine, lab)

    lab.up()
    during = observe(lab.machine, lab)
    lab.run("down")

    changed = [
        (old, new)
        for old, new in zip(before.pop("sysctls"), during.pop("sysctls"), strict=True)
        if old != new
    ]
    path = "/proc/sys/net/ipv4/conf/eth0/forwarding"
    assert changed == [(f"{path}:0", f"{path}:1")]
    assert during == before


@pytest.mark.parametrize("first_to_go", [0, 1])
def test_the_last_of_two_labs_resets_the_forwarding_they_share(
    lab: Lab, other_lab: Lab, first_to_go: int
) -> None:
    sysctl = "net/ipv4/conf/eth0/forwarding"
    labs = [lab, other_lab]
    for each in labs:
        each.up()

    labs.pop(first_to_go).run("down")
    assert lab.machine.sysctl(sysctl) == "1"
    labs.pop().run("down")

    assert lab.machine.sysctl(sysctl) == "0"


CHAINS = {
    "iptables": ("ip filter", "FORWARD", "policy drop", ""),
    "nftables": ("inet firewall", "through", "policy drop", ""),
    "last rule": ("inet firewall", "through", "policy accept", "counter reject"),
}


@pytest.mark.parametrize(("table", "chain", "policy", "rule"), CHAINS.values(), ids=CHAINS)
def test_a_foreign_drop_is_named_with_the_rule_that_helps(
    lab: Lab, table: str, chain: str, policy: str, rule: str
) -> None:
    lab.machine.shell(
        f"""
        nft add table {table}
        nft add chain {table} {chain} '{{ type filter hook forward priority 0; {policy}; }}'
        {f"nft add rule {table} {chain} {rule}" if rule else ""}
        """
    )
    try:
        warning = lab.up()
        assert f"chain {chain} drops" in warning or f"chain {table} {chain} drops" in warning
        lab.inside("ping", "-c1", "-W1", "-q", SERVER, code=1)

        lab.machine.shell(warning.partition("to let it pass: ")[2])

        lab.inside("ping", "-c1", "-W5", "-q", SERVER)
        assert lab.up() == ""
    finally:
        lab.machine.shell(f"nft delete table {table}")
