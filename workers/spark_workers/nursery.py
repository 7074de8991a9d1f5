"""The process that starts workers by forking, reaps them, and lets none of them outlive the supervisor.

It imports what workers will need, once, and forks; a worker is then ready in milliseconds with PyTorch in place. Four
rules keep that safe, each of them found by breaking it:

* It only imports and forks; it never computes. A process that has run OpenMP code hangs its children.
* It has one thread. Importing numpy starts OpenBLAS' threads unless ``OPENBLAS_NUM_THREADS`` is 1, so that is set
  during the imports and taken back after; each worker sets the real number through OpenBLAS itself. Where an import
  leaves a thread behind all the same, a child is forked to try; if it hangs, the nursery is given up.
* It is the parent: only a parent can wait. Workers lead sessions of their own, so Ctrl-C reaches the supervisor alone;
  when one dies what it started falls to the nursery, because it is a subreaper, and is killed.
* It ends when the supervisor does, by the pidfd of its parent as well as by end-of-file on the channel, and takes
  every descendant along. Workers have PDEATHSIG on the nursery in case it is killed itself.
"""

import gc
import importlib
import os
import selectors
import signal
import socket
import sys
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass

from spark_workers import blas, system
from spark_workers.channel import Channel
from spark_workers.messages import (
    Exited,
    Fork,
    Forked,
    NurseryReady,
    NurserySpoiled,
    Preload,
    Signal,
    Stopped,
)

PROBE_SECONDS = 10.0
TRACKER_SECONDS = 1.0
ORPHAN_SECONDS = 1.0
POLL_SECONDS = 0.25  # only where the parent has no pidfd


@dataclass(frozen=True, slots=True)
class Descriptors:
    """What a new worker is given."""

    channel: int
    bell: int
    stdout: int
    stderr: int

    def all(self) -> tuple[int, int, int, int]:
        """In the order in which they travel."""
        return self.channel, self.bell, self.stdout, self.stderr


