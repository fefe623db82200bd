"""What of the compute database is kept no longer than need be (core/pruner.py)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from peewee import fn

from mcloud_controlplane.compute.model import (
    Claim,
    Domain,
    Flavor,
    Host,
    Instance,
    Placement,
    shared,
)
from mcloud_controlplane.core.pruner import Cursor, Prune, ago
from mcloud_controlplane.settings import Settings

_exists: Callable[[Any], Any] = fn.EXISTS


def needed_operations() -> Any:
    """Return the condition on operations whose lease number gives back what is still held.

    The reclaimer goes on with the last operation of an instance until that is DELETED.
    """
    table = shared.operation
    living = Instance.select(Instance.id).where(
        (Instance.id == table.resource_id) & (Instance.state != "DELETED")
    )
    return _exists(living)


def prunes(settings: Settings) -> Mapping[str, Prune]:
    """Return what is pruned beside what every database has, by name."""
    cursor = Cursor(Instance.id)

    def instances(limit: int) -> int:
        """Delete instances that are gone, with their domains and the explanations of their hosts.

        While anything of one is held or placed, or an operation of it is kept, its row stays: by
        it the reclaimer and verify know whose the thing is.
        """
        claim = Claim.select(Claim.domain_id).where(Claim.instance_id == Instance.id)
        domain = Domain.select(Domain.id).where(
            (Domain.instance_id == Instance.id) & Domain.absent_time.is_null()
        )
        operation = shared.operation.select(shared.operation.id).where(
            shared.operation.resource_id == Instance.id
        )
        gone = (Instance.state == "DELETED") & (Instance.delete_time < ago(settings.keep_deleted_s))
        free = ~_exists(claim) & ~_exists(domain) & ~_exists(operation)
        here = Instance.id.in_(cursor.page(limit))
        found = [row.id for row in Instance.select(Instance.id).where(here & gone & free)]
        Placement.delete().where(Placement.instance_id.in_(found)).execute()
        Domain.delete().where(Domain.instance_id.in_(found)).execute()
        return int(Instance.delete().where(Instance.id.in_(found)).execute())

    def hosts(limit: int) -> int:
        """Delete hosts that are gone, with their sessions: their certificates are revoked."""
        domain = Domain.select(Domain.id).where(Domain.host_id == Host.id)
        claim = Claim.select(Claim.domain_id).where(Claim.host_id == Host.id)
        gone = Host.delete_time < ago(settings.keep_deleted_s)
        query = Host.select(Host.id).where(gone & ~_exists(domain) & ~_exists(claim))
        found = [row.id for row in query.limit(limit)]
        shared.host_session.delete().where(shared.host_session.host_id.in_(found)).execute()
        return int(Host.delete().where(Host.id.in_(found)).execute())

    def flavors(limit: int) -> int:
        """Delete flavors that are gone and of which no instance is any more."""
        used = Instance.select(Instance.id).where(Instance.flavor_id == Flavor.id)
        gone = Flavor.delete_time < ago(settings.keep_deleted_s)
        query = Flavor.select(Flavor.id).where(gone & ~_exists(used))
        found = [row.id for row in query.limit(limit)]
        return int(Flavor.delete().where(Flavor.id.in_(found)).execute())

    return {"instance": instances, "host": hosts, "flavor": flavors}
