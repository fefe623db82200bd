"""Asking hosts what is on them, whichever process of the control plane has their sessions.

A question is a row. Every process that serves the conductor is woken by it, and the one that has
the host's session asks the host and writes the answer into the row. What is not answered by the
deadline stays so: of that host nothing is known.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Collection

import structlog

from mcloud.common.v1 import session_pb2
from mcloud_base import errors
from mcloud_controlplane.compute.model import Host, HostListing, shared
from mcloud_controlplane.core import database, sessions, tables
from mcloud_controlplane.core.database import Database

log = structlog.get_logger()

Listings = dict[str, list[session_pb2.Artifact]]  # by host

_POLL_S = 5.0  # the net under the wake-ups
_TYPE = "host_listing"  # in the change log


class HostListings:
    """Asks, and answers for the hosts that are connected to this process."""

    def __init__(self, opened: Database, hosts: sessions.Sessions, timeout_s: float) -> None:
        self._database = opened
        self._hosts = hosts
        self._timeout_s = timeout_s
        self._answering: dict[tuple[str, str], asyncio.Task[None]] = {}

    async def ask(self, host_id: str = "") -> tuple[Listings, list[str]]:
        """Return what is on hosts, and the hosts that did not answer.

        Args:
            host_id: only this one; empty: all that are not deleted.
        """
        request_id = secrets.token_hex(8)
        asked, silent = await self._database.write(_ask, request_id, host_id, self._timeout_s)
        found: Listings = {}
        try:
            if asked:
                await self._database.until(
                    lambda: _all_answered(request_id), timeout_s=self._timeout_s, types=(_TYPE,)
                )
        except TimeoutError:
            log.info("hosts have not answered in time", request=request_id)
        finally:
            found = await self._database.write(_collect, request_id)
        return found, sorted({*silent, *(asked - found.keys())})

    async def serve(self) -> None:
        """Answer for the hosts that are connected here, for ever."""
        try:
            with self._database.listening(_TYPE) as event:
                while True:
                    event.clear()
                    await self._answer_all()
                    try:
                        async with asyncio.timeout(_POLL_S):
                            await event.wait()
                    except TimeoutError:
                        continue
        finally:
            for task in self._answering.values():
                task.cancel()

    async def _answer_all(self) -> None:
        here = self._hosts.connected()
        try:
            questions = await self._database.read(_open_questions, here) if here else []
        except errors.Error as error:
            log.warning("questions to hosts wait", reason=error.reason)
            return
        for key in questions:
            if key not in self._answering:
                task = asyncio.create_task(self._answer(*key))
                self._answering[key] = task
                task.add_done_callback(lambda _, key=key: self._answering.pop(key))  # type: ignore[misc]

    async def _answer(self, request_id: str, host_id: str) -> None:
        try:
            listing = await self._hosts.list_artifacts(host_id, self._timeout_s)
            if listing is not None:
                await self._database.write(_record, request_id, host_id, listing)
        except errors.Error as error:
            log.warning("listing of a host is lost", host=host_id, reason=error.reason)


def _ask(request_id: str, host_id: str, timeout_s: float) -> tuple[set[str], set[str]]:
    """Write the questions; return the hosts that are asked, and those that are not connected."""
    living = Host.select(Host.id).where(Host.delete_time.is_null())
    wanted = {host_id} if host_id else {row.id for row in living}
    session = shared.host_session
    connected = {row.host_id for row in session.select(session.host_id).where(shared.connected())}
    asked = wanted & connected
    expiry = database.now() + int(timeout_s * 1_000_000)
    rows = [(request_id, id_, expiry) for id_ in sorted(asked)]
    fields = [HostListing.request_id, HostListing.host_id, HostListing.expire_time]
    for start in range(0, len(rows), 500):
        HostListing.insert_many(rows[start : start + 500], fields=fields).execute()
    if asked:
        tables.changed(_TYPE, request_id, "")
    return asked, wanted - asked


def _all_answered(request_id: str) -> bool | None:
    waiting = (HostListing.request_id == request_id) & HostListing.listing.is_null()
    return None if HostListing.select(HostListing.host_id).where(waiting).exists() else True


def _collect(request_id: str) -> Listings:
    this = HostListing.request_id == request_id
    found = {
        row.host_id: list(session_pb2.Listing.FromString(bytes(row.listing or b"")).artifacts)
        for row in HostListing.select().where(this & HostListing.listing.is_null(False))
    }
    HostListing.delete().where(this).execute()
    return found


def _open_questions(host_ids: Collection[str]) -> list[tuple[str, str]]:
    waiting = HostListing.listing.is_null() & (HostListing.expire_time > database.now())
    query = HostListing.select(HostListing.request_id, HostListing.host_id).where(waiting)
    here = set(host_ids)
    return [(row.request_id, row.host_id) for row in query if row.host_id in here]


def _record(request_id: str, host_id: str, listing: session_pb2.Listing) -> None:
    answered = (
        HostListing.update(listing=listing.SerializeToString())
        .where((HostListing.request_id == request_id) & (HostListing.host_id == host_id))
        .execute()
    )
    if answered:
        tables.changed(_TYPE, request_id, "")


def forget_old() -> None:
    """Delete the questions of processes that were killed while they waited. Within a unit."""
    HostListing.delete().where(HostListing.expire_time < database.now() - 60_000_000).execute()
