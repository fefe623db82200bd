"""Clients of a control plane of identity and network."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import pytest
from cryptography.hazmat.primitives import serialization
from google.protobuf import field_mask_pb2

from fakes.dataplane_host import DataplaneHost
from mcloud.common.v1 import options_pb2
from mcloud.identity.v1 import (
    project_pb2,
    project_service_pb2,
    project_service_pb2_grpc,
    role_assignment_pb2,
    role_assignment_service_pb2,
    role_assignment_service_pb2_grpc,
    token_service_pb2,
    token_service_pb2_grpc,
    user_pb2,
    user_service_pb2,
    user_service_pb2_grpc,
)
from mcloud.network.v1 import (
    floating_ip_pb2,
    floating_ip_service_pb2,
    floating_ip_service_pb2_grpc,
    network_pb2,
    network_service_pb2,
    network_service_pb2_grpc,
    operation_service_pb2_grpc,
    port_pb2,
    port_service_pb2,
    port_service_pb2_grpc,
    router_pb2,
    router_service_pb2,
    router_service_pb2_grpc,
    security_group_pb2,
    security_group_service_pb2,
    security_group_service_pb2_grpc,
    session_service_pb2_grpc,
    subnet_pb2,
    subnet_service_pb2,
    subnet_service_pb2_grpc,
)
from mcloud_base import endpoints, errors, ids, rpc, tls
from mcloud_controlplane.core.runtime import Runtime
from mcloud_controlplane.settings import Settings

Rule = options_pb2.Rule
PASSWORD = "correct horse"

# What each kind of resource is made of: its request's module, its message.
_KINDS: dict[str, tuple[Any, Any]] = {
    "Network": (network_service_pb2, network_pb2.Network),
    "Subnet": (subnet_service_pb2, subnet_pb2.Subnet),
    "Port": (port_service_pb2, port_pb2.Port),
    "SecurityGroup": (security_group_service_pb2, security_group_pb2.SecurityGroup),
    "SecurityGroupRule": (security_group_service_pb2, security_group_pb2.SecurityGroupRule),
    "Router": (router_service_pb2, router_pb2.Router),
    "FloatingIp": (floating_ip_service_pb2, floating_ip_pb2.FloatingIp),
}


class Stubs:
    """Every service of network, and what of identity is needed, over one channel."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel
        self.token = token_service_pb2_grpc.TokenServiceStub(channel)
        self.user = user_service_pb2_grpc.UserServiceStub(channel)
        self.project = project_service_pb2_grpc.ProjectServiceStub(channel)
        self.role = role_assignment_service_pb2_grpc.RoleAssignmentServiceStub(channel)
        self.network = network_service_pb2_grpc.NetworkServiceStub(channel)
        self.subnet = subnet_service_pb2_grpc.SubnetServiceStub(channel)
        self.port = port_service_pb2_grpc.PortServiceStub(channel)
        self.group = security_group_service_pb2_grpc.SecurityGroupServiceStub(channel)
        self.router = router_service_pb2_grpc.RouterServiceStub(channel)
        self.floating_ip = floating_ip_service_pb2_grpc.FloatingIpServiceStub(channel)
        self.operation = operation_service_pb2_grpc.OperationServiceStub(channel)
        self.session = session_service_pb2_grpc.SessionServiceStub(channel)

    def of(self, kind: str) -> Any:
        return {
            "Network": self.network,
            "Subnet": self.subnet,
            "Port": self.port,
            "SecurityGroup": self.group,
            "SecurityGroupRule": self.group,
            "Router": self.router,
            "FloatingIp": self.floating_ip,
        }[kind]


