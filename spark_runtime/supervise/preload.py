"""Which modules a nursery imports ahead: those that the script imported the last time, from installed packages only."""

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class PreloadList:
    """The list, and its copy on disk. A list that cannot be read or written costs a slower start, nothing else."""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        stored = self._read()
        self.modules: list[str] = stored.get("modules", [])
        self.left_out: set[str] = set(stored.get("left_out", []))

    def save(self, modules: Iterable[str]) -> None:
        """Import these the next time."""
        self.modules = sorted(set(modules))
        self._write()

    def leave_out(self, package: str) -> None:
        """Never import *package* ahead again."""
        self.left_out.add(package)
        self.modules = [name for name in self.modules if name.partition(".")[0] != package]
        self._write()

    def _read(self) -> dict[str, Any]:
        if self._file is None:
            return {}
        try:
            stored = json.loads(self._file.read_text())
        except (OSError, ValueError):
            return {}
        fits = isinstance(stored, dict) and stored.get("python") == _interpreter()
        return stored if fits and _are_texts(stored.get("modules")) and _are_texts(stored.get("left_out")) else {}

    def _write(self) -> None:
        if self._file is None:
            return
        content = {"python": _interpreter(), "modules": self.modules, "left_out": sorted(self.left_out)}
        temporary = self._file.with_suffix(f".{os.getpid()}")
        try:
            temporary.write_text(json.dumps(content))
            os.replace(temporary, self._file)
        except OSError:
            temporary.unlink(missing_ok=True)


def _interpreter() -> str:
    return f"{sys.executable} {sys.version}"


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)
