"""What `spark doctor` looks at. Each check does the thing for real, once, and says what it found.

A check is a function that returns a `Finding`. One that raises is a problem too: there the runtime would have failed.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

OK, NOTE, PROBLEM = "ok", "note", "problem"

READY_SECONDS = 5.0
LITTLE_MEMORY = 512 << 20
LITTLE_DISK = 1 << 30
FEW_FILES = 1024

#: A module with one function, ``answer() -> 42``.
ANSWER = bytes.fromhex("0061736d010000000105016000017f030201000" + "70a0106616e73776572000" + "00a06010400412a0b")

_RUN_ANSWER = """
import sys
from spark_runtime.models.scratch import Scratch
from spark_workers.engines.seam import Settings, open_engine

engine = open_engine("wasmtime", Settings())
code = Scratch(engine.compile(bytes.fromhex(sys.argv[1])))
print(engine.load(code.path).instantiate(None).function("answer")())
"""


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found.

    Attributes:
        state: ``"ok"``, ``"note"`` (works, with something to know) or ``"problem"`` (something will fail).
        text: What there is.
        advice: What to do, where there is something.
        facts: The same for programs.
    """

    state: str
    text: str
    advice: str = ""
    facts: dict[str, Any] = field(default_factory=dict)


Check = Callable[[], Finding]


def examine(check: Check) -> Finding:
    """Run one check, whatever happens in it."""
    from spark_runtime.errors import SparkError

    try:
        return check()
    except SparkError as problem:
        return Finding(PROBLEM, str(problem))
    except Exception as problem:  # noqa: BLE001 - whatever goes wrong in a check is what it is there to find
        return Finding(PROBLEM, f"{type(problem).__name__}: {problem}")


# --- what runs -------------------------------------------------------------------------------------------------------


def python() -> Finding:
    """The interpreter."""
    name, version = sys.implementation.name, ".".join(map(str, sys.version_info[:3]))
    facts = {"version": version, "implementation": name, "executable": sys.executable}
    text = f"{version} {name}, {sys.executable}"
    if sys.maxsize <= 2**32:
        return Finding(PROBLEM, f"{text}, 32 bits", "engines need a Python of 64 bits", facts)
    if name != "cpython":
        return Finding(NOTE, text, "only CPython is tested", facts)
    return Finding(OK, text, facts=facts)


def platform() -> Finding:
    """The operating system."""
    system = os.uname()
    text = f"{system.sysname} {system.release} {system.machine}"
    facts = {"system": system.sysname, "release": system.release, "machine": system.machine}
    if system.sysname == "Linux":
        return Finding(OK, text, facts=facts)
    return Finding(
        NOTE, text, "Linux is what the runtime is made for; here workers are spawned, which is slower", facts
    )


def version() -> Finding:
    """This package."""
    import spark_runtime

    folder = str(Path(spark_runtime.__file__).parent)
    facts = {"version": spark_runtime.__version__, "folder": folder}
    return Finding(OK, f"{spark_runtime.__version__}, {folder}", facts=facts)


def messages() -> Finding:
    """The library that packs messages."""
    import msgpack

    release = ".".join(map(str, msgpack.version))
    is_compiled = not msgpack.Packer.__module__.endswith("fallback")
    facts = {"version": release, "compiled": is_compiled}
    if is_compiled:
        return Finding(OK, f"{release}, compiled", facts=facts)
    return Finding(NOTE, f"{release}, in pure Python", "calls take several times as long; reinstall msgpack", facts)


# --- engines ---------------------------------------------------------------------------------------------------------


def wasmtime() -> Finding:
    """The engine that models run on unless they ask for another: a function is compiled and called."""
    import subprocess
    import time

    from spark_runtime.models.identity import engine_identity, engine_package, engine_version
    from spark_workers.engines.wasmtime_found import find_installed

    engine_identity("wasmtime")  # raises the sentence that says how to get it
    package, found = engine_package("wasmtime"), find_installed()
    release = engine_version(package) if package else "unknown"
    why_public = found.why_not_raw() if found else "it cannot be found"
    facts: dict[str, Any] = {"version": release, "calls": "public" if why_public else "raw"}
    began = time.monotonic()
    # In a process of its own, as models are: a broken library ends that one.
    command = [sys.executable, "-P", "-c", _RUN_ANSWER, ANSWER.hex()]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        return Finding(PROBLEM, f"{release}: a function of one line does not return", _reinstall("wasmtime"), facts)
    if done.returncode or done.stdout.strip() != "42":
        said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        return Finding(PROBLEM, f"{release} does not run: {said}", _reinstall("wasmtime"), facts)
    facts["seconds"] = round(time.monotonic() - began, 3)
    if why_public:
        return Finding(NOTE, f"{release}, public calls", f"{why_public}; a call costs 30 µs more than it could", facts)
    return Finding(OK, f"{release}, raw calls", facts=facts)


