"""The calls that scripts make of models, and the models that answer them.

A worker names its calls by numbers of its own. What it says is checked here; what the call itself makes no sense of is
told to the script as the error that a `Spark` raises. Answers come on the pool's thread and are handed to the run's
loop, where every ledger lives.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import msgpack

from spark_runtime.config import Model
from spark_runtime.errors import ModelNotFound, ProtocolViolated, SparkError
from spark_runtime.supervise.worker import Worker
from spark_workers import messages as m
from spark_workers.frames import FrameBroken
from spark_workers.requests import write_numbers

if TYPE_CHECKING:
    from spark_runtime.pool.job import Call
    from spark_runtime.runtime import Spark

MOST_SECONDS = 1e6  # eleven days; a call that may take longer has no limit
MOST_TEXT = 2000


class Executions:
    """Knows which call of which worker is which call of the run's `Spark`.

    The `Spark` is made for the first call, so that a run whose script calls no models starts no processes for them.
    """

    def __init__(self, models: Sequence[Model], note: Callable[[str], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._models = models
        self._note = note
        self._spark: Spark | None = None
        self._calls: dict[tuple[int, int], Call] = {}  # by the number of the worker, and its number of the call
        self._is_closed = False

    def execute(self, worker: Worker, message: m.Execute) -> None:
        """Begin a call for a worker; what cannot be begun is answered at once.

        Raises:
            ProtocolViolated: No worker of ours says this.
        """
        key = (worker.number, message.id)
        if key in self._calls:
            raise ProtocolViolated(f"call {message.id} was begun twice")
        if not message.seconds >= 0:
            raise ProtocolViolated(f"call {message.id} may take {message.seconds} s")
        numbers = _numbers(message.payload) if message.function else []
        if self._is_closed:
            return
        limit = None if message.seconds == 0 else message.seconds if message.seconds <= MOST_SECONDS else math.inf
        try:
            if message.function:
                call = self._open().submit_call(message.model, message.function, *numbers, timeout=limit)
            else:
                call = self._open().submit_text(message.payload, message.model or None, timeout=limit)
        except SparkError as problem:
            _refuse(worker, message.id, problem)
            return
        self._calls[key] = call
        call.add_done_callback(lambda done: self._post(self._ended, worker, message.id, call))

    def stop(self, worker: Worker, message: m.StopExecute) -> None:
        """Stop a call that nobody waits for any more; its answer may be on its way already."""
        call = self._calls.pop((worker.number, message.id), None)
        if call is not None:
            call.cancel()

    def drop(self, worker: Worker) -> None:
        """Stop what a worker has begun that is gone."""
        # The newest first: otherwise the end of each call that runs lets the next one begin.
        for key in [each for each in reversed(self._calls) if each[0] == worker.number]:
            self._calls.pop(key).cancel()

    async def aclose(self) -> None:
        """Stop every call, end every process of a model."""
        self._is_closed = True
        self._calls.clear()
        if self._spark is not None:
            await asyncio.to_thread(self._spark.close)

    def _open(self) -> Spark:
        if not self._models:
            raise ModelNotFound(
                "this run has no models: name one with `spark run --model NAME=PATH`, or in [tool.spark.models] of a "
                "pyproject.toml beside the script or above it"
            )
        if self._spark is None:
            from spark_runtime.runtime import Spark

            self._spark = Spark(self._models, on_note=lambda text: self._post(self._note, text))
        return self._spark

    def _ended(self, worker: Worker, number: int, call: Call) -> None:
        """Tell a worker how its call ended; nobody if it was stopped meanwhile."""
        key = (worker.number, number)
        if self._calls.get(key) is not call:
            return
        del self._calls[key]
        problem = call.exception()
        if isinstance(problem, SparkError):
            _refuse(worker, number, problem)
        elif problem is not None:
            raise problem  # a fault of ours, which ends the run with its traceback
        else:
            worker.send(m.Executed(number, call.model, call.replica, _bytes(call.result())))

    def _post(self, callback: Callable[..., None], *arguments: Any) -> None:
        """Have something happen on the loop; for the threads of the `Spark`."""
        try:
            self._loop.call_soon_threadsafe(callback, *arguments)
        except RuntimeError:
            pass  # the loop is closed: the run is over, and with it whoever would be told


def _refuse(worker: Worker, number: int, problem: SparkError) -> None:
    try:
        worker.send(m.ExecuteFailed(number, problem.to_dict()))
    except (m.MessageBroken, FrameBroken):  # a path that is no text is in it, or far too many words
        text = str(problem)[:MOST_TEXT].encode("utf-8", "backslashreplace").decode()
        worker.send(m.ExecuteFailed(number, {"error": type(problem).__name__, "message": text}))


def _numbers(payload: bytes) -> list[Any]:
    """Return the arguments of an export; whether they are numbers `Spark` looks at."""
    try:
        numbers = msgpack.unpackb(payload)
    except (ValueError, RecursionError, msgpack.UnpackException, TypeError) as problem:
        raise ProtocolViolated(f"the arguments of an export are no msgpack: {problem}") from problem
    if not isinstance(numbers, list):
        raise ProtocolViolated(f"the arguments of an export are a {type(numbers).__name__}")
    return numbers


def _bytes(answer: Any) -> bytes:
    """Return an answer as it travels: a model's own bytes, or the numbers that an export returned."""
    if isinstance(answer, bytes):
        return answer
    return write_numbers(answer if isinstance(answer, tuple) else () if answer is None else (answer,))
