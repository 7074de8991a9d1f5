"""Models to test with, and a look at the processes that run them."""

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from spark_runtime import Spark

MODELS = Path(__file__).parent / "models"
JSON = MODELS / "json_model.wasm"
SPIN = MODELS / "spin_model.wasm"
TRAP = MODELS / "trap_model.wasm"
WASI = MODELS / "wasi_cmd.wasm"
REACTOR = MODELS / "wasi_reactor.wasm"
WORK = MODELS / "wasi_work.wasm"
MEMORY = MODELS / "mem_model.wasm"
FUSSY = MODELS / "fussy.wasm"  # answers what it is asked, unless a sign says otherwise; see src/fussy.wat
PACKAGES = MODELS / "packages"  # Neuron packages; see src/ in it


def until(fits: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait until it *fits*."""
    limit = time.monotonic() + seconds
    while not fits():
        assert time.monotonic() < limit, "it did not happen in time"
        time.sleep(0.002)


def replica_pids(spark: Spark) -> list[int]:
    """The processes of every model, spares included."""
    return [each.pid for model in spark.statistics().models for each in model.replicas if each.pid is not None]


def states(spark: Spark) -> list[str]:
    """The states of every replica of every model."""
    return [each.state for model in spark.statistics().models for each in model.replicas]


def serving(spark: Spark) -> dict[int, str]:
    """The processes that serve, with their states: idle or busy."""
    replicas = [each for model in spark.statistics().models for each in model.replicas]
    return {each.pid: each.state for each in replicas if each.pid is not None and each.state in ("idle", "busy")}


def wait_in_service(spark: Spark, count: int, seconds: float = 15.0) -> list[int]:
    """Wait until *count* replicas serve and none has anything to do; return their processes."""
    until(lambda: list(serving(spark).values()) == ["idle"] * count, seconds)
    return list(serving(spark))


def is_alive(pid: int) -> bool:
    """Tell whether a process runs: neither gone nor a zombie."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_computing(spark: Spark) -> int:
    """Wait until a replica is at a call that does not end, and return its process.

    A replica is busy as soon as a call is sent to it; killed before it begins, it fails none.
    """
    until(lambda: "busy" in serving(spark).values())
    pid = next(pid for pid, state in serving(spark).items() if state == "busy")
    before = _ticks(pid)
    until(lambda: _ticks(pid) >= before + 3)
    return pid


def _ticks(pid: int) -> int:
    with open(f"/proc/{pid}/stat") as file:
        return int(file.read().rpartition(")")[2].split()[11])


def parent_of(pid: int) -> int:
    """The parent of a process; of a replica that is the nursery."""
    with open(f"/proc/{pid}/stat") as file:
        return int(file.read().rpartition(")")[2].split()[1])


def module(folder: Path, name: str, text: str) -> Path:
    """Write a module, given as text, into *folder*."""
    from wasmtime import wat2wasm

    path = folder / f"{name}.wasm"
    path.write_bytes(wat2wasm(text))
    return path


@contextlib.contextmanager
def program(source: str, *flags: str, **environment: str) -> "Iterator[subprocess.Popen[str]]":
    """A Python program that uses a Spark, for the length of a block; all of this file is imported in it.

    It leads a group of its own, of which nothing is left after the block.
    """
    head = f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    head += "from models_help import *\nfrom spark_runtime import Model, Spark\n"
    process = subprocess.Popen(
        [sys.executable, *flags, "-c", head + textwrap.dedent(source)],
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with process:
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def run_program(
    source: str, *flags: str, timeout: float = 50.0, **environment: str
) -> "subprocess.CompletedProcess[str]":
    """Run such a program to its end."""
    with program(source, *flags, **environment) as process:
        out, err = process.communicate(timeout=timeout)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)
