"""Generates Python code and type stubs beside the .proto files, for whoever runs this Python.

Run it after editing a .proto: `python scripts/protos.py`. The build does it too.
`--image FILE` writes the contract as one descriptor set; `--baseline` renews the committed one,
against which breaking changes are found (an ADR says why).
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
    outputs = ("python_out", "grpc_python_out", "mypy_out", "mypy_grpc_out")
    protos = _compile(
        root, [f"--{name}={'quiet:' if 'mypy' in name else ''}{root}" for name in outputs]
    )
    for path in protos:
        if "service " not in (root / path).read_text():
            for suffix in ("_pb2_grpc.py", "_pb2_grpc.pyi"):  # generated empty
                (root / path.with_name(path.stem + suffix)).unlink(missing_ok=True)
    return sorted(path.relative_to(root) for path in root.glob("mcloud/**/*_pb2*.py*"))


def _compile(root: Path, outputs: list[str]) -> list[Path]:
    # protoc looks for the mypy plugins on PATH only; those of this environment must win.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    googleapis = Path(status_pb2.__file__).parents[2]  # google.rpc is a namespace package
    builtin = Path(grpc_tools.__file__).parent / "_proto"
    protos = sorted(path.relative_to(root) for path in root.glob("mcloud/**/*.proto"))
    includes = [f"-I{root}", f"-I{googleapis}", f"-I{builtin}"]
    code = protoc.main(["protoc", *includes, *outputs, *map(str, protos)])
    if code:
        raise SystemExit(code)
    return protos


def image(path: Path, *, source_info: bool, root: Path = ROOT) -> None:
    """Write the contract as one descriptor set: what Buf reads, and the committed baseline."""
    outputs = [f"--descriptor_set_out={path}", "--include_imports"]
    _compile(root, outputs + ["--include_source_info"] * source_info)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["--image", path]:
            image(Path(path), source_info=True)
        case ["--baseline"]:
            image(ROOT / "baseline.binpb", source_info=False)
        case _:
            print(f"{len(generate())} files generated")
