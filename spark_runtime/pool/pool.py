"""All loaded models and the processes that they come from.

Callers' threads enter by `submit` and `stop`; what must happen on the loop they post there. One lock guards every
ledger below. It is never held while a caller's code runs, nor while anything waits.
"""

import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial

from spark_runtime.config import Model
from spark_runtime.errors import ModelUnusable, NurseryDied, QueueFull, SparkClosed, SparkError
from spark_runtime.models.prepared import ModelCache, ModelFile, Prepared
from spark_runtime.pool.job import FINISHED, NEVER, Job
from spark_runtime.pool.loop import PoolLoop, Timer
from spark_runtime.pool.model_pool import CLOSED, ModelPool
from spark_runtime.pool.preparing import Preparer
from spark_runtime.pool.replica import Observer, Replica
from spark_runtime.pool.statistics import Statistics
from spark_runtime.processes.nursery import Nursery, Process
from spark_workers.messages import Host

_log = logging.getLogger("spark_runtime")

PRELOADED = {
    "wasmtime": ["spark_workers.replicas.worker", "spark_workers.engines.wasmtime_engine", "spark_workers.hosts.host"],
    "wasmer": [
        "wasmer",
        "spark_workers.replicas.worker",
        "spark_workers.engines.wasmer_engine",
        "spark_workers.hosts.host",
    ],
}
PRELOADED_FOR_PACKAGES = ["spark_workers.hosts.neuron", "spark_workers.hosts.emscripten.functions"]
END_SECONDS = 3.0
MAX_LOST = 3  # nurseries in a row that ended before they were ready
RETRY_SECONDS = 1.0  # how long a model that cannot be used is not tried again
DIED_RETRY_SECONDS = 30.0  # the same for one whose processes end before they can take a call
SWEEP_SECONDS = 0.002  # deadlines this close are dealt with together

