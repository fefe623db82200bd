"""The host's side of a session against a real gRPC server that says what the test wants."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import grpc
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes.session_service import ServerStream, SessionService, serving
from mcloud.common.v1 import session_pb2
from mcloud.volume.v1 import session_service_pb2_grpc
from mcloud_agents.session import HostSession, Limits
from mcloud_base import errors

QUICK = Limits(
    answer_timeout_s=5,
    first_pause_s=0.01,
    longest_pause_s=0.05,
    first_retry_s=0.01,
    longest_retry_s=0.05,
    kept_reports=30,
)


class World:
    """A handler over an imaginary host: what is desired is there at once, unless told otherwise."""

    def __init__(self) -> None:
        self.there: dict[str, tuple[str, int]] = {}
        self.applied: list[tuple[str, int, bool]] = []
        self.gates: dict[str, asyncio.Event] = {}  # ids that wait until told to go on
        self.failures: dict[str, list[errors.Error]] = {}
        self.at_once: dict[str, int] = {}
        self.cancelled: list[tuple[str, int]] = []

    async def apply(self, desired: session_pb2.Desired) -> session_pb2.Observed | None:
        self.at_once[desired.id] = self.at_once.get(desired.id, 0) + 1
        assert self.at_once[desired.id] == 1, "never twice at a time for one id"
        try:
            if gate := self.gates.get(desired.id):
                await gate.wait()
            if failures := self.failures.get(desired.id):
                raise failures.pop(0)
            self.applied.append((desired.id, desired.generation, desired.absent))
            if desired.absent:
                self.there.pop(desired.id, None)
            else:
                self.there[desired.id] = (desired.epoch, desired.generation)
        except asyncio.CancelledError:
            self.cancelled.append((desired.id, desired.generation))
            raise
        finally:
            self.at_once[desired.id] -= 1
        return session_pb2.Observed(
            id=desired.id,
            epoch=desired.epoch,
            generation=desired.generation,
            absent=desired.absent,
        )

    async def observe_all(self) -> list[session_pb2.Observed]:
        return [
            session_pb2.Observed(id=id_, epoch=epoch, generation=generation)
            for id_, (epoch, generation) in self.there.items()
        ]

    async def artifacts(self) -> list[session_pb2.Artifact]:
        return [session_pb2.Artifact(name=id_, owner_id=id_) for id_ in self.there]


@asynccontextmanager
async def running(
    world: World, port: int, *, epoch: str = "", remember: Callable[[str], None] = lambda e: None
) -> AsyncIterator[HostSession]:
    async with grpc.aio.insecure_channel(
        f"127.0.0.1:{port}", options=[("grpc.initial_reconnect_backoff_ms", 50)]
    ) as channel:
        stub = session_service_pb2_grpc.SessionServiceStub(channel)
        hello = session_pb2.Hello(incarnation=3, boot_id="b", epoch=epoch)
        session = HostSession("volume", lambda: stub.OpenSession(), world, hello, remember, QUICK)
        task = asyncio.create_task(session.run())
        try:
            yield session
        finally:
            task.cancel()
            await asyncio.wait({task})


@asynccontextmanager
async def connected(
    world: World,
) -> AsyncIterator[tuple[SessionService, ServerStream, HostSession]]:
    service = SessionService()
    async with serving(service) as port, running(world, port) as session:
        stream = await service.stream()
        stream.lease()
        yield service, stream, session


async def test_a_desire_is_done_and_reported_until_it_is_stored() -> None:
    world = World()
    async with connected(world) as (service, stream, _):
        stream.desire("vol-1", 1)
        await stream.until(lambda: stream.observed)
        assert stream.kinds[0] == "hello"
        assert stream.received[0].hello.incarnation == 3
        assert world.there == {"vol-1": ("e1", 1)}
        (report,) = stream.observed
        assert (report.id, report.epoch, report.generation) == ("vol-1", "e1", 1)

        stream.end()  # before it is acknowledged
        again = await service.stream()
        again.lease(2)
        await again.until(lambda: again.observed)
        assert again.observed == [report]
        again.acknowledge(report.sequence)
        again.desire("vol-2", 1)
        await again.until(lambda: len(again.observed) == 2)
        again.acknowledge(again.observed[1].sequence)
        again.end()

        third = await service.stream()
        third.lease(3)
        third.desire("vol-3", 1)
        await third.until(lambda: third.observed)
        assert [o.id for o in third.observed] == ["vol-3"]


async def test_only_the_newest_report_of_an_id_is_kept() -> None:
    world = World()
    async with connected(world) as (service, stream, session):
        stream.desire("vol-1", 1)
        await stream.until(lambda: stream.observed)
        stream.end()
        await stream.ended.wait()
        for generation in range(2, 6):
            session.report(session_pb2.Observed(id="vol-1", epoch="e1", generation=generation))
        session.report(session_pb2.Observed(id="vol-2", epoch="e1", generation=1))
        again = await service.stream()
        again.lease(2)
        await again.until(lambda: len(again.observed) >= 2)
        assert [(o.id, o.generation) for o in again.observed] == [("vol-1", 5), ("vol-2", 1)]


async def test_a_tombstone_preempts_what_is_being_made() -> None:
    world = World()
    world.gates["vol-1"] = asyncio.Event()
    async with connected(world) as (_, stream, _session):
        stream.desire("vol-1", 1)
        stream.desire("vol-2", 1)
        await stream.until(lambda: stream.observed)  # one id does not wait for another
        assert stream.observed[0].id == "vol-2"
        del world.gates["vol-1"]
        stream.desire("vol-1", 2, absent=True)
        await stream.until(lambda: len(stream.observed) == 2)
        assert stream.observed[1].absent
        assert world.cancelled == [("vol-1", 1)]
        assert "vol-1" not in world.there


async def test_an_older_generation_is_ignored_also_after_a_tombstone() -> None:
    world = World()
    async with connected(world) as (_, stream, _session):
        stream.desire("vol-1", 5, absent=True)
        await stream.until(lambda: stream.observed)
        stream.acknowledge(stream.observed[0].sequence)
        stream.desire("vol-1", 4)
        stream.desire("vol-9", 1, epoch="e0")  # of another epoch than the lease
        stream.desire("vol-2", 1)
        await stream.until(lambda: len(stream.observed) == 2)
        assert world.applied == [("vol-1", 5, True), ("vol-2", 1, False)]


async def test_what_fails_is_reported_and_tried_again() -> None:
    world = World()
    world.failures["vol-1"] = [errors.Unavailable("NO_ROOM", "no room"), errors.Exhausted("X", "x")]
    async with connected(world) as (_, stream, _session):
        stream.desire("vol-1", 7)
        await stream.until(lambda: stream.observed and not stream.observed[-1].HasField("error"))
        first, last = stream.observed[0], stream.observed[-1]
        assert (first.generation, errors.from_status(first.error).reason) == (0, "NO_ROOM")
        assert last.generation == 7
        sequences = [o.sequence for o in stream.observed]
        assert sequences == sorted(set(sequences))


async def test_a_fault_in_the_handler_does_not_end_the_session() -> None:
    world = World()

    async def broken(desired: session_pb2.Desired) -> session_pb2.Observed | None:
        raise ZeroDivisionError

    world.apply = broken  # type: ignore[method-assign]
    async with connected(world) as (service, stream, _session):
        stream.desire("vol-1", 1)
        await stream.until(lambda: stream.observed)
        assert errors.from_status(stream.observed[0].error).reason == "AGENT_FAULT"
        assert service.opened == 1


async def test_a_new_epoch_makes_the_host_tell_everything_and_accept_lower_numbers() -> None:
    world, remembered = World(), list[str]()
    service = SessionService()
    async with serving(service) as port, running(world, port, remember=remembered.append):
        stream = await service.stream()
        stream.lease(9)
        stream.desire("vol-1", 40)
        await stream.until(lambda: stream.observed)
        stream.end()
        restored = await service.stream()
        assert restored.received[0].hello.epoch == "e1"
        restored.lease(2, "e2")  # also a lower session number
        await restored.until(lambda: restored.observed)
        told = restored.observed[0]
        assert (told.id, told.epoch, told.generation) == ("vol-1", "e2", 0)
        restored.desire("vol-1", 3, epoch="e2")
        await restored.until(lambda: len(restored.observed) == 2)
        assert world.there == {"vol-1": ("e2", 3)}
        assert remembered == ["e1", "e2"]


async def test_a_restarted_agent_tells_everything_and_names_its_epoch() -> None:
    world = World()
    world.there = {"vol-1": ("e1", 4), "vol-2": ("e1", 1)}
    service = SessionService()
    async with serving(service) as port, running(world, port, epoch="e1"):
        stream = await service.stream()
        stream.lease()
        await stream.until(lambda: len(stream.observed) == 2)
        assert stream.received[0].hello.epoch == "e1"
        assert [(o.id, o.generation) for o in stream.observed] == [("vol-1", 4), ("vol-2", 1)]


async def test_a_stream_with_a_lower_number_is_dropped() -> None:
    world = World()
    async with connected(world) as (service, stream, _):
        stream.lease(5)
        stream.desire("vol-1", 1)
        await stream.until(lambda: stream.observed)
        stream.end()
        older = await service.stream()
        older.lease(4)
        older.desire("vol-1", 2)
        newest = await service.stream()
        newest.lease(6)
        newest.desire("vol-2", 1)
        await newest.until(lambda: "vol-2" in [o.id for o in newest.observed])
        assert ("vol-1", 2, False) not in world.applied


async def test_the_lease_is_renewed_and_silence_ends_the_stream() -> None:
    world = World()
    service = SessionService()
    async with serving(service) as port, running(world, port) as session:
        stream = await service.stream()
        stream.lease(1, ttl_s=0.6)
        await stream.until(lambda: stream.kinds.count("renewal") == 1)
        assert session.connected
        stream.lease(1, ttl_s=0.6)
        await stream.until(lambda: stream.kinds.count("renewal") >= 2)
        again = await service.stream()  # nothing was answered any more
        await again.until(lambda: again.kinds == ["hello"])
        assert not session.connected


async def test_a_listing_is_answered() -> None:
    world = World()
    world.there = {"vol-1": ("e1", 1)}
    async with connected(world) as (_, stream, _session):
        stream.ask_for_listing("q-1")
        await stream.until(lambda: "listing" in stream.kinds)
        (listing,) = [m.listing for m in stream.received if m.WhichOneof("message") == "listing"]
        assert listing.id == "q-1"
        assert [a.owner_id for a in listing.artifacts] == ["vol-1"]


async def test_what_a_newer_service_says_beyond_this_contract_is_ignored() -> None:
    """A message of a kind that is not known, and fields that are not, of any type."""
    world = World()
    later = b"\xfa\x3f\x03new" + b"\xf8\x3f\x63"  # field 1023: a string, a number
    async with connected(world) as (_, stream, _session):
        stream.say(session_pb2.SessionResponse.FromString(later))
        desired = session_pb2.Desired(id="vol-1", epoch="e1", generation=1)
        desired.MergeFromString(later)
        stream.say(session_pb2.SessionResponse(desired=desired))
        await stream.until(lambda: stream.observed)
        assert world.there == {"vol-1": ("e1", 1)}
        assert stream.kinds.count("hello") == 1, "it is the same stream"


async def test_work_goes_on_while_the_control_plane_is_away() -> None:
    world = World()
    world.gates["vol-1"] = gate = asyncio.Event()
    service = SessionService()
    async with serving(service) as port:
        agent = running(world, port)
        await agent.__aenter__()
        stream = await service.stream()
        stream.lease()
        stream.desire("vol-1", 1)
        await stream.until(lambda: stream.kinds == ["hello"])
        while not world.at_once.get("vol-1"):
            await asyncio.sleep(0.005)
    gate.set()  # the server is gone
    async with asyncio.timeout(10):
        while not world.there:
            await asyncio.sleep(0.005)
    service = SessionService()
    async with serving(service, port):
        again = await service.stream()
        again.lease(2)
        await again.until(lambda: again.observed)
        assert [(o.id, o.generation) for o in again.observed] == [("vol-1", 1)]
        await agent.__aexit__(None, None, None)


async def test_when_too_many_reports_wait_everything_is_told_again() -> None:
    world = World()
    async with connected(world) as (service, stream, session):
        world.there = {f"vol-{n}": ("e1", 1) for n in range(100)}
        await stream.until(lambda: stream.kinds == ["hello"])
        stream.desire("vol-x", 1)
        await stream.until(lambda: stream.observed)
        for n in range(100):
            session.report(session_pb2.Observed(id=f"vol-{n}", epoch="e1", generation=1))
        stored: set[str] = set()
        async with asyncio.timeout(20):
            while len(stored) < 101:
                for report in stream.observed:
                    stored.add(report.id)
                if stream.observed:
                    stream.acknowledge(stream.observed[-1].sequence)
                await asyncio.sleep(0.01)
        assert service.opened == 1


async def test_a_reconnection_keeps_what_was_not_stored() -> None:
    world = World()
    async with connected(world) as (service, stream, session):
        stream.desire("vol-1", 1)
        await stream.until(lambda: stream.observed)
        session.reconnect()
        again = await service.stream()
        again.lease(2)
        await again.until(lambda: again.observed)
        assert [o.id for o in again.observed] == ["vol-1"]
        await stream.ended.wait()


async def test_ending_the_session_touches_nothing() -> None:
    world = World()
    async with connected(world) as (_, stream, _session):
        stream.desire("vol-1", 1)
        await stream.until(lambda: stream.observed)
    assert world.there == {"vol-1": ("e1", 1)}
    assert world.applied == [("vol-1", 1, False)]


Message = st.tuples(st.sampled_from(["vol-1", "vol-2", "vol-3"]), st.integers(1, 6), st.booleans())


@given(
    streams=st.lists(
        st.tuples(st.sampled_from(["e1", "e2"]), st.lists(Message, max_size=8)),
        min_size=1,
        max_size=4,
    ),
    acknowledged=st.booleans(),
)
@settings(max_examples=25, deadline=None)
async def test_whatever_the_order_the_newest_of_the_epoch_wins(
    streams: list[tuple[str, list[tuple[str, int, bool]]]], acknowledged: bool
) -> None:
    """Disconnects, repeats, reordering and new epochs: the host ends where the service wants it."""
    world, service = World(), SessionService()
    highest: dict[str, tuple[int, set[bool]]] = {}
    epoch = ""
    async with serving(service) as port, running(world, port):
        for number, (current, messages) in enumerate(streams, 1):
            stream = await service.stream()
            if current != epoch:
                highest.clear()
                epoch = current
            stream.lease(number, epoch)
            for id_, generation, absent in messages:
                stream.desire(id_, generation, epoch=epoch, absent=absent)
                best, kinds = highest.get(id_, (0, set()))
                if generation > best:
                    highest[id_] = generation, {absent}
                elif generation == best:
                    kinds.add(absent)
            if number < len(streams):
                stream.end()
        stream.desire("vol-last", 1, epoch=epoch)
        await stream.until(lambda: "vol-last" in [o.id for o in stream.observed])
        async with asyncio.timeout(20):
            while not all(_is_so(world, epoch, i, g, k) for i, (g, k) in highest.items()):
                await asyncio.sleep(0.005)
        if acknowledged:
            stream.acknowledge(max(o.sequence for o in stream.observed))
        sequences = [o.sequence for o in stream.observed]
        assert sequences == sorted(set(sequences))


def _is_so(world: World, epoch: str, id_: str, generation: int, kinds: set[bool]) -> bool:
    if id_ in world.there:
        return False in kinds and world.there[id_] == (epoch, generation)
    return True in kinds