def _reinstall(package: str) -> str:
    return f"run `{sys.executable} -m pip install --force-reinstall {package}`"


def wasmer() -> Finding:
    """The second engine, which nobody needs."""
    from spark_runtime.errors import SparkError
    from spark_runtime.models.interpreter import find_interpreter

    try:
        found = find_interpreter(None, "wasmer")
    except SparkError as problem:
        return Finding(NOTE, "not there, and optional: wasmtime needs nothing", str(problem), {"python": None})
    facts = {"python": found.path, "version": found.version, "identity": found.identity}
    text = f"under Python {found.version}, {found.path}"
    return Finding(NOTE if found.note else OK, text, found.note, facts)


# --- processes -------------------------------------------------------------------------------------------------------


def start_method() -> Finding:
    """How workers are started."""
    from spark_workers import system

    is_spawned = os.environ.get("SPARKRT_START") == "spawn"
    if system.LINUX and not is_spawned:
        return Finding(OK, "fork, from a nursery", facts={"method": "fork"})
    why = "SPARKRT_START asks for it" if is_spawned else "forking is not safe on this system"
    return Finding(
        NOTE, f"spawn: {why}", "each worker starts in tenths of a second in place of ms", {"method": "spawn"}
    )


def nursery() -> Finding:
    """The process that starts workers: one is started, and must say that it is ready."""
    import socket
    import subprocess
    import time

    from spark_runtime.processes.nursery import this_interpreter
    from spark_workers.channel import Channel
    from spark_workers.messages import NurseryReady, Preload

    began = time.monotonic()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(READY_SECONDS)
        process = subprocess.Popen(
            [*this_interpreter(), "nursery", str(theirs.fileno()), str(os.getpid())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            theirs.close()
            channel = Channel(ours)
            channel.send(Preload([]))
            message, _ = channel.receive()
            if not isinstance(message, NurseryReady):
                return Finding(PROBLEM, f"it answers {type(message).__name__}", _BROKEN_INSTALLATION)
            seconds = time.monotonic() - began
        except (TimeoutError, EOFError, ConnectionError):
            process.kill()
            said = (process.communicate()[1].decode(errors="replace").strip().splitlines() or ["it says nothing"])[-1]
            return Finding(PROBLEM, f"it is not ready after {READY_SECONDS:.0f} s: {said}", _BROKEN_INSTALLATION)
        finally:
            ours.close()  # the nursery ends by itself then
            try:
                process.communicate(timeout=READY_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
    return Finding(OK, f"ready after {seconds * 1000:.0f} ms", facts={"seconds": round(seconds, 4)})


_BROKEN_INSTALLATION = f"run `{sys.executable} -P -m spark_workers` to see more; then install spark-runtime again"


def memfd() -> Finding:
    """Shared memory without a file."""
    from spark_runtime.models.scratch import Scratch

    if not hasattr(os, "memfd_create"):
        return Finding(NOTE, "not on this system", "temporary files are used in its place", {"available": False})
    scratch = Scratch(b"some bytes")
    try:
        scratch.seal()
        with open(scratch.path, "rb") as file:
            is_right = file.read() == b"some bytes"
    finally:
        scratch.close()
    if not is_right:
        return Finding(PROBLEM, "what is written is not what is read", "report this, with the kernel's version")
    return Finding(OK, "works, with seals", facts={"available": True})


def pidfd() -> Finding:
    """How the end of a process is noticed."""
    from spark_workers import system

    descriptor = system.open_pidfd(os.getpid())
    if descriptor is None:
        advice = "a worker's death is noticed by polling; Linux from 5.3 has them"
        return Finding(NOTE, "not on this system", advice, {"available": False})
    os.close(descriptor)
    return Finding(OK, "works", facts={"available": True})


def subreaper() -> Finding:
    """How processes that workers have started are found when the workers are gone."""
    from spark_workers import system

    if not system.LINUX:
        advice = "what a worker starts can outlive it"
        return Finding(NOTE, "not on this system", advice, {"available": False})
    system.adopt_orphans()
    if not system.adopts_orphans():
        advice = "what a worker starts can outlive it; look whether a sandbox forbids prctl"
        return Finding(NOTE, "the kernel does not do it", advice, {"available": False})
    return Finding(OK, "works", facts={"available": True})


# --- files -----------------------------------------------------------------------------------------------------------


def watching() -> Finding:
    """How a save is noticed: a file is saved in a folder that is watched."""
    import tempfile
    import threading

    from watchfiles._rust_notify import RustNotify

    limits = _inotify_limits()
    with tempfile.TemporaryDirectory(prefix="spark-doctor-") as folder:
        try:
            with RustNotify([folder], False, False, 300, False, True) as notify:
                Path(folder, "saved").touch()
                seen = notify.watch(20, 1, int(READY_SECONDS * 1000), threading.Event())
        except OSError as problem:
            advice = "raise fs.inotify.max_user_instances and fs.inotify.max_user_watches with sysctl, or use --poll"
            return Finding(PROBLEM, f"a folder cannot be watched: {problem}", advice, limits)
    if not isinstance(seen, set):
        return Finding(PROBLEM, "a save is not noticed", "use --poll", limits)
    words = ", ".join(f"{value} {name.removeprefix('max_user_')}" for name, value in limits.items())
    return Finding(OK, f"works{f' (at most {words})' if words else ''}", facts=limits)


def _inotify_limits() -> dict[str, Any]:
    limits = {}
    for name in ("max_user_watches", "max_user_instances"):
        try:
            limits[name] = int(Path("/proc/sys/fs/inotify", name).read_text())
        except (OSError, ValueError):
            continue  # not Linux
    return limits


def cache_folder() -> Finding:
    """Where prepared models are kept."""
    from spark_runtime.models.cache_files import FOLDER_VARIABLE
    from spark_runtime.models.cache_folder import CacheFolder, default_folder

    path = default_folder()
    advice = f"make it writable, or set {FOLDER_VARIABLE} to a folder of yours; models are compiled at every start"
    try:
        folder = CacheFolder.open(path)
        folder.try_writing()
        entries = folder.listed()
    except OSError as problem:
        return Finding(PROBLEM, f"{path}: {problem.strerror or problem}", advice, {"path": str(path)})
    size = sum(entry.size for entry in entries)
    facts = {"path": str(folder.path), "entries": len(entries), "bytes": size}
    if os.statvfs(folder.path).f_flag & getattr(os, "ST_NOEXEC", 0):
        return Finding(PROBLEM, f"{path} is mounted noexec, and prepared models are machine code", advice, facts)
    return Finding(OK, f"{folder.path}, {len(entries)} models, {size / 1e6:.1f} MB", facts=facts)


def runtime_folder() -> Finding:
    """Where runs can be found by other shells: a socket is made there."""
    import socket

    from spark_runtime.supervise.runtime_folder import runtime_folder as find_folder

    folder = find_folder()
    path = folder / f"doctor-{os.getpid()}"
    try:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.bind(str(path))
    except OSError as problem:
        advice = "set SPARKRT_RUNTIME_DIR to a folder on a local disk"
        return Finding(PROBLEM, f"{folder}: no socket can be made: {problem}", advice, {"path": str(folder)})
    finally:
        path.unlink(missing_ok=True)
    return Finding(OK, str(folder), facts={"path": str(folder)})


# --- room ------------------------------------------------------------------------------------------------------------


def memory() -> Finding:
    """What is free, of the machine or of the container."""
    from spark_workers.system import available_memory

    free = available_memory()
    if free == sys.maxsize:
        return Finding(OK, "unknown on this system", facts={"bytes": None})
    few = free < LITTLE_MEMORY
    advice = "large models may not fit; end something" if few else ""
    return Finding(NOTE if few else OK, f"{free / 1e9:.1f} GB free", advice, {"bytes": free})


def disk() -> Finding:
    """What is free where prepared models and temporary files go."""
    import shutil
    import tempfile

    from spark_runtime.models.cache_folder import default_folder

    path = default_folder()
    while not path.exists():
        path = path.parent
    free = {str(each): shutil.disk_usage(each).free for each in (path, Path(tempfile.gettempdir()))}
    text = ", ".join(f"{size / 1e9:.1f} GB free at {name}" for name, size in free.items())
    few = min(free.values()) < LITTLE_DISK
    return Finding(NOTE if few else OK, text, "make room there" if few else "", {"bytes": free})


def open_files() -> Finding:
    """How many files, sockets and pipes a process may have."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    facts = {"soft": soft, "hard": hard}
    if soft != resource.RLIM_INFINITY and soft < FEW_FILES:
        return Finding(NOTE, f"{soft}", f"a replica takes six; run `ulimit -n {min(hard, 65536)}`", facts)
    return Finding(OK, str(soft), facts=facts)


def processors() -> Finding:
    """How many replicas can compute at once."""
    here = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else here
    text = f"{usable}" if usable == here else f"{usable} of {here}"
    return Finding(OK, text, facts={"usable": usable, "all": here})


#: What is looked at, in this order. A backend that needs more adds a list of its own.
CHECKS: tuple[tuple[str, Check], ...] = (
    ("python", python),
    ("platform", platform),
    ("spark-runtime", version),
    ("msgpack", messages),
    ("wasmtime", wasmtime),
    ("wasmer", wasmer),
    ("start method", start_method),
    ("nursery", nursery),
    ("memfd", memfd),
    ("pidfd", pidfd),
    ("subreaper", subreaper),
    ("watching", watching),
    ("cache folder", cache_folder),
    ("runtime folder", runtime_folder),
    ("memory", memory),
    ("disk", disk),
    ("open files", open_files),
    ("processors", processors),
)
