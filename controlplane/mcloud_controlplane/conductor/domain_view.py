"""Domains as operators see them."""

from __future__ import annotations

from mcloud.conductor.v1 import domain_pb2, domain_service_pb2
from mcloud_base import errors
from mcloud_controlplane.compute.model import Domain, Instance, shared
from mcloud_controlplane.conductor import store
from mcloud_controlplane.core import auth, contract, convert, listing


def message(row: Domain, power_state: str) -> domain_pb2.Domain:
    """Return a domain's row as operators see it."""
    domain = domain_pb2.Domain(
        id=row.id,
        instance_id=row.instance_id,
        host_id=row.host_id,
        generation=row.generation,
        observed_generation=row.observed_generation,
        desired_power_state=contract.enum_value(power_state, domain_pb2.PowerState),
        state=contract.enum_value(row.state, store.State),
        create_time=convert.timestamp(row.create_time),
    )
    if row.absent_time is not None:
        domain.absent_time.CopyFrom(convert.timestamp(row.absent_time))
    return domain


def get_message(id_: str) -> domain_pb2.Domain:
    """Return a domain as operators see it.

    Raises:
        errors.NotFound: DOMAIN_NOT_FOUND.
    """
    row = store.find_domain(id_)
    if row is None:
        raise errors.NotFound("DOMAIN_NOT_FOUND", f"there is no domain {id_}", id=id_)
    return message(row, Instance.get_by_id(row.instance_id).power_state)


def list_page(
    caller: auth.Caller, request: domain_service_pb2.ListDomainsRequest
) -> domain_service_pb2.ListDomainsResponse:
    """Return a page of domains; also of those that are gone."""
    revision = shared.revision()
    page = listing.page(
        Domain,
        request,
        caller,
        fields={
            "id": Domain.id,
            "instance_id": Domain.instance_id,
            "host_id": Domain.host_id,
            "state": Domain.state,
        },
        orders={"id": Domain.id},
        default_order="id",
        visible=True,
    )
    instances = Instance.select(Instance.id, Instance.power_state).where(
        Instance.id.in_([row.instance_id for row in page.rows])
    )
    power = {row.id: row.power_state for row in instances}
    return domain_service_pb2.ListDomainsResponse(
        domains=[message(row, power.get(row.instance_id, "RUNNING")) for row in page.rows],
        next_page_token=page.next_page_token,
        revision=str(revision),
    )
