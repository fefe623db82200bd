"""A client written in JavaScript: login, create, watch and delete, from the proto files alone."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path

import pytest
from google.rpc import status_pb2

from conftest import Cloud

_HERE = Path(__file__).parent
_NODE = _HERE.parent / "node"
_PROTOS = _HERE.parents[1] / "protos"
_DEADLINE_S = 180


async def test_a_client_in_javascript(cloud: Cloud, tmp_path: Path) -> None:
    node = shutil.which("node")
    if node is None or not (_NODE / "node_modules").exists():
        pytest.skip("Node.js and tests/node/node_modules are missing: scripts/setup test")
    authority = tmp_path / "ca.pem"
    authority.write_bytes(cloud.authority)
    # Where google/rpc/status.proto is: beside its generated module.
    google = Path(status_pb2.__file__).parents[2]
    process = await asyncio.create_subprocess_exec(
        node, "client.js", cloud.public, str(authority), str(_PROTOS), str(google),
        cwd=_NODE, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    async with asyncio.timeout(_DEADLINE_S):
        output, _ = await process.communicate(cloud.password.encode())
    assert process.returncode == 0
    seen = json.loads(output)
    assert seen["without_token"] == {"code": 16, "reason": "TOKEN_MISSING"}
    assert seen["image_state"] == "STATE_ACTIVE"
    assert seen["repeat_is_the_same"]
    assert seen["instance"] == {
        "name": "node_vm",
        "hostname": "node-vm",
        "labels": {"made_by": "node"},
        "fault": "NO_VALID_HOST",
    }
    assert seen["operation"]["state"] == "STATE_FAILED"
    assert seen["operation"]["reason"] == "NO_VALID_HOST"
    assert seen["operation"]["explanation"] == 0  # hosts considered: there are none
    assert {1, 2, 3, 4, 5} <= set(seen["operation"]["steps"])
    assert seen["changes"][0][0] == "CHANGE_TYPE_ADDED"
    assert seen["changes"][-1] == ["CHANGE_TYPE_MODIFIED", "STATE_ERROR"]
    assert seen["deleted_is_it"]
    assert seen["delete_state"] == "STATE_SUCCEEDED"
    assert seen["after"] == {"code": 5, "reason": "INSTANCE_NOT_FOUND"}
