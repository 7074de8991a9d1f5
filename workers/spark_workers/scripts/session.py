"""A script's life in its worker: loaded, restored, run, and left. Everything here happens on the main thread.

    Load ──> top level runs ──> Loaded ──> Start ──> torch() ──> idle, serving calls ──> Left
                     └──> LoadFailed          (values restored)       ▲
                                                   checkpoints serve calls, pause, hand over state, raise

`Session.turn` is the slow way through a checkpoint; the fast way never gets here.
"""

import asyncio
import inspect
import os
import sys
import threading
import time
from types import FrameType
from typing import Any

from spark_workers.messages import (
    Ask,
    Call,
    CancelCall,
    Entered,
    Exposed,
    Flush,
    Imported,
    Message,
    Note,
    Start,
    Turn,
    Unread,
    Wish,
)
from spark_workers.scripts import checkpoint as checkpoints
from spark_workers.scripts import randomness
from spark_workers.scripts.asks import Asks
from spark_workers.scripts.calls import Calls
from spark_workers.scripts.errors import (
    SparkControl,
    SparkReloadError,
    SparkStopError,
    SparkUsageError,
    control_in,
)
from spark_workers.scripts.exposed import ExposedNames
from spark_workers.scripts.inbox import Inbox
from spark_workers.scripts.loader import Entry
from spark_workers.scripts.loops import Loops
from spark_workers.scripts.persist import Persisted
from spark_workers.scripts.snapshots import RUNTIME, Schedule, SnapshotRefused, Snapshots
from spark_workers.scripts.swallowed import describe_handler
from spark_workers.scripts.tracebacks import format_script_error
from spark_workers.scripts.tree import Tree, installed_modules

FLUSH_SECONDS = 1 / 30
FLUSH_FACTOR = 100  # showing values costs the script at most a hundredth of its time
IDLE_SECONDS = 0.25
THREAD_PAUSE_SECONDS = 0.01
MANY_MODULES = 20
_UNKNOWN = object()
IMPORTS_SECONDS = 1.0


