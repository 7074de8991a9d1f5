"""What people write today: a pool of processes, each with a module of its own through wasmtime's public interface."""

import json
import threading
from pathlib import Path
from typing import Any

import wasmtime

_worker: "Worker | None" = None


class Worker:
    """One instance of a plain module: requests and answers in its memory."""

    def __init__(self, path: str) -> None:
        engine = wasmtime.Engine()
        is_source = Path(path).suffix == ".wasm"
        module = (
            wasmtime.Module.from_file(engine, path) if is_source else wasmtime.Module.deserialize_file(engine, path)
        )
        self._store = wasmtime.Store(engine)
        self.exports: Any = wasmtime.Instance(self._store, module, []).exports(self._store)

    def answer(self, request: bytes) -> bytes:
        store, exports = self._store, self.exports
        place = exports["alloc"](store, len(request))
        exports["memory"].write(store, request, place)
        packed = exports["execute"](store, place, len(request))
        at, length = (packed >> 32) & 0xFFFFFFFF, packed & 0xFFFFFFFF
        answer = bytes(exports["memory"].read(store, at, at + length))
        exports["reset"](store)
        return answer

    def call(self, function: str, *numbers: float) -> Any:
        return self.exports[function](self._store, *numbers)


def compiled(model: Path, folder: Path) -> Path:
    """Compile a model ahead of time, as careful people do; return the machine code's file."""
    code = folder / f"{model.stem}.code"
    if not code.exists():
        code.write_bytes(wasmtime.Module.from_file(wasmtime.Engine(), str(model)).serialize())
    return code


def load(path: str) -> None:
    """Load a module, or machine code; the initializer of a pool."""
    global _worker
    _worker = Worker(path)


def answer(request: object) -> object:
    """Answer a request."""
    assert _worker is not None
    return json.loads(_worker.answer(json.dumps(request).encode()))


def call(function: str, *numbers: float) -> Any:
    """Call an export with numbers."""
    assert _worker is not None
    return _worker.call(function, *numbers)


_barrier: threading.Barrier | None = None


def load_for_all(path: str, barrier: threading.Barrier) -> None:
    """As `load`, for `answer_of_each`. *barrier* is multiprocessing's."""
    global _barrier
    _barrier = barrier
    load(path)


def answer_of_each(request: object) -> object:
    """Answer when every worker is about to: as many calls as workers then go to one each."""
    assert _barrier is not None
    _barrier.wait()
    return answer(request)
