"""The supervisor's side of the nursery: starting workers, and learning how each of them ended.

There may be two nurseries for a while: the first one starts empty, so that the first worker need not wait; when that
worker's imports are known a second one imports them ahead, and later workers come from there. A nursery that is not
needed any more is kept while it has workers, because it is their parent.
"""

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

from spark_runtime.errors import NurseryDied
from spark_runtime.supervise.channel import LoopChannel
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

SCRIPT_WORKER = "spark_workers.scripts.worker"  # every nursery has the runtime's own part imported
MANY_MODULES = 10  # fewer are not worth another nursery
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
        self, modules: list[str], on_ready: Callable[["Nursery"], None], on_lost: Callable[["Nursery"], None]
    ) -> None:
        ours, theirs = socket.socketpair()
        flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
        command = [
            sys.executable,
            *flags,
            "-P",
            "-m",
            "spark_workers",
            "nursery",
            str(theirs.fileno()),
            str(os.getpid()),
        ]
        self._popen = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True, env=_environment()
        )
        theirs.close()
        self._processes: dict[int, Process] = {}
        self._on_ready = on_ready
        self._on_lost = on_lost
        self.spoiled_by: str | None = None
        self.modules: set[str] = set()  # what is imported in it, once it is ready
        self.is_ready = False
        self._channel = LoopChannel(ours, self._deal, self._closed)
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

    def signal(self, worker: int, number: int) -> None:
        """Pass a signal on, where there are no pidfds."""
        self._channel.send(Signal(worker, number))

    def close(self) -> None:
        """End the nursery, and with it whatever it still has."""
        self._channel.close()

    async def wait(self, seconds: float) -> None:
        """Wait for the end of a closed nursery, then make sure of it."""
        limit = asyncio.get_running_loop().time() + seconds
        while self._popen.poll() is None and asyncio.get_running_loop().time() < limit:
            await asyncio.sleep(0.005)
        if self._popen.poll() is None:
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

    def _forked(self, process: Process, pid: int, descriptors: list[int]) -> None:
        process.pid = pid
        process.pidfd = descriptors[0] if descriptors else None
        for number in process.pending:
            process.send_signal(number)
        process.pending.clear()

    def _exited(self, worker: int, status: int) -> None:
        process = self._processes.pop(worker)
        if process.pidfd is not None:
            os.close(process.pidfd)
            process.pidfd = None
        process.on_exit(status)

    def _closed(self, reason: str) -> None:
        """The nursery is gone. The kernel kills its workers; what they started in their sessions is left to us."""
        self._popen.poll()
        for number, process in list(self._processes.items()):
            if process.pid is not None:
                process.kill()
                system.kill_session(process.pid)
            self._exited(number, LOST)
        self._on_lost(self)


class Nurseries:
    """Knows the nursery that starts workers now, and the older ones that still have some."""

    def __init__(self, modules: list[str], left_out: set[str], on_left_out: Callable[[str], None]) -> None:
        self._left_out = set(left_out)
        self._on_left_out = on_left_out
        self._all: list[Nursery] = []
        self._next: Nursery | None = None
        self._failures = 0
        self._is_closing = False
        self._tried: set[str] = set()
        self._current = self._start(modules)

    def start(self, process: Process, entry: str, descriptors: list[int]) -> None:
        """Have a worker process started.

        Raises:
            NurseryDied: No nursery can be started.
        """
        if self._current not in self._all:
            if self._failures > 3:
                raise NurseryDied("the process that starts workers ends at once; `python -m spark_workers` shows why")
            self._current = self._start([])
        self._current.start(process, entry, descriptors)

    def prepare(self, modules: list[str]) -> None:
        """Import *modules* in a new nursery, which takes over when it is ready."""
        wanted = [name for name in modules if name.partition(".")[0] not in self._left_out]
        missing = set(wanted) - self._current.modules - self._tried
        if self._next is None and self._current.is_ready and not self._is_closing and len(missing) > MANY_MODULES:
            self._tried = missing  # what cannot be imported ahead is not tried again and again
            self._next = self._start(wanted)

    async def aclose(self) -> None:
        """End every nursery and wait until they and all their descendants are gone."""
        self._is_closing = True
        for each in self._all:
            each.close()
        await asyncio.gather(*(each.wait(3.0) for each in self._all))

    def pids(self) -> list[int]:
        """The nurseries' own processes."""
        return [each.pid for each in self._all]

    def _start(self, modules: list[str]) -> Nursery:
        nursery = Nursery([SCRIPT_WORKER, *modules], self._ready, self._lost)
        self._all.append(nursery)
        return nursery

    def _ready(self, nursery: Nursery) -> None:
        self._failures = 0
        if nursery is self._next:
            self._current, self._next = nursery, None
        self.tidy()

    def tidy(self) -> None:
        """End nurseries that are neither used nor needed."""
        for each in list(self._all):
            if each not in (self._current, self._next) and not each.is_needed():
                each.close()
                self._all.remove(each)
                # Reaped when it is gone; waiting here would hold the loop.
                self._reaping = asyncio.ensure_future(each.wait(3.0))

    def _lost(self, nursery: Nursery) -> None:
        self._all.remove(nursery)
        if nursery.spoiled_by is not None:
            package = nursery.spoiled_by.partition(".")[0]
            self._left_out.add(package)
            self._on_left_out(package)
        else:
            self._failures += 1
        if nursery is self._next:
            self._next = None


def _environment() -> dict[str, str]:
    """The user's environment; what is ours and secret is never in it."""
    return dict(os.environ)
