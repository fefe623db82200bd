"""The tables of the identity database. What deletes a row ends its tokens; rows do not linger."""

from __future__ import annotations

import peewee

from mcloud_controlplane.core import processes, schema, tables
from mcloud_controlplane.core.database import Database
from mcloud_controlplane.core.model import Model
from mcloud_controlplane.core.tables import Resource

database = peewee.DatabaseProxy()
shared = tables.bind(database)


class User(Resource):
    """Somebody who can log in."""

    disabled = peewee.BooleanField(default=False)
    password_hash = peewee.TextField()  # argon2id, in its own encoding

    epoch: int  # present in rows that epoch_store.find returned

    class Meta:
        database = database
        table_name = "identity_user"  # "user" is reserved on PostgreSQL


User.add_index(User.name, unique=True)


class Project(Resource):
    """What resources belong to."""

    disabled = peewee.BooleanField(default=False)

    epoch: int

    class Meta:
        database = database


Project.add_index(Project.name, unique=True)


class RoleAssignment(Resource):
    """A user's role; its `project_id` is where, empty for the system."""

    user_id = peewee.TextField()
    role = peewee.IntegerField()  # of mcloud.common.v1.Rule.Role

    epoch: int

    class Meta:
        database = database
        table_name = "role_assignment"


RoleAssignment.add_index(
    RoleAssignment.user_id, RoleAssignment.project_id, RoleAssignment.role, unique=True
)


class ApplicationCredential(Resource):
    """A secret with which a program acts for a user in one project."""

    user_id = peewee.TextField()
    role = peewee.IntegerField()  # 0: the user's
    secret_hash = peewee.TextField()  # SHA-256: the secret is random, guessing it is hopeless
    expire_time = peewee.BigIntegerField(null=True)

    epoch: int

    class Meta:
        database = database
        table_name = "application_credential"


ApplicationCredential.add_index(
    ApplicationCredential.user_id,
    ApplicationCredential.project_id,
    ApplicationCredential.name,
    unique=True,
)


class Epoch(Model):
    """How often the tokens of a principal have been revoked; no row means never.

    Principals are what tokens rest on: users, projects, role assignments, credentials, hosts.
    Rows outlive their principals, since tokens do.
    """

    principal_id = peewee.TextField(primary_key=True)
    value = peewee.BigIntegerField()
    time = peewee.BigIntegerField(index=True)  # of the last revocation

    class Meta:
        database = database


class SigningKey(Model):
    """A key that signs tokens, or did so until a newer one came."""

    id = peewee.TextField(primary_key=True)
    private_key = peewee.BlobField()  # 32 bytes of Ed25519
    public_key = peewee.BlobField()
    create_time = peewee.BigIntegerField()

    class Meta:
        database = database
        table_name = "signing_key"


class Attempt(Model):
    """Failed attempts to log in under a name, whether or not there is such a user."""

    name_hash = peewee.TextField(primary_key=True)
    failure_count = peewee.IntegerField()
    time = peewee.BigIntegerField(index=True)  # of the last
    not_before = peewee.BigIntegerField()  # of the next

    class Meta:
        database = database
        table_name = "login_attempt"


class JoinToken(Resource):
    """Lets one machine, the first key that comes with it, become a host."""

    secret_hash = peewee.TextField(unique=True)
    expire_time = peewee.BigIntegerField()
    host_id = peewee.TextField(default="", index=True)
    key_hash = peewee.TextField(default="")  # SHA-256 of the public key that has used it

    class Meta:
        database = database
        table_name = "join_token"


class Certificate(Model):
    """A certificate that was given to a host."""

    serial = peewee.TextField(primary_key=True)  # hexadecimal
    host_id = peewee.TextField(index=True)
    fingerprint = peewee.TextField()  # SHA-256 of the DER, hexadecimal
    create_time = peewee.BigIntegerField()
    expire_time = peewee.BigIntegerField()
    revoke_time = peewee.BigIntegerField(null=True, index=True)

    class Meta:
        database = database


MODELS = (
    User,
    Project,
    RoleAssignment,
    ApplicationCredential,
    Epoch,
    SigningKey,
    Attempt,
    JoinToken,
    Certificate,
)


def open_database(url: str, process: processes.Process | None = None) -> Database:
    """Open the identity database; its tables are made where they are missing."""
    return schema.open_database("identity", url, database, shared, process)
