"""Build hook: generates the contract's Python code, which git ignores, into the wheel."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class ProtoBuildHook(BuildHookInterface[Any]):
    """Runs scripts/protos.py before files are collected."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Generate, and name the generated files as artifacts."""
        script = Path(self.root) / "scripts" / "protos.py"
        spec = importlib.util.spec_from_file_location("protos", script)
        assert spec is not None
        assert spec.loader is not None
        protos = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(protos)
        protos.generate()
        build_data["artifacts"] += ["protos/mcloud/**/*_pb2*.py", "protos/mcloud/**/*_pb2*.pyi"]
