"""Calls of exposed functions: waiting, running (one inside another, or side by side), and what they gave."""

import asyncio
import inspect
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from spark_workers.frames import FrameBroken
from spark_workers.messages import Began, Call, Message, MessageBroken, Raised, Returned
from spark_workers.scripts.asks import Asks
from spark_workers.scripts.errors import SparkCancelError, control_in
from spark_workers.scripts.exposed import ExposedNames
from spark_workers.scripts.loops import Loops
from spark_workers.scripts.tracebacks import format_script_error
from spark_workers.scripts.values import plain


@dataclass(frozen=True, slots=True)
class _Running:
    """A call that has begun; *was_paused* if the script was, so that the call itself does not wait."""

    id: str
    was_paused: bool


class Calls:
    """Runs exposed functions. A call that is interrupted by a reload gets no answer: the supervisor repeats it."""

    def __init__(self, exposed: ExposedNames, loops: Loops, send: Callable[[Message], None], asks: Asks) -> None:
        self._exposed = exposed
        self._loops = loops
        self._send = send
        self._asks = asks
        self._waiting: deque[Call] = deque()
        self._begun: set[str] = set()
        # Which call the code that asks belongs to; a context variable, because asyncio runs several side by side.
        self._running: ContextVar[_Running | None] = ContextVar("running", default=None)

    def add(self, call: Call) -> None:
        """Put a call in the queue."""
        self._waiting.append(call)

    def cancel(self, call: str) -> None:
        """Take a call that has not begun out of the queue; one that has is asked at its next checkpoint."""
        for each in list(self._waiting):
            if each.id == call:
                self._waiting.remove(each)
                self._send(Raised(call, "SparkCancelError", "cancelled before it began", ""))
                return
        if call in self._begun:  # else it has ended meanwhile, and the flag would never be taken down
            self._asks.cancelled.add(call)

    def current(self) -> str | None:
        """The call that the code which asks belongs to."""
        running = self._running.get()
        return running.id if running is not None else None

    def is_exempt(self) -> bool:
        """Tell whether the code that asks is a call made while the script was paused: it must not wait as well."""
        running = self._running.get()
        return running is not None and running.was_paused

    def has_waiting(self) -> bool:
        """Tell whether a call waits to be served."""
        return bool(self._waiting)

    def take_waiting(self) -> Call | None:
        """Take the next call out of the queue, for an event loop to run."""
        return self._waiting.popleft() if self._waiting else None

    def serve(self) -> None:
        """Run the waiting calls, one after another, in this thread.

        Raises:
            BaseException: What is not an answer: stop, reload, `SystemExit`, `KeyboardInterrupt`.
        """
        while self._waiting:
            call = self._waiting.popleft()
            with self._answering(call):
                value = self._function(call)(*call.args, **call.kwargs)
                if inspect.iscoroutine(value):
                    value = asyncio.run(value)
                self._answer(call, value)

    async def serve_one(self, call: Call) -> None:
        """Run one call inside an event loop, beside others.

        Raises:
            BaseException: What is not an answer, as `serve` does.
        """
        with self._answering(call):
            value = self._function(call)(*call.args, **call.kwargs)
            if inspect.isawaitable(value):
                value = await value
            self._answer(call, value)

    @contextmanager
    def _answering(self, call: Call) -> Iterator[None]:
        """Stand inside a call: its errors are answers, and its loops are its own."""
        self._send(Began(call.id))
        self._begun.add(call.id)
        before = self._running.set(_Running(call.id, self._asks.paused))
        entered = self._loops.enter_call(call.id)
        is_finished = True
        try:
            yield
        except BaseException as problem:
            is_finished = self._fail(call, problem)
            if not is_finished:
                raise
        finally:
            self._loops.leave_call(entered, finished=is_finished)
            self._running.reset(before)
            self._begun.discard(call.id)
            self._asks.cancelled.discard(call.id)

    def _function(self, call: Call) -> Callable[..., Any]:
        function = self._exposed.functions.get(call.name)
        if function is None:
            known = ", ".join(sorted(self._exposed.functions)) or "none"
            raise _NoFunction(f"the script exposes no function {call.name!r}; there is {known}")
        return function

    def _answer(self, call: Call, value: object) -> None:
        try:
            self._send(Returned(call.id, plain(value)))
        except (MessageBroken, FrameBroken) as problem:
            self._send(Raised(call.id, "ValueError", f"the result of {call.name}() cannot be sent: {problem}", ""))

    def _fail(self, call: Call, problem: BaseException) -> bool:
        """Answer with an error; False when *problem* is not the call's own and must go on."""
        control = control_in(problem)
        if isinstance(control, SparkCancelError):
            self._send(Raised(call.id, "SparkCancelError", "cancelled", ""))
            return True
        if control is not None or not isinstance(problem, Exception):
            return False
        text = "" if isinstance(problem, _NoFunction) else format_script_error(problem)
        kind = "LookupError" if isinstance(problem, _NoFunction) else type(problem).__name__
        self._send(Raised(call.id, kind, str(problem), text))
        return True


class _NoFunction(LookupError):
    """A call of a name that the script does not expose."""