def main(descriptor: int, parent: int) -> None:
    """Serve the supervisor at the other end of *descriptor* until it goes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the supervisor's business
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # and nothing waits on SIGTERM: end-of-file ends us
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    system.adopt_orphans()
    channel = Channel(socket.socket(fileno=descriptor))
    try:
        Nursery(channel, parent).run()
    finally:
        channel.close()


class Nursery:
    """Knows which worker is which process. It knows nothing of what they do."""

    def __init__(self, channel: Channel, parent: int) -> None:
        self._channel = channel
        self._parent = parent
        self._workers: dict[int, int] = {}  # pid to worker
        self._burying = 0
        self._trackers: dict[int, float] = {}  # resource trackers of dead workers, and when their time is up
        self._selector = selectors.DefaultSelector()

    def run(self) -> None:
        """Import, then fork, reap and tell until the supervisor is gone."""
        try:
            self._preload()
            self._watch()
            self._deal_all()  # what arrived together with the first message
            while True:
                self._turn()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            pass  # the supervisor is gone; nothing is left to tell anybody
        finally:
            self._end_everything()

    # --- the loop ---

    def _watch(self) -> None:
        self._wake_read, wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(wake_write, False)
        self._wake_write = wake_write
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        self._selector.register(self._channel.fileno(), selectors.EVENT_READ)
        self._selector.register(self._wake_read, selectors.EVENT_READ)
        self._parent_pidfd = system.open_pidfd(self._parent)
        if self._parent_pidfd is not None:
            self._selector.register(self._parent_pidfd, selectors.EVENT_READ)

    def _turn(self) -> None:
        ready = {key.fd for key, _ in self._selector.select(self._time_left())}
        if self._wake_read in ready:
            os.read(self._wake_read, 4096)
        self._reap()
        self._end_trackers()
        if self._channel.fileno() in ready:
            self._channel.fill()
            self._deal_all()
        if self._parent_pidfd in ready or os.getppid() != self._parent:
            raise EOFError("the supervisor ended")

    def _time_left(self) -> float | None:
        if self._trackers:
            return max(0.0, min(self._trackers.values()) - time.monotonic())
        return None if self._parent_pidfd is not None else POLL_SECONDS

    def _deal_all(self) -> None:
        while (found := self._channel.next_message()) is not None:
            self._deal(*found)

    def _deal(self, message: object, descriptors: list[int]) -> None:
        if isinstance(message, Fork):
            self._fork(message, Descriptors(*descriptors))
        elif isinstance(message, Signal):
            for pid, worker in self._workers.items():
                if worker == message.worker:
                    os.kill(pid, message.number)
        else:
            raise EOFError(f"the supervisor sent the nursery {type(message).__name__}")

    # --- imports ---

    def _preload(self) -> None:
        message, _ = self._channel.receive()
        if not isinstance(message, Preload):
            raise EOFError(f"the first message was {type(message).__name__}, not Preload")
        with blas.one_thread():
            for name in message.modules:
                self._import(name)
        _disown_finalizers()
        gc.collect()
        gc.freeze()  # what is here now is shared with every worker: collecting it would copy the pages
        self._channel.send(NurseryReady(sorted(sys.modules)))

    def _import(self, name: str) -> None:
        """Import one module, if it can be."""
        if name in sys.modules:
            return
        threads = _thread_count()
        try:
            importlib.import_module(name)
        except BaseException:  # noqa: BLE001 - whatever a package's import raises, the worker meets it again and shows it
            return
        if _thread_count() > threads and not _children_live():
            self._channel.send(NurserySpoiled(name))
            raise EOFError(f"children hang after importing {name}")

    # --- workers ---

    def _fork(self, message: Fork, given: Descriptors) -> None:
        if os.environ.get("SPARKRT_START") == "spawn" or not system.LINUX:
            pid = _spawn(message.entry, given)
        else:
            pid = os.fork()
            if pid == 0:
                self._become_worker(message.entry, given)
        for descriptor in given.all():
            os.close(descriptor)
        self._workers[pid] = message.worker
        pidfd = system.open_pidfd(pid)
        self._channel.send(Forked(message.worker, pid), [] if pidfd is None else [pidfd])
        if pidfd is not None:
            os.close(pidfd)

    def _become_worker(self, entry: str, given: Descriptors) -> None:
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            self._selector.close()
            self._channel.close()
            for descriptor in (self._wake_read, self._wake_write, self._parent_pidfd):
                if descriptor is not None:
                    os.close(descriptor)
            status = run_worker(entry, given, os.getppid())
        except BaseException:  # noqa: BLE001 - nothing may return into the nursery's own loop
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(status)

    def _reap(self) -> None:
        """Take notice of every child that ended, stopped or went on."""
        while True:
            try:
                found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WSTOPPED | os.WCONTINUED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if found is None:
                return
            if found.si_code in (os.CLD_EXITED, os.CLD_KILLED, os.CLD_DUMPED):
                status = found.si_status if found.si_code == os.CLD_EXITED else -found.si_status
                self._bury(found.si_pid, status)
                continue
            os.waitid(os.P_PID, found.si_pid, os.WSTOPPED | os.WCONTINUED | os.WNOHANG)
            if found.si_pid in self._workers:
                self._channel.send(Stopped(self._workers[found.si_pid], found.si_code != os.CLD_CONTINUED))

    def _bury(self, pid: int, status: int) -> None:
        """Kill what a dead worker left behind, then reap it and say so."""
        worker = self._workers.pop(pid, None)
        if worker is not None:
            self._burying = pid  # a zombie until it is reaped, below
            self._kill_orphans()
        _reap_one(pid)
        self._trackers.pop(pid, None)
        if worker is not None:
            self._channel.send(Exited(worker, status))

    def _kill_orphans(self) -> None:
        """Kill what the dead worker started: its session, and what made a session of its own.

        Whatever has fallen to us is of that worker, because workers that live keep their own orphans.
        """
        limit = time.monotonic() + ORPHAN_SECONDS
        while True:
            left = [pid for pid in self._orphans() if pid not in self._trackers]
            if not left or time.monotonic() > limit:
                return
            for pid in left:
                if system.is_resource_tracker(pid):
                    self._trackers[pid] = time.monotonic() + TRACKER_SECONDS
                else:
                    system.kill(pid)
                    self._wait_dead(pid, limit)

    def _wait_dead(self, pid: int, limit: float) -> None:
        """Wait for a killed orphan, so that its memory and its devices are free when the next worker starts."""
        while time.monotonic() < limit:
            try:
                if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG) is not None:
                    return
            except ChildProcessError:
                return  # not our child (yet): its parent is killed in this same round, and it falls to us in the next
            time.sleep(0.001)

    def _orphans(self) -> list[int]:
        found = []
        for child in system.children(os.getpid()):
            if child not in self._workers and child != self._burying:
                found += [child, *system.descendants(child)]
        return found

    def _end_trackers(self) -> None:
        for pid, limit in list(self._trackers.items()):
            if time.monotonic() > limit:
                system.kill(pid)
                del self._trackers[pid]

    def _end_everything(self) -> None:
        """Kill every descendant, workers first, resource trackers when the others are gone."""
        for pid in self._workers:
            system.kill(pid)
        limit = time.monotonic() + ORPHAN_SECONDS
        while time.monotonic() < limit:
            _reap_all()
            left = list(system.descendants(os.getpid()))
            trackers = [pid for pid in left if system.is_resource_tracker(pid)]
            others = [pid for pid in left if pid not in trackers]
            if not left:
                return
            for pid in others:
                system.kill(pid)
            time.sleep(0.005)
        for pid in system.descendants(os.getpid()):
            system.kill(pid)


def run_worker(entry: str, given: Descriptors, parent: int) -> int:
    """Turn this fresh process into a worker and return its exit status. Used after a fork and after a spawn."""
    if hasattr(os, "setsid") and os.getsid(0) != os.getpid():
        os.setsid()
    system.die_with_parent(parent)
    system.adopt_orphans()  # so that a child's child whose parent ends stays with us, and ends with us
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _move_streams(given)
    _offer_to_the_oom_killer()
    gc.enable()
    module, _, name = entry.partition(":")
    start: Callable[[int, int], int] = getattr(importlib.import_module(module), name)
    return start(given.channel, given.bell)


def _move_streams(given: Descriptors) -> None:
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(given.stdout, 1)
    os.dup2(given.stderr, 2)
    for descriptor in {null, given.stdout, given.stderr} - {0, 1, 2}:
        os.close(descriptor)
    # One line at a time, so that what the script printed before a crash has left the process.
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]


def _offer_to_the_oom_killer() -> None:
    """Let the kernel take the worker, which can be replaced, before the supervisor, which holds the state."""
    try:
        with open("/proc/self/oom_score_adj", "r+") as file:
            score = int(file.read())
            file.write(str(min(1000, score + 300)))
    except OSError:
        pass  # not Linux, or not allowed: then the kernel decides by size alone


def _spawn(entry: str, given: Descriptors) -> int:
    """Start a worker as a new interpreter, where forking is not safe."""
    import subprocess

    import __main__

    # `python -m spark_workers` has started us, or bootstrap.py, where that is not installed: it starts the worker too.
    start = ["-P", "-m", "spark_workers"] if __main__.__spec__ is not None else [str(__main__.__file__)]
    flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    numbers = [str(number) for number in given.all()]
    command = [sys.executable, *flags, *start, "worker", entry, str(os.getpid()), *numbers]
    process = subprocess.Popen(command, pass_fds=given.all(), start_new_session=True, stdin=subprocess.DEVNULL)
    process.returncode = 0  # the nursery reaps it; Popen must not
    return process.pid


def _disown_finalizers() -> None:
    """Have finalizers of what is imported here run in no worker's exit.

    Libraries register hundreds for their own bookkeeping (PyTorch for each of its operator libraries). In a forked
    process, which ends all at once, they would do nothing but touch memory, and hold a reload up for 40 ms.
    """
    for finalizer in list(weakref.finalize._registry):  # type: ignore[attr-defined]
        finalizer.atexit = False


def _thread_count() -> int:
    try:
        return len(os.listdir("/proc/self/task"))
    except OSError:
        return 1


def _children_live() -> bool:
    """Fork a child that computes a little with what is imported; tell whether it came to its end."""
    pid = os.fork()
    if pid == 0:
        try:
            _compute_a_little()
        finally:
            os._exit(0)
    limit = time.monotonic() + PROBE_SECONDS
    while time.monotonic() < limit:
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG) is not None:
            return True
        time.sleep(0.01)
    system.kill(pid)
    _reap_one(pid)
    return False


def _compute_a_little() -> None:
    import threading

    thread = threading.Thread(target=gc.collect)
    thread.start()
    thread.join()
    numpy, torch = sys.modules.get("numpy"), sys.modules.get("torch")
    if numpy is not None:
        square = numpy.ones((256, 256))
        square.dot(square)
    if torch is not None:
        torch.ones(256, 256).mm(torch.ones(256, 256))


def _reap_one(pid: int) -> None:
    try:
        os.waitid(os.P_PID, pid, os.WEXITED)
    except ChildProcessError:
        pass  # reaped already


def _reap_all() -> None:
    while True:
        try:
            if os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG) is None:
                return
        except ChildProcessError:
            return
