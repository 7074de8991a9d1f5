"""The folder where live runs can be found: one socket and one description for each, for this user only."""

import json
import os
import socket
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path

from spark_runtime.errors import NoSuchRun, StoreError

LONGEST_SOCKET_PATH = 100  # the kernel allows 107


@dataclass(frozen=True, slots=True)
class LiveRun:
    """A run that answers."""

    run_id: str
    script: str
    pid: int
    socket: Path


def runtime_folder() -> Path:
    """Return the folder, made if need be.

    Raises:
        StoreError: It belongs to somebody else, or others may write there.
    """
    base = os.environ.get("SPARKRT_RUNTIME_DIR") or os.environ.get("XDG_RUNTIME_DIR")
    folder = Path(base) / "sparkrt" if base else Path(tempfile.gettempdir()) / f"sparkrt-{os.getuid()}"
    is_long = len(str(folder)) > LONGEST_SOCKET_PATH - 20
    if is_long and os.environ.get("SPARKRT_RUNTIME_DIR"):
        raise StoreError(f"{folder} is too long for the path of a socket; set SPARKRT_RUNTIME_DIR to a shorter one")
    if is_long:
        folder = Path("/tmp") / f"sparkrt-{os.getuid()}"  # noqa: S108 - checked below: ours and 0700
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.lstat()
    except OSError as problem:
        raise StoreError(f"{folder}: {problem.strerror}; set SPARKRT_RUNTIME_DIR to a folder of yours") from problem
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise StoreError(f"{folder} must be a folder of yours that nobody else can enter; remove it, or `chmod 700` it")
    return folder


def socket_path(run_id: str) -> Path:
    """Where run *run_id* listens."""
    return runtime_folder() / f"{run_id}.sock"


def describe(run_id: str, script: str) -> Path:
    """Write down that this process does *run_id*; return the file."""
    file = runtime_folder() / f"{run_id}.json"
    temporary = file.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps({"run": run_id, "script": script, "pid": os.getpid()}))
    os.replace(temporary, file)
    return file


def live_runs() -> list[LiveRun]:
    """Return every run that answers, and clear away what dead ones left."""
    found = []
    for file in sorted(runtime_folder().glob("*.json")):
        try:
            content = json.loads(file.read_text())
            run = LiveRun(content["run"], content["script"], content["pid"], file.with_suffix(".sock"))
        except (OSError, ValueError, KeyError, TypeError):
            continue  # being written, or not ours
        if _answers(run.socket):
            found.append(run)
        elif not _lives(run.pid):
            file.unlink(missing_ok=True)
            run.socket.unlink(missing_ok=True)
    return found


def find_run(wanted: str | None) -> LiveRun:
    """Return the run that *wanted* names, by its id or its script, or the only one there is.

    Raises:
        NoSuchRun: There is none, or more than one fits.
    """
    runs = live_runs()
    if wanted is not None:
        path = os.path.abspath(wanted)
        fitting = [run for run in runs if run.run_id == wanted] or [
            run for run in runs if run.run_id.startswith(wanted) or path == run.script
        ]
    else:
        fitting = runs
    if len(fitting) == 1:
        return fitting[0]
    listed = "".join(f"\n  {run.run_id}  {run.script}" for run in (fitting or runs))
    if not runs:
        raise NoSuchRun("nothing runs; start something with `spark run script.py`")
    if not fitting:
        raise NoSuchRun(f"there is no run {wanted!r}; these run:{listed}")
    raise NoSuchRun(f"{len(fitting)} runs fit; name one with --run:{listed}")


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except OSError:
            return False
        return True


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
