"""`Spark`: runs models on replicas. Read this first, then `pool/pool.py`, `pool/model_pool.py` and `pool/dispatch.py`.

A call goes from `submit` to the dispatcher of its model, from there straight into the pipe of a replica with room, on
the caller's own thread; the pool's one thread reads the answer and resolves the future.
"""

import logging
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Generator, Iterable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from spark_runtime.config import Model
from spark_runtime.errors import BadRequestError, ModelNotFound, SparkClosed
from spark_runtime.models.fronts import Fronts, Opened
from spark_runtime.models.prepared import ModelCache, ModelFile, Prepared
from spark_runtime.pool.job import FINISHED, NEVER, Call, Context, Job, Waiting
from spark_runtime.pool.pool import Pool
from spark_runtime.pool.statistics import Statistics
from spark_runtime.pool.stream import Outcome, Stream
from spark_workers.requests import read_numbers, write_numbers

if TYPE_CHECKING:
    from spark_runtime.models.registry import Registry, Wanted

MAX_WAITING = 10_000
WINDOW = 1024  # rows of a map that are under way

_log = logging.getLogger("spark_runtime")


class Spark:
    """Runs models on replicas: worker processes, each with an instance of its own.

    Thread-safe, and usable under asyncio. Close it, or use it in ``with``; a `Spark` that is forgotten closes itself.

    Args:
        models: The models that can be called. Their processes start with the first call.
        max_models: How many may be loaded at once; the least recently used one that is idle makes room.
        timeout: Seconds that a call may take, counted from submit; None for no limit.
        max_waiting: How many calls may wait, of all models together.
        cache_dir: Where compiled code is kept; the user's cache folder if None.
        on_note: Is told what a user wants to know (a long compilation, a broken rebuild), one sentence each; the log
            of name ``spark_runtime`` if None.

    Raises:
        BadRequestError: Two models of one name, or a number that makes no sense.
    """

    def __init__(
        self,
        models: Iterable[Model] = (),
        *,
        max_models: int = 20,
        timeout: float | None = 60.0,
        max_waiting: int = MAX_WAITING,
        cache_dir: str | Path | None = None,
        on_note: Callable[[str], None] | None = None,
    ) -> None:
        self._models: dict[str, Model] = {}
        for model in models:
            if not isinstance(model, Model):
                raise BadRequestError(f"models takes Model objects, not {type(model).__name__}")
            if model.name in self._models:
                raise BadRequestError(f"two models have the name {model.name!r}")
            self._models[model.name] = model
        for name, value, least in (("max_models", max_models, 1), ("max_waiting", max_waiting, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise BadRequestError(f"{name} is {value!r}, not a number of at least {least}")
        if timeout is not None and not timeout > 0:
            raise BadRequestError(f"timeout is {timeout!r}, not a number of seconds above 0")
        self._timeout = timeout
        note = on_note or _log.info
        cache = ModelCache(Path(cache_dir) if cache_dir is not None else None, warn=on_note)
        self._fronts = Fronts(self._models)
        self._pool = Pool(self._models, max_models, max_waiting, cache, note)
        self._pool.on_outcall = _Outcalls(self)
        unwatch = _watch(self._models.values(), self._pool, note)
        self._finalizer = weakref.finalize(self, _close, self._pool, unwatch)  # also at the interpreter's end

    # --- one call ---

    def execute(self, request: Any, model: str | None = None, *, timeout: float | None = None) -> Any:
        """Return the model's whole answer to *request*.

        Args:
            request: Anything that JSON can say, which the model gets as JSON, and the answer is read as JSON; or
                bytes, which it gets as they are, and the answer is bytes. A Neuron model takes plain inputs,
                ``{"radius": 3}``, or a whole request.
            model: Its name; may be left out if there is only one.
            timeout: Seconds for this call, in place of the model's and the `Spark`'s own.

        Raises:
            ExecuteError: The call failed; see `spark_runtime.errors` for the ways.
            ModelUnusable, EngineMissing: The model cannot be run at all.
            BadRequestError, QueueFull, SparkClosed: It was not tried.
        """
        name = self._name(model)
        opened = self._fronts.open(name, request)
        if opened.is_answered:
            return opened.read(b"", name, 0)
        answer, replica = self._wait(name, "", opened.payload, timeout, opened.context)
        return opened.read(answer, name, replica)

    def submit(self, request: Any, model: str | None = None, *, timeout: float | None = None) -> Call:
        """Begin a call; return its future. Its `Call.cancel` stops it wherever it is."""
        name = self._name(model)
        return self._begin(name, self._fronts.open(name, request), timeout)

    def submit_text(self, text: bytes, model: str | None = None, *, timeout: float | None = None) -> Call:
        """As `submit`, for a request that is JSON already; the answer is JSON as bytes, too."""
        name = self._name(model)
        return self._begin(name, self._fronts.open_text(name, text), timeout)

    async def aexecute(self, request: Any, model: str | None = None, *, timeout: float | None = None) -> Any:
        """As `execute`, for asyncio. Cancelling the task stops the work."""
        import asyncio  # only here and below: it takes longer to import than all the rest

        return await asyncio.wrap_future(self.submit(request, model, timeout=timeout))

    def call(self, model: str, function: str, *numbers: float, timeout: float | None = None) -> Any:
        """Call an export of a model with numbers; return None, a number, or a tuple of them. Errors as `execute`."""
        name = self._name(model)
        answer, replica = self._wait(name, _checked(function), write_numbers(numbers), timeout)
        return read_numbers(answer, name, replica)

    def submit_call(self, model: str, function: str, *numbers: float, timeout: float | None = None) -> Call:
        """Begin a call of an export; return its future."""
        return self._submit(self._name(model), _checked(function), write_numbers(numbers), read_numbers, timeout)

    async def acall(self, model: str, function: str, *numbers: float, timeout: float | None = None) -> Any:
        """As `call`, for asyncio."""
        import asyncio

        return await asyncio.wrap_future(self.submit_call(model, function, *numbers, timeout=timeout))

    # --- many calls ---

    def map(
        self, model: str, requests: Iterable[Any], *, ordered: bool = True, timeout: float | None = None
    ) -> Generator[Any, None, None]:
        """Yield the answers to *requests*, in their order, or as they come; the first error raises and ends it.

        Requests are taken as answers are, so neither side is ever held in memory as a whole. *timeout* is for each.
        """
        outcomes = self.outcomes(model, requests, ordered=ordered, timeout=timeout)
        try:
            for outcome in outcomes:
                if outcome.error is not None:
                    raise outcome.error
                yield outcome.answer
        finally:
            outcomes.close()

    async def amap(
        self, model: str, requests: Iterable[Any], *, ordered: bool = True, timeout: float | None = None
    ) -> AsyncIterator[Any]:
        """As `map`, for asyncio."""
        import asyncio

        answers = self.map(model, requests, ordered=ordered, timeout=timeout)
        nothing = object()
        try:
            while (answer := await asyncio.to_thread(next, answers, nothing)) is not nothing:
                yield answer
        finally:
            await asyncio.to_thread(answers.close)

    def outcomes(
        self,
        model: str,
        requests: Iterable[Any],
        *,
        ordered: bool = True,
        timeout: float | None = None,
        window: int = WINDOW,
    ) -> Generator[Outcome, None, None]:
        """Yield an `Outcome` for every request; one that fails does not end the others. Closing it stops what runs.

        Raises:
            ModelUnusable, EngineMissing, SparkClosed: The model as a whole cannot be run.
        """
        name = self._name(model)
        opening = partial(self._fronts.open, name)
        return Stream(self._pool, name, self._limit(name, timeout), requests, ordered, window, opening).run()

    # --- the rest ---

    def load(self, *models: str) -> None:
        """Begin to load models, all if none is named, so that their first calls need not wait."""
        for name in models or self._models:
            self._pool.load(self._name(name))

    def reload(self, model: str | None = None) -> bool:
        """Read a model's file again and put new replicas in place of the old, one by one; wait until that is done.

        Calls go on meanwhile. Returns whether anything was replaced: an unchanged file replaces nothing.

        Raises:
            ModelUnusable: The new code cannot be used; the old one goes on.
        """
        return self._pool.renew(self._name(model)).result()

    def statistics(self) -> Statistics:
        """Return a picture of this moment: models, replicas, calls, memory. It does not change any more."""
        return self._pool.statistics()

    def close(self) -> None:
        """Fail every call that has no answer yet with `SparkClosed`, end every process, wait until they are gone."""
        self._finalizer()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """As `concurrent.futures.Executor.shutdown`: with *wait* calls in flight get their answers first."""
        if cancel_futures or not wait:
            self.close()
            return
        while self._finalizer.alive and self._pool.is_busy():
            time.sleep(0.002)
        self.close()

    def __enter__(self) -> "Spark":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown(wait=problem is None)

    async def __aenter__(self) -> "Spark":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        import asyncio

        await asyncio.to_thread(self.shutdown, problem is None)

    # --- inside ---

    def _submit(
        self,
        name: str,
        function: str,
        payload: bytes,
        read: Callable[[bytes, str, int], Any],
        timeout: float | None,
        context: Context | None = None,
    ) -> Call:
        limit = self._limit(name, timeout)
        deadline = NEVER if limit is None else time.monotonic() + limit
        call = Call(name, function, payload, deadline, read, self._stop)
        call.context = context
        self._pool.submit(name, [call])
        return call

    def _begin(self, name: str, opened: Opened, timeout: float | None, context: Context | None = None) -> Call:
        if opened.is_answered:
            call = Call(name, "", b"", NEVER, opened.read, self._stop)
            call.state = FINISHED
            call.resolve(b"", 0)
            return call
        return self._submit(name, "", opened.payload, opened.read, timeout, context or opened.context)

    def _wait(
        self, name: str, function: str, payload: bytes, timeout: float | None, context: Context | None = None
    ) -> tuple[bytes, int]:
        limit = self._limit(name, timeout)
        job = Waiting(function, payload, NEVER if limit is None else time.monotonic() + limit)
        job.context = context
        try:
            self._pool.submit(name, (job,))
            return job.wait()
        except KeyboardInterrupt:
            self._pool.abandon(name, [job])
            raise

    def _stop(self, call: Call) -> bool:
        return self._pool.stop(call.model, call)

    def _limit(self, name: str, timeout: float | None) -> float | None:
        if timeout is not None:
            if not timeout > 0:
                raise BadRequestError(f"timeout is {timeout!r}, not a number of seconds above 0")
            return timeout
        own = self._models[name].timeout
        return self._timeout if own is None else own

    def _name(self, model: str | None) -> str:
        if model in self._models:
            return model
        known = ", ".join(map(repr, self._models)) or "none"
        if model is None:
            if len(self._models) == 1:
                return next(iter(self._models))
            raise BadRequestError(f"which model is to be called? There are {known}")
        raise ModelNotFound(f"there is no model {model!r}; there are {known}")


class _Outcalls:
    """Answers what models ask of other services, with the models of a `Spark`, which it does not keep alive."""

    def __init__(self, spark: Spark) -> None:
        self._spark = weakref.ref(spark)
        self._registry: Registry[str] | None = None
        self._making = threading.Lock()

    def __call__(self, model: str, job: Job, request: bytes, reply: Callable[[bytes, str], None]) -> None:
        """See `spark_runtime.pool.pool.Outcall`."""
        from spark_runtime.models.outcalls import Outcalls

        begin = partial(Outcalls(self._find, self._submit).begin, model, job, request, reply)
        if self._registry is None:  # packages have to be read, and whoever calls us reads every answer
            threading.Thread(target=begin, name="spark-outcall", daemon=True).start()
        else:
            begin()

    def _find(self, wanted: "Wanted") -> str:
        spark = self._open()
        name = f"{wanted.folder}/{wanted.service}" if wanted.folder else wanted.service
        if name in spark._models:
            return name
        with self._making:
            if self._registry is None:
                self._registry = self._packages(spark)
        return self._registry.find(wanted)

    def _packages(self, spark: Spark) -> "Registry[str]":
        from spark_runtime.models.registry import Registry

        registry: Registry[str] = Registry()
        for name in spark._models:
            if spark._fronts.is_package(name):
                registry.add(name, spark._fronts.identity(name), name)
        return registry

    def _submit(self, model: str, request: Any, context: Context, timeout: float) -> Call:
        spark = self._open()
        return spark._begin(model, spark._fronts.open(model, request), timeout, context)

    def _open(self) -> Spark:
        spark = self._spark()
        if spark is None:
            raise SparkClosed("this Spark is closed")
        return spark


def _checked(function: str) -> str:
    if not function:
        raise BadRequestError("the function to call has no name")
    return function


def _watch(models: Iterable[Model], pool: Pool, note: Callable[[str], None]) -> Callable[[], None]:
    """Watch the models that want it; return what ends that."""
    watched = [model for model in models if model.watch]
    if not watched:
        return lambda: None
    from spark_runtime.models.watching import ModelWatcher

    return ModelWatcher(watched, pool.renew, note).close


def _close(pool: Pool, unwatch: Callable[[], None]) -> None:
    unwatch()
    pool.close()


def prepare_model(model: Model, on_note: Callable[[str], None] | None = None) -> tuple[ModelFile, Prepared]:
    """Compile a model, or find it in the cache, without running it.

    Raises:
        ModelUnusable, ModelNotFound, EngineMissing, StoreError: It cannot be; the message says why.
    """
    pool = Pool({model.name: model}, 1, 1, ModelCache(warn=on_note), on_note or _log.info)
    try:
        return pool.prepared(model)
    finally:
        pool.close()
