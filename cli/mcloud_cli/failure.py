"""The end of a command that failed: one line, the way out, the exit code.

1 error, 2 usage, 3 not found, 4 conflict or wrong state, 5 unavailable or too late, 130 interrupted
"""

from __future__ import annotations

from typing import Any, NoReturn

import click

from mcloud_base import errors

_CODES: dict[type[errors.Error], int] = {
    errors.NotFound: 3,
    errors.AlreadyExists: 4,
    errors.WrongState: 4,
    errors.Conflict: 4,
    errors.Unavailable: 5,
    errors.DeadlineExceeded: 5,
}


def report(error: Exception, session: Any) -> None:
    """Say an error of mcloud and exit; return if it is not one."""
    if isinstance(error, errors.Error):
        stop(error, session)


def stop(error: errors.Error, session: Any) -> NoReturn:
    """Say an error and exit."""
    message = error.message
    endpoint = session.known_endpoint if session is not None else ""
    if isinstance(error, errors.Unavailable | errors.DeadlineExceeded) and endpoint:
        # gRPC's own words; only their end tells something.
        message = f"{endpoint}: {message.rpartition('last error: ')[2]}"
    click.echo(f"Error: {message} ({error.reason})", err=True)
    explain(error)
    if hint := _hint(error, session):
        click.echo(hint, err=True)
    raise click.exceptions.Exit(_CODES.get(type(error), 1))


def explain(error: errors.Error) -> None:
    """Print what an error carries beside its message: which filter removed which hosts."""
    from google.rpc import error_details_pb2

    if error.reason == "NO_VALID_HOST":
        from mcloud.scheduler.v1 import placement_pb2

        found: Any = errors.find_detail(error, placement_pb2.PlacementExplanation)
        if found is not None and found.filters:
            click.echo(f"Hosts looked at: {found.considered_count}", err=True)
            for item in found.filters:
                line = f"  {item.name:<16} removed {item.removed_count}, left {item.left_count}"
                click.echo(f"{line}  {item.reason}".rstrip(), err=True)
    quota: Any = errors.find_detail(error, error_details_pb2.QuotaFailure)
    for violation in quota.violations if quota is not None else ():
        click.echo(f"  {violation.subject}: {violation.description}", err=True)
    request: Any = errors.find_detail(error, error_details_pb2.BadRequest)
    violations = request.field_violations if request is not None else ()
    for violation in violations if len(violations) > 1 else ():
        click.echo(f"  {violation.field}: {violation.description}", err=True)


def _hint(error: errors.Error, session: Any) -> str:
    """Return what to do next, where that is known and the message does not say it."""
    cloud = f" --cloud {session.cloud}" if session is not None and session.options.cloud else ""
    login = f"mcloud{cloud} login"
    match error.reason:
        case "NOT_LOGGED_IN":
            return f"Log in: {login} --endpoint HOST:PORT --ca FILE --username NAME"
        case (
            "LOGIN_EXPIRED" | "TOKEN_EXPIRED" | "TOKEN_REVOKED" | "TOKEN_INVALID" | "TOKEN_MISSING"
        ):
            return f"Log in again: {login} (or set MCLOUD_PASSWORD)"
        case "PROJECT_REQUIRED" | "NO_PROJECT":
            return f"Choose one: {login} --project NAME"
        case "OPERATION_IN_PROGRESS" if "mcloud operation wait" not in error.message:
            return f"Wait for it: mcloud operation wait {error.metadata.get('operation_id', '')}"
        case "INSTANCE_NAME_TAKEN" if "name" in error.metadata:
            name = error.metadata["name"]
            return f"Choose another name, or look at it: mcloud instance show {name}"
        case "NO_VALID_HOST":
            return "See the hosts: mcloud host list"
    if "CERTIFICATE_VERIFY_FAILED" in error.message:
        return "Its certificate is not known here; give its authority: --ca FILE"
    return ""
