"""The end of a command that failed."""

from __future__ import annotations

import click
import pytest

from mcloud.scheduler.v1 import placement_pb2
from mcloud_base import errors
from mcloud_cli import failure
from mcloud_cli.session import Options, Session


def _stop(error: errors.Error) -> int:
    with pytest.raises(click.exceptions.Exit) as caught:
        failure.report(error, Session(Options(endpoint="cloud:7700")))
    return caught.value.exit_code


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (errors.InvalidArgument, 1),
        (errors.Unauthenticated, 1),
        (errors.PermissionDenied, 1),
        (errors.NotFound, 3),
        (errors.AlreadyExists, 4),
        (errors.WrongState, 4),
        (errors.Conflict, 4),
        (errors.Exhausted, 1),
        (errors.Unavailable, 5),
        (errors.DeadlineExceeded, 5),
        (errors.Internal, 1),
    ],
)
def test_exit_codes(kind: type[errors.Error], code: int) -> None:
    assert _stop(kind("REASON", "what happened")) == code


def test_one_line_with_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    _stop(errors.NotFound("FLAVOR_NOT_FOUND", "there is no flavor x"))

    assert capsys.readouterr().err == "Error: there is no flavor x (FLAVOR_NOT_FOUND)\n"


def test_unavailable_names_the_endpoint(capsys: pytest.CaptureFixture[str]) -> None:
    _stop(errors.Unavailable("UNAVAILABLE", "failed to connect"))

    assert capsys.readouterr().err == "Error: cloud:7700: failed to connect (UNAVAILABLE)\n"


def test_no_valid_host_shows_the_filters_also_after_the_wire(
    capsys: pytest.CaptureFixture[str],
) -> None:
    explanation = placement_pb2.PlacementExplanation(considered_count=3)
    explanation.filters.add(name="alive", removed_count=1, left_count=2, reason="1 is silent")
    explanation.filters.add(name="memory", removed_count=2, left_count=0, reason="largest: 64 MiB")
    error = errors.Exhausted("NO_VALID_HOST", "no host can take it", details=(explanation,))

    _stop(errors.from_status(errors.to_status(error)))

    said = capsys.readouterr().err
    assert "Hosts looked at: 3" in said
    assert "alive            removed 1, left 2  1 is silent" in said
    assert "memory           removed 2, left 0  largest: 64 MiB" in said


@pytest.mark.parametrize(
    ("error", "hint"),
    [
        (errors.Unauthenticated("NOT_LOGGED_IN", "not logged in"), "mcloud login --endpoint"),
        (errors.Unauthenticated("TOKEN_EXPIRED", "it is over"), "Log in again: mcloud login"),
        (
            errors.Conflict("OPERATION_IN_PROGRESS", "busy", operation_id="cop-1"),
            "mcloud operation wait cop-1",
        ),
        (
            errors.AlreadyExists("INSTANCE_NAME_TAKEN", "there is web", name="web"),
            "mcloud instance show web",
        ),
        (errors.Unavailable("UNAVAILABLE", "CERTIFICATE_VERIFY_FAILED"), "--ca FILE"),
    ],
)
def test_hints(error: errors.Error, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    _stop(error)

    assert hint in capsys.readouterr().err


def test_what_is_not_an_error_of_mcloud_goes_on() -> None:
    failure.report(ValueError("a mistake in the program"), None)
