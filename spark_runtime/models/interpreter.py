"""Finds the other interpreter that an engine needs, and says in one sentence why one cannot be used.

wasmer's wheels end at CPython 3.10, so its replicas run under one of these, wherever the supervisor runs. Our own
worker package is not installed there: `spark_workers/bootstrap.py` is started by its path. What has to be installed
there is msgpack, the engine and its compiler.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import spark_workers
from spark_runtime.errors import EngineMissing
from spark_runtime.processes.children import our_children
from spark_workers.engines.wasmer_engine import FORMAT

IDENTIFY_SECONDS = 10.0
MOST_OUTPUT = 64 * 1024
BOOTSTRAP = Path(spark_workers.__file__).with_name("bootstrap.py")

_OLDEST = (3, 10)
_WASMER_PYTHON = "python3.10"
_NEWEST_FOR_WASMER = (3, 10)
_PACKAGES = {
    "wasmer": ("msgpack", "wasmer==1.1.0", "wasmer_compiler_cranelift==1.1.0"),
    "wasmtime": ("msgpack", "wasmtime"),
}
#: The supervisor's PYTHONPATH and PYTHONHOME are for another Python.
_FLAGS = ["-E"]

_found: dict[tuple[str | None, str], Interpreter] = {}


@dataclass(frozen=True, slots=True)
class Interpreter:
    """An interpreter that has what an engine needs.

    Attributes:
        path: Its executable, as it calls itself: what was asked for may be a script that chooses one.
        version: Of Python, such as ``"3.10.13"``.
        engine: ``"wasmer"`` or ``"wasmtime"``.
        identity: What tells one build of the engine from another. Whatever machine code depends on is in it, apart
            from the processor and a model's limits; see `identity_for`.
        note: One sentence about what could be better, usually empty.
    """

    path: str
    version: str
    engine: str
    identity: str
    note: str = ""

    def identity_for(self, settings: Mapping[str, Any]) -> str:
        """Return *identity* with those of a model's settings that this engine writes into machine code.

        wasmer has no limits of its own: they are in the code. Without them in the key two models of one file with
        different limits would refuse, and compile anew, each other's code.
        """
        if self.engine != "wasmer":
            return self.identity
        return f"{self.identity} memory {settings['memory_limit']} table {settings['table_limit']}"


def find_interpreter(python: str | None, engine: str) -> Interpreter:
    """Return the interpreter *python*, which can run *engine*. What was found once is not looked at again.

    Args:
        python: A path, or a name to look for on PATH. None: for wasmer ``python3.10``, else this interpreter.
        engine: ``"wasmer"`` or ``"wasmtime"``.

    Raises:
        EngineMissing: There is none, it does not answer, or it lacks something. The message says what to do.
    """
    key = (python, engine)
    if key not in _found:
        _found[key] = _look(python, engine)
    return _found[key]


def nursery_command(interpreter: Interpreter) -> list[str]:
    """Return the beginning of the command that starts a nursery; ``nursery FD PARENT`` comes after it."""
    return [interpreter.path, *_FLAGS, str(BOOTSTRAP)]


def _look(python: str | None, engine: str) -> Interpreter:
    path = _executable(python, engine)
    found = _identify(path, engine)
    _check(path, found, engine)
    compiler = found["compiler"] or ""
    parts = [engine, found[engine], compiler, found["implementation"], found["machine"], f"format {FORMAT}"]
    note = ""
    if compiler.startswith("singlepass"):
        note = (
            f"{path} has only the singlepass compiler, which does not optimize; for one that does, run "
            f"`{_install(path, engine)}`"
        )
    return Interpreter(found["executable"] or path, found["python"], engine, " ".join(filter(None, parts)), note)


def _executable(python: str | None, engine: str) -> str:
    wanted = os.path.expanduser(python or (_WASMER_PYTHON if engine == "wasmer" else sys.executable))
    path = shutil.which(wanted)
    if path is not None:
        return path
    if python is None:
        raise EngineMissing(f"{engine} needs CPython 3.10, and there is no {_WASMER_PYTHON} on PATH{_other(engine)}")
    where = "" if os.sep in wanted else " on PATH"
    what = "is no file that can be run" if os.path.exists(wanted) else f"is not there{where}"
    raise EngineMissing(f"the interpreter {python!r} for {engine} {what}{_other(engine)}")


def _check(path: str, found: dict[str, Any], engine: str) -> None:
    """Say what an interpreter lacks.

    Raises:
        EngineMissing: It lacks something.
    """
    version = _version(found)
    implementation = f"{found['implementation']} {found['python']}"
    if version < _OLDEST:
        raise EngineMissing(f"{path} is {implementation}, and workers need 3.10 or newer{_other(engine)}")
    if engine == "wasmer" and not found[engine] and version > _NEWEST_FOR_WASMER:
        raise EngineMissing(f"{path} is {implementation}, and wasmer's wheels end at CPython 3.10{_other(engine)}")
    needed = ["msgpack", engine, *(["compiler"] if engine == "wasmer" else [])]
    missing = [each for each in needed if not found[each]]
    if missing:
        names = " and ".join("a compiler for wasmer" if each == "compiler" else each for each in missing)
        said = f" ({' '.join(found['problem'].split())[:200]})" if found["problem"] else ""
        raise EngineMissing(f"{path} lacks {names}{said}; run `{_install(path, engine)}`{_instead(engine)}")


def _identify(path: str, engine: str) -> dict[str, Any]:
    """Ask the interpreter what it is and has.

    Raises:
        EngineMissing: It does not say.
    """
    command = [path, *_FLAGS, str(BOOTSTRAP), "identify", engine]
    try:
        status, output, errors = _run(command)
    except TimeoutError:
        raise EngineMissing(
            f"{path} does not say within {IDENTIFY_SECONDS:g} s which Python it is{_other(engine)}"
        ) from None
    except OSError as problem:
        raise EngineMissing(f"{path} cannot be run: {problem.strerror}{_other(engine)}") from problem
    if status != 0:
        how = f"exit code {status}" if status > 0 else f"signal {-status}"
        raise EngineMissing(f"{path} ends with {how} when it is asked what it is{_quoted(errors)}{_other(engine)}")
    with contextlib.suppress(ValueError, IndexError):
        found = json.loads(output.splitlines()[-1])  # what somebody's sitecustomize.py prints comes before
        if isinstance(found, dict) and _is_whole(found, engine):
            return found
    raise EngineMissing(f"{path} is no Python: asked what it is, it said {_shown(output)}{_other(engine)}")


def _is_whole(found: dict[str, Any], engine: str) -> bool:
    texts = ("python", "implementation", "machine", "executable", "problem")
    perhaps = ("msgpack", engine, "compiler")
    return (
        all(isinstance(found.get(name), str) for name in texts)
        and all(isinstance(found.get(name, 0), str | None) for name in perhaps)
        and len(_version(found)) == 2
    )


def _version(found: dict[str, Any]) -> tuple[int, ...]:
    return tuple(int(part) for part in found["python"].split(".")[:2] if part.isdecimal())


def _run(command: list[str]) -> tuple[int, bytes, bytes]:
    """Run a command that may be anything at all; return exit code, output and errors, the beginning of each.

    Raises:
        OSError: It cannot be started.
        TimeoutError: It took too long.
    """
    process = our_children.start(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    limit = time.monotonic() + IDENTIFY_SECONDS
    with process:
        try:
            output, errors = _read_both(process, limit)
            return process.wait(max(0.0, limit - time.monotonic())), output, errors
        except subprocess.TimeoutExpired:
            raise TimeoutError from None
        finally:
            # The whole session: a script's own child would go on otherwise.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)


def _read_both(process: subprocess.Popen[bytes], limit: float) -> tuple[bytes, bytes]:
    """Read what a process prints until it has closed both, or has printed more than an interpreter would."""
    texts = {process.stdout: bytearray(), process.stderr: bytearray()}
    with selectors.DefaultSelector() as selector:
        for stream in texts:
            assert stream is not None
            selector.register(stream, selectors.EVENT_READ)
        for stream in _readable(selector, limit):
            part = os.read(stream.fileno(), MOST_OUTPUT)
            texts[stream] += part
            if not part:
                selector.unregister(stream)
            elif len(texts[stream]) >= MOST_OUTPUT:
                process.kill()
                break
    return bytes(texts[process.stdout]), bytes(texts[process.stderr])


def _readable(selector: selectors.BaseSelector, limit: float) -> Iterator[Any]:
    while selector.get_map():
        ready = selector.select(max(0.0, limit - time.monotonic()))
        if not ready:
            raise TimeoutError
        for key, _ in ready:
            yield key.fileobj


# --- sentences -------------------------------------------------------------------------------------------------------


def _install(path: str, engine: str) -> str:
    return f"{shlex.quote(path)} -m pip install {' '.join(_PACKAGES[engine])}"


def _instead(engine: str) -> str:
    return "; the default engine, wasmtime, needs nothing" if engine != "wasmtime" else ""


def _other(engine: str) -> str:
    wanted = "that CPython 3.10" if engine == "wasmer" else "a CPython 3.10 or newer"
    command = _install(_WASMER_PYTHON, engine)
    return f"; run `{command}`, and name {wanted} with python=... or --worker-python{_instead(engine)}"


def _quoted(errors: bytes) -> str:
    """Return what was said: the first line, of a traceback of Python's the last one."""
    lines = [line for line in errors.decode(errors="replace").splitlines() if line.strip()]
    if not lines:
        return ""
    return f" ({_printable(lines[-1 if lines[0].startswith(('Traceback', '  File')) else 0])})"


def _shown(output: bytes) -> str:
    text = _printable(output.decode(errors="replace"))
    return repr(text) if text else "nothing"


def _printable(text: str) -> str:
    cut = " ".join(text.split())[:120]
    return "".join(each if each.isprintable() else "?" for each in cut)
