"""Removes the bytes of deleted images that nobody uses, and ends uploads that were given up."""

from __future__ import annotations

import asyncio

import structlog

from mcloud_base import errors
from mcloud_controlplane.core.database import Database
from mcloud_controlplane.image import upload_store, use_store
from mcloud_controlplane.image.contents import Contents

log = structlog.get_logger()

_INTERVAL_S = 30.0
_ABANDONED_S = 7 * 86400.0


async def sweep_forever(database: Database, contents: Contents) -> None:
    """Sweep after changes, and now and then; repeatable, and by any number of processes."""
    with database.listening() as event:
        while True:
            event.clear()
            try:
                await sweep(database, contents)
            except (errors.Error, OSError) as error:
                log.warning("image sweeper tries again", error=str(error))
            try:
                async with asyncio.timeout(_INTERVAL_S):
                    await event.wait()
            except TimeoutError:
                continue


async def sweep(
    database: Database, contents: Contents, *, abandoned_s: float = _ABANDONED_S
) -> None:
    """Remove what may go. The bytes before the row, which is what is known of them."""
    for id_ in await database.read(use_store.unused):
        if not await database.write(use_store.condemn, id_):
            continue
        await contents.remove(id_)
        await database.write(use_store.forget, id_)
        log.info("image's bytes removed", image=id_)
    if not await database.read(upload_store.has_abandoned, abandoned_s):
        return
    for lease in await database.write(upload_store.take_abandoned, abandoned_s):
        await contents.remove(lease.image_id)
        await database.write(upload_store.refuse, lease, "the upload was not gone on with")
        log.info("abandoned upload ended", image=lease.image_id)
