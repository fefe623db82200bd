"""Flavors in the database."""

from __future__ import annotations

from collections.abc import Mapping

from google.protobuf.message import Message

from mcloud.compute.v1 import flavor_pb2, flavor_service_pb2
from mcloud_base import errors, ids
from mcloud_controlplane.compute.model import Flavor, shared
from mcloud_controlplane.core import auth, convert, database, listing, tables
from mcloud_controlplane.core.mutation import Mutation


def message(row: Flavor) -> flavor_pb2.Flavor:
    """Return a flavor's row as its message."""
    return flavor_pb2.Flavor(
        metadata=convert.metadata(row), spec=flavor_pb2.FlavorSpec.FromString(bytes(row.spec))
    )


def get(id_: str, *, lock: bool = False) -> Flavor:
    """Return a living flavor.

    Args:
        lock: it is to be changed.

    Raises:
        errors.NotFound: FLAVOR_NOT_FOUND.
    """
    row = Flavor.find_locked(id_) if lock else Flavor.find(id_)
    if row is None or row.delete_time is not None:
        raise errors.NotFound("FLAVOR_NOT_FOUND", f"there is no flavor {id_}", id=id_)
    return row


def create(work: Mutation, request: flavor_service_pb2.CreateFlavorRequest) -> flavor_pb2.Flavor:
    """Make a flavor."""
    if Flavor.select().where((Flavor.name == request.name) & Flavor.delete_time.is_null()).exists():
        raise errors.AlreadyExists(
            "FLAVOR_NAME_TAKEN", f"there is a flavor {request.name}", name=request.name
        )
    moment = database.now()
    row = Flavor.create(
        id=ids.new("flv"),
        name=request.name,
        labels=dict(request.labels),
        create_time=moment,
        update_time=moment,
        spec=request.spec.SerializeToString(),
    )
    work.concerns("flavor", row.id, row.name)
    tables.changed("flavor", row.id, "", "ADDED")
    return message(row)


def delete(work: Mutation, request: flavor_service_pb2.DeleteFlavorRequest) -> flavor_pb2.Flavor:
    """Delete a flavor; instances keep their copy."""
    row = get(request.id, lock=True)
    convert.require_version(row, request.resource_version)
    moment = database.now()
    row.delete_time = row.update_time = moment
    row.version += 1
    row.save()
    work.concerns("flavor", row.id, row.name)
    tables.changed("flavor", row.id, "", "DELETED")
    return message(row)


def list_page(
    caller: auth.Caller, request: flavor_service_pb2.ListFlavorsRequest
) -> flavor_service_pb2.ListFlavorsResponse:
    """Return a page of the living flavors."""
    revision = shared.revision()
    page = listing.page(
        Flavor,
        request,
        caller,
        fields={"id": Flavor.id, "name": Flavor.name},
        where=Flavor.delete_time.is_null(),
        visible=True,
    )
    return flavor_service_pb2.ListFlavorsResponse(
        flavors=[message(row) for row in page.rows],
        next_page_token=page.next_page_token,
        revision=str(revision),
    )


def load(found: list[str]) -> Mapping[str, Message]:
    """Return the messages of these ids, for a watch."""
    query = Flavor.select().where(Flavor.id.in_(found) & Flavor.delete_time.is_null())
    return {row.id: message(row) for row in query}
