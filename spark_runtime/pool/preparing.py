"""From a model's file to machine code: on a thread of its own, with a throw-away worker that compiles."""

import os
import socket
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import TYPE_CHECKING, Any

from spark_runtime.config import Model
from spark_runtime.errors import ModelUnusable, NurseryDied, SparkClosed, SparkError
from spark_runtime.models.identity import engine_identity
from spark_runtime.models.prepared import ModelCache, ModelFile, Prepared
from spark_runtime.pool.loop import PoolLoop
from spark_runtime.processes.channel import LoopChannel
from spark_runtime.processes.nursery import Process, shared_page, this_interpreter
from spark_workers.messages import Compile, Compiled, Message, Refused

if TYPE_CHECKING:
    from spark_runtime.models.interpreter import Interpreter

ENTRY = "spark_workers.replicas.compiling:start"
COMPILE_SECONDS = 600  # of wall time and of processor time on each core together
COMPILE_BYTES = 8 << 30
NOTICE_SECONDS = 1.0
FROZEN_SECONDS = 1.0

#: Starts a process at an entry with the descriptors that every worker gets; called on the loop.
StartProcess = Callable[[Model, Process, str, list[int]], None]


class Preparer:
    """Prepares models. `prepare` blocks, so it is called on a thread that may."""

    def __init__(self, loop: PoolLoop, start: StartProcess, cache: ModelCache, note: Callable[[str], None]) -> None:
        self._loop = loop
        self._start = start
        self._cache = cache
        self._note = note
        self._interpreters: dict[str | None, Interpreter] = {}
        self._workers: set[_CompileWorker] = set()
        self._is_closed = False

    def command(self, model: Model) -> list[str]:
        """Return what starts the nursery of a model that is prepared."""
        if model.engine != "wasmer":
            return this_interpreter()
        from spark_runtime.models.interpreter import nursery_command

        return nursery_command(self._interpreters[model.python])

    def prepare(self, model: Model) -> tuple[ModelFile, Prepared]:
        """Read, compile if need be, and return the module with its code.

        Raises:
            ModelUnusable, ModelNotFound, EngineMissing, StoreError: It cannot be; the message says why.
        """
        file = ModelFile.read(model.path)
        _check_kind(model, file)
        if model.engine == "wasmer":
            from spark_runtime.models.interpreter import find_interpreter

            self._interpreters[model.python] = find_interpreter(model.python, model.engine)
            identity = self._interpreters[model.python].identity_for(model.settings())
        else:
            identity = engine_identity(model.engine)
        prepared = self._cache.prepare(
            file, identity, model.settings(), lambda source, code: self._compile(model, file, source, code)
        )
        return file, prepared

    def discard(self, prepared: Prepared) -> None:
        """Forget code that the engine refused."""
        self._cache.discard(prepared)

    def close(self) -> None:
        """Have whoever waits for a compilation wait no more; the loop has ended."""
        self._is_closed = True
        for worker in list(self._workers):
            worker.abandon()

    def _compile(self, model: Model, file: ModelFile, source: int, code: int) -> dict[str, Any]:
        answer: Future[dict[str, Any]] = Future()
        began = time.monotonic()
        limits = [COMPILE_SECONDS, COMPILE_BYTES]
        message = Compile(model.engine, model.settings(), limits)
        descriptors = [os.dup(source), os.dup(code)]
        worker = _CompileWorker(model, self._loop, answer, self._workers.discard, descriptors)
        self._workers.add(worker)
        if self._is_closed:  # looked at after adding: `close` either sees the worker or is seen here
            worker.abandon()
        else:
            self._loop.post(lambda: worker.start(self._start, message))
        try:
            return answer.result(NOTICE_SECONDS)
        except FutureTimeout:
            if answer.done():
                raise
        self._note(f"compiling {file.path.name} ({file.size / 1e6:.1f} MB), once; later starts take it from the cache")
        try:
            report = answer.result(COMPILE_SECONDS)
        except FutureTimeout:
            self._loop.post(worker.kill)
            raise ModelUnusable(
                f"model {model.name!r}: compiling takes longer than {COMPILE_SECONDS} s", "over-limit"
            ) from None
        self._note(f"compiled {file.path.name} in {time.monotonic() - began:.1f} s")
        return report