class User:
    """Somebody logged in: makes, changes and deletes resources."""

    def __init__(self, stubs: Stubs, token: str, project_id: str) -> None:
        self.stubs = stubs
        self.metadata = rpc.bearer(token)
        self.project_id = project_id

    async def mutate(self, kind: str, verb: str, **fields: Any) -> Any:
        module, message = _KINDS[kind]
        fields.setdefault("request_id", ids.request_id())
        request = getattr(module, f"{verb}{kind}Request")(**fields)
        method = getattr(self.stubs.of(kind), f"{verb}{kind}")
        operation = await rpc.call(method, request, metadata=self.metadata, timeout_s=30)
        made = message()
        assert operation.response.Unpack(made), operation
        return made

    async def create(self, kind: str, name: str = "a", **spec: Any) -> Any:
        _, message = _KINDS[kind]
        made = message.DESCRIPTOR.fields_by_name["spec"].message_type._concrete_class(**spec)
        named = {} if kind == "SecurityGroupRule" else {"name": name}
        return await self.mutate(kind, "Create", spec=made, **named)

    async def update(self, kind: str, id_: str, *paths: str, **fields: Any) -> Any:
        mask = field_mask_pb2.FieldMask(paths=paths)
        return await self.mutate(kind, "Update", id=id_, update_mask=mask, **fields)

    async def delete(self, kind: str, id_: str) -> Any:
        return await self.mutate(kind, "Delete", id=id_)

    async def get(self, kind: str, id_: str) -> Any:
        request = getattr(_KINDS[kind][0], f"Get{kind}Request")(id=id_)
        return await rpc.call(
            getattr(self.stubs.of(kind), f"Get{kind}"), request, metadata=self.metadata
        )

    async def list(self, kind: str, **fields: Any) -> Any:
        request = getattr(_KINDS[kind][0], f"List{kind}sRequest")(**fields)
        return await rpc.call(
            getattr(self.stubs.of(kind), f"List{kind}s"), request, metadata=self.metadata
        )

    async def leg(self, verb: str, router_id: str, subnet_id: str) -> Any:
        """AddRouterInterface or RemoveRouterInterface."""
        request = getattr(router_service_pb2, f"{verb}RouterInterfaceRequest")(
            request_id=ids.request_id(), id=router_id, subnet_id=subnet_id
        )
        operation = await rpc.call(
            getattr(self.stubs.router, f"{verb}RouterInterface"), request, metadata=self.metadata
        )
        router = router_pb2.Router()
        assert operation.response.Unpack(router)
        return router

    async def net(self, cidr: str = "10.0.0.0/24", **spec: Any) -> tuple[Any, Any]:
        """Make a network with one subnet."""
        network = await self.create("Network")
        subnet = await self.create("Subnet", network_id=network.metadata.id, cidr=cidr, **spec)
        return network, subnet