#: Replicas get these of our environment and no more: what a model's process needs, none of the user's secrets.
_ENVIRONMENT = (
    *("PATH", "HOME", "USER", "LANG", "LANGUAGE", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH"),
    *("VIRTUAL_ENV", "PYTHONHOME", "PYTHONPATH", "PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX"),
    *("MALLOC_ARENA_MAX", "RUST_BACKTRACE"),
)


#: Has the service called that a model asks for while it is at a call: model, call, request, what takes the answer.
Outcall = Callable[[str, Job, bytes, Callable[[bytes, str], None]], None]


class Pool:
    """Runs calls of models on replicas.

    Args:
        models: Every model that may be called, by name.
        max_models: How many may be loaded at once.
        max_waiting: How many calls may wait, of all models together.
        cache: Where machine code is kept.
        note: Is told things that a user wants to know, one sentence each.
    """

    def __init__(
        self,
        models: dict[str, Model],
        max_models: int,
        max_waiting: int,
        cache: ModelCache,
        note: Callable[[str], None],
    ) -> None:
        self.loop = PoolLoop()
        self.lock = threading.Lock()
        self.note = note
        self.on_outcall: Outcall | None = None  # answers what models ask of other services
        self._models = models
        self._max_models = max_models
        self._max_waiting = max_waiting
        self._loaded: dict[str, ModelPool] = {}  # the least recently used first
        self._unusable: dict[str, tuple[float, SparkError]] = {}
        self._nurseries: dict[tuple[str, ...], Nursery] = {}
        self._lost = 0
        self._workers = 0
        self._replicas: set[Replica] = set()  # every process that has not ended
        self._preparer = Preparer(self.loop, self._start_process, cache, note)
        self._deadline = NEVER
        self._sweep: Timer | None = None
        self._is_closed = False
        self._was_over = False
        self._evictions = self._loads = self._cached = self._past_calls = self._past_failures = 0
        self.loop.start()
        _open.add(self)

    # --- for callers, on any thread ---

    def submit(self, name: str, jobs: Sequence[Job], *, bounded: bool = True) -> None:
        """Take calls of model *name*, of one time limit; they find their way from here.

        Raises:
            SparkClosed, QueueFull, ModelUnusable, EngineMissing: None of them was taken.
        """
        with self.lock:
            models = self._loaded.get(name)
            try:
                if models is None:
                    models = self._load(name)
                if bounded and models.dispatcher.waiting_count:
                    self._check_room(len(jobs))
                self._touch(name, models)
                models.add(jobs)
                deadline = jobs[0].deadline if jobs[0].limit is None else time.monotonic() + jobs[0].limit
                if deadline < self._deadline:
                    self._deadline = deadline
                    self.loop.post(self._set_sweep)
            except KeyboardInterrupt:
                self._mend(name, models, jobs)
                raise

    def stop(self, name: str, job: Job) -> bool:
        """Finish a call, wherever it is; return False if it had finished. Whoever stops it tells its caller."""
        with self.lock:
            if job.state == FINISHED or self._is_closed:  # closed with calls only in a fork of the program
                return False
            models = self._loaded[name]
            try:
                models.stop(job)
            except KeyboardInterrupt:
                self._mend(name, models, [job])
                raise
        return True

    def abandon(self, name: str, jobs: Sequence[Job]) -> None:
        """Finish calls whose caller was interrupted, by Ctrl-C in whatever it was, and put things in order."""
        with self.lock:
            self._mend(name, self._loaded.get(name), jobs)

    def _mend(self, name: str, models: ModelPool | None, jobs: Sequence[Job]) -> None:
        """Put in order what Ctrl-C struck in the middle of; under the lock still, so that nobody saw it."""
        if models is not None:
            self._loaded.setdefault(name, models)
            models.mend(jobs)
            self._deadline = min(self._deadline, time.monotonic())
        elif name in self._loaded:  # it was about to be loaded
            self._loaded.pop(name).close()
        for job in jobs:
            job.state = FINISHED
        self.loop.post(self._set_sweep)
        self.loop.nudge()

    def prepared(self, model: Model) -> tuple[ModelFile, Prepared]:
        """Prepare a model without running it; blocks. Errors as `Preparer.prepare`."""
        return self._preparer.prepare(model)

    def is_busy(self) -> bool:
        """Tell whether any call waits or runs."""
        with self.lock:
            return any(models.is_busy() for models in self._loaded.values())

    def load(self, name: str) -> None:
        """Begin to load a model that will be called."""
        with self.lock:
            if name not in self._loaded:
                self._load(name)

    def renew(self, name: str) -> "Future[bool]":
        """Have a model's file read again; see `ModelPool.renew`. A model that is not loaded has nothing to renew."""
        with self.lock:
            self._unusable.pop(name, None)
            if name in self._loaded:
                return self._loaded[name].renew()
        nothing: Future[bool] = Future()
        nothing.set_result(False)
        return nothing

    def statistics(self) -> Statistics:
        """Return what there is to tell of this moment."""
        with self.lock:
            models = tuple(each.statistics() for each in self._loaded.values())
            past = self._past_calls, self._past_failures
        return Statistics(
            models,
            sum(each.waiting for each in models),
            sum(each.running for each in models),
            past[0] + sum(each.calls for each in models),
            past[1] + sum(each.failures for each in models),
            self._evictions,
            self._loads,
            self._cached,
        )

    def close(self) -> None:
        """Fail every call, end every process, and wait until they are gone. May be called twice."""
        jobs: list[Job] = []
        with self.lock:
            if self._is_closed:
                return
            self._is_closed = True
            for models in self._loaded.values():
                jobs += models.take_all()
                models.close()
            self._loaded.clear()
        error = SparkClosed("this Spark was closed before the call was done")
        for job in jobs:
            job.fail(error)
        if self.loop.is_own_thread():  # the last reference was dropped there
            self._close_nurseries()
        else:
            self.loop.post(self._close_nurseries)
        self.loop.close()
        self._preparer.close()
        for replica in self._replicas:
            replica.release()
        for nursery in self._nurseries.values():
            nursery.wait(END_SECONDS)

    # --- models, under the lock ---

    def _load(self, name: str) -> ModelPool:
        if self._is_closed:
            raise SparkClosed("this Spark is closed")
        until, error = self._unusable.get(name, (0.0, None))
        if error is not None and time.monotonic() < until:
            raise error
        self._make_room()
        models = self._loaded[name] = ModelPool(self._models[name], self)
        self._loads += 1
        if models.model.engine == "wasmtime":  # its nursery can start while the file is read
            self.loop.post(partial(self._warm, models.model))
        models.prepare()
        return models

    def _touch(self, name: str, models: ModelPool) -> None:
        if next(reversed(self._loaded)) != name:
            del self._loaded[name]
            self._loaded[name] = models

    def _check_room(self, count: int) -> None:
        waiting = sum(each.dispatcher.waiting_count for each in self._loaded.values())
        if waiting + count > self._max_waiting:
            raise QueueFull(
                f"{waiting} calls wait, and {self._max_waiting} may; take answers before submitting more, or use map()"
            )

    def _make_room(self, coming: int = 1) -> None:
        """Unload the least recently used models that nobody is at, if there are too many."""
        while len(self._loaded) + coming > self._max_models:
            name = next((n for n, each in self._loaded.items() if not each.model.keep and not each.is_busy()), None)
            if name is None:
                if not self._was_over:
                    self._was_over = True
                    self.note(
                        f"more than {self._max_models} models are loaded, because every one of them is busy or to be "
                        "kept; raise max_models, or give fewer models keep=True"
                    )
                return
            models = self._loaded.pop(name)
            self._past_calls += models.calls
            self._past_failures += models.failed_calls
            self._evictions += 1
            models.close()

    # --- what models ask for ---

    def prepare(self, models: ModelPool, turn: int, *, anew: bool) -> None:
        """Have a model prepared on a thread of its own, and told."""
        arguments = (models, turn, anew)
        threading.Thread(target=self._prepare, args=arguments, name="spark-prepare", daemon=True).start()

    def _prepare(self, models: ModelPool, turn: int, anew: bool) -> None:
        try:
            if anew:
                self._preparer.discard(self._preparer.prepare(models.model)[1])
            _, prepared = self._preparer.prepare(models.model)
        except SparkError as problem:
            self.loop.post(partial(models.failed, problem, turn))
        except Exception as problem:  # noqa: BLE001 - a fault of ours: whoever waits must hear of it
            _log.exception("an internal error while a model was prepared, please report it")
            text = f"model {models.model.name!r} cannot be prepared: {type(problem).__name__}: {problem}"
            self.loop.post(partial(models.failed, SparkError(text), turn))
        else:
            self._cached += prepared.from_cache
            self.loop.post(partial(models.prepared, prepared, turn))

    def unusable(self, models: ModelPool, error: SparkError) -> None:
        """Forget a model that cannot be used; it is tried again after a while."""
        name = models.model.name
        if self._loaded.get(name) is models:
            del self._loaded[name]
        has_died = isinstance(error, NurseryDied) or (isinstance(error, ModelUnusable) and error.kind == "died")
        self._unusable[name] = (time.monotonic() + (DIED_RETRY_SECONDS if has_died else RETRY_SECONDS), error)

    def outcall(self, name: str, job: Job, request: bytes, reply: Callable[[bytes, str], None]) -> None:
        """Have the service called that model *name* asks for while it is at *job*."""
        if self.on_outcall is None:
            reply(b"", "it calls another service, and nobody is here to answer")
        else:
            self.on_outcall(name, job, request, reply)

    def ended(self, replica: Replica) -> None:
        """Forget a process that has ended."""
        self._replicas.discard(replica)

    def idle(self) -> None:
        """Go back to as many models as may be loaded, now that one has nothing to do."""
        if len(self._loaded) > self._max_models:
            with self.lock:
                self._make_room(coming=0)

    # --- processes, on the loop ---

    def start_replica(self, model: Model, host: Host, observer: Observer) -> Replica:
        """Start a process for a model. Raises NurseryDied."""
        nursery = self._nursery(model)
        self._workers += 1
        replica = Replica(self._workers, self.loop, self.lock, nursery, host, observer)
        self._replicas.add(replica)
        return replica

    def _start_process(self, model: Model, process: Process, entry: str, descriptors: list[int]) -> None:
        self._workers += 1
        process.number = self._workers
        self._nursery(model).start(process, entry, descriptors)

    def _nursery(self, model: Model) -> Nursery:
        command = self._preparer.command(model)
        key = (model.engine, *command)
        if key not in self._nurseries:
            if self._lost >= MAX_LOST:
                self._lost = MAX_LOST - 1  # whoever asks again, when the model is tried again, may try one more
                raise NurseryDied("the process that starts workers ends at once; `spark doctor` shows why")
            modules = PRELOADED[model.engine]
            if any(str(each.path).lower().endswith(".zip") for each in self._models.values()):
                modules = modules + PRELOADED_FOR_PACKAGES
            self._nurseries[key] = Nursery(
                self.loop, modules, self._nursery_ready, self._nursery_lost, command, _environment()
            )
        return self._nurseries[key]

    def _warm(self, model: Model) -> None:
        try:
            self._nursery(model)
        except NurseryDied:
            pass  # told when a process is to be started

    def _nursery_ready(self, nursery: Nursery) -> None:
        self._lost = 0

    def _nursery_lost(self, nursery: Nursery) -> None:
        self._lost += not nursery.is_ready
        for key, each in list(self._nurseries.items()):
            if each is nursery:
                del self._nurseries[key]

    def _close_nurseries(self) -> None:
        for nursery in self._nurseries.values():
            nursery.close()

    # --- deadlines, on the loop ---

    def _set_sweep(self) -> None:
        if self._sweep is not None:
            self._sweep.cancel()
        with self.lock:
            deadline = self._deadline
        if deadline != NEVER:
            self._sweep = self.loop.call_later(max(0.0, deadline - time.monotonic()), self._expire)

    def _expire(self) -> None:
        """Finish the calls whose time is up, and look when the next one's is."""
        now = time.monotonic()
        late: list[tuple[Job, SparkError]] = []
        with self.lock:
            self._deadline = NEVER
            for models in self._loaded.values():
                for job in models.live():
                    if job.deadline <= now:
                        late.append((job, models.timed_out(job)))
                        models.stop(job)
                        continue
                    deadline = job.deadline
                    if deadline == NEVER and job.limit is not None:
                        deadline = now + job.limit
                    self._deadline = min(self._deadline, max(deadline, now + SWEEP_SECONDS))
        for job, error in late:
            job.fail(error)
        self._sweep = None
        self._set_sweep()

    # --- forks ---

    def disown(self) -> None:
        """Become unusable in a fork of this process, which must not hold what belongs to its parent."""
        if self._is_closed:
            return
        self.lock = threading.Lock()
        self._is_closed = True
        for replica in self._replicas:
            replica.release()
        for models in self._loaded.values():
            models.state = CLOSED
        for nursery in self._nurseries.values():
            nursery.disown()
        self._loaded = {}
        self._nurseries = {}
        self.loop.disown()


_open: "weakref.WeakSet[Pool]" = weakref.WeakSet()


def _disown_all() -> None:
    for pool in list(_open):
        pool.disown()


os.register_at_fork(after_in_child=_disown_all)


def _environment() -> dict[str, str]:
    prefixes = ("LC_", "SPARKRT_START", "SPARKRT_FAIL", "SPARKRT_WASMTIME")
    return {name: value for name, value in os.environ.items() if name in _ENVIRONMENT or name.startswith(prefixes)}
