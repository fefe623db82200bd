"""Identity's part of a process: its servicers, its first start, its upkeep."""

from __future__ import annotations

import asyncio

import structlog

from mcloud.identity.v1 import (
    application_credential_service_pb2_grpc,
    endpoint_service_pb2_grpc,
    enrolment_service_pb2_grpc,
    invariant_service_pb2_grpc,
    operation_service_pb2_grpc,
    project_service_pb2_grpc,
    role_assignment_service_pb2_grpc,
    schema_service_pb2_grpc,
    token_service_pb2_grpc,
    user_service_pb2_grpc,
)
from mcloud_base import errors
from mcloud_controlplane.core import invariants as core_invariants
from mcloud_controlplane.core import operations
from mcloud_controlplane.core.database import Database
from mcloud_controlplane.core.mutation import Frame
from mcloud_controlplane.core.pruner import Pruner
from mcloud_controlplane.core.runtime import Runtime
from mcloud_controlplane.core.schema_service import SchemaServicer
from mcloud_controlplane.identity import (
    enrolment_store,
    first_start,
    invariants,
    login_store,
    model,
    signing,
)
from mcloud_controlplane.identity.application_credential_service import (
    ApplicationCredentialServicer,
)
from mcloud_controlplane.identity.authentication import Authenticator
from mcloud_controlplane.identity.endpoint_service import EndpointServicer
from mcloud_controlplane.identity.enrolment_service import EnrolmentServicer
from mcloud_controlplane.identity.model import shared
from mcloud_controlplane.identity.passwords import Hasher
from mcloud_controlplane.identity.project_service import ProjectServicer
from mcloud_controlplane.identity.role_assignment_service import RoleAssignmentServicer
from mcloud_controlplane.identity.token_service import TokenServicer
from mcloud_controlplane.identity.user_service import UserServicer

log = structlog.get_logger()

_UPKEEP_S = 300


def register(runtime: Runtime) -> None:
    """Add identity to a process."""
    settings = runtime.settings
    database = runtime.database("identity", model.open_database)
    database.write_now(signing.rotate, database)
    database.write_now(
        first_start.ensure_administrator, database, settings.state_dir / "admin-password"
    )
    hasher = Hasher()
    authenticator = Authenticator(database, hasher)
    frame = Frame(database, shared, "iop")
    runtime.add(
        token_service_pb2_grpc.add_TokenServiceServicer_to_server,
        TokenServicer(database, authenticator, settings.token_ttl_s, runtime.checker.learn),
    )
    runtime.add(
        endpoint_service_pb2_grpc.add_EndpointServiceServicer_to_server, EndpointServicer(settings)
    )
    runtime.add(
        enrolment_service_pb2_grpc.add_EnrolmentServiceServicer_to_server,
        EnrolmentServicer(
            database,
            frame,
            runtime.authority,
            settings.internal_advertise or settings.internal_listen,
        ),
    )
    runtime.add(
        operation_service_pb2_grpc.add_OperationServiceServicer_to_server,
        operations.OperationServicer(database, shared),
    )
    runtime.add(
        schema_service_pb2_grpc.add_SchemaServiceServicer_to_server,
        SchemaServicer("identity", database, shared, runtime.process),
    )
    runtime.add(
        user_service_pb2_grpc.add_UserServiceServicer_to_server,
        UserServicer(database, frame, authenticator, hasher),
    )
    runtime.add(
        project_service_pb2_grpc.add_ProjectServiceServicer_to_server,
        ProjectServicer(database, frame),
    )
    runtime.add(
        role_assignment_service_pb2_grpc.add_RoleAssignmentServiceServicer_to_server,
        RoleAssignmentServicer(database, frame),
    )
    runtime.add(
        application_credential_service_pb2_grpc.add_ApplicationCredentialServiceServicer_to_server,
        ApplicationCredentialServicer(database, frame),
    )
    runtime.add(
        invariant_service_pb2_grpc.add_InvariantServiceServicer_to_server,
        core_invariants.InvariantServicer(database, invariants.INVARIANTS, invariants.count),
    )
    runtime.background(_upkeep(database, hasher), "identity upkeep")
    runtime.background(Pruner(database, shared, runtime.settings).run(), "pruner of identity")


async def _upkeep(database: Database, hasher: Hasher) -> None:
    """Rotate the signing keys and forget what has expired, for ever."""
    try:
        while True:
            await asyncio.sleep(_UPKEEP_S)
            try:
                await database.write(signing.rotate, database)
                await database.write(login_store.forget_old_failures)
                await database.write(enrolment_store.forget_expired)
                await database.write(enrolment_store.forget_join_tokens)
            except errors.Error as error:
                log.warning("upkeep of identity postponed", reason=error.reason)
    finally:
        hasher.close()