class Session:
    """The script's state on this side: what was asked, exposed, persisted, and where it is."""

    def __init__(self, send: Any, inbox: Inbox, tree: Tree, bell: checkpoints.Bell) -> None:
        self._send = send
        self._inbox = inbox
        self._tree = tree
        self._pid = os.getpid()
        self._main = threading.get_ident()
        self._dealing = threading.Lock()
        self.asks = Asks()
        self.exposed = ExposedNames()
        self.persisted = Persisted(self.note)
        self.checkpoint, self._passed, self._start_at = checkpoints.make_checkpoint(
            bell.face, self.turn, self.asks.pending
        )
        self.loops = Loops(self.checkpoint)
        self.calls = Calls(self.exposed, self.loops, send)
        self._snapshots = Snapshots(send, inbox.segment)
        self._schedule = Schedule()
        self._series: list[list[Any]] = []
        self._next_flush = 0.0
        self._modules = self._files = 0
        self._next_imports = 0.0
        self._raised: SparkControl | None = None
        self._status = "starting"
        self._dropped: dict[str, object] = {}  # keys that could not be kept, with the value they had then
        self._resumed: asyncio.Event | None = None
        self.persisted.is_open = False

    # --- life ---

    def run(self, entry: Entry, start: Start, descriptors: list[int]) -> str:
        """Run the script to its end; return how it ended: done, stopped or reload.

        Raises:
            BaseException: What the script raised.
        """
        self.asks.paused = start.paused
        self.persisted.is_open = True
        if start.parts:
            self._restore(start, descriptors)
        self._schedule.begin(self.persisted.content)
        self.enter("running")
        is_async = inspect.iscoroutinefunction(inspect.unwrap(entry))
        try:
            if is_async:
                AsyncHost(self, self._inbox).run(entry)
            else:
                self._run_sync(entry)
        except BaseException as problem:
            if not self._is_asked_end(problem):
                raise
            return self._ending(unwound=True)
        return self._ending(unwound=False)

    def _run_sync(self, entry: Entry) -> None:
        result = entry()
        if inspect.iscoroutine(result):
            asyncio.run(result)
        self.main_returned()
        while self.wants_to_idle():
            self._idle()

    def main_returned(self) -> None:
        """``torch()`` came to its end by itself."""
        self.loops.finish_main()
        self._raised = None
        self.flush(now=True)

    def wants_to_idle(self) -> bool:
        """Tell whether the script now waits for calls: it exposes functions, and nothing asks it to go."""
        return self.exposed.has_functions() and not self.asks.stop and not self.asks.leave

    def _is_asked_end(self, problem: BaseException) -> bool:
        """Tell whether *problem* is the answer to a request of ours; what else was raised on the way is shown."""
        if isinstance(control_in(problem), (SparkStopError, SparkReloadError)):
            return True
        if self.asks.leave and isinstance(problem.__context__, SparkReloadError):
            self.note(f"while making room for the new code: {format_script_error(problem)}", "warning")
            return True
        return False

    def _ending(self, *, unwound: bool) -> str:
        """Hand over the values as they are now, except where a checkpoint did so for a reload.

        What ``finally`` blocks do on the way out of a reload is not part of the state: the new code goes on from the
        checkpoint. A stop is an end, so there it is.
        """
        reload = self.asks.leave and not self.asks.stop
        if not (reload and unwound):
            self.take_snapshot()
        if self.asks.stop:
            return "stopped"
        return "reload" if reload else "done"

    def _idle(self) -> None:
        """Wait for one message and act on it."""
        self.enter("idle" if not self.asks.paused else "paused")
        arrived = self._inbox.take(IDLE_SECONDS)
        if arrived is not None:
            self._deal(*arrived)
            self.deal()
        if self.calls.has_waiting() and self.wants_to_idle():
            self.enter("running" if not self.asks.paused else "paused")
            self.calls.serve()
        if self.asks.snapshot or self._schedule.is_due():
            self.take_snapshot()
        self.flush()

    # --- checkpoints ---

    def turn(self) -> "checkpoints.Turn | checkpoints.PauseTurn":
        """Do what was asked, in this order: stop, reload, pause, then serve calls, show values, take a snapshot."""
        if os.getpid() != self._pid:
            return checkpoints.DONE  # in a process that the script forked
        if threading.get_ident() != self._main:
            return self._turn_in_thread()
        self.deal()
        self._raise_if_asked()
        self.asks.count_step()
        if self.asks.paused:
            if _in_event_loop():
                return checkpoints.PauseTurn(self._paused_async)
            self._pause()
        if self.calls.has_waiting() and not _in_event_loop():
            self.calls.serve()
        self.flush()
        if self.asks.snapshot or self._schedule.is_due():
            self.take_snapshot()
        return checkpoints.DONE

    def _turn_in_thread(self) -> "checkpoints.Turn":
        """A checkpoint in a thread of the script's: it obeys, and leaves calls and snapshots to the main thread."""
        self.deal()
        while self.asks.paused and not (self.asks.stop or self.asks.leave):
            self.enter("paused")
            time.sleep(THREAD_PAUSE_SECONDS)
            self.deal()
        self.enter("running")
        self._raise_if_asked()
        self.flush()
        return checkpoints.DONE

    def deal(self) -> None:
        """Take every message that has arrived."""
        while (arrived := self._inbox.take_nowait()) is not None:
            self._deal(*arrived)

    def _deal(self, message: Message, descriptors: list[int]) -> None:
        with self._dealing:
            if isinstance(message, Ask):
                self.asks.take(message.what, message.count)
                if self._resumed is not None and not self.asks.paused:
                    self._resumed.set()
            elif isinstance(message, Call):
                self.calls.add(message)
            elif isinstance(message, CancelCall):
                if not self.calls.drop(message.id):
                    self.asks.cancelled.add(message.id)
            elif isinstance(message, Turn):
                self._turn_control(message)
            else:
                raise SparkUsageError(f"the supervisor sent a running script {type(message).__name__}")

    def _turn_control(self, message: Turn) -> None:
        try:
            self.exposed.turn(message.name, message.value)
        except SparkUsageError as problem:
            self.note(str(problem), "warning")

    def _raise_if_asked(self) -> None:
        signal = self.asks.signal(self.calls.current())
        if signal is None:
            return
        if self._raised is not None and type(self._raised) is type(signal):
            self.note(f"{type(signal).__name__} was swallowed by {describe_handler(self._raised)}", "warning")
        if self.asks.leave or self.asks.stop:
            self.take_snapshot()
        else:
            self.asks.cancelled.discard(self.calls.current() or "")
        self._raised = signal
        raise signal

    # --- pause ---

    def _pause(self) -> None:
        """Wait here until resumed, serving calls; stop and reload end it."""
        self.flush(now=True)
        self.enter("paused")
        while self.asks.paused:
            arrived = self._inbox.take(IDLE_SECONDS)
            if arrived is not None:
                self._deal(*arrived)
            self._raise_if_asked()
            self.calls.serve()
            self.flush()
            if self.asks.snapshot:
                self.take_snapshot()
        self.enter("running")

    async def _paused_async(self) -> None:
        self.flush(now=True)
        self.enter("paused")
        while self.asks.paused:
            self._resumed = self._resumed or asyncio.Event()
            self._resumed.clear()
            try:
                await asyncio.wait_for(self._resumed.wait(), IDLE_SECONDS)
            except asyncio.TimeoutError:
                pass  # look again: a stop or a reload also ends a pause
            self.deal()
            self._raise_if_asked()
            self.flush()
        self.enter("running")

    # --- state ---

    def _restore(self, start: Start, descriptors: list[int]) -> None:
        load = self._snapshots.restore(start, descriptors)
        runtime: Any = load.values.pop(RUNTIME, {})
        unread = self.persisted.restore(load, runtime.get("versions", {}))
        self.loops.positions.update(runtime.get("loops", {}))
        self.exposed.turned.update(runtime.get("turned", {}))
        self._start_at(int(start.meta.get("checkpoints", 0)))
        if unread:
            self._send(Unread(unread))
        if "random" in runtime:
            randomness.restore(runtime["random"])

    def take_snapshot(self) -> None:
        """Hand the persisted values to the supervisor."""
        self.asks.snapshot = False
        runtime = {
            "versions": self.persisted.versions,
            "loops": self.loops.positions,
            "turned": self.exposed.turned,
            "random": randomness.capture(),
        }
        began = time.monotonic()
        try:
            dropped = self._snapshots.take({**self._keepable(), RUNTIME: runtime}, {"checkpoints": self._passed()})
        except SnapshotRefused as problem:
            self.note(f"{problem}; the state from before is kept", "warning")
            dropped = ()
        cost = time.monotonic() - began
        before = self._schedule.interval
        self._schedule.taken(cost)
        if self._schedule.interval > max(before, 2 * 30.0):
            self.note(
                f"a snapshot holds the script for {cost:.1f} s, so one is taken every {self._schedule.interval:.0f} s"
            )
        for each in dropped:
            if each.key not in self._dropped:
                self.note(
                    f"{each.path} is not kept over a reload ({each.reason}): its initializer makes it anew", "warning"
                )
            self._dropped[each.key] = self.persisted.content().get(each.key)

    def _keepable(self) -> dict[str, Any]:
        """The persisted values, less those that could not be kept the last time: finding that out takes a while."""
        content = self.persisted.content()
        return {key: value for key, value in content.items() if self._dropped.get(key, _UNKNOWN) is not value}

    # --- showing ---

    def flush(self, *, now: bool = False) -> None:
        """Show what changed since the last time, at most thirty times a second."""
        began = time.monotonic()
        if began < self._next_flush and not now:
            return
        if not self.exposed.is_announced:
            self._send(Exposed(*self.exposed.describe()))
        self._tell_imports(began)
        series, self._series = self._series, []
        place = "" if now else _place(self._tree)
        values = self.exposed.changes()
        self._send(Flush(self._passed(), place, values, series, self.loops.progress()))
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        ended = time.monotonic()
        self._next_flush = ended + max(FLUSH_SECONDS, (ended - began) * FLUSH_FACTOR)

    def _tell_imports(self, now: float) -> None:
        """Tell new files of the user's at once, and what a nursery may import ahead when much has been added."""
        grown = len(sys.modules) - self._modules > MANY_MODULES and now >= self._next_imports
        if not grown and len(self._tree.files) == self._files:
            return
        self._files = len(self._tree.files)
        installed: list[str] = []
        if grown:
            self._modules = len(sys.modules)
            self._next_imports = now + IMPORTS_SECONDS
            installed = installed_modules(self._tree)
        self._send(Imported(dict(self._tree.files), installed))

    def wish(self, wish: Wish) -> None:
        """The script asks for something itself: it holds from the next checkpoint on, and the supervisor is told."""
        self.asks.take(wish.what, wish.count)
        self._start_at(self._passed())
        self._send(wish)

    def log(self, numbers: dict[str, Any]) -> None:
        """Add a point to the series that the page plots."""
        if len(self._series) < 100_000:
            self._series.append([self._passed(), time.time(), numbers])

    def note(self, text: str, level: str = "info") -> None:
        """Tell the user something, in the runtime's name."""
        self._send(Note(level, text))

    def enter(self, status: str) -> None:
        """Tell the supervisor what the script does now, if that changed."""
        if status != self._status:
            self._status = status
            self._send(Entered(status))

    @property
    def status(self) -> str:
        """What the script is doing, as far as this side knows."""
        if self.asks.stop:
            return "stopping"
        if self.asks.paused and self._status != "paused":
            return "pausing"
        return self._status


