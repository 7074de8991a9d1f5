"""All replicas of one model, and the translation between its calls and their processes.

Every method that is not private is called on the loop, or under the pool's lock where it says so. What happened to
calls is collected under the lock and told to their callers after it was released, because they may call back.
"""

import logging
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Protocol

from spark_runtime.config import Model
from spark_runtime.errors import (
    AnswerInvalid,
    ExecuteError,
    ExecuteTimeout,
    FunctionMissing,
    ModelExited,
    ModelOutOfMemory,
    ModelStackOverflow,
    ModelTrapped,
    ModelUnusable,
    NurseryDied,
    ProtocolViolated,
    ReplicaDied,
    SparkError,
    WrongSignature,
)
from spark_runtime.models.prepared import Prepared
from spark_runtime.pool.dispatch import Dispatcher, Lane
from spark_runtime.pool.job import FINISHED, SENT, WAITING, Call, Job
from spark_runtime.pool.loop import PoolLoop
from spark_runtime.pool.replica import Observer, Replica
from spark_runtime.pool.statistics import ModelStatistics, ReplicaStatistics, memory_of, quantile
from spark_workers.frames import FrameBroken
from spark_workers.messages import Failed, Host, Hosted, Message, Printed, Refused, XAnswer, XCall
from spark_workers.replicas.page import OUT_OF_MEMORY

_log = logging.getLogger("spark_runtime")

PREPARING, STARTING, READY, CLOSED = "preparing", "starting", "ready", "closed"
RELIEF_SECONDS = 0.005  # a call that takes longer holds nothing behind it
INTERRUPT_SECONDS = 0.2  # a guest that an epoch does not stop within this is killed
FROZEN_SECONDS = 1.0
MAX_ENDED = 2  # processes, beside those that idle, that a call may end unbegun before it is held to be the cause
MAX_FAILURES = 3  # starts in a row that came to nothing
BACKOFF_SECONDS = 0.1
MAX_BACKOFF_SECONDS = 30.0
REMEMBERED = 512

_ERRORS: dict[str, type[ExecuteError]] = {
    "trap": ModelTrapped,
    "out-of-memory": ModelOutOfMemory,
    "stack-overflow": ModelStackOverflow,
    "exit": ModelExited,
    "missing-export": FunctionMissing,
    "no-entry": FunctionMissing,
    "wrong-signature": WrongSignature,
    "bad-answer": AnswerInvalid,
}


class Owner(Protocol):
    """What a model's pool asks of the whole pool."""

    loop: PoolLoop
    lock: threading.Lock

    def start_replica(self, model: Model, host: Host, observer: Observer) -> Replica:
        """Start a process. Raises NurseryDied."""

    def ended(self, replica: Replica) -> None:
        """Take notice that a process has ended."""

    def prepare(self, models: "ModelPool", turn: int, *, anew: bool) -> None:
        """Have the model prepared; `ModelPool.prepared` or `ModelPool.failed` follows, with *turn*."""

    def unusable(self, models: "ModelPool", error: SparkError) -> None:
        """Take notice, under the lock, that the model cannot be used."""

    def outcall(self, name: str, job: Job, request: bytes, reply: Callable[[bytes, str], None]) -> None:
        """Have the service called that model *name* asks for while it is at *job*; *reply* gets answer or error."""

    def idle(self) -> None:
        """Take notice that a model has nothing to do any more."""

    def note(self, text: str) -> None:
        """Tell the user something."""


