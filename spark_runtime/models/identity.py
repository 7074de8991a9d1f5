"""What prepared code depends on: a different engine, processor or setting means different code.

Machine code carries no check sum and little to tell what made it, so everything it depends on is in its key.
Neither the engine nor `importlib.metadata` is imported for that: they cost more than all the rest of a warm start.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spark_runtime.errors import BadRequestError, EngineMissing

#: Counted up whenever engines are configured in another way, or the report says something else: old entries then rest.
FORMAT = 2

#: The settings that the code or the report depends on. Limits of memory, tables and stack are those of a running
#: instance: wasmtime takes the same code whatever they are (tried with 64 KiB to 1 MiB of stack).
CODE_SETTINGS = ("entry", "epochs")


def entry_key(module_sha256: str, engine: str, settings: Mapping[str, Any]) -> str:
    """Return the name under which a prepared model is kept: 64 hexadecimal digits.

    Args:
        module_sha256: Of the module.
        engine: What `engine_identity` says, or its like for another engine.
        settings: `spark_runtime.config.Model.settings()`.
    """
    chosen = {name: settings[name] for name in CODE_SETTINGS if name in settings}
    parts = [FORMAT, module_sha256, engine, processor_identity(), chosen]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def engine_identity(engine: str) -> str:
    """Return what tells one build of *engine* from another, in this interpreter.

    Raises:
        EngineMissing: It is not installed here.
        BadRequestError: The engine runs under another interpreter, which alone can tell.
    """
    if engine != "wasmtime":
        raise BadRequestError(f"{engine} runs under an interpreter of its own, which is asked for its identity")
    package = engine_package(engine)
    if package is None:
        raise EngineMissing(
            f"wasmtime is not installed for {sys.executable}; run `{sys.executable} -m pip install wasmtime`"
        )
    return f"wasmtime {engine_version(package)} {_libraries(package)}"


def engine_package(engine: str) -> Path | None:
    """Return the folder of an engine's package, or None if it is not installed here."""
    try:
        spec = importlib.util.find_spec(engine)
    except (ImportError, ValueError):
        return None
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(next(iter(spec.submodule_search_locations)))
    return folder if folder.is_dir() else None


def engine_version(package: Path) -> str:
    """Return the version that pip has noted beside a package, or "unknown"."""
    beginning, end = f"{package.name}-", ".dist-info"
    # More than one is left by installations that were cut short; all of them together still tell builds apart.
    found = sorted(name for name in os.listdir(package.parent) if name.startswith(beginning) and name.endswith(end))
    return ",".join(name[len(beginning) : -len(end)] for name in found) or "unknown"


def _libraries(package: Path) -> str:
    """Return size and time of the engine's shared library, which is what makes the code."""
    found = []
    for library in sorted(package.glob(f"{sys.platform}-*/*")):
        status = library.stat()
        found.append(f"{library.parent.name}/{library.name}:{status.st_size}:{status.st_mtime_ns}")
    return " ".join(found) or "no library"


@functools.cache
def processor_identity() -> str:
    """Return what the processor can do: code for one that can do more must not run here."""
    machine = os.uname().machine
    try:
        with open("/proc/cpuinfo", "rb", buffering=0) as file:
            first = file.read(8192).partition(b"\n\n")[0]  # one processor; all of them may take milliseconds
    except OSError:
        return f"{sys.platform} {machine}"  # not Linux; engines check by themselves when they load
    fields = {name.strip().lower(): value for name, _, value in (line.partition(b":") for line in first.splitlines())}
    features = sorted((fields.get(b"flags") or fields.get(b"features") or fields.get(b"isa") or b"").split())
    return f"{sys.platform} {machine} {b' '.join(features).decode('ascii', 'replace')}"
