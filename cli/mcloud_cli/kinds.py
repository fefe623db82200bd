"""The kinds of things that commands name, and how the contract calls them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Kind:
    """One kind."""

    noun: str  # for people: "security group"
    prefix: str  # of its ids
    domain: str  # "network"
    message: str  # "SecurityGroup"
    is_owned: bool = True  # by a project; a resource of the system needs the system's role

    @property
    def service(self) -> str:
        """Its service: "network.SecurityGroupService"."""
        return f"{self.domain}.{_SERVICES.get(self.message, self.message)}Service"

    @property
    def field(self) -> str:
        """The field that a List answers in: "security_groups"."""
        from mcloud_cli.contract import snake

        return f"{snake(self.message)}s"

    def rpc(self, verb: str) -> str:
        """Return the rpc of a verb: "network.SecurityGroupService/GetSecurityGroup"."""
        plural = "s" if verb == "List" else ""
        return f"{self.service}/{verb}{self.message}{plural}"

    def is_of_system(self, resource: Any) -> bool:
        """Tell whether a resource that projects may have belongs to the whole system."""
        return self.is_owned and not resource.metadata.project_id


_SERVICES = {"JoinToken": "Enrolment"}

INSTANCE = Kind("instance", "i", "compute", "Instance")
FLAVOR = Kind("flavor", "flv", "compute", "Flavor", is_owned=False)
KEY_PAIR = Kind("key pair", "key", "compute", "KeyPair")
SERVER_GROUP = Kind("server group", "grp", "compute", "ServerGroup")
HOST = Kind("host", "h", "compute", "Host", is_owned=False)
IMAGE = Kind("image", "img", "image", "Image")
NETWORK = Kind("network", "net", "network", "Network")
SUBNET = Kind("subnet", "sub", "network", "Subnet")
PORT = Kind("port", "port", "network", "Port")
ROUTER = Kind("router", "rtr", "network", "Router")
SECURITY_GROUP = Kind("security group", "sg", "network", "SecurityGroup")
FLOATING_IP = Kind("floating address", "fip", "network", "FloatingIp")
VOLUME = Kind("volume", "vol", "volume", "Volume")
PROJECT = Kind("project", "p", "identity", "Project", is_owned=False)
USER = Kind("user", "u", "identity", "User", is_owned=False)
ROLE_ASSIGNMENT = Kind("role assignment", "ra", "identity", "RoleAssignment", is_owned=False)
APPLICATION_CREDENTIAL = Kind("application credential", "cred", "identity", "ApplicationCredential")
JOIN_TOKEN = Kind("join token", "jt", "identity", "JoinToken", is_owned=False)
