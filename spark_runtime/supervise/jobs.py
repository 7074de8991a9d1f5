"""The calls of exposed functions, from the asking to the answer, over reloads and crashes."""

import asyncio
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from spark_runtime.errors import CallFailed, RequestRefused, WorkerDied
from spark_workers.messages import Call, MessageBroken, Raised, Returned, encode

MOST_CRASHES = 2
KEPT = 100  # answers that can still be asked for


@dataclass(eq=False)
class Job:
    """One call. *answer* has its value or its error when it is over."""

    id: str
    name: str
    args: list[Any]
    kwargs: dict[str, Any]
    answer: "asyncio.Future[Any]"
    has_begun: bool = False
    crashes: int = 0

    def message(self) -> Call:
        """What the worker is told."""
        return Call(self.id, self.name, self.args, self.kwargs)


@dataclass
class Jobs:
    """Every call without an answer, in the order they came, and the last ones with. *on_change* hears of each step."""

    on_change: Callable[[Job, str], None]
    _open: dict[str, Job] = field(default_factory=dict)
    _closed: dict[str, Job] = field(default_factory=dict)
    _numbers: "itertools.count[int]" = field(default_factory=lambda: itertools.count(1))

    def add(self, name: str, args: list[Any], kwargs: dict[str, Any]) -> Job:
        """Take a new call into the books.

        Raises:
            RequestRefused: It cannot be sent to a worker.
        """
        if not isinstance(name, str):
            raise RequestRefused(f"a call names a function, not {name!r}")
        try:
            encode(Call("", name, args, kwargs))
        except MessageBroken as problem:
            raise RequestRefused(f"the arguments of {name}() cannot be sent: {problem}") from problem
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        answer.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody may be waiting for it
        job = Job(f"job-{next(self._numbers)}", name, args, kwargs, answer)
        self._open[job.id] = job
        self.on_change(job, "waiting")
        return job

    def find(self, job: str) -> Job:
        """Return a job by its id.

        Raises:
            RequestRefused: There is none, or it ended long ago.
        """
        found = self._open.get(job) or self._closed.get(job)
        if found is None:
            raise RequestRefused(f"there is no job {job!r}")
        return found

    def unfinished(self) -> list[Job]:
        """The calls that a new worker must be given, the outermost first."""
        return list(self._open.values())

    def began(self, job: str) -> None:
        """The script has begun with it."""
        if job in self._open:
            self._open[job].has_begun = True
            self.on_change(self._open[job], "running")

    def returned(self, message: Returned) -> None:
        """The answer has come."""
        job = self._close(message.id)
        if job is not None:
            job.answer.set_result(message.value)
            self.on_change(job, "returned")

    def raised(self, message: Raised) -> None:
        """The function raised, or could not be called."""
        job = self._close(message.id)
        if job is not None:
            job.answer.set_exception(CallFailed(message.kind, message.message, message.text))
            self.on_change(job, "raised")

    def worker_died(self, how: str) -> None:
        """The worker crashed: what it had begun is repeated from the snapshot, at most twice."""
        for job in self.unfinished():
            if not job.has_begun:
                continue
            job.has_begun = False
            job.crashes += 1
            if job.crashes > MOST_CRASHES:
                self._fail(
                    job, WorkerDied(f"{job.name}() was given up: the worker died {job.crashes} times in it ({how})")
                )

    def worker_left(self) -> None:
        """The worker made room for newer code: what it had begun is repeated there."""
        for job in self.unfinished():
            job.has_begun = False

    def cancel(self, job: Job) -> None:
        """Cancel a call that no worker has."""
        self._fail(job, CallFailed("SparkCancelError", "cancelled before it began", ""))

    def fail_all(self, reason: str) -> None:
        """No worker will answer any more."""
        for job in self.unfinished():
            self._fail(job, RequestRefused(f"{job.name}() has no answer: {reason}"))

    def _fail(self, job: Job, problem: Exception) -> None:
        self._close(job.id)
        job.answer.set_exception(problem)
        self.on_change(job, "raised")

    def _close(self, job: str) -> Job | None:
        """Move a job to the closed ones; None for an answer that comes twice or late."""
        found = self._open.pop(job, None)
        if found is not None:
            self._closed[job] = found
            while len(self._closed) > KEPT:
                del self._closed[next(iter(self._closed))]
        return found
