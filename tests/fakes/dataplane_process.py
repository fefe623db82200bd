"""A host agent's dataplane in a process of its own, told what to do by lines of JSON.

Run as `python dataplane_process.py SETTINGS`, inside the host's namespaces.
"""

from __future__ import annotations

import asyncio
import base64
import json
import sys
import time
from pathlib import Path
from typing import Any

from google.protobuf import json_format

from mcloud.network.v1 import dataplane_pb2 as pb
from mcloud_agents.network.dataplane import Dataplane
from mcloud_agents.network.settings import Settings
from mcloud_base.errors import Error


async def main(path: str) -> None:
    given = json.loads(Path(path).read_text())
    settings = Settings(
        **{
            **given,
            "state_dir": Path(given["state_dir"]),
            "runtime_dir": Path(given["runtime_dir"]),
        }
    )
    documents: dict[str, dict[str, bytes]] = {}
    dataplane = Dataplane(settings, documents.get)
    await dataplane.start()
    print(json.dumps({"ready": True}), flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        command = json.loads(line)
        started = time.monotonic()
        try:
            reply = {"result": await obey(dataplane, documents, command)}
        except Error as error:
            reply = {"reason": error.reason, "message": error.message}
        print(json.dumps({**reply, "seconds": time.monotonic() - started}), flush=True)
    await dataplane.close()


async def obey(
    dataplane: Dataplane, documents: dict[str, dict[str, bytes]], command: dict[str, Any]
) -> object:
    argument = command.get("argument")
    match command["do"]:
        case "apply":
            document = pb.HostDataplane.FromString(base64.b64decode(str(argument)))
            return json_format.MessageToDict(await dataplane.apply(document))
        case "artifacts":
            found = await dataplane.artifacts()
            return sorted([[a.Kind.Name(a.kind), a.name, a.owner_id] for a in found])
        case "ensure_tap":
            return vars(await dataplane.ensure_tap(str(argument), timeout_s=5))
        case "documents":
            for port, bodies in (argument or {}).items():
                documents[port] = {path: body.encode() for path, body in bodies.items()}
            return None
    raise ValueError(command)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
