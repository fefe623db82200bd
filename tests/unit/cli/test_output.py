"""Tables, values for people, JSON for programs."""

from __future__ import annotations

import json
import sys
import time

import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from mcloud.compute.v1 import instance_pb2
from mcloud.network.v1 import security_group_pb2
from mcloud_cli import output


@pytest.fixture
def instance() -> instance_pb2.Instance:
    found = instance_pb2.Instance()
    found.metadata.id = "i-00000000000000000001"
    found.metadata.name = "web"
    found.metadata.labels["tier"] = "front"
    found.metadata.create_time.FromJsonString("2026-01-02T03:04:05Z")
    found.spec.user_data = b"#!/bin/sh"
    found.spec.config_drive = True
    found.status.state = instance_pb2.InstanceStatus.STATE_ACTIVE
    found.status.addresses.add(network_name="lan", ip_address="10.0.0.5")
    found.status.addresses.add(network_name="wan", ip_address="10.1.0.5")
    return found


def test_what_a_newer_cloud_says_is_printed_as_far_as_it_is_known(
    instance: instance_pb2.Instance, capsys: pytest.CaptureFixture[str]
) -> None:
    status = b"\x08\x63" + b"\xfa\x3f\x03new"  # state 99; field 1023, a string
    instance.status.MergeFromString(status)
    columns = [output.Column("STATE", lambda item: output.state(item.status), is_state=True)]

    output.resources([instance], "table", columns)
    assert capsys.readouterr().out == "STATE\n99\n"
    for form in ("table", "yaml", "json"):
        output.resource(instance, form)
        assert "99" in capsys.readouterr().out


def test_table_is_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    output.table(["NAME", "STATE"], [["a", "ACTIVE"], ["longer", "ERROR"]])

    assert capsys.readouterr().out == "NAME    STATE\na       ACTIVE\nlonger  ERROR\n"


def test_table_counts_columns_of_wide_signs(capsys: pytest.CaptureFixture[str]) -> None:
    output.table(["NAME", "X"], [["雲", "1"], ["ab", "2"]])

    assert capsys.readouterr().out.splitlines()[1:] == ["雲    1", "ab    2"]


def test_table_fits_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)

    output.table(["NAME", "TEXT"], [["web", "x" * 200], ["db", "y"]])

    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) == 40
    assert lines[1].endswith("…")


def test_colours_only_on_a_terminal_without_no_color(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert not output.colours()
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert output.colours()
    monkeypatch.setenv("NO_COLOR", "1")
    assert not output.colours()


def test_resource_as_fields(
    instance: instance_pb2.Instance, capsys: pytest.CaptureFixture[str]
) -> None:
    output.resource(instance, "table")

    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert ["name", "web"] in lines
    assert ["labels", "tier=front"] in lines
    assert ["user_data", "(9 bytes)"] in lines
    assert ["config_drive", "yes"] in lines
    assert ["state", "ACTIVE"] in lines
    assert ["addresses", "network_name=lan ip_address=10.0.0.5"] in lines
    assert ["network_name=wan", "ip_address=10.1.0.5"] in lines


@pytest.mark.parametrize(("form", "text"), [("name", "web\n"), ("id", "i-00000000000000000001\n")])
def test_resource_for_scripts(
    instance: instance_pb2.Instance, capsys: pytest.CaptureFixture[str], form: str, text: str
) -> None:
    output.resource(instance, form)

    assert capsys.readouterr().out == text


def test_json_has_the_contracts_names_and_rfc_3339(
    instance: instance_pb2.Instance, capsys: pytest.CaptureFixture[str]
) -> None:
    output.resource(instance, "json")

    found = json.loads(capsys.readouterr().out)
    assert found["metadata"]["create_time"] == "2026-01-02T03:04:05Z"
    assert found["spec"]["config_drive"] is True


def test_yaml_is_the_same(
    instance: instance_pb2.Instance, capsys: pytest.CaptureFixture[str]
) -> None:
    import yaml

    output.resource(instance, "yaml")

    assert yaml.safe_load(capsys.readouterr().out) == output.as_dict(instance)


def test_optional_zero_is_shown() -> None:
    rule = security_group_pb2.SecurityGroupRuleSpec(protocol="icmp", port_min=0)

    assert ("port_min", "0") in output.flat(rule)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (20_132_659, "19.2 MiB"),
        (5 << 40, "5.0 TiB"),
    ],
)
def test_size(count: int, text: str) -> None:
    assert output.size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0s"), (59, "59s"), (60, "1m"), (7200, "2h"), (200_000, "2d")]
)
def test_span(seconds: float, text: str) -> None:
    assert output.span(seconds) == text


def test_age_of_the_future_is_zero_and_of_nothing_a_dash() -> None:
    assert output.age(Timestamp(seconds=int(time.time()) + 100)) == "0s"
    assert output.age(Timestamp()) == "-"
