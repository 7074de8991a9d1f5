"""Small guests written as text, and what is needed to run them in this process or in a process of their own."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

wasmtime: Any = pytest.importorskip("wasmtime", reason="wasmtime is not installed in this interpreter")

from spark_workers import channel as channels  # noqa: E402
from spark_workers.engines import wasmtime_engine  # noqa: E402
from spark_workers.engines.seam import Code, Engine, Settings, open_engine  # noqa: E402
from spark_workers.hosts.failures import GuestFailed  # noqa: E402
from spark_workers.hosts.host import Host, open_host  # noqa: E402
from spark_workers.replicas.compiling import compile_module  # noqa: E402

MODELS = Path(__file__).resolve().parent.parent / "models"
ROOT = Path(channels.__file__).resolve().parent.parent  # the folder that the package lies in


def model(name: str) -> bytes:
    """Return a module from the folder of models."""
    return (MODELS / f"{name}.wasm").read_bytes()


def from_text(text: str) -> bytes:
    """Return the module that *text* describes."""
    return bytes(wasmtime.wat2wasm(text))


class Workshop:
    """Compiles modules into files of a folder, and opens them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0

    def prepare(self, wasm: bytes | str, settings: Settings | None = None) -> tuple[str, dict[str, Any]]:
        """Return the path of the machine code, and the report."""
        settings = settings or Settings()
        wasm = from_text(wasm) if isinstance(wasm, str) else wasm
        code, report = compile_module(open_engine("wasmtime", settings), wasm, settings)
        self._count += 1
        path = self._folder / f"{self._count}.code"
        path.write_bytes(code)
        return str(path), report

    def code(self, wasm: bytes | str, **settings: Any) -> tuple[Engine, Code]:
        """Return an engine with the module loaded."""
        given = Settings(**settings)
        path, _ = self.prepare(wasm, given)
        engine = open_engine("wasmtime", given)
        return engine, engine.load(path)

    def host(self, wasm: bytes | str, kind: str = "auto", **settings: Any) -> Host:
        """Return the module's host."""
        given = Settings(**settings)
        return open_host("wasmtime", kind, self.prepare(wasm, given)[0], given)


def failure(action: Any, *arguments: Any) -> GuestFailed:
    """Return the failure that *action* ends in."""
    with pytest.raises(GuestFailed) as caught:
        action(*arguments)
    return caught.value


def use_way(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """Have the engine wasmtime be the raw or the public one."""
    monkeypatch.setattr(wasmtime_engine, "WasmtimeEngine", wasmtime_engine._import(way))


def run_python(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script in an interpreter of its own that finds the worker's package."""
    return subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(ROOT), "MODELS": str(MODELS), **environment},
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
