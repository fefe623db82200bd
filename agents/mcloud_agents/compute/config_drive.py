"""The config drive: the guest's documents as an ISO 9660 image that is labelled "config-2".

Source: https://docs.openstack.org/nova/latest/user/metadata.html#config-drives
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import pycdlib

from mcloud_agents.compute import files

LABEL = "config-2"


def write(path: Path, documents: Mapping[str, bytes]) -> None:
    """Write the image, mode 0600, whole or not at all; keys are paths without a leading slash."""
    files.write_atomically(path, build(documents))


def build(documents: Mapping[str, bytes]) -> bytes:
    """Return the image.

    Names stand in it three times: as ISO 9660 allows at its most lenient (level 4), in Joliet for
    Windows, in Rock Ridge for all others.
    """
    image = pycdlib.PyCdlib()
    image.new(interchange_level=4, joliet=3, rock_ridge="1.09", vol_ident=LABEL)
    try:
        made: set[str] = set()
        for name in sorted(documents):
            parts = name.split("/")
            for depth in range(1, len(parts)):
                directory = "/" + "/".join(parts[:depth])
                if directory not in made:
                    made.add(directory)
                    image.add_directory(directory, rr_name=parts[depth - 1], joliet_path=directory)
            content = documents[name]
            image.add_fp(
                io.BytesIO(content),
                len(content),
                f"/{name}",
                rr_name=parts[-1],
                joliet_path=f"/{name}",
            )
        out = io.BytesIO()
        image.write_fp(out)
        return out.getvalue()
    finally:
        image.close()
