"""Many requests of one model, a window of them under way at a time."""

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from spark_runtime.errors import BadRequestError, ExecuteError, ModelUnusable, SparkError
from spark_runtime.models.fronts import Opened
from spark_runtime.pool.job import FINISHED, Job
from spark_runtime.pool.pool import Pool
from spark_workers.requests import read_bytes

WINDOW_BYTES = 32 << 20  # of requests under way; one is always
GROUP = 256  # requests handed over at once


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one request of many. *index* counts them from 0; *error* is None if there is an *answer*."""

    index: int
    answer: Any
    error: Exception | None


class _Row(Job):
    """One request of many. Lighter than a `Call`: nobody holds it but its stream."""

    __slots__ = ("_on_end", "_read", "error", "index", "is_done", "model", "raw", "replica")

    def __init__(
        self,
        index: int,
        model: str,
        opened: Opened,
        limit: float | None,
        on_end: Callable[["_Row"], None],
    ) -> None:
        super().__init__("", opened.payload, limit=limit)  # from when a replica has it: until then it waits at our pace
        self.index = index
        self.model = model
        self.raw = b""
        self.replica = 0
        self.error: Exception | None = None
        self.is_done = False
        self._read = opened.read
        self._on_end = on_end

    def resolve(self, answer: bytes, replica: int) -> None:
        """Take the answer; it is read where it is wanted, not on the loop."""
        self.raw, self.replica = answer, replica
        self._on_end(self)

    def fail(self, error: Exception) -> None:
        """Take the error."""
        self.error = error
        self._on_end(self)

    def outcome(self) -> Outcome:
        """Return what became of it."""
        if self.error is None:
            try:
                return Outcome(self.index, self._read(self.raw, self.model, self.replica), None)
            except ExecuteError as problem:
                self.error = problem
        return Outcome(self.index, None, self.error)


class Stream:
    """Sends requests as answers come. Used by one thread; *window* requests at most are under way."""

    def __init__(
        self,
        pool: Pool,
        model: str,
        timeout: float | None,
        requests: Iterable[Any],
        ordered: bool,
        window: int,
        opening: Callable[[Any], Opened],
    ) -> None:
        self._pool = pool
        self._model = model
        self._timeout = timeout
        self._requests: Iterator[tuple[int, Any]] = enumerate(requests)
        self._ordered = ordered
        self._window = window
        self._opening = opening
        self._rows: dict[int, _Row] = {}  # under way or done, in order
        self._bytes = 0
        self._done: deque[_Row] = deque()  # in the order of their ends
        self._news = threading.Semaphore(0)
        self._is_waiting = False
        self._is_exhausted = False

    def run(self) -> Generator[Outcome, None, None]:
        """Yield what becomes of every request."""
        try:
            while self._fill() or self._rows:
                yield from self._take()
        finally:
            for row in list(self._rows.values()):
                if not row.is_done:
                    self._pool.stop(self._model, row)

    def _fill(self) -> bool:
        """Send requests until the window is full; tell whether any may be left."""
        while not self._is_exhausted and len(self._rows) < self._window and self._bytes < WINDOW_BYTES:
            group: list[Job] = []
            while len(group) < GROUP and len(self._rows) < self._window and self._bytes < WINDOW_BYTES:
                try:
                    index, request = next(self._requests)
                except StopIteration:
                    self._is_exhausted = True
                    break
                group += self._row(index, request)
            if group:
                self._send(group)
        return not self._is_exhausted

    def _send(self, group: list[Job]) -> None:
        try:
            self._pool.submit(self._model, group, bounded=False)
        except BaseException:
            for row in group:
                row.state = FINISHED  # none of them was taken
            raise

    def _row(self, index: int, request: Any) -> list[_Row]:
        """Make a row of a request; an impossible request has ended at once, and nothing is left to send."""
        problem: SparkError | None = None
        try:
            opened = self._opening(request)
        except (BadRequestError, ModelUnusable) as error:
            opened, problem = Opened(b"", read_bytes), error
        row = _Row(index, self._model, opened, self._timeout, self._ended)
        row.context = opened.context
        self._rows[index] = row
        self._bytes += len(opened.payload)
        if problem is None and not opened.is_answered:
            return [row]
        row.state = FINISHED
        if problem is None:
            row.resolve(b"", 0)
        else:
            row.fail(problem)
        return []

    def _take(self) -> Iterator[Outcome]:
        """Yield what is done, waiting until something is."""
        while not self._done:
            self._is_waiting = True
            if not self._done:  # again: it may have come between the two lines
                self._news.acquire()
            self._is_waiting = False
        while self._done:
            row = self._done.popleft()
            row.is_done = True
            _raise_general(row.error)
            if not self._ordered:
                yield self._leave(row)
        while self._ordered and self._rows:
            first = next(iter(self._rows.values()))
            if not first.is_done:
                break
            yield self._leave(first)

    def _leave(self, row: _Row) -> Outcome:
        del self._rows[row.index]
        self._bytes -= len(row.payload)
        return row.outcome()

    def _ended(self, row: _Row) -> None:
        """Take notice of a row's end; on whatever thread it happens."""
        self._done.append(row)
        if self._is_waiting:
            self._news.release()


def _raise_general(error: Exception | None) -> None:
    """Raise what is no failure of one request, but of all."""
    if isinstance(error, SparkError) and not isinstance(error, ExecuteError | BadRequestError):
        raise error