class Cloud:
    def __init__(self, settings: Settings, runtime: Runtime) -> None:
        self.settings = settings
        self.runtime = runtime
        self.public = Stubs(
            rpc.channel(
                settings.public_listen,
                grpc.ssl_channel_credentials(runtime.authority.certificate),
            )
        )
        self.service = self.internal(runtime.authority.issue_service("compute", ()))
        self.opened = [self.public, self.service]

    def internal(self, identity: tls.Identity) -> Stubs:
        return Stubs(
            rpc.channel(
                self.settings.internal_listen,
                identity.channel_credentials(),
                server_name=endpoints.SERVICE_NAME,
            )
        )

    async def login(self, name: str, password: str, **scope: Any) -> User:
        answer = await rpc.call(
            self.public.token.CreateToken,
            token_service_pb2.CreateTokenRequest(
                password=token_service_pb2.PasswordCredential(user_name=name, password=password),
                **scope,
            ),
            timeout_s=30,
        )
        return User(self.public, answer.token, answer.claims.project_id)

    async def admin(self) -> User:
        password = (self.settings.state_dir / "admin-password").read_text().strip()
        return await self.login("admin", password, system=True)

    async def member(self, name: str, role: Any = Rule.ROLE_MEMBER) -> User:
        """Make a project, and somebody with a role in it."""
        admin = await self.admin()
        project, user = project_pb2.Project(), user_pb2.User()
        answer = await rpc.call(
            self.public.project.CreateProject,
            project_service_pb2.CreateProjectRequest(
                request_id=ids.request_id(), name=name, spec={}
            ),
            metadata=admin.metadata,
        )
        assert answer.response.Unpack(project)
        answer = await rpc.call(
            self.public.user.CreateUser,
            user_service_pb2.CreateUserRequest(
                request_id=ids.request_id(), name=name, spec={}, password=PASSWORD
            ),
            metadata=admin.metadata,
            timeout_s=30,
        )
        assert answer.response.Unpack(user)
        await rpc.call(
            self.public.role.CreateRoleAssignment,
            role_assignment_service_pb2.CreateRoleAssignmentRequest(
                request_id=ids.request_id(),
                spec=role_assignment_pb2.RoleAssignmentSpec(
                    user_id=user.metadata.id, project_id=project.metadata.id, role=role
                ),
            ),
            metadata=admin.metadata,
        )
        return await self.login(name, PASSWORD, project=project.metadata.id)

    def host(self, underlay_ip: str, *capabilities: str) -> DataplaneHost:
        """A host with a certificate of its own; its session is not open yet."""
        id_ = ids.new("h")
        key = tls.new_key()
        signed = self.runtime.authority.issue_host(tls.signing_request(key, id_), id_, underlay_ip)
        pem = signed.public_bytes(serialization.Encoding.PEM)
        identity = tls.Identity(key, pem, self.runtime.authority.certificate)
        stubs = self.internal(identity)
        self.opened.append(stubs)
        return DataplaneHost(id_, identity, stubs.session, stubs.port, underlay_ip, capabilities)

    async def delegate(
        self, host: DataplaneHost, project_id: str, domain_id: str, *port_ids: str
    ) -> rpc.Metadata:
        """Have identity issue the token that the conductor would give the host for a domain."""
        answer = await rpc.call(
            self.service.token.CreateDelegatedToken,
            token_service_pb2.CreateDelegatedTokenRequest(
                host_id=host.id,
                certificate_sha256=host.identity.fingerprint(),
                project_id=project_id,
                domain_id=domain_id,
                generation=1,
                port_ids=port_ids,
            ),
        )
        return rpc.bearer(answer.token)

    async def ensure(
        self, project_id: str, network_id: str, instance_id: str = "", **fields: Any
    ) -> port_pb2.Port:
        """Reserve a port as the conductor does."""
        request = port_service_pb2.EnsurePortRequest(
            project_id=project_id,
            instance_id=instance_id or ids.new("i"),
            hostname="guest",
            lease_number=fields.pop("lease_number", 1),
            port_id=fields.pop("port_id", "") or ids.new("port"),
            existing=fields.pop("existing", False),
            spec=port_pb2.PortSpec(network_id=network_id, **fields) if network_id else None,
        )
        return await rpc.call(self.service.port.EnsurePort, request, timeout_s=30)

    async def bind(
        self, host: DataplaneHost, port: port_pb2.Port, domain_id: str
    ) -> port_service_pb2.BindPortResponse:
        metadata = await self.delegate(host, port.metadata.project_id, domain_id, port.metadata.id)
        return await rpc.call(
            host.ports.BindPort,
            port_service_pb2.BindPortRequest(
                port_id=port.metadata.id, domain_id=domain_id, generation=1
            ),
            metadata=metadata,
            timeout_s=30,
        )

    async def unbind(
        self, port: port_pb2.Port, domain_id: str, lease_number: int = 1
    ) -> port_pb2.Port:
        request = port_service_pb2.UnbindPortRequest(
            port_id=port.metadata.id, domain_id=domain_id, lease_number=lease_number
        )
        return await rpc.call(self.service.port.UnbindPort, request)

    async def release(self, port: port_pb2.Port, lease_number: int = 1) -> None:
        request = port_service_pb2.ReleasePortRequest(
            port_id=port.metadata.id,
            instance_id=port.status.owner_id,
            lease_number=lease_number,
        )
        await rpc.call(self.service.port.ReleasePort, request)


async def refused(call: Awaitable[Any]) -> errors.Error:
    with pytest.raises(errors.Error) as caught:
        await call
    return caught.value


async def eventually(attempt: Callable[[], Awaitable[Any]], timeout_s: float = 30) -> Any:
    """Repeat until it returns something true."""
    async with asyncio.timeout(timeout_s):
        while not (found := await attempt()):
            await asyncio.sleep(0.02)
        return found
