"""Allocation of addresses: properties, and two processes that race."""

from __future__ import annotations

import ipaddress
import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peewee
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mcloud.network.v1 import port_pb2
from mcloud_base import errors
from mcloud_controlplane.core.database import Database
from mcloud_controlplane.network import address_store, model, network_store
from mcloud_controlplane.network.model import Address, AllocationPool, Network, Port, Subnet

NETWORK = "net-00000000000000000000"
SUBNET = "sub-00000000000000000000"


@pytest.fixture
def store_url(database_url: str, tmp_path: Path) -> str:
    if database_url == "sqlite":
        return f"sqlite://{tmp_path}/network.db"
    return database_url.replace("{name}", "network")


@pytest.fixture
def store(store_url: str) -> Iterator[Database]:
    opened = model.open_database(store_url)
    yield opened
    opened.close()


def make_subnet(cidr: str, *pools: tuple[int, int]) -> None:
    """Replace everything by one subnet with these pools. A unit."""
    for table in (Address, AllocationPool, Subnet):
        table.delete().execute()
    Subnet.create(
        id=SUBNET,
        network_id=NETWORK,
        ip_version=ipaddress.ip_network(cidr).version,
        cidr=cidr,
        create_time=1,
        update_time=1,
    )
    for first, last in pools:
        AllocationPool.create(subnet_id=SUBNET, first=first, last=last)


def take(number: int, wanted: str = "") -> str:
    """Have a port take an address: any, or a certain one. A unit."""
    request = [port_pb2.FixedIpRequest(ip_address=wanted)] if wanted else []
    port = Port(id=f"port-{number}", network_id=NETWORK)
    return str(address_store.assign(port, request)[0].ip_address)


@st.composite
def pools(draw: st.DrawFn) -> list[tuple[int, int]]:
    """Disjoint ranges within the hosts' addresses of a /27."""
    marks = draw(st.lists(st.integers(1, 30), min_size=2, max_size=6, unique=True).map(sorted))
    return [(marks[i], marks[i + 1]) for i in range(0, len(marks) - 1, 2)]


Step = tuple[str, int]
STEPS = st.lists(
    st.tuples(st.sampled_from(["take", "free", "ask"]), st.integers(0, 31)), max_size=60
)


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(cidr=st.sampled_from(["10.1.2.0/27", "fd00::/123"]), ranges=pools(), steps=STEPS)
def test_no_address_is_had_twice_and_every_one_comes_back(
    store: Database, cidr: str, ranges: list[tuple[int, int]], steps: list[Step]
) -> None:
    store.write_now(make_subnet, cidr, *ranges)
    base = ipaddress.ip_network(cidr).network_address
    pool = {str(base + i) for first, last in ranges for i in range(first, last + 1)}
    holds: dict[int, str] = {}
    for number, (what, choice) in enumerate(steps):
        if what == "free" and holds:
            port = sorted(holds)[choice % len(holds)]
            store.write_now(address_store.give_back, f"port-{port}")
            del holds[port]
        elif what == "ask":
            wanted = str(base + max(1, min(choice, 30)))
            try:
                assert store.write_now(take, number, wanted) == wanted
            except errors.AlreadyExists:
                assert wanted in holds.values()
            else:
                assert wanted not in holds.values()
                holds[number] = wanted
        else:
            free = pool - set(holds.values())
            try:
                found = store.write_now(take, number)
            except errors.Exhausted:
                assert not free
            else:
                assert found in free
                holds[number] = found
    # Nothing that was given back is lost: the pools can be emptied to the last address.
    for number in range(1000, 1000 + len(pool - set(holds.values()))):
        holds[number] = store.write_now(take, number)
    assert pool <= set(holds.values())
    assert len(set(holds.values())) == len(holds)
    with pytest.raises(errors.Exhausted):
        store.write_now(take, 5000)


