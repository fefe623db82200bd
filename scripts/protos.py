"""Generates Python code and type stubs beside the .proto files, for whoever runs this Python.

Run it after editing a .proto: `python scripts/protos.py`. The build does it too.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import grpc_tools
from google.rpc import status_pb2
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parents[1] / "protos"


def generate(root: Path = ROOT) -> list[Path]:
    """Compile every .proto under `root` and return the files made, relative to it.

    Raises:
        SystemExit: a .proto does not compile; protoc has said why on stderr.
    """
    # protoc looks for the mypy plugins on PATH only; those of this environment must win.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    googleapis = Path(status_pb2.__file__).parents[2]  # google.rpc is a namespace package
    builtin = Path(grpc_tools.__file__).parent / "_proto"
    protos = sorted(path.relative_to(root) for path in root.glob("mcloud/**/*.proto"))
    outputs = ("python_out", "grpc_python_out", "mypy_out", "mypy_grpc_out")
    code = protoc.main(
        ["protoc", f"-I{root}", f"-I{googleapis}", f"-I{builtin}"]
        + [
            f"--{output}=quiet:{root}" if "mypy" in output else f"--{output}={root}"
            for output in outputs
        ]
        + [str(path) for path in protos]
    )
    if code:
        raise SystemExit(code)
    for path in protos:
        if "service " not in (root / path).read_text():
            for suffix in ("_pb2_grpc.py", "_pb2_grpc.pyi"):  # generated empty
                (root / path.with_name(path.stem + suffix)).unlink(missing_ok=True)
    return sorted(path.relative_to(root) for path in root.glob("mcloud/**/*_pb2*.py*"))


if __name__ == "__main__":
    print(f"{len(generate())} files generated")
