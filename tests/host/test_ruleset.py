"""The steps from one packet filter to the next, in the kernel."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mcloud.network.v1 import dataplane_pb2 as pb
from mcloud_agents.network import expressions as x
from mcloud_agents.network import filters, names, namespaces, nft
from mcloud_agents.network.ruleset import Ruleset, difference
from mcloud_agents.network.state import Numbers, State

pytestmark = pytest.mark.host

RULE = pb.EffectiveRule
TABLES = [("bridge", names.TABLE), ("inet", names.TABLE)]
_Result = TypeVar("_Result")


class Kernel:
    """A network namespace, and the thread that is in it."""

    def __init__(self) -> None:
        self.name = f"test-ruleset-{os.getpid()}"
        self._thread = ThreadPoolExecutor(1)
        self._thread.submit(namespaces.ensure, self.name).result()

    def run(self, function: Callable[..., _Result], *arguments: object) -> _Result:
        def inside() -> _Result:
            with namespaces.entered(self.name):
                return function(*arguments)

        return self._thread.submit(inside).result()

    def content(self) -> list[list[dict[str, object]]]:
        """What the tables hold, but for handles and counters."""
        return [
            sorted(map(_lasting, self.run(nft.list_table, family, name)), key=repr)
            for family, name in TABLES
        ]

    def generation(self) -> int:
        return self.run(nft.generation)

    def close(self) -> None:
        self._thread.submit(namespaces.remove, self.name).result()
        self._thread.shutdown()


@pytest.fixture(scope="module")
def kernel() -> Iterator[Kernel]:
    made = Kernel()
    yield made
    made.close()


@pytest.fixture
def ruleset(tmp_path: Path, kernel: Kernel) -> Ruleset:
    kernel.run(nft.run, filters.remove())
    return Ruleset(State(tmp_path))


def _lasting(item: dict[str, object]) -> dict[str, object]:
    """An object of a listing without what changes by itself; elements in one order."""
    ((kind, value),) = item.items()
    assert isinstance(value, dict)
    kept = {key: part for key, part in value.items() if key not in ("handle", "elem")}
    if kind in ("set", "map"):
        kept["elem"] = sorted(value.get("elem", []), key=repr)
    return {kind: _without_counts(kept)}


def _without_counts(part: object) -> object:
    if isinstance(part, dict):
        return {k: None if k == "counter" else _without_counts(v) for k, v in part.items()}
    return [_without_counts(each) for each in part] if isinstance(part, list) else part


def network(number: int) -> pb.NetworkSegment:
    subnet = pb.SubnetBinding(subnet_id=f"sub-{number}", cidr="10.0.0.0/24", service_ip="10.0.0.2")
    return pb.NetworkSegment(
        network_id=f"net-{number}",
        vni=100 + number,
        mtu=1450,
        service_mac="fa:16:3e:ff:00:02",
        subnets=[subnet],
    )


def port(
    number: int, *, network_number: int = 0, secure: bool = True, open_to: int = 0
) -> pb.PortBinding:
    rules = [
        RULE(direction=RULE.DIRECTION_EGRESS, ip_version=4),
        RULE(
            direction=RULE.DIRECTION_INGRESS,
            ip_version=4,
            protocol="tcp",
            remote_cidrs=[f"10.0.0.{member}/32" for member in range(10, 11 + open_to)],
        ),
    ]
    return pb.PortBinding(
        port_id=f"port-{number}",
        network_id=f"net-{network_number}",
        mac=f"fa:16:3e:00:00:{number:02x}",
        fixed_ips=[pb.FixedIp(ip_address=f"10.0.0.{number}")],
        port_security_enabled=secure,
        device_name=f"tap{number:011d}",
        rules=rules,
    )


def document(*ports: pb.PortBinding) -> pb.HostDataplane:
    numbers = sorted({int(each.network_id.removeprefix("net-")) for each in ports} | {0})
    return pb.HostDataplane(networks=map(network, numbers), ports=ports)


PORTS = st.lists(
    st.builds(
        port,
        st.integers(10, 15),
        network_number=st.integers(0, 1),
        secure=st.booleans(),
        open_to=st.integers(0, 3),
    ),
    max_size=5,
    unique_by=lambda each: each.port_id,
)


def tables_of(wanted: pb.HostDataplane, numbers: Numbers) -> list[x.Table]:
    return filters.build(wanted, numbers, {})


def give_out(numbers: Numbers, wanted: pb.HostDataplane) -> Numbers:
    return numbers.give_out(
        [each.port_id for each in wanted.ports], [each.network_id for each in wanted.networks]
    )


def replaced(kernel: Kernel, tables: list[x.Table]) -> list[list[dict[str, object]]]:
    """What the tables hold when they are made anew."""
    commands = [
        command
        for table in tables
        for command in nft.replace_table(table.family, table.name, table.commands())
    ]
    kernel.run(nft.run, commands)
    return kernel.content()


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(documents=st.lists(PORTS, min_size=2, max_size=5))
def test_any_way_to_a_document_leads_to_the_same_filter(
    tmp_path_factory: pytest.TempPathFactory, kernel: Kernel, documents: list[list[pb.PortBinding]]
) -> None:
    ruleset = Ruleset(State(tmp_path_factory.mktemp("state")))
    kernel.run(nft.run, filters.remove())
    numbers = Numbers()
    for ports in documents:
        wanted = document(*ports)
        numbers = give_out(numbers, wanted)
        tables = tables_of(wanted, numbers)
        kernel.run(ruleset.begin, tables)
        kernel.run(ruleset.finish)
    reached = kernel.content()
    assert reached == replaced(kernel, tables)


def test_a_new_port_has_its_rules_before_others_learn_of_it(
    kernel: Kernel, ruleset: Ruleset
) -> None:
    before, after = document(port(10)), document(port(10, open_to=1), port(11, open_to=1))
    numbers = give_out(Numbers(), before)
    kernel.run(ruleset.begin, tables_of(before, numbers))
    kernel.run(ruleset.finish)
    others = chain(kernel, "in-tap00000000010")

    numbers = give_out(numbers, after)
    generation = kernel.generation()
    kernel.run(ruleset.begin, tables_of(after, numbers))
    begun = {name: chain(kernel, name) for name in PORT_CHAINS}
    assert all(begun.values())
    assert chain(kernel, "in-tap00000000010") == others
    kernel.run(ruleset.finish)
    assert {name: chain(kernel, name) for name in PORT_CHAINS} == begun
    assert chain(kernel, "in-tap00000000010") != others
    assert kernel.generation() == generation + 2


PORT_CHAINS = ("in-tap00000000011", "out-tap00000000011")


def chain(kernel: Kernel, name: str) -> list[object]:
    """The rules of a chain of the inet table."""
    rules = [
        item["rule"]
        for item in kernel.run(nft.list_table, "inet", names.TABLE)
        if item.get("rule", {}).get("chain") == name
    ]
    return [_without_counts(rule["expr"]) for rule in rules]


def test_what_others_change_between_two_passes_is_undone_by_the_next(
    kernel: Kernel, ruleset: Ruleset
) -> None:
    first, second = document(port(10)), document(port(10), port(11))
    numbers = give_out(Numbers(), second)
    kernel.run(ruleset.begin, tables_of(first, numbers))
    kernel.run(ruleset.finish)
    flushed = {"family": "inet", "table": names.TABLE, "name": "in-tap00000000010"}
    kernel.run(nft.run, [{"flush": {"chain": flushed}}])
    kernel.run(ruleset.begin, tables_of(second, numbers))
    kernel.run(ruleset.finish)
    reached = kernel.content()
    assert reached == replaced(kernel, tables_of(second, numbers))


def test_an_agent_that_dies_between_the_two_transactions_is_followed_by_one_that_repairs(
    kernel: Kernel, tmp_path: Path
) -> None:
    first, second = document(port(10)), document(port(10, open_to=1), port(11))
    numbers = give_out(Numbers(), second)
    dying = Ruleset(State(tmp_path))
    kernel.run(dying.begin, tables_of(first, numbers))
    kernel.run(dying.finish)
    kernel.run(dying.begin, tables_of(second, numbers))

    for wanted in (second, first):
        tables = tables_of(wanted, numbers)
        after = Ruleset(State(tmp_path))
        kernel.run(after.begin, tables)
        kernel.run(after.finish)
        reached = kernel.content()
        assert reached == replaced(kernel, tables)


def test_the_same_again_is_no_transaction(kernel: Kernel, ruleset: Ruleset, tmp_path: Path) -> None:
    tables = tables_of(document(port(10)), give_out(Numbers(), document(port(10))))
    kernel.run(ruleset.begin, tables)
    kernel.run(ruleset.finish)
    generation = kernel.generation()
    for again in (ruleset, Ruleset(State(tmp_path))):  # the same agent, and one after a restart
        kernel.run(again.begin, tables)
        kernel.run(again.finish)
    assert kernel.generation() == generation


def test_what_a_port_that_stays_needs_does_not_wait() -> None:
    numbers = give_out(Numbers(), document(port(10), port(11)))
    one, two = tables_of(document(port(10)), numbers), tables_of(document(port(11)), numbers)
    assert difference(one, two).can_wait  # the one that is gone has no device any more
    other = document(port(11), port(12, network_number=1))
    assert not difference(one, tables_of(other, give_out(numbers, other))).can_wait
