"""OpenBLAS' threads: none while the nursery imports, the right number in each worker.

OpenBLAS starts its threads when it is loaded and cannot be forked with them running, so the nursery loads it with one
thread. A worker then asks OpenBLAS for as many as plain Python would have had.
"""

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator

_VARIABLES = ("OPENBLAS_NUM_THREADS", "GOTO_NUM_THREADS", "OMP_NUM_THREADS")
_SETTERS = (
    "scipy_openblas_set_num_threads64_",
    "scipy_openblas_set_num_threads",
    "openblas_set_num_threads64_",
    "openblas_set_num_threads",
)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Have libraries that are loaded meanwhile start no threads; the environment is as before afterwards."""
    before = os.environ.get("OPENBLAS_NUM_THREADS")
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["OPENBLAS_NUM_THREADS"]
        else:
            os.environ["OPENBLAS_NUM_THREADS"] = before


def restore_threads() -> None:
    """Give every OpenBLAS in this process the number of threads that it would have chosen by itself."""
    if "numpy" not in sys.modules:
        return  # nothing was preloaded that brings OpenBLAS along; what the script loads chooses by itself
    wanted = _wanted()
    for path in _loaded():
        library = ctypes.CDLL(path)
        for name in _SETTERS:
            setter = getattr(library, name, None)
            if setter is not None:
                setter(ctypes.c_int(wanted))
                break


def _wanted() -> int:
    for name in _VARIABLES:
        text = os.environ.get(name, "")
        if text.isdigit() and int(text) > 0:
            return min(int(text), os.cpu_count() or 1)  # OpenBLAS itself has no more
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _loaded() -> set[str]:
    try:
        with open("/proc/self/maps") as maps:
            paths = {line.split(maxsplit=5)[-1].strip() for line in maps if "openblas" in line}
    except OSError:
        return set()
    return {path for path in paths if os.path.isfile(path)}
