"""One process of the control plane: its two ports, its databases, its clients, its tasks."""

from __future__ import annotations

import asyncio
import importlib
import pkgutil
import socket
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, cast

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from mcloud.identity.v1 import (
    enrolment_service_pb2,
    enrolment_service_pb2_grpc,
    token_service_pb2_grpc,
)
from mcloud_base import endpoints, errors, rpc
from mcloud_controlplane.core import (
    database,
    gate,
    migrations,
    own_calls,
    pki,
    ports,
    processes,
    tables,
    tokens,
    workflow,
)
from mcloud_controlplane.core.database import Database
from mcloud_controlplane.settings import Settings

log = structlog.get_logger()

_REVOKED_POLL_S = 10


class Runtime:
    """What services are registered with. Use within a running event loop."""

    def __init__(
        self,
        settings: Settings,
        *,
        probe: workflow.Probe = workflow.no_probe,
        release: migrations.Release = migrations.THIS,
        life: processes.Life | None = None,
    ) -> None:
        self.settings = settings
        self.process = processes.Process(release, settings.services, life)
        self.probe = probe  # of every runner of workflows
        self.authority = pki.Authority(settings.state_dir / "pki")
        self.identity = self.authority.issue_service(
            "+".join(settings.services)[:60], settings.names
        )
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._databases: dict[str, database.Database] = {}
        self._tasks: list[asyncio.Task[Any]] = []
        self.runners: list[workflow.Runner] = []  # of every database that has workflows
        self._revoked: frozenset[str] = frozenset()
        self.checker = tokens.TokenChecker(
            token_service_pb2_grpc.TokenServiceStub(self.network_channel("identity"))  # type: ignore[arg-type]
        )
        places = ports.places(settings)

        def guard(*, internal: bool) -> gate.Gate:
            return gate.Gate(
                self.checker,
                internal=internal,
                is_revoked=lambda serial: serial in self._revoked,
                places=places,
                limits=gate.Limits(settings.default_deadline_s, settings.slow_reader_s),
            )

        self.public = ports.server(settings, guard(internal=False), internal=False)
        inner = guard(internal=True)
        self.internal = ports.server(settings, inner, internal=True)
        self._own = own_calls.Registry(inner, self.identity)

    def add(self, register: Callable[[Any, Any], None], servicer: Any) -> None:
        """Offer a servicer on both ports; the contract says who may call what.

        Args:
            register: the generated add_XServicer_to_server.
        """
        register(servicer, self.public)
        register(servicer, self.internal)
        register(servicer, self._own)

    def channel(self, service: str) -> grpc.aio.Channel:
        """Return what reaches a service: this process itself, if it serves that.

        Another endpoint that the settings name for a service is used all the same.
        """
        network = self.network_channel(service)
        if service in self.settings.services and service not in self.settings.internal_endpoints:
            return cast(grpc.aio.Channel, own_calls.Channel(self._own, network))
        return network

    def network_channel(self, service: str) -> grpc.aio.Channel:
        """Return the channel to a service's internal port."""
        target = self.settings.internal_endpoint(service)
        if target not in self._channels:
            self._channels[target] = rpc.channel(
                target, self.identity.channel_credentials(), server_name=endpoints.SERVICE_NAME
            )
        return self._channels[target]

    def database(
        self, name: str, open_: Callable[[str, processes.Process], database.Database]
    ) -> database.Database:
        """Return this process's one object for a database; opened at first use."""
        if name not in self._databases:
            self._databases[name] = open_(self.settings.database_url(name), self.process)
        return self._databases[name]

    def run_workflows(
        self,
        opened: Database,
        shared: tables.Tables,
        workflows: Mapping[str, workflow.Workflow],
    ) -> None:
        """Run a database's operations."""
        runner = workflow.Runner(
            opened,
            shared,
            workflows,
            lease_s=self.settings.operation_lease_s,
            probe=self.probe,
            host_name=socket.gethostname(),
            life=self.process.life,
        )
        self.runners.append(runner)
        self.background(runner.run(), f"workflows: {', '.join(workflows)}")

    def workflows(self) -> dict[str, workflow.Workflow]:
        """Return every workflow that this process runs, by name."""
        return {name: table for each in self.runners for name, table in each.workflows.items()}

    def background(self, work: Coroutine[Any, Any, None], name: str) -> None:
        """Run work for the life of the process; its end is an error, said in the log."""
        task = asyncio.create_task(work, name=name)
        task.add_done_callback(_report_end)
        self._tasks.append(task)

    async def start(self) -> None:
        """Open both ports.

        Raises:
            errors.Unavailable: PORT_IN_USE.
        """
        pair = [(self.identity.key, self.identity.certificate)]
        for server, address, credentials in (
            (self.public, self.settings.public_listen, grpc.ssl_server_credentials(pair)),
            (
                self.internal,
                self.settings.internal_listen,
                grpc.ssl_server_credentials(
                    pair, self.identity.authority, require_client_auth=True
                ),
            ),
        ):
            self._add_standard_services(server)
            try:
                server.add_secure_port(address, credentials)
            except RuntimeError as error:
                raise errors.Unavailable(
                    "PORT_IN_USE", f"cannot listen on {address}; is mcloud running already?"
                ) from error
            await server.start()
        self.background(self.process.keep(), "heartbeats")
        self.background(self.checker.follow(), "revocations")
        self.background(self._follow_revoked_certificates(), "revoked certificates")

    def _add_standard_services(self, server: grpc.aio.Server) -> None:
        servicer = health.aio.HealthServicer()  # type: ignore[attr-defined]
        health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
        self.background(servicer.set("", health_pb2.HealthCheckResponse.SERVING), "health")
        names = [
            f"mcloud.{service}.v1.{name}"
            for service in self.settings.services
            for name in _services_of(f"mcloud.{service}.v1")
        ]
        reflection.enable_server_reflection(
            [*names, reflection.SERVICE_NAME, health.SERVICE_NAME], server
        )

    async def _follow_revoked_certificates(self) -> None:
        stub = enrolment_service_pb2_grpc.EnrolmentServiceStub(self.channel("identity"))
        request = enrolment_service_pb2.ListRevokedCertificatesRequest()
        while True:
            try:
                answer = await rpc.call(stub.ListRevokedCertificates, request, timeout_s=5)
                self._revoked = frozenset(answer.serials)
            except errors.Error as error:
                log.debug("revoked certificates not known", reason=error.reason)
            await asyncio.sleep(_REVOKED_POLL_S)

    async def stop(self, grace_s: float = 2) -> None:
        """Close the ports, end the tasks, finish the databases' units."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(self.public.stop(grace_s), self.internal.stop(grace_s))
        for channel in self._channels.values():
            await channel.close(None)
        await self.process.leave()
        for opened in self._databases.values():
            await asyncio.to_thread(opened.close)


def _services_of(package: str) -> list[str]:
    """Return the names of the services that a package of the contract has."""
    modules = pkgutil.iter_modules(importlib.import_module(package).__path__)
    return [
        name
        for module in modules
        if module.name.endswith("_service_pb2")
        for name in importlib.import_module(f"{package}.{module.name}").DESCRIPTOR.services_by_name
    ]


def _report_end(task: asyncio.Task[Any]) -> None:
    if task.cancelled() or task.get_name() == "health":
        return
    if (error := task.exception()) is not None:
        log.error("background task ended", task=task.get_name(), exc_info=error)