def _check_kind(model: Model, file: ModelFile) -> None:
    """Refuse a package that is to be run as a module, or the other way round, or by an engine that cannot."""
    name = model.name
    if model.kind not in ("auto", "neuron") and file.is_package:
        raise ModelUnusable(
            f"model {name!r}: {file.path} is a zip, so a Neuron package, and its kind is {model.kind!r}"
        )
    if model.kind == "neuron" and not file.is_package:
        raise ModelUnusable(
            f"model {name!r}: {file.path} is a module, and its kind is 'neuron', which is a zip package"
        )
    if file.is_package and model.engine != "wasmtime":
        text = f"model {name!r}: Neuron packages run on wasmtime, not on {model.engine}; leave its engine out"
        raise ModelUnusable(text, "unsupported-import")


class _CompileWorker:
    """One process that compiles one module and ends. All of it happens on the loop."""

    def __init__(
        self,
        model: Model,
        loop: PoolLoop,
        answer: "Future[dict[str, Any]]",
        on_end: Callable[["_CompileWorker"], None],
        descriptors: list[int],
    ) -> None:
        self._on_end = on_end
        self._descriptors = descriptors  # until they are sent
        self._model = model
        self._loop = loop
        self._answer = answer
        self._channel: LoopChannel | None = None
        self._is_frozen = False
        self._process = Process(0, self._exited, self._stopped)

    def start(self, start: StartProcess, message: Compile) -> None:
        """Start the process and tell it what to do; what cannot be started fails the answer."""
        if self._answer.done():
            return  # it was abandoned meanwhile
        ours, theirs = socket.socketpair()
        self._channel = LoopChannel(self._loop, ours, self._deal, lambda reason: None)
        try:
            start(self._model, self._process, ENTRY, [theirs.detach(), shared_page(), os.dup(2), os.dup(2)])
        except SparkError as problem:
            self._channel.close()
            self._on_end(self)
            self._close_descriptors()
            self._answer.set_exception(problem)
            return
        self._channel.send(message, self._descriptors)
        self._descriptors = []

    def kill(self) -> None:
        """End it."""
        self._process.kill()

    def _stopped(self, is_stopped: bool) -> None:
        """Give it a second to go on when the kernel reports it stopped; nobody would ever hear of it otherwise."""
        self._is_frozen = is_stopped
        if is_stopped:
            self._loop.call_later(FROZEN_SECONDS, self._end_frozen)

    def _end_frozen(self) -> None:
        if self._is_frozen:
            self.kill()

    def abandon(self) -> None:
        """Let go of it: the loop has ended."""
        self._on_end(self)
        self._close_descriptors()
        if self._channel is not None:
            self._channel.disown()
        if not self._answer.done():
            self._answer.set_exception(SparkClosed("this Spark was closed while a model was compiled"))

    def _close_descriptors(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.pop())

    def _deal(self, message: Message, descriptors: list[int]) -> None:
        if self._answer.done():
            return
        if isinstance(message, Compiled):
            self._answer.set_result(message.report)
        elif isinstance(message, Refused):
            text = f"model {self._model.name!r}: {message.message}"
            self._answer.set_exception(ModelUnusable(text, message.kind, message.details))

    def _exited(self, status: int) -> None:
        assert self._channel is not None
        self._channel.drain()
        self._channel.close()
        self._on_end(self)
        if not self._answer.done() and self._process.pid is None:
            self._answer.set_exception(NurseryDied("the process that starts workers ended; `spark doctor` shows why"))
        elif not self._answer.done():
            how = f"exit code {status}" if status >= 0 else f"signal {-status}"
            self._answer.set_exception(
                ModelUnusable(
                    f"model {self._model.name!r}: the process that compiled it ended ({how}); the module may be "
                    f"broken, or need more than {COMPILE_BYTES >> 30} GiB or {COMPILE_SECONDS} s",
                    "over-limit",
                )
            )
