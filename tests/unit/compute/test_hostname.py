"""Host names as Nova derives them."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcloud_controlplane.compute.instance_store import hostname

ID = "i-06h0817hjxe6pa51ht60"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("stack_testvm", "stack-testvm"),
        ("My Server", "my-server"),
        ("web.example.org", "web-example-org"),
        ("  a  ", "a"),
        ("a__b  c", "a--b--c"),
        ("ÜBER-größe", "ber-gre"),
        ("-.-x-.-", "x"),
        ("x" * 70, "x" * 63),
        ("a" * 62 + "-b", "a" * 62),
        ("日本", ID),
        ("...", ID),
    ],
)
def test_names_become_host_names(name: str, expected: str) -> None:
    assert hostname(name, ID) == expected


@given(st.text(max_size=255))
def test_every_name_gives_a_label_of_rfc_1123(name: str) -> None:
    assert re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", hostname(name, ID))