class AsyncHost:
    """Runs an asynchronous script: ``torch()`` is one task, and calls are served whenever the loop is free."""

    def __init__(self, session: Session, inbox: Inbox) -> None:
        self._session = session
        self._inbox = inbox

    def run(self, entry: Entry) -> None:
        """Run the script until it has ended.

        Raises:
            BaseException: What ended one of its tasks.
        """
        asyncio.run(self._main(entry))

    async def _main(self, entry: Entry) -> None:
        loop = asyncio.get_running_loop()
        woken = asyncio.Event()
        self._inbox.on_message = lambda: _wake(loop, woken)
        main = asyncio.ensure_future(entry())
        tasks: set[asyncio.Future[Any]] = {main}
        try:
            while tasks or self._session.wants_to_idle():
                woken.clear()
                self._session.deal()
                self._begin_calls(tasks)
                if not tasks and (self._session.asks.leave or self._session.asks.stop):
                    return
                if main.done() and not tasks:
                    self._session.enter("paused" if self._session.asks.paused else "idle")
                waiting = asyncio.ensure_future(woken.wait())
                done, _ = await asyncio.wait(
                    {*tasks, waiting}, timeout=IDLE_SECONDS, return_when=asyncio.FIRST_COMPLETED
                )
                waiting.cancel()
                tasks -= done
                for each in done - {waiting}:
                    each.result()  # what is not an answer ends the script
                    if each is main:
                        self._session.main_returned()
                self._session.flush()
        finally:
            self._inbox.on_message = None
            for each in tasks:
                each.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _begin_calls(self, tasks: "set[asyncio.Future[Any]]") -> None:
        if self._session.asks.leave or self._session.asks.stop:
            return
        while (call := self._session.calls.take_waiting()) is not None:
            if not self._session.asks.paused:
                self._session.enter("running")
            tasks.add(asyncio.ensure_future(self._session.calls.serve_one(call)))


def _wake(loop: asyncio.AbstractEventLoop, woken: asyncio.Event) -> None:
    loop.call_soon_threadsafe(woken.set)


def _in_event_loop() -> bool:
    return asyncio._get_running_loop() is not None


def _place(tree: Tree) -> str:
    """Where the checkpoint stands in the user's code."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if tree.is_own(frame.f_code.co_filename):
            return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"
        frame = frame.f_back
    return ""
