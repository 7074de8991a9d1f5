"""What this operating system offers for looking after processes, each with its fallback."""

import ctypes
import os
import signal
import sys
from collections.abc import Iterator

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_PR_GET_CHILD_SUBREAPER = 37
LINUX = sys.platform == "linux"


def _prctl(option: int, value: int) -> None:
    if LINUX and ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl({option}): {os.strerror(number)}")


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when process *parent*, which started it, ends.

    The signal belongs to the starting *thread*, so the parent must start its workers on a thread that lasts.
    """
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended between the fork and the line above
        os._exit(1)


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent ends, so that they can be found and reaped."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def open_pidfd(pid: int) -> int | None:
    """Return a descriptor that becomes readable when *pid* ends, or None where the kernel has none."""
    if not hasattr(os, "pidfd_open"):
        return None
    try:
        return os.pidfd_open(pid)
    except OSError:
        return None


def children(pid: int) -> list[int]:
    """Return the direct children of *pid*, dead ones that nobody has waited for included."""
    found: list[int] = []
    try:
        tasks = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return found
    for task in tasks:
        try:
            with open(f"/proc/{pid}/task/{task}/children") as file:
                found += map(int, file.read().split())
        except OSError:
            continue
    return found


def descendants(pid: int) -> Iterator[int]:
    """Yield every process below *pid*, parents before their children."""
    for child in children(pid):
        yield child
        yield from descendants(child)


def command_of(pid: int) -> bytes:
    """Return the command line of *pid*, empty if it is gone or dead."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read()
    except OSError:
        return b""


def is_resource_tracker(pid: int) -> bool:
    """Tell whether *pid* is multiprocessing's resource tracker, which cleans up after the others have ended."""
    return b"multiprocessing.resource_tracker" in command_of(pid)


def kill(pid: int) -> None:
    """SIGKILL *pid*, which may be gone."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # it ended by itself meanwhile, which is all that was wanted


def adopts_orphans() -> bool:
    """Tell whether `adopt_orphans` was called in this process."""
    found = ctypes.c_int(0)
    if LINUX:
        ctypes.CDLL(None).prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(found), 0, 0, 0)
    return bool(found.value)


def kill_session(session: int) -> None:
    """SIGKILL every process of a session, for when their common parent is gone.

    multiprocessing's resource tracker is left: it ends by itself when the others have, and cleans up after them.
    """
    try:
        pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    except OSError:
        return  # not Linux: the workers see end-of-file on their channels
    for pid in pids:
        try:
            is_member = os.getsid(pid) == session
        except OSError:
            continue  # gone meanwhile
        if is_member and not is_resource_tracker(pid):
            kill(pid)


def reap_nowait(pid: int) -> bool:
    """Reap a child that has ended; tell whether it is gone."""
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG) is not None
    except ChildProcessError:
        return True


def available_memory() -> int:
    """Return how many bytes can be taken without pushing anything out: the machine's, or the container's if less."""
    try:
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":", 1) for line in file)
        available = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return sys.maxsize  # not Linux: nothing to go by
    for limit, used in _GROUPS:
        try:
            with open(limit) as limit_file, open(used) as used_file:
                available = min(available, int(limit_file.read()) - int(used_file.read()))
        except (OSError, ValueError):
            continue  # no such group, or "max"
    return max(available, 0)


_GROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def count_oom_kills() -> int:
    """Return how many processes the kernel has killed for want of memory since it started."""
    try:
        with open("/proc/vmstat") as file:
            return next((int(line.split()[1]) for line in file if line.startswith("oom_kill ")), 0)
    except OSError:
        return 0
