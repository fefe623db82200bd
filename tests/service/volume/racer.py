"""One of several processes that reserve the same volumes: python -m service.volume.racer URL."""

from __future__ import annotations

import json
import sys
from collections import Counter

from mcloud.volume.v1 import attachment_pb2, attachment_service_pb2
from mcloud_base import errors, ids
from mcloud_controlplane.volume import attachment_store, model


def main() -> None:
    store = model.open_database(sys.argv[1])
    print("ready", flush=True)
    project_id, *volumes = json.loads(sys.stdin.readline())
    won, refused = [], Counter[str]()
    for volume_id in volumes:
        request = attachment_service_pb2.EnsureAttachmentRequest(
            attachment_id=ids.new("att"),
            project_id=project_id,
            spec=attachment_pb2.AttachmentSpec(volume_id=volume_id, instance_id=ids.new("i")),
            lease_number=1,
        )
        try:
            store.write_now(attachment_store.ensure, request)
            won.append(volume_id)
        except errors.Error as error:
            refused[error.reason] += 1
    print(json.dumps({"won": won, "refused": refused}), flush=True)
    store.close()


if __name__ == "__main__":
    main()
