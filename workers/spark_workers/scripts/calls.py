"""Calls of exposed functions: waiting, running (one inside another), and what they gave."""

import asyncio
import inspect
from collections import deque
from collections.abc import Callable
from typing import Any

from spark_workers.frames import FrameBroken
from spark_workers.messages import Began, Call, Message, MessageBroken, Raised, Returned
from spark_workers.scripts.errors import SparkCancelError, control_in
from spark_workers.scripts.exposed import ExposedNames
from spark_workers.scripts.loops import Loops
from spark_workers.scripts.tracebacks import format_script_error
from spark_workers.scripts.values import plain


class Calls:
    """Runs exposed functions. A call that is interrupted by a reload gets no answer: the supervisor repeats it."""

    def __init__(self, exposed: ExposedNames, loops: Loops, send: Callable[[Message], None]) -> None:
        self._exposed = exposed
        self._loops = loops
        self._send = send
        self._waiting: deque[Call] = deque()
        self._running: list[str] = []

    def add(self, call: Call) -> None:
        """Put a call in the queue."""
        self._waiting.append(call)

    def drop(self, call: str) -> bool:
        """Take a call that has not begun out of the queue; tell whether it was there."""
        for each in list(self._waiting):
            if each.id == call:
                self._waiting.remove(each)
                self._send(Raised(call, "SparkCancelError", "cancelled before it began", ""))
                return True
        return False

    def current(self) -> str | None:
        """The call that runs now, the innermost one."""
        return self._running[-1] if self._running else None

    def has_waiting(self) -> bool:
        """Tell whether a call waits to be served."""
        return bool(self._waiting)

    def is_running(self) -> bool:
        """Tell whether a call has begun and not ended."""
        return bool(self._running)

    def serve(self) -> None:
        """Run the waiting calls, one after another, in this thread.

        Raises:
            BaseException: What is not an answer: stop, reload, `SystemExit`, `KeyboardInterrupt`.
        """
        while self._waiting:
            call = self._waiting.popleft()
            entered = self._enter(call)
            finished = False
            try:
                value = self._function(call)(*call.args, **call.kwargs)
                if inspect.iscoroutine(value):
                    value = asyncio.run(value)
                self._answer(call, value)
                finished = True
            except BaseException as problem:
                finished = self._fail(call, problem)
                if not finished:
                    raise
            finally:
                self._leave(call, entered, finished)

    def take_waiting(self) -> Call | None:
        """Take the next call out of the queue, for an event loop to run."""
        return self._waiting.popleft() if self._waiting else None

    async def serve_one(self, call: Call) -> None:
        """Run one call inside an event loop, beside others.

        Raises:
            BaseException: What is not an answer, as `serve` does.
        """
        entered = self._enter(call)
        finished = False
        try:
            value = self._function(call)(*call.args, **call.kwargs)
            if inspect.isawaitable(value):
                value = await value
            self._answer(call, value)
            finished = True
        except BaseException as problem:
            finished = self._fail(call, problem)
            if not finished:
                raise
        finally:
            self._leave(call, entered, finished)

    def _enter(self, call: Call) -> Any:
        self._send(Began(call.id))
        self._running.append(call.id)
        return self._loops.enter_call(call.id)

    def _leave(self, call: Call, entered: Any, finished: bool) -> None:
        self._loops.leave_call(entered, finished=finished)
        self._running.remove(call.id)

    def _function(self, call: Call) -> Callable[..., Any]:
        function = self._exposed.functions.get(call.name)
        if function is None:
            known = ", ".join(sorted(self._exposed.functions)) or "none"
            raise LookupError(f"the script exposes no function {call.name!r}; there is {known}")
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
        text = (
            "" if isinstance(problem, LookupError) and problem.__traceback__ is None else format_script_error(problem)
        )
        self._send(Raised(call.id, type(problem).__name__, str(problem), text))
        return True
