"""The supervisor's side of a nursery: starting workers, and learning how each of them ended."""

import mmap
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field

from spark_runtime.processes.channel import LoopChannel
from spark_runtime.processes.children import our_children
from spark_runtime.processes.loop import Loop
from spark_workers import system
from spark_workers.messages import (
    Exited,
    Fork,
    Forked,
    Message,
    NurseryReady,
    NurserySpoiled,
    Preload,
    Signal,
    Stopped,
)

FORK_SECONDS = 2.0  # a fork takes milliseconds
LOST = -int(signal.SIGKILL)  # the status of a worker that went down with its nursery


@dataclass
class Process:
    """One worker process as its owner sees it: alive until *on_exit* is called with its status."""

    number: int
    on_exit: Callable[[int], None]
    on_stopped: Callable[[bool], None]
    pid: int | None = None
    pidfd: int | None = None
    nursery: "Nursery | None" = None
    pending: list[int] = field(default_factory=list)  # signals asked for before the process was there

    def send_signal(self, number: int) -> None:
        """Send a signal; to a process that has ended nothing happens."""
        if self.pid is None:
            self.pending.append(number)
        elif self.pidfd is not None:
            try:
                signal.pidfd_send_signal(self.pidfd, number)
            except ProcessLookupError:
                pass  # it has ended; the nursery will say how
        elif self.nursery is not None:
            self.nursery.signal(self.number, number)

    def kill(self) -> None:
        """End it at once."""
        self.send_signal(signal.SIGKILL)


class Nursery:
    """One nursery process."""

    def __init__(
        self,
        loop: Loop,
        modules: list[str],
        on_ready: Callable[["Nursery"], None],
        on_lost: Callable[["Nursery"], None],
        command: list[str] | None = None,
        environment: dict[str, str] | None = None,
    ) -> None:
        """Start one that imports *modules*. *command* and *environment* are those of this process if None."""
        ours, theirs = socket.socketpair()
        self._popen = our_children.start(
            [*(command or this_interpreter()), "nursery", str(theirs.fileno()), str(os.getpid())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env=environment,
        )
        theirs.close()
        self._loop = loop
        self._processes: dict[int, Process] = {}
        self._on_ready = on_ready
        self._on_lost = on_lost
        self.spoiled_by: str | None = None
        self.modules: set[str] = set()  # what is imported in it, once it is ready
        self.is_ready = False
        self._channel = LoopChannel(loop, ours, self._deal, self._closed)
        self._channel.send(Preload(modules))

    @property
    def pid(self) -> int:
        """The nursery's own process."""
        return self._popen.pid

    def is_needed(self) -> bool:
        """Tell whether a worker of this nursery lives."""
        return bool(self._processes)

    def start(self, process: Process, entry: str, descriptors: list[int]) -> None:
        """Have *process* started; the descriptors are taken over."""
        process.nursery = self
        self._processes[process.number] = process
        self._channel.send(Fork(process.number, entry), descriptors)
        self._loop.call_later(FORK_SECONDS, self._wake, process)

    def signal(self, worker: int, number: int) -> None:
        """Pass a signal on, where there are no pidfds."""
        self._channel.send(Signal(worker, number))

    def close(self) -> None:
        """End the nursery, and with it whatever it still has. How its workers end nobody is told any more."""
        self._channel.close()
        for process in self._processes.values():
            if process.pidfd is not None:
                self._loop.remove_reader(process.pidfd)
                os.close(process.pidfd)
                process.pidfd = None
        self._processes.clear()

    def disown(self) -> None:
        """Let go of it in a fork of this process, without ending it."""
        self._channel.disown()
        self._popen.returncode = 0  # it is not this process's child, and must not be waited for here
        for process in self._processes.values():
            if process.pidfd is not None:
                os.close(process.pidfd)

    def has_ended(self) -> bool:
        """Tell whether the process is gone; it is reaped then."""
        return self._popen.poll() is not None

    def wait(self, seconds: float) -> None:
        """Wait for the end of a closed nursery, *seconds* at most, then make sure of it. Not for a loop's thread."""
        try:
            self._popen.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """End it at once, and wait until it is gone."""
        self._popen.kill()
        self._popen.wait()

    def _deal(self, message: Message, descriptors: list[int]) -> None:
        if isinstance(message, NurseryReady):
            self.is_ready, self.modules = True, set(message.modules)
            self._on_ready(self)
        elif isinstance(message, NurserySpoiled):
            self.spoiled_by = message.module
        elif isinstance(message, Forked):
            self._forked(self._processes[message.worker], message.pid, descriptors)
        elif isinstance(message, Stopped):
            self._processes[message.worker].on_stopped(message.stopped)
        elif isinstance(message, Exited):
            self._exited(message.worker, message.status)

    def _wake(self, process: Process) -> None:
        """No answer to a fork: the nursery imports, or somebody has stopped it, and that can be undone."""
        if process.pid is None and process.number in self._processes:
            self._popen.send_signal(signal.SIGCONT)
            self._loop.call_later(FORK_SECONDS, self._give_up, process)

    def _give_up(self, process: Process) -> None:
        """A nursery that has nothing to do but to fork, and does not, is stuck: end it."""
        if process.pid is None and process.number in self._processes and self.is_ready:
            self._popen.kill()

    def _forked(self, process: Process, pid: int, descriptors: list[int]) -> None:
        process.pid = pid
        process.pidfd = descriptors[0] if descriptors else None
        if process.pidfd is not None:
            self._loop.add_reader(process.pidfd, self._ended, process)
        for number in process.pending:
            process.send_signal(number)
        process.pending.clear()

    def _ended(self, process: Process) -> None:
        """The process has ended. How, the nursery will say; a nursery that does not has been stopped by somebody."""
        assert process.pidfd is not None
        self._loop.remove_reader(process.pidfd)
        self._loop.call_later(FORK_SECONDS, self._wake_to_reap, process)

    def _wake_to_reap(self, process: Process) -> None:
        if process.number in self._processes:
            self._popen.send_signal(signal.SIGCONT)

    def _exited(self, worker: int, status: int) -> None:
        process = self._processes.pop(worker)
        if process.pidfd is not None:
            self._loop.remove_reader(process.pidfd)
            os.close(process.pidfd)
            process.pidfd = None
        process.on_exit(status)

    def _closed(self, reason: str) -> None:
        """The nursery is gone. The kernel kills its workers; what they started in their sessions is left to us."""
        self._popen.poll()
        self._on_lost(self)  # first: whoever hears of a lost worker may ask for another at once
        for number, process in list(self._processes.items()):
            process.kill()
            if process.pid is not None:
                system.kill_session(process.pid)
            self._exited(number, LOST)


def this_interpreter() -> list[str]:
    """Return the command that runs the worker side under this very Python."""
    flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    return [sys.executable, *flags, "-P", "-m", "spark_workers"]


def shared_page() -> int:
    """Return a descriptor of one page of memory to be mapped here and in a worker."""
    if sys.platform == "linux":
        descriptor = os.memfd_create("sparkrt-bell")
    else:
        with tempfile.TemporaryFile() as file:  # unlinked: it ends with its last descriptor
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, mmap.PAGESIZE)
    return descriptor
