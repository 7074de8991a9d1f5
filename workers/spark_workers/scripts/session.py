"""A script's life in its worker: restored, run, and left. Everything here happens on the main thread.

    Load ──> top level runs ──> Loaded ──> Start ──> torch() ──> idle, serving calls ──> Left
                     └──> LoadFailed          (values restored)       ▲
                                                   checkpoints serve calls, pause, hand over state, raise

`Session.turn` is the slow way through a checkpoint; the fast way never gets here.
"""

import asyncio
import inspect
import os
import threading
import time
from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING

from spark_workers.messages import Ask, Call, CancelCall, Message, Start, Stayed, Turn, Wish
from spark_workers.scripts import checkpoint as checkpoints
from spark_workers.scripts.asks import Asks
from spark_workers.scripts.asynchronous import AsyncHost, in_event_loop
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
from spark_workers.scripts.keeping import Keeper
from spark_workers.scripts.loader import Entry
from spark_workers.scripts.loops import Loops
from spark_workers.scripts.persist import Persisted
from spark_workers.scripts.showing import Display
from spark_workers.scripts.swallowed import describe_handler
from spark_workers.scripts.tracebacks import format_script_error
from spark_workers.scripts.tree import Tree

if TYPE_CHECKING:
    from spark_workers.scripts.models import Models

IDLE_SECONDS = 0.25
THREAD_PAUSE_SECONDS = 0.01


