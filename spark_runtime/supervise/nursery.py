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
FORK_SECONDS = 2.0  # a fork takes milliseconds
END_SECONDS = 3.0
ORPHAN_SECONDS = 1.0
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
        self._loop = asyncio.get_running_loop()
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
        self._loop.call_later(FORK_SECONDS, self._wake, process)

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
        self._nursery_pids: set[int] = set()  # those that have ended included, until they are reaped
        self._burials: set[asyncio.Future[None]] = set()
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

    def _bury(self, nursery: Nursery) -> None:
        """Have a nursery that has ended, or is about to, reaped; waiting here would hold the loop."""
        burial = asyncio.ensure_future(self._reap(nursery))
        self._burials.add(burial)
        burial.add_done_callback(self._burials.discard)

    async def _reap(self, nursery: Nursery) -> None:
        await nursery.wait(END_SECONDS)
        self._nursery_pids.discard(nursery.pid)
        await self._clear_orphans()

    async def _clear_orphans(self) -> None:
        """Kill what a lost nursery's workers left behind; it has fallen to us, if we take orphans.

        multiprocessing's resource trackers end by themselves when the others have, and clean up as they do.
        """
        if not system.adopts_orphans():
            return
        limit = asyncio.get_running_loop().time() + ORPHAN_SECONDS
        while orphans := [pid for pid in system.children(os.getpid()) if pid not in self._nursery_pids]:
            is_late = asyncio.get_running_loop().time() > limit
            for pid in [each for orphan in orphans for each in (*system.descendants(orphan), orphan)]:
                if is_late or not system.is_resource_tracker(pid):
                    system.kill(pid)
            for pid in orphans:
                system.reap_nowait(pid)
            await asyncio.sleep(0.01)

    async def aclose(self) -> None:
        """End every nursery and wait until they and all their descendants are gone."""
        self._is_closing = True
        for each in self._all:
            each.close()
        for each in self._all:
            self._bury(each)
        self._all.clear()
        await asyncio.gather(*self._burials)

    def pids(self) -> list[int]:
        """The nurseries' own processes."""
        return [each.pid for each in self._all]

    def _start(self, modules: list[str]) -> Nursery:
        nursery = Nursery([SCRIPT_WORKER, *modules], self._ready, self._lost)
        self._all.append(nursery)
        self._nursery_pids.add(nursery.pid)
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
                self._bury(each)

    def _lost(self, nursery: Nursery) -> None:
        self._all.remove(nursery)
        self._bury(nursery)
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
