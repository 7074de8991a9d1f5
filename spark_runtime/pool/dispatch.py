"""Which call goes to which replica. Knows calls and lanes, no processes; everything happens under the pool's lock.

A *lane* leads to one replica and carries calls in order: the first is the one that the replica is at, or will be at
next, the others were sent ahead so that it need not wait for them. How many may be sent ahead follows from what calls
of this model take: a few milliseconds' worth, which is as long as a Python thread may be kept from running, so that a
model that answers in microseconds is never idle and one that takes long never has a call waiting behind another.

A call that takes much longer than the others before it must not hold those behind it. So each call sent ahead comes
with a token, and a replica begins such a call only with a token in hand: whoever takes the token has the call. The
lane takes tokens back when its first call is slow or is to be stopped, and those calls return to the queue. A replica
drops what it has no token for; until it has answered a call that was sent after that, nothing is sent ahead.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Protocol

from spark_runtime.errors import ProtocolViolated
from spark_runtime.pool.job import FINISHED, NEVER, SENT, WAITING, Job
from spark_workers.spin import QUICK_SECONDS

AHEAD_SECONDS = 0.004
MAX_WINDOW = 512
AHEAD_BYTES = 64 * 1024  # of one call; a longer one is sent only to a replica that has nothing else
BATCH_BYTES = 256 * 1024
GROUP = 16
KNOWN_AFTER = 3  # answers, until the time that calls take is believed


class Port(Protocol):
    """What a lane leads to."""

    def send(self, first: Job | None, ahead: list[Job]) -> None:
        """Send calls: *first* to be begun at once, those *ahead* with a token each."""

    def take_back(self, count: int) -> int:
        """Take back up to *count* tokens; return how many."""

    def read_for(self, job: Job, lane: "Lane") -> None:
        """Read on the calling thread until *job*, which says that its caller reads, has ended. Without the lock."""


class Lane:
    """The way to one replica."""

    __slots__ = ("_ahead_after", "_looked_at", "is_open", "is_quick", "last_answered", "number", "port", "sent")

    def __init__(self, number: int, port: Port) -> None:
        self.number = number
        self.port = port
        self.sent: deque[Job] = deque()
        self.is_open = True  # more may be sent
        self.is_quick = False  # its last call took next to no time
        self.last_answered = 0  # serial of the last call that was answered
        self._ahead_after = -1  # nothing is sent ahead before a call with a greater serial was answered
        self._looked_at = 0  # the last answer when it was last asked whether this lane is slow

    def may_send_ahead(self) -> bool:
        """Tell whether the replica has passed everything that was taken back from it."""
        return self.last_answered > self._ahead_after

    def is_slow(self) -> bool:
        """Tell whether nothing was answered since this was last asked."""
        is_slow = self._looked_at == self.last_answered
        self._looked_at = self.last_answered
        return is_slow

    def take_back(self, moving: list[Job]) -> list[Job]:
        """Take back what was sent ahead and not begun, in order; *moving* learns of it first."""
        behind = len(self.sent) - 1
        if behind <= 0:
            return []
        taken = self.port.take_back(behind)
        if not taken:
            return []
        jobs = list(self.sent)[-taken:]
        moving.extend(jobs)
        for _ in jobs:
            self.sent.pop()
        self._ahead_after = jobs[-1].serial
        return jobs


class Dispatcher:
    """The calls of one model."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.lanes: list[Lane] = []
        self.waiting_count = 0
        self._waiting: deque[Job] = deque()
        self._idle: deque[Lane] = deque()
        self._serial = 0
        self._seconds = 0.0
        self._answers = 0
        # What is under way from one ledger to another: all there is to go by if Ctrl-C strikes in between.
        self._moving: list[Job] = []
        self._touched: list[Lane] = []
        self.window = 1
        self.has_ahead = False  # a call may stand behind another

    # --- calls ---

    def add(self, job: Job) -> None:
        """Take a call: to an idle replica at once, else it waits."""
        if self._idle and not self.waiting_count:
            self._send(self._idle.popleft(), [job])
            return
        job.reads = False
        self._waiting.append(job)
        self.waiting_count += 1
        if self.window > 1:
            # A few wait for each other and travel together, unless a replica has next to nothing left: its answers
            # fetch them in any case.
            low = self.window // 2 if self.waiting_count >= GROUP else 1
            if any(len(lane.sent) <= low for lane in self.lanes):
                self._feed()

    def add_many(self, jobs: Iterable[Job]) -> None:
        """Take many calls at once, in order."""
        before = len(self._waiting)
        self._waiting.extend(jobs)
        self.waiting_count += len(self._waiting) - before
        self._feed()

    def take_back(self, lane: Lane) -> list[Job]:
        """Take back what was sent ahead to a replica and not begun; `give_back` follows."""
        self._touched.append(lane)
        return lane.take_back(self._moving)

    def give_back(self, jobs: list[Job]) -> None:
        """Put calls that no replica began where they came from: to the front, in order."""
        for job in reversed(jobs):
            if job.state != FINISHED:
                job.state, job.serial, job.reads = WAITING, 0, False
                if job.limit is not None:
                    job.deadline = NEVER
                self._waiting.appendleft(job)
                self.waiting_count += 1
        self._moving.clear()
        self._touched.clear()
        self._feed()

    def drop_waiting(self, job: Job) -> None:
        """Finish a call that waits; its place in the queue is passed over when it comes up."""
        job.state = FINISHED
        self.waiting_count -= 1
        if len(self._waiting) > 2 * self.waiting_count + 1000:
            self._waiting = deque(each for each in self._waiting if each.state == WAITING)

    def answered(self, lane: Lane, serial: int, seconds: float) -> Job | None:
        """Take notice of an answer; return its call, or None if nobody asks for it any more. `refill` follows.

        Raises:
            ProtocolViolated: The replica has no such call.
        """
        if not lane.sent or lane.sent[0].serial != serial:
            raise ProtocolViolated(f"an answer to piece of work {serial}, which it does not have")
        job = lane.sent.popleft()
        lane.last_answered = serial
        lane.is_quick = seconds < QUICK_SECONDS
        self._learn(seconds)
        if not lane.sent and lane.is_open:
            self._idle.append(lane)
        if job.state == FINISHED:
            return None
        job.state = FINISHED
        return job

    def refill(self, lane: Lane) -> None:
        """Send a replica that has answered what waits, if it has room."""
        if self.waiting_count and len(lane.sent) <= self.window // 2:  # for other lanes nothing has changed
            self._feed()

    def waiting(self) -> list[Job]:
        """The calls that wait, in order."""
        return [each for each in self._waiting if each.state == WAITING]

    def clear(self) -> None:
        """Forget every call that waits."""
        self._waiting.clear()
        self.waiting_count = 0

    def is_busy(self) -> bool:
        """Tell whether any call waits or runs."""
        return self.waiting_count > 0 or len(self._idle) < len(self.lanes)

    # --- lanes ---

    def open(self, lane: Lane) -> None:
        """Use a new replica."""
        self.lanes.append(lane)
        self._idle.append(lane)
        self._feed()

    def close(self, lane: Lane) -> deque[Job]:
        """Use a replica no more; return the calls it had, in order. What becomes of them the pool decides."""
        self._forget(lane)
        jobs, lane.sent = lane.sent, deque()
        return jobs

    def retire(self, lane: Lane) -> None:
        """Send a replica nothing more; what it is at it may answer."""
        self._forget(lane)
        self.give_back(self.take_back(lane))

    def mend(self, abandoned: Iterable[Job] = ()) -> list[Lane]:
        """Make the ledgers agree after a caller was interrupted in the middle of them, by Ctrl-C for example.

        Calls that were *abandoned* before they were sent are finished. Return the lanes that something was just being
        sent to, or taken back from: nobody knows how far that went, so their replicas have to be replaced.
        """
        sent = {id(job) for lane in self.lanes for job in lane.sent}
        for job in abandoned:
            if id(job) not in sent:
                job.state = FINISHED
        known = sent | {id(job) for job in self._waiting}
        lost = [job for job in self._moving if id(job) not in known]
        self._moving.clear()
        self._idle = deque(lane for lane in self.lanes if not lane.sent)
        self.waiting_count = sum(job.state == WAITING for job in self._waiting)
        touched = [lane for lane in self._touched if lane.is_open]
        self._touched.clear()
        for lane in touched:
            self._forget(lane)
        self.give_back(lost)
        return touched

    def _forget(self, lane: Lane) -> None:
        if lane.is_open:
            lane.is_open = False
            self.lanes.remove(lane)
            if lane in self._idle:
                self._idle.remove(lane)

    def relieve_slow(self) -> bool:
        """Take back calls that stand behind a slow one; tell whether to look again soon."""
        self.has_ahead = False
        for lane in list(self.lanes):
            if len(lane.sent) > 1:
                self.has_ahead = True
                if lane.is_slow():
                    self.give_back(self.take_back(lane))
        return self.has_ahead

    def take_out(self, job: Job, *, close: bool) -> Lane | None:
        """Finish a call that a replica has; return its lane if the replica has to be stopped for that.

        It has to if it may be at the call. It has not if it had not begun it, or has begun a later one, because then
        the answer is under way. With *close* the lane is closed then, so that nothing more is sent to the replica; the
        calls that it still has were answered, and their answers are under way.
        """
        job.state = FINISHED
        lane = job.lane
        assert lane is not None
        taken = self.take_back(lane)
        must_stop = bool(lane.sent) and lane.sent[-1] is job  # what is left was begun, in order: it is at the last
        if must_stop and close:
            self._forget(lane)
            lane.sent.pop()
        self.give_back(taken)
        return lane if must_stop else None

    # --- sending ---

    def _learn(self, seconds: float) -> None:
        self._answers += 1
        weight = max(0.05, 1 / self._answers)
        self._seconds += (seconds - self._seconds) * weight
        if self._answers >= KNOWN_AFTER:
            ahead = AHEAD_SECONDS / max(self._seconds, 1e-7)
            self.window = 1 if ahead < 1 else min(MAX_WINDOW, 1 + int(ahead))

    def _feed(self) -> None:
        """Send what waits to replicas with room: to each idle one a call, then ahead where little is left."""
        planned: dict[Lane, list[Job]] = {}
        while self._idle and self.waiting_count:
            planned[self._idle.popleft()] = [self._next()]
        if self.waiting_count and self.window > 1:
            share = -(-self.waiting_count // max(1, len(self.lanes)))
            for lane in self.lanes:
                jobs = planned.get(lane, [])
                held = len(lane.sent) + len(jobs)
                if held <= self.window // 2 and lane.may_send_ahead():
                    jobs += self._some_ahead(min(share, self.window - held))
                    planned[lane] = jobs
        for lane, jobs in planned.items():
            if jobs:
                self._send(lane, jobs)
        self._moving.clear()

    def _some_ahead(self, count: int) -> list[Job]:
        jobs: list[Job] = []
        size = 0
        while self.waiting_count and len(jobs) < count and size < BATCH_BYTES:
            job = self._next()
            if len(job.payload) > AHEAD_BYTES:
                self._waiting.appendleft(job)
                self.waiting_count += 1
                break
            size += len(job.payload)
            jobs.append(job)
        return jobs

    def _next(self) -> Job:
        while (job := self._waiting[0]).state != WAITING:
            self._waiting.popleft()  # cancelled while it waited
        self._moving.append(job)
        self._waiting.popleft()
        self.waiting_count -= 1
        return job

    def _send(self, lane: Lane, jobs: list[Job]) -> None:
        is_first = not lane.sent
        self._touched.append(lane)
        for job in jobs:
            self._serial += 1
            job.serial = self._serial
            job.state = SENT
            job.lane = lane
            if job.limit is not None:
                job.deadline = self._clock() + job.limit
        lane.sent.extend(jobs)
        if len(lane.sent) > 1:
            self.has_ahead = True
        lane.port.send(jobs[0] if is_first else None, jobs[1:] if is_first else jobs)
        self._touched.pop()
