"""The engine `wasmtime`, by the way that fits the version that is installed: `wasmtime_raw` or `wasmtime_public`.

``SPARKRT_WASMTIME=public`` (or ``raw``, which then has to work) chooses by hand.
"""

import importlib
import os
import sys
from collections.abc import Callable

from spark_workers.engines.seam import Engine, Settings
from spark_workers.engines.wasmtime_found import Installed, find_installed
from spark_workers.hosts.failures import GuestFailed


def _choose() -> tuple[Installed, str]:
    installed = find_installed()
    if installed is None:
        text = f"wasmtime is not installed for {sys.executable}; get it with: {sys.executable} -m pip install wasmtime"
        raise GuestFailed("engine-missing", text)
    asked = os.environ.get("SPARKRT_WASMTIME", "")
    if asked in ("raw", "public"):
        return installed, asked
    reason = installed.why_not_raw()
    if reason:
        print(f"spark: calls of WASM models are slower than they could be: {reason}", file=sys.stderr)
    return installed, "public" if reason else "raw"


def _import(way: str) -> Callable[[Settings], Engine]:
    module, cls = f"spark_workers.engines.wasmtime_{way}", f"{way.title()}Engine"
    try:
        found: Callable[[Settings], Engine] = getattr(importlib.import_module(module), cls)
    except (ImportError, OSError, AttributeError) as problem:
        text = f"wasmtime cannot be used: {problem}; install it anew with: {sys.executable} -m pip install wasmtime"
        raise GuestFailed("engine-missing", text) from problem
    return found


_installed, WAY = _choose()
VERSION = _installed.version
WasmtimeEngine = _import(WAY)