class Counter:
    """Counts the statements of a database."""

    def __init__(self, database: Any) -> None:
        self.count = 0
        self._database = database
        self._execute = database.execute_sql

    def __enter__(self) -> Counter:
        def execute(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            return self._execute(*args, **kwargs)

        self._database.execute_sql = execute
        return self

    def __exit__(self, *_: object) -> None:
        del self._database.execute_sql


@pytest.mark.parametrize("cidr", ["10.0.0.0/8", "fd00:1::/64"])
def test_a_large_subnet_costs_what_a_small_one_does(store: Database, cidr: str) -> None:
    network = ipaddress.ip_network(cidr)
    first, last = address_store.usable(network)
    store.write_now(make_subnet, cidr, (first, last))
    lowest, highest = address_store.at(network, first), address_store.at(network, last)
    assert (lowest, lowest + 1) == tuple(
        ipaddress.ip_address(store.write_now(take, number)) for number in (1, 2)
    )
    # The end is taken, so that the next one has to be found in the gap before it.
    store.write_now(take, 3, str(highest))
    with Counter(store.peewee) as counter:
        assert store.write_now(take, 4) == str(lowest + 2)
    assert counter.count <= 12
    store.write_now(address_store.give_back, "port-1")
    assert store.write_now(take, 5) == str(lowest)


def _compete(url: str, worker: int, start: Any, results: Any) -> None:
    """Take addresses and make networks, in step with another. A process of its own."""
    store = model.open_database(url)
    found, vnis = [], []
    for turn in range(10):
        start.wait(timeout=60)
        for number in range(25):
            found.append(store.write_now(take, worker * 1000 + turn * 25 + number))
        for number in range(2):
            vnis.append(store.write_now(_make_network, f"net-{worker}-{turn}-{number}"))
    results.put((found, vnis))
    store.close()


def _make_network(id_: str) -> int:
    vni = network_store._free_vni()
    Network.create(id=id_, vni=vni, mtu=1450, create_time=1, update_time=1)
    return vni


def test_two_processes_race_for_addresses_and_vnis(store: Database, store_url: str) -> None:
    store.write_now(make_subnet, "10.0.0.0/23", (3, 502))
    context = multiprocessing.get_context("spawn")
    results, start = context.Queue(), context.Barrier(2)
    processes = [
        context.Process(target=_compete, args=(store_url, worker, start, results))
        for worker in (1, 2)
    ]
    for process in processes:
        process.start()
    answers = [results.get(timeout=120) for _ in processes]
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    taken = [address for found, _ in answers for address in found]
    vnis = [vni for _, found in answers for vni in found]
    assert len(taken) == len(set(taken)) == 500
    assert len(vnis) == len(set(vnis)) == 40
    assert store.read_now(lambda: Address.select().count()) == 500
    with pytest.raises(errors.Exhausted):
        store.write_now(take, 1)
    print(f"addresses by process: {[len(found) for found, _ in answers]} of 500, none twice")


def test_the_index_itself_forbids_an_address_twice(store: Database) -> None:
    def insert(port: str) -> None:
        Address.create(
            subnet_id=SUBNET,
            position=7,
            ip_address="10.0.0.7",
            prefix_len=24,
            ip_version=4,
            port_id=port,
            number=0,
        )

    store.write_now(insert, "port-1")
    with pytest.raises(peewee.IntegrityError):
        store.write_now(insert, "port-2")


def test_vnis_come_back_when_the_highest_is_taken(store: Database) -> None:
    first, last = network_store._FIRST_VNI, network_store._LAST_VNI
    made = [store.write_now(_make_network, f"net-{number}") for number in range(3)]
    assert made == [first, first + 1, first + 2]

    def jump() -> None:
        Network.update(vni=last).where(Network.vni == first + 2).execute()
        Network.delete().where(Network.vni == first).execute()

    store.write_now(jump)
    assert store.write_now(_make_network, "net-a") == first
    assert store.write_now(_make_network, "net-b") == first + 2
    assert store.write_now(_make_network, "net-c") == first + 3