class Slot:
    """What is remembered of one replica, over all the processes that it is."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.calls = 0
        self.starts = 0
        self.seconds: deque[float] = deque(maxlen=REMEMBERED)


class ModelPool:
    """One loaded model: its calls, its replicas, and what becomes of either when the other ends.

    A process starts, then serves in a vacant slot or, if there is none, stands by as the spare. What is missing
    `_fill` starts; everything else only takes processes away.
    """

    def __init__(self, model: Model, owner: Owner) -> None:
        self.model = model
        self.state = PREPARING
        self.dispatcher = Dispatcher()
        self.calls = 0
        self.failed_calls = 0
        self._owner = owner
        self._prepared: Prepared | None = None
        self._before: Prepared | None = None  # the code that still serves while newer code starts
        self._slots = [Slot(number) for number in range(1, model.replicas + 1)]
        self._vacant = list(self._slots)
        self._starting: set[Replica] = set()
        self._serving: dict[Replica, tuple[Slot, Lane]] = {}
        self._old: list[Replica] = []  # those that serve with the code before, until a new one takes the slot
        self._retired: dict[Replica, Lane] = {}  # those that end when they have answered what they are at
        self._spare: Replica | None = None
        self._wants_spare = False
        self._failures = 0
        self._is_filling = False
        self._is_relieving = False
        self._was_stale = False
        self._turn = 0  # of preparing: what an earlier one brings is out of date
        self._renewal: Future[bool] | None = None

    # --- under the lock, on any thread ---

    def is_busy(self) -> bool:
        """Tell whether a call waits or runs."""
        return self.dispatcher.is_busy() or bool(self._retired)

    def add(self, jobs: Sequence[Job]) -> None:
        """Take calls."""
        if len(jobs) == 1:
            self.dispatcher.add(jobs[0])
        else:
            self.dispatcher.add_many(jobs)
        self._look_for_slow()

    def stop(self, job: Job) -> None:
        """Finish a call wherever it is; stop the replica that is at it."""
        if job.state == WAITING:
            self.dispatcher.drop_waiting(job)
            return
        self._stop_outcall(job)
        by_epoch = self.model.interrupt == "epoch"
        lane = self.dispatcher.take_out(job, close=not by_epoch)
        replica = next((each for each, its in self._lanes() if its is lane), None)
        if replica is None:
            return
        if by_epoch:
            replica.interrupt(job.serial)
            self._owner.loop.post(partial(self._later, INTERRUPT_SECONDS, partial(self._insist, replica, job)))
        else:
            self._kill(replica, "its call was stopped")

    def live(self) -> list[Job]:
        """Every call that is not finished."""
        sent = [job for _, lane in self._lanes() for job in lane.sent if job.state != FINISHED]
        return sent + self.dispatcher.waiting()

    def timed_out(self, job: Job) -> ExecuteTimeout:
        """Return the error for a call whose time is up."""
        name = self.model.name
        self.failed_calls += 1
        if job.state == WAITING or job.lane is None:
            why = "the model was still being loaded" if self.state != READY else "no replica was free"
            return ExecuteTimeout(f"model {name!r}: no answer in time; {why}", name)
        number = job.lane.number
        return ExecuteTimeout(
            f"model {name!r}, replica {number}: no answer in time; its work was stopped", name, number
        )

    def mend(self, abandoned: Sequence[Job]) -> None:
        """Put in order what a caller was interrupted in; its own calls are *abandoned*."""
        touched = self.dispatcher.mend(abandoned)
        for replica, lane in self._lanes():
            if lane in touched:
                replica.kill("a caller was interrupted while it sent something")
        for job in abandoned:
            if job.state == SENT and job.lane not in touched:
                self.stop(job)

    def take_all(self) -> list[Job]:
        """Finish and return every call."""
        jobs = self.live()
        self.dispatcher.clear()
        for job in jobs:
            job.state = FINISHED
        return jobs

    def close(self) -> None:
        """End every process. They are gone soon after."""
        self.state = CLOSED
        self._settle_renewal(False)
        for replica in self.replicas():
            replica.kill("its model was unloaded")
        self._starting.clear()
        self._serving.clear()
        self._retired.clear()
        self._spare = None

    def replicas(self) -> list[Replica]:
        """Every process of this model that lives, or is about to."""
        spare = [self._spare] if self._spare else []
        return [*self._starting, *self._serving, *self._retired, *spare]

    def statistics(self) -> ModelStatistics:
        """Return what there is to tell; the processes' memory is read from the system."""
        by_slot = {slot: (replica, lane) for replica, (slot, lane) in self._serving.items()}
        told = []
        for slot in self._slots:
            replica, lane = by_slot.get(slot, (None, None))
            state = "starting" if lane is None else "busy" if lane.sent else "idle"
            told.append(_tell(slot, replica, state))
        if self._spare is not None:
            told.append(_tell(Slot(0), self._spare, "spare"))
        sent = [len(lane.sent) for _, lane in self._lanes()]
        running = sum(map(bool, sent))
        return ModelStatistics(
            self.model.name,
            self.state,
            self.dispatcher.waiting_count + sum(sent) - running,
            running,
            self.calls,
            self.failed_calls,
            tuple(told),
        )

    def _lanes(self) -> list[tuple[Replica, Lane]]:
        return [*((replica, lane) for replica, (_, lane) in self._serving.items()), *self._retired.items()]

    def renew(self) -> "Future[bool]":
        """Read the model's file again; the future tells whether newer code has taken the old one's place.

        Its error is the reason why the newer code cannot be used.
        """
        if self._renewal is not None:
            self._settle_renewal(False)
        self._renewal = Future()
        self.prepare()
        return self._renewal

    def prepare(self, *, anew: bool = False) -> None:
        """Have the model prepared."""
        self._turn += 1
        self._owner.prepare(self, self._turn, anew=anew)

    # --- what the owner tells, on the loop ---

    def prepared(self, prepared: Prepared, turn: int) -> None:
        """Start the replicas, all together; or, if older code serves, one by one in place of those."""
        with self._owner.lock:
            if self.state == CLOSED or turn != self._turn:
                return
            self._failures = 0
            if self.state == READY:
                if self._prepared is not None and prepared.key == self._prepared.key and not self._old:
                    self._settle_renewal(False)
                    return
                self._before = self._before or self._prepared
                self._old = list(self._serving)
                self._drop_starting("newer code is there")
                if self._spare is not None:
                    self._spare.kill("newer code is there")
                    self._spare = None
            else:
                self.state = STARTING
            self._prepared = prepared
            self._fill()

    def failed(self, error: SparkError, turn: int = 0) -> None:
        """Give every call the reason why the model cannot be used. If older code serves, it goes on."""
        with self._owner.lock:
            if self.state == CLOSED or (turn and turn != self._turn):
                return
            if self._serving:
                self._keep_old(str(error))
                return
            jobs = self.take_all()
            self.close()
            self._owner.unusable(self, error)
        for job in jobs:
            job.fail(error)

    def _keep_old(self, reason: str) -> None:
        self._prepared, self._before, self._old = self._before or self._prepared, None, []
        self._failures = 0
        self._drop_starting("its code cannot be used")
        error = ModelUnusable(f"{reason}; the old code goes on")
        if self._renewal is None:
            self._owner.note(str(error))
        else:
            self._settle_renewal(error)
        self._fill_soon()

    def _settle_renewal(self, result: bool | Exception) -> None:
        renewal, self._renewal = self._renewal, None
        if renewal is not None:
            # Not here: under the lock nothing of a caller's may run.
            settle = renewal.set_exception if isinstance(result, Exception) else renewal.set_result
            self._owner.loop.post(partial(settle, result))  # type: ignore[arg-type]

    # --- processes come, under the lock, on the loop ---

    def _fill(self) -> None:
        """Start the processes that are missing: one for each vacant slot, a spare if wanted, one for newer code."""
        self._is_filling = False
        if self.state in (PREPARING, CLOSED) or self._prepared is None:
            return
        wanted = len(self._vacant) + bool(self._old)
        if self._wants_spare and self._spare is None and not self._old:
            wanted += 1
        while len(self._starting) < wanted:
            kind = self._prepared.report["kind"] if self.model.kind == "auto" else self.model.kind
            host = Host(self.model.engine, str(kind), str(self._prepared.code), self.model.settings())
            try:
                replica = self._owner.start_replica(self.model, host, self)
            except NurseryDied as problem:
                self._owner.loop.post(partial(self.failed, problem))
                return
            except OSError as problem:
                self._lack(problem)
                return
            self._starting.add(replica)

    def _lack(self, problem: OSError) -> None:
        """Try again later where a process cannot be made, for want of descriptors perhaps; tell it if that stays so."""
        self._failures += 1
        if self._failures < MAX_FAILURES or self._serving:
            self._fill_soon(self._backoff())
            return
        error = SparkError(f"model {self.model.name!r}: no process can be started: {problem.strerror}")
        self._owner.loop.post(partial(self.failed, error))

    def _backoff(self) -> float:
        exponent = max(0, self._failures - 1)
        return min(MAX_BACKOFF_SECONDS, BACKOFF_SECONDS * 2**exponent) if self._failures else 0.0

    def _fill_soon(self, delay: float = 0.0) -> None:
        """Have `_fill` run on the loop."""
        if self._is_filling:
            return
        self._is_filling = True
        if delay:
            self._owner.loop.post(partial(self._later, delay, self._fill_now))
        else:
            self._owner.loop.post(self._fill_now)

    def _later(self, delay: float, callback: Callable[[], None]) -> None:
        self._owner.loop.call_later(delay, callback)

    def _fill_now(self) -> None:
        with self._owner.lock:
            self._fill()

    def _hosted(self, replica: Replica) -> None:
        with self._owner.lock:
            if replica not in self._starting:
                return  # it was given up while it started
            self._starting.discard(replica)
            if self._old:
                self._retire(self._old.pop(0))
                if not self._old:
                    self._before = None
                    self._settle_renewal(True)
            if self._vacant:
                self._serve(replica)
            else:
                self._spare = replica
            self._fill()

    def _serve(self, replica: Replica) -> None:
        """Put a process that is ready into a vacant slot."""
        slot = self._vacant.pop(0)
        slot.starts += 1
        replica.number = slot.number
        replica.ready_at = time.monotonic()
        lane = Lane(slot.number, replica)
        self._serving[replica] = (slot, lane)
        self.state = READY
        self.dispatcher.open(lane)

    # --- processes go, under the lock, on any thread ---

    def _kill(self, replica: Replica, reason: str) -> None:
        """Kill a process whose lane is closed, and have its place taken: by the spare at once, else by a new one."""
        lane = dict(self._lanes()).get(replica)
        replica.kill(reason)
        self._vacate(replica)
        if lane is not None and lane.sent:
            self._retired[replica] = lane  # until the answers that it has sent are read
        self._wants_spare = True  # a model whose calls are stopped has the next replica at hand from now on
        self._fill_soon()

    def _vacate(self, replica: Replica) -> None:
        """Take a process out of its place, which the spare takes if there is one."""
        self._starting.discard(replica)
        self._retired.pop(replica, None)
        if replica in self._old:
            self._old.remove(replica)
        if self._spare is replica:
            self._spare = None
        place = self._serving.pop(replica, None)
        if place is not None:
            self._vacant.insert(0, place[0])
            if self._spare is not None:
                spare, self._spare = self._spare, None
                self._serve(spare)

    def _drop_starting(self, reason: str) -> None:
        for replica in self._starting:
            replica.kill(reason)
        self._starting.clear()

    def _retire(self, replica: Replica) -> None:
        """Give a process nothing more to do; it ends when it has answered what it is at."""
        slot, lane = self._serving.pop(replica)
        self._vacant.append(slot)
        self.dispatcher.retire(lane)
        if lane.sent:
            self._retired[replica] = lane
        else:
            replica.kill("newer code took its place")

    # --- what processes tell, on the loop ---

    def on_answers(self, replica: Replica, answers: list[tuple[int, bytes, float]]) -> None:
        """Give answers to those who wait for them."""
        jobs, problem = self._finish(replica, [(serial, seconds) for serial, _, seconds in answers])
        for job, (_, answer, _) in zip(jobs, answers, strict=False):
            if job is not None:
                job.resolve(answer, replica.number)
        if problem is not None:
            raise problem

    def on_message(self, replica: Replica, message: Message) -> None:
        """Act on anything else that a process says."""
        if isinstance(message, Failed):
            jobs, problem = self._finish(replica, [(message.serial, message.seconds)])
            if problem is not None:
                raise problem
            job = jobs[0] if jobs else None
            if job is not None:
                self.failed_calls += 1
                job.fail(self._error(replica, message))
        elif isinstance(message, Printed):
            _log.info("model %s, replica %d: %s", self.model.name, replica.number, _printable(message.text))
        elif isinstance(message, XCall):
            self._outcall(replica, message)
        elif isinstance(message, Hosted):
            self._hosted(replica)
        elif isinstance(message, Refused):
            self._refused(replica, message)
        else:
            raise ProtocolViolated(f"a replica sent {type(message).__name__}")

    def _finish(
        self, replica: Replica, answers: list[tuple[int, float]]
    ) -> tuple[list[Job | None], ProtocolViolated | None]:
        """Take the calls that answers, each with its serial and seconds, belong to; None where nobody waits any more.

        All that came at once is dealt with under one lock. After an answer to no call the rest is not believed.
        """
        jobs: list[Job | None] = []
        problem = None
        with self._owner.lock:
            slot, lane = self._serving.get(replica) or (None, self._retired.get(replica))
            if lane is None:
                return [], None  # the process was given up a moment ago, and its calls with it
            try:
                for serial, seconds in answers:
                    jobs.append(self.dispatcher.answered(lane, serial, seconds))
            except ProtocolViolated as violation:
                problem = violation
            self.dispatcher.refill(lane)
            self.calls += len(jobs)
            self._failures = 0
            if slot is not None:
                slot.calls += len(jobs)
                slot.seconds.extend([seconds for _, seconds in answers])
            elif not lane.sent:
                del self._retired[replica]
                replica.kill("newer code took its place")
            self._look_for_slow()
            is_idle = not lane.sent and not self.is_busy()
        if is_idle:
            self._owner.idle()
        return jobs, problem

    def _outcall(self, replica: Replica, message: XCall) -> None:
        """Have another service called for the model, which waits for it at its call."""

        def reply(answer: bytes, error: str) -> None:
            try:
                replica.reply(XAnswer(message.serial, answer, error))
            except FrameBroken:
                text = f"the other service's answer of {len(answer)} bytes is too long to be passed on"
                replica.reply(XAnswer(message.serial, b"", text))

        with self._owner.lock:
            lane = dict(self._lanes()).get(replica)
            job = lane.sent[0] if lane is not None and lane.sent else None
            if job is None or job.serial != message.serial or job.state == FINISHED:
                job = None
        if job is None:
            reply(b"", "nobody waits for this call any more")
        else:
            self._owner.outcall(self.model.name, job, message.request, reply)

    def _stop_outcall(self, job: Job) -> None:
        """Stop what a call's model waits for, now that nobody waits for the call; under the lock."""
        inner = job.context.inner if job.context is not None else None
        if inner is not None:
            self._owner.loop.post(partial(_cancel, inner))

    def _error(self, replica: Replica, message: Failed) -> ExecuteError:
        name, number = self.model.name, replica.number
        text = f"model {name!r}, replica {number}: {message.message}"
        return _ERRORS.get(message.kind, ExecuteError)(text, name, number, message.details)

    def _refused(self, replica: Replica, message: Refused) -> None:
        with self._owner.lock:
            if replica not in self._starting:
                return
            self._starting.discard(replica)
            if message.kind == "stale-code" and not self._was_stale:
                self._was_stale = True
                self._drop_starting("its machine code is stale")
                self.prepare(anew=True)
                return
        text = f"model {self.model.name!r}: {message.message}"
        self.failed(ModelUnusable(text, message.kind, message.details))

    def on_stopped(self, replica: Replica, is_stopped: bool) -> None:
        """Give a process that the kernel reports stopped a second to go on: until then nobody else can tell."""
        replica.is_frozen = is_stopped
        if is_stopped:
            self._owner.loop.call_later(FROZEN_SECONDS, self._end_frozen, replica)

    def _end_frozen(self, replica: Replica) -> None:
        if replica.is_frozen:
            replica.kill("it was stopped by a signal and did not go on")

    def on_death(self, replica: Replica, status: int, reason: str) -> None:
        """Say what became of the calls that a dead process had, and have its place taken."""
        self._owner.ended(replica)
        how = _how(status, reason)
        told: list[tuple[Job, SparkError]] = []
        back: list[Job] = []
        with self._owner.lock:
            was_starting = replica in self._starting
            lane = dict(self._lanes()).get(replica)
            is_known = was_starting or lane is not None or replica is self._spare
            if lane is not None:
                told, back = self._settle(replica, self.dispatcher.close(lane), how)
            self._vacate(replica)
            if lane is not None:
                self.dispatcher.give_back(back)
            if self.state == CLOSED or not is_known:
                return  # it was to end
            is_sudden = was_starting or (lane is not None and not told and replica.has_failed_to_start())
            self._failures += is_sudden
            # Only one that never came to serve says that none can; somebody may kill as many as he likes that idle.
            # Those that were never there were lost with their nursery, and the pool counts nurseries by itself.
            was_there = was_starting and replica.pid is not None
            is_hopeless = was_there and self._failures >= MAX_FAILURES and not self._serving
            if not is_hopeless:
                self._fill_soon(self._backoff())
        for job, problem in told:
            job.fail(problem)
        if is_hopeless or (was_there and self._old and self._failures >= MAX_FAILURES):
            name = self.model.name
            self.failed(ModelUnusable(f"model {name!r}: its process ends before it can take a call: {how}", "died"))

    def _settle(self, replica: Replica, jobs: deque[Job], how: str) -> tuple[list[tuple[Job, SparkError]], list[Job]]:
        """Of the calls that a dead process had, return those that fail, with their errors, and those not begun."""
        told: list[tuple[Job, SparkError]] = []
        back: list[Job] = []
        name, number = self.model.name, replica.number
        for place, job in enumerate(each for each in jobs if each.state != FINISHED):
            was_begun = job.serial <= replica.at()
            self._stop_outcall(job)
            job.ended += was_begun
            # The next one it would have begun may have killed it while it was read. Or the process was dead before:
            # several that idle may be killed at once, and a call can meet each of them.
            job.ended_before += not was_begun and place == 0
            if was_begun and job.ended > self.model.retries:
                text = f"the process ended while it was at this call ({how})"
            elif job.ended_before >= MAX_ENDED + len(self._slots):
                text = f"{job.ended_before} processes ended before they began this call ({how}); it is not tried again"
            else:
                back.append(job)
                continue
            job.state = FINISHED
            self.failed_calls += 1
            told.append((job, ReplicaDied(f"model {name!r}, replica {number}: {text}", name, number, {"how": how})))
        return told, back

    # --- time ---

    def _look_for_slow(self) -> None:
        if self.dispatcher.has_ahead and not self._is_relieving:
            self._is_relieving = True
            self._owner.loop.post(self._relieve)

    def _relieve(self) -> None:
        """Look from time to time whether a slow call holds others."""
        with self._owner.lock:
            self._is_relieving = self.state != CLOSED and self.dispatcher.relieve_slow()
            if self._is_relieving:
                self._owner.loop.call_later(RELIEF_SECONDS, self._relieve)

    def _insist(self, replica: Replica, job: Job) -> None:
        """Kill a process whose guest does not notice that it was interrupted."""
        with self._owner.lock:
            lane = dict(self._lanes()).get(replica)
            if lane is not None and lane.sent and lane.sent[0] is job:
                taken = self.dispatcher.take_back(lane)
                self.dispatcher.close(lane)
                self._kill(replica, "its call did not stop when it was interrupted")
                self.dispatcher.give_back(taken)


def _tell(slot: Slot, replica: Replica | None, state: str) -> ReplicaStatistics:
    ordered = sorted(slot.seconds)
    pid = replica.pid if replica is not None else None
    restarts = max(0, slot.starts - 1)
    p50, p95 = quantile(ordered, 0.5), quantile(ordered, 0.95)
    return ReplicaStatistics(slot.number, pid, state, slot.calls, restarts, p50, p95, memory_of(pid))


def _printable(text: str) -> str:
    """Escape what could steer the terminal that shows the log: a guest's words are not ours."""
    return "".join(each if each.isprintable() or each in "\n\t" else repr(each)[1:-1] for each in text)


def _cancel(call: Call) -> None:
    call.cancel()


def _how(status: int, reason: str) -> str:
    if reason:
        return reason
    if status == OUT_OF_MEMORY:
        return "it could not get the memory it needed"
    if status >= 0:
        return f"exit code {status}"
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"killed by signal {-status}"
