"""Calls that a script makes of the supervisor's models.

A call is a message to the supervisor and a future here. The side thread resolves the future as soon as the answer is
there, so no checkpoint is needed for it. What a script hangs on a future runs on a thread of its own, because the side
thread must go on reading whatever that does: it may wait for the next answer, or pass a checkpoint.

Whoever takes a call out of the ledger ends it, and nobody else: the side thread with an answer, or a cancel.
"""

import asyncio
import itertools
import math
import queue
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from functools import partial
from typing import Any

from spark_workers.errors import BadRequestError, ExecuteError, from_dict
from spark_workers.frames import FrameBroken
from spark_workers.futures import StoppableFuture
from spark_workers.messages import Execute, Executed, ExecuteFailed, Message, MessageBroken, StopExecute
from spark_workers.requests import read_bytes, read_json, read_numbers, write_numbers, write_request
from spark_workers.scripts.tracebacks import format_script_error

LOOK_SECONDS = 0.25  # a call that takes less is not interrupted, so that most scripts stop at their checkpoints

_Read = Callable[[bytes, str, int], Any]


class ModelCall(StoppableFuture):
    """A call of a model as the script sees it. While it is waited for, stop and reload are raised in who waits."""

    def __init__(self, owner: "Models", number: int, model: str, read: _Read) -> None:
        super().__init__(model)
        self._owner = owner
        self._number = number
        self._read = read

    def cancel(self) -> bool:
        """Stop the work, wherever it is; return False only when it has already ended."""
        self._owner.cancel(self._number)
        return self.cancelled()

    def result(self, timeout: float | None = None) -> Any:
        """Wait for the answer.

        Raises:
            SparkError: There is none; `ExecuteCancelled` after a cancel.
            TimeoutError: It has not come yet.
            SparkControl: Stop or a reload was asked meanwhile.
        """
        problem = self.exception(timeout)
        if problem is not None:
            raise problem  # from here, where the script's traceback shows no line of a library
        return super().result(0)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait for the end; return the error, if it ended in one. Raises as `result` while it waits, or cancelled."""
        self._wait(timeout)
        return super().exception(None if timeout is None else 0)

    def add_done_callback(self, fn: Callable[["Future[Any]"], object]) -> None:
        """Have *fn* called with this future when it has ended, on a thread that is there for such callbacks."""
        super().add_done_callback(lambda done: self._owner.callbacks.put(partial(fn, done)))

    def when_done(self, tell: Callable[[], object]) -> None:
        """Have *tell*, which must neither wait nor raise, called at once when it has ended, on any thread."""
        super().add_done_callback(lambda done: tell())

    def settle(self, message: Executed | ExecuteFailed) -> None:
        """Take the answer."""
        if isinstance(message, ExecuteFailed):
            self.set_exception(from_dict(message.error))
            return
        try:
            value = self._read(message.answer, message.model, message.replica)
        except ExecuteError as problem:
            self.set_exception(problem)
        else:
            self.set_result(value)

    def _wait(self, timeout: float | None) -> None:
        """Wait for the end, *timeout* seconds at most, and look up from time to time."""
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        while not self.done() and (left := deadline - time.monotonic()) > 0:
            try:
                super().exception(min(left, LOOK_SECONDS))
            except FutureTimeout:
                self._owner.look()


class Models:
    """The calls without an answer, by number."""

    def __init__(self, send: Callable[[Message], None], look: Callable[[], None]) -> None:
        self._send = send
        self.look = look
        self.callbacks = CallbackThread()
        self._calls: dict[int, ModelCall] = {}
        self._numbers = itertools.count(1)

    def submit(self, request: Any, model: str | None, timeout: float | None) -> ModelCall:
        """Begin a call; see `spark_workers.scripts.api.Spark.submit`."""
        read = read_bytes if isinstance(request, (bytes, bytearray, memoryview)) else read_json
        return self._begin(model, "", write_request(request), read, timeout)

    def submit_call(self, model: str, function: str, numbers: tuple[Any, ...], timeout: float | None) -> ModelCall:
        """Begin a call of an export."""
        if not isinstance(function, str) or not function:
            raise BadRequestError(f"the function to call is {function!r}, not a name")
        return self._begin(model, function, write_numbers(numbers), read_numbers, timeout)

    def wait(self, call: ModelCall) -> Any:
        """Return the answer; whatever ends the waiting also ends the call."""
        try:
            return call.result()
        except BaseException:
            call.cancel()
            raise

    async def wait_async(self, call: ModelCall) -> Any:
        """As `wait`, for asyncio: cancelling the task stops the work."""
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[None] = loop.create_future()
        call.when_done(lambda: _wake(loop, ended))
        try:
            while not (await asyncio.wait({ended}, timeout=LOOK_SECONDS))[0]:
                self.look()
        except BaseException:
            call.cancel()
            raise
        return call.result()

    def cancel(self, number: int) -> None:
        """Have a call stopped that has not ended."""
        call = self._calls.pop(number, None)
        if call is not None:
            call.set_cancelled()
            self._send(StopExecute(number))

    def answered(self, message: Executed | ExecuteFailed) -> None:
        """Take an answer; called on the side thread. One that nobody waits for any more is dropped."""
        call = self._calls.pop(message.id, None)
        if call is not None:
            call.settle(message)

    def _begin(self, model: str | None, function: str, payload: bytes, read: _Read, timeout: float | None) -> ModelCall:
        if model is not None and (not isinstance(model, str) or not model):
            raise BadRequestError(f"the model to call is {model!r}, not a name")
        number = next(self._numbers)
        message = Execute(number, model or "", function, payload, _seconds(timeout))
        call = self._calls[number] = ModelCall(self, number, model or "", read)
        try:
            self._send(message)
        except (MessageBroken, FrameBroken) as problem:  # a name with half of a surrogate pair, or far too long
            del self._calls[number]
            raise BadRequestError(f"the call cannot be sent: {problem}") from problem
        return call


class CallbackThread:
    """Runs what scripts hang on futures, one after another. The thread starts with the first."""

    def __init__(self) -> None:
        self._waiting: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._starting = threading.Lock()
        self._has_started = False

    def put(self, callback: Callable[[], object]) -> None:
        """Have *callback* run soon."""
        self._waiting.put(callback)
        with self._starting:
            if not self._has_started:
                self._has_started = True
                threading.Thread(target=self._run, name="spark-callbacks", daemon=True).start()

    def _run(self) -> None:
        while True:
            callback = self._waiting.get()
            try:
                callback()
            except BaseException as problem:  # noqa: BLE001 - the script's code; a stop ends this callback, not the next
                print(format_script_error(problem), end="", file=sys.stderr, flush=True)


def _seconds(timeout: float | None) -> float:
    if timeout is None:
        return 0.0
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not timeout > 0:
        raise BadRequestError(f"timeout is {timeout!r}, not a number of seconds above 0")
    return float(min(timeout, sys.float_info.max))


def _wake(loop: asyncio.AbstractEventLoop, ended: "asyncio.Future[None]") -> None:
    try:
        loop.call_soon_threadsafe(_set, ended)
    except RuntimeError:
        pass  # the loop is closed, so nobody waits


def _set(ended: "asyncio.Future[None]") -> None:
    if not ended.done():
        ended.set_result(None)