class Session:
    """The script on this side: what was asked of it, and how it answers at its checkpoints."""

    def __init__(self, send: Callable[[Message], None], inbox: Inbox, tree: Tree, bell: checkpoints.Bell) -> None:
        self._send = send
        self._inbox = inbox
        self._pid = os.getpid()
        self._main = threading.get_ident()
        self._dealing = threading.Lock()
        self.asks = Asks()
        self.exposed = ExposedNames()
        self.checkpoint, self.passed, self._start_at = checkpoints.make_checkpoint(
            bell.face, self.turn, self.asks.pending
        )
        self.loops = Loops(self.checkpoint)
        self.display = Display(self.exposed, self.loops, tree, send)
        self.calls = Calls(self.exposed, self.loops, send, self.asks)
        self.persisted = Persisted(self.display.note)
        self._keeper = Keeper(self.persisted, self.loops, self.exposed, inbox, send, self.display.note)
        # What was raised last; a context variable, because each asyncio task is told once.
        self._raised: ContextVar[SparkControl | None] = ContextVar("raised", default=None)
        self._waits = False  # at a checkpoint, paused
        self._is_stale = False  # a reload was swallowed, and the script has gone on since its snapshot
        self._waiters: set[asyncio.Event] = set()  # asyncio's tasks that wait while paused
        self._models: Models | None = None
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
            self._start_at(self._keeper.restore(start, descriptors))
        self._keeper.begin()
        self.display.enter("running")
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

    def main_returned(self) -> None:
        """``torch()`` came to its end by itself."""
        self.loops.finish_main()
        self._raised.set(None)
        self.flush(now=True)

    def wants_to_idle(self) -> bool:
        """Tell whether the script now waits for calls: it exposes functions, and nothing asks it to go."""
        return self.exposed.has_functions() and not self.asks.stop and not self.asks.leave

    def _run_sync(self, entry: Entry) -> None:
        result = entry()
        if inspect.iscoroutine(result):
            asyncio.run(result)
        self.main_returned()
        while self.wants_to_idle():
            self._idle()

    def _idle(self) -> None:
        """Wait for one message and act on it."""
        self.display.enter("paused" if self.asks.paused else "idle")
        arrived = self._inbox.take(IDLE_SECONDS)
        if arrived is not None:
            self._deal(*arrived)
            self.deal()
        if self.calls.has_waiting() and self.wants_to_idle():
            self.display.enter("paused" if self.asks.paused else "running")
            self.calls.serve()
        if self._keeper.is_due():
            self.take_snapshot()
        self.flush()

    def _is_asked_end(self, problem: BaseException) -> bool:
        """Tell whether *problem* is the answer to a request of ours; what else was raised on the way is shown."""
        if isinstance(control_in(problem), (SparkStopError, SparkReloadError)):
            return True
        if self.asks.leave and isinstance(problem.__context__, SparkReloadError):
            self.display.note(f"while making room for the new code: {format_script_error(problem)}", "warning")
            return True
        return False

    def _ending(self, *, unwound: bool) -> str:
        """Hand over the values as they are now, except where a checkpoint did so for a reload.

        What ``finally`` blocks do on the way out of a reload is not part of the state: the new code goes on from the
        checkpoint. A stop is an end, so there it is.
        """
        reload = self.asks.leave and not self.asks.stop
        if not (reload and unwound) or self._is_stale:
            self.take_snapshot(last=True)
        if self.asks.stop:
            return "stopped"
        return "reload" if reload else "done"

    # --- checkpoints ---

    def turn(self) -> "checkpoints.Turn | checkpoints.PauseTurn":
        """Do what was asked, in this order: stop, reload, pause, then serve calls, show values, take a snapshot."""
        if os.getpid() != self._pid:
            return checkpoints.DONE  # in a process that the script forked
        if threading.get_ident() != self._main:
            return self._turn_in_thread()
        self.asks.count_step()
        self.deal()
        self._raise_if_asked()
        if self.asks.paused and not self.calls.is_exempt():
            if in_event_loop():
                return checkpoints.PauseTurn(self._paused_async)
            self._pause()
        if self.calls.has_waiting() and not in_event_loop():
            self.calls.serve()
        self.flush()
        if self._keeper.is_due():
            self.take_snapshot()
        return checkpoints.DONE

    def deal(self) -> None:
        """Take every message that has arrived."""
        while (arrived := self._inbox.take_nowait()) is not None:
            self._deal(*arrived)

    def flush(self, *, now: bool = False) -> None:
        """Show what changed."""
        self.display.flush(self.passed(), now=now)

    def take_snapshot(self, *, last: bool = False) -> None:
        """Hand the persisted values to the supervisor."""
        self._keeper.take(self.passed(), last=last)

    def models(self) -> "Models":
        """Return the way to the supervisor's models.

        Raises:
            SparkUsageError: Asked for at the top level of a script.
        """
        if not self.persisted.is_open:
            raise SparkUsageError(
                "models cannot be called at the top level of a script, which also runs while the old code goes on; "
                "call them inside torch()"
            )
        with self._dealing:
            if self._models is None:
                from spark_workers.scripts.models import Models  # a script that calls no models pays nothing for them

                self._models = Models(self._send, self.look)
                self._inbox.on_answer = self._models.answered
        return self._models

    def look(self) -> None:
        """For code that waits for something else: raise what was asked, unless a checkpoint has raised it before.

        Raises:
            SparkControl: Stop or a reload was asked, or the call of an exposed function that waits was cancelled.
        """
        if os.getpid() != self._pid:
            raise SparkUsageError("the answer of a model comes to the process that asked, not to one that it forked")
        self.deal()
        signal, before = self.asks.signal(self.calls.current()), self._raised.get()
        if signal is not None and (type(signal), str(signal)) != (type(before), str(before)):
            self._raise_if_asked()

    def wish(self, wish: Wish) -> None:
        """The script asks for something itself: it holds from the next checkpoint on, and the supervisor is told."""
        self.asks.take(wish.what, wish.count)
        self._start_at(self.passed())
        self._send(wish)

    @property
    def status(self) -> str:
        """What the script is doing, as far as this side knows."""
        if self.asks.stop:
            return "stopping"
        if self.asks.paused:
            return "paused" if self._waits else "pausing"
        return self.display.status

    def _turn_in_thread(self) -> "checkpoints.Turn":
        """A checkpoint in a thread of the script's: it obeys, and leaves calls and snapshots to the main thread."""
        self.deal()
        while self.asks.paused and not (self.asks.stop or self.asks.leave):
            self.display.enter("paused")
            time.sleep(THREAD_PAUSE_SECONDS)
            self.deal()
        self.display.enter("running")
        self._raise_if_asked()
        self.flush()
        return checkpoints.DONE

    def _deal(self, message: Message, descriptors: list[int]) -> None:
        with self._dealing:
            if isinstance(message, Ask):
                self.asks.take(message.what, message.count)
                self.display.forget_status()
                for waiter in self._waiters:
                    waiter.set()
            elif isinstance(message, Call):
                self.calls.add(message)
            elif isinstance(message, CancelCall):
                self.calls.cancel(message.id)
            elif isinstance(message, Turn):
                self._turn_control(message)
            else:
                raise SparkUsageError(f"the supervisor sent a running script {type(message).__name__}")

    def _turn_control(self, message: Turn) -> None:
        try:
            self.exposed.turn(message.name, message.value)
        except SparkUsageError as problem:
            self.display.note(str(problem), "warning")

    def _raise_if_asked(self) -> None:
        signal = self.asks.signal(self.calls.current())
        if signal is None:
            return
        before = self._raised.get()
        again = before is not None and type(before) is type(signal)
        if before is not None and again and not self._is_stale:
            self.display.note(f"{type(signal).__name__} was swallowed by {describe_handler(before)}", "warning")
        if isinstance(signal, (SparkReloadError, SparkStopError)) and threading.get_ident() == self._main:
            # A script that swallows the signal raises it at every step; that must not mean a snapshot at every step.
            self._is_stale = again and not self._keeper.can_afford()
            is_kept = self._is_stale or self._keeper.take(self.passed(), last=not again)
            if not is_kept and isinstance(signal, SparkReloadError):
                self._stay()
                return
        self._raised.set(signal)
        raise signal

    def _stay(self) -> None:
        """There is no room for the state: go on with the old code rather than lose what it has done."""
        self.asks.leave = False
        self._raised.set(None)
        self._send(Stayed())

    # --- pause ---

    def _pause(self) -> None:
        """Wait here until resumed, serving calls; stop and reload end it."""
        self._begin_wait()
        while self.asks.paused:
            arrived = self._inbox.take(IDLE_SECONDS)
            if arrived is not None:
                self._deal(*arrived)
            self._raise_if_asked()
            self.calls.serve()
            self.flush()
        self._end_wait()

    def _begin_wait(self) -> None:
        self._waits = True
        self.flush(now=True)
        self.display.enter("paused")

    def _end_wait(self) -> None:
        self._waits = False
        self.display.enter("running")

    async def _paused_async(self) -> None:
        self._begin_wait()
        waiter = asyncio.Event()
        self._waiters.add(waiter)
        try:
            while self.asks.paused:
                waiter.clear()
                try:
                    await asyncio.wait_for(waiter.wait(), IDLE_SECONDS)
                except asyncio.TimeoutError:
                    pass  # look again: a stop or a reload also ends a pause
                self.deal()
                self._raise_if_asked()
                self.flush()
        finally:
            self._waiters.discard(waiter)
        self._end_wait()
