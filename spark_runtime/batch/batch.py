"""A batch: the rows of an input through a model to the rows of an output. Read this first.

    Source  →  missing rows  →  Segment  →  Backend  →  Segment  →  Appender
    inputs     journal (Done)   what is out             lines       journal

Rules that keep it simple:

* One thread pulls rows, gives them to the backend, takes the answers and makes the lines; another one only writes.
* A row is bytes from the input to the model and its answer is bytes from there to the output; each is looked at once,
  whether it is JSON, and never built up and written again.
* What goes wrong with a row becomes its error row. What goes wrong with the input or the output ends the batch after
  the rows that are out have come back. Whatever ends it, the same command goes on.
"""

import contextlib
import hashlib
import itertools
import json
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from spark_runtime.batch.inputs import Source
from spark_runtime.batch.journal import Appender
from spark_runtime.batch.outputs import Output
from spark_runtime.batch.pace import Pace
from spark_runtime.batch.rows import RowUnusable, check_json, content_key, describe
from spark_runtime.batch.stop import Stop
from spark_runtime.batch.written import on_one_line
from spark_runtime.config import Model
from spark_runtime.errors import AnswerInvalid, BatchError, SparkError
from spark_runtime.models.model_file import ModelFile

MOST_BYTES_OUT = 128 * 1024 * 1024
MOST_UNUSABLE = 1000  # rows in a segment that never go out
REHEARSED_ROWS = 1000


class Outcome(Protocol):
    """What became of one request."""

    @property
    def index(self) -> int: ...

    @property
    def answer(self) -> Any: ...

    @property
    def error(self) -> Exception | None: ...


class Backend(Protocol):
    """What runs the rows: a `Spark`, or something else that has models and replicas somewhere."""

    def outcomes(
        self,
        model: str,
        requests: Iterator[bytes],
        *,
        ordered: bool = True,
        timeout: float | None = None,
        window: int = 1024,
    ) -> Generator[Outcome, None, None]:
        """Run the requests, bytes in and bytes out, at most *window* of them at once.

        Requests are taken from the iterator on the caller's thread when there is room. Closing the generator stops
        what is out. *index* counts the requests from 0.

        Raises:
            SparkError: The model cannot be used at all.
        """


OpenBackend = Callable[[], AbstractContextManager[Backend]]


@dataclass(frozen=True, slots=True)
class BatchOptions:
    """How to run a batch.

    Attributes:
        model: The name of the model at the backend.
        replicas: How many rows it answers at once.
        ordered: Output in the order of the input.
        limit: Only the first so many rows.
        timeout: Seconds a row may take; None for the backend's own.
        mix: Go on with an output although another model, or other settings, made what is there.
        restart: Drop what an output of ours holds, and begin anew.
    """

    model: str
    replicas: int = 1
    ordered: bool = True
    limit: int | None = None
    timeout: float | None = None
    mix: bool = False
    restart: bool = False


@dataclass(slots=True)
class Progress:
    """How far a batch is. Another thread may read it at any time.

    Attributes:
        before: Rows that were done when it began, and how many of them *failed_before*.
        rows: Rows done now, without those; *failed* of them.
        state: ``starting``, ``running``, ``finished`` (there was nothing to do), ``done``, ``stopped``.
    """

    before: int = 0
    failed_before: int = 0
    rows: int = 0
    failed: int = 0
    state: str = "starting"
    began: float = field(default_factory=time.monotonic)
    ended: float | None = None

    def seconds(self) -> float:
        """Return how long it has been running."""
        return (self.ended or time.monotonic()) - self.began

    def all_rows(self) -> int:
        """Return the rows that the output has."""
        return self.before + self.rows

    def all_failed(self) -> int:
        """Return the error rows that the output has."""
        return self.failed_before + self.failed


class Ticket(NamedTuple):
    """A row that is to be done."""

    number: int
    key: bytes
    data: bytes
    problem: RowUnusable | None


def maker_of(model: Model) -> bytes:
    """Return what stands for the model in a row's key: a digest of its bytes and of what changes its answers.

    Raises:
        ModelUnusable: It cannot be read.
    """
    parts = [ModelFile.read(model.path).sha256, model.kind, list(model.args), dict(model.env), model.entry]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=4).hexdigest().encode()


class Batch:
    """One batch, to be run once.

    Attributes:
        progress: How far it is.
    """

    def __init__(self, options: BatchOptions, maker: bytes, source: Source, output: Output, stop: Stop) -> None:
        self.progress = Progress()
        self._options = options
        self._maker = maker
        self._source = source
        self._output = output
        self._stop = stop

    def run(self, open_backend: OpenBackend) -> None:
        """Do the rows that are not done. `progress` tells how it went.

        Raises:
            BatchError: Input or output cannot be used, or not any further.
            SparkError: The model cannot be used at all. Nothing is written then.
        """
        self._take_over()
        with contextlib.closing(self._missing()) as tickets:
            first = next(tickets, None)
            if first is not None:
                self.progress.state = "running"
                self.progress.began = time.monotonic()
                with open_backend() as backend:
                    self._run(backend, itertools.chain([first], tickets))
        if self._stop.asked:
            self.progress.state = "stopped"
        else:
            self._output.finish()
            self.progress.state = "finished" if first is None and self.progress.before else "done"
        self.progress.ended = time.monotonic()

    def rehearse(self, open_backend: OpenBackend) -> "Rehearsal":
        """Look at the first rows and run the first one that can be, without any output.

        Raises:
            BatchError: The input cannot be used.
            SparkError: The model cannot be used at all.
        """
        rows = list(itertools.islice(self._tickets(None), REHEARSED_ROWS))
        unusable = [each.problem for each in rows if each.problem is not None]
        usable = next((each for each in rows if each.problem is None), None)
        if usable is None:
            return Rehearsal(len(rows), unusable, None, False)
        with open_backend() as backend:
            segment = Segment(iter([usable]), Pace(1), self._source, self._stop)
            with contextlib.closing(self._outcomes(backend, segment, 1)) as outcomes:
                for outcome in outcomes:
                    line, is_failed = self._line(segment.take(outcome.index), outcome)
                    return Rehearsal(len(rows), unusable, line, is_failed)
        raise BatchError("the batch was stopped before its first row")

    def _take_over(self) -> None:
        """Look at what the output has and decide whether it can be gone on with."""
        options, output = self._options, self._output
        if options.restart:
            output.restart()
        there = output.contents
        if options.ordered and not there.is_ordered:
            raise BatchError(f"{output.name} was begun with --unordered; add it again, or choose another output")
        if there.other_maker is not None and not options.mix:
            raise BatchError(
                f"{output.name} has rows of another model, or of other settings (its row {there.other_maker} for one); "
                "choose another output, begin anew with --restart, or keep those rows and go on with --mix"
            )
        self.progress.before, self.progress.failed_before = there.rows, there.failed

    def _missing(self) -> Generator[Ticket, None, None]:
        """Give the rows that are not done, after comparing those that are."""
        limit, count = self._options.limit, 0
        done = self._output.done()
        if done is None:
            yield from self._tickets(limit)
            return
        with contextlib.closing(done):
            for ticket in self._tickets(limit):
                count += 1
                if not done.has(ticket.number, ticket.key[:16]):
                    yield ticket
            # With a limit there may be more rows in the output; after a stop the input was not read to its end.
            if not self._stop.asked and count != limit:
                done.check_end(count)

    def _tickets(self, limit: int | None) -> Iterator[Ticket]:
        end = b"-" + self._maker
        for number, row in enumerate(itertools.islice(self._source.rows(), limit)):
            yield Ticket(number, content_key(row.data) + end, row.data, row.problem)

    def _run(self, backend: Backend, tickets: Iterator[Ticket]) -> None:
        pace = Pace(self._options.replicas)
        with ExitStack() as stack:
            # Only with the first line: a model that cannot be used leaves the output as it was.
            lines = LateAppender(lambda: stack.enter_context(self._output.begin()))
            while not self._stop.asked:
                segment = Segment(tickets, pace, self._source, self._stop)
                self._run_segment(backend, segment, pace.window, lines)
                if segment.problem is not None:
                    raise segment.problem
                if segment.is_last:
                    return
                pace.end()

    def _run_segment(self, backend: Backend, segment: "Segment", window: int, lines: "LateAppender") -> None:
        with contextlib.closing(self._outcomes(backend, segment, window)) as outcomes:
            for outcome in outcomes:
                for ticket in segment.take_unusable(outcome.index if self._options.ordered else None):
                    self._append(lines, *self._refused(ticket))
                self._append(lines, *self._line(segment.take(outcome.index), outcome))
        for ticket in segment.take_unusable(None):
            self._append(lines, *self._refused(ticket))

    def _outcomes(self, backend: Backend, segment: "Segment", window: int) -> Generator[Outcome, None, None]:
        options = self._options
        return backend.outcomes(
            options.model, segment.requests(), ordered=options.ordered, timeout=options.timeout, window=window
        )

    def _append(self, lines: "LateAppender", line: bytes, is_failed: bool) -> None:
        lines.append(line)
        self.progress.rows += 1
        self.progress.failed += is_failed

    def _refused(self, ticket: Ticket) -> tuple[bytes, bool]:
        assert ticket.problem is not None
        return self._output.form.failed(ticket.number, ticket.key, ticket.problem.to_dict()), True

    def _line(self, ticket: Ticket, outcome: Outcome) -> tuple[bytes, bool]:
        """Return the line of output for an answer or an error, and whether it is an error."""
        error, form = outcome.error, self._output.form
        if error is None:
            answer = on_one_line(outcome.answer)
            try:
                check_json(answer)
            except ValueError as problem:
                error = self._invalid(answer, problem)
            else:
                return form.answered(ticket.number, ticket.key, answer), False
        if not isinstance(error, SparkError):
            raise error
        return form.failed(ticket.number, ticket.key, error.to_dict()), True

    def _invalid(self, answer: bytes, problem: ValueError) -> AnswerInvalid:
        shown = f"it begins with {answer[:80].decode(errors='replace')!r}" if answer else "it is empty"
        name = self._options.model
        return AnswerInvalid(f"model {name!r}: the answer is not JSON ({describe(problem)[0]}); {shown}", name)


class Rehearsal(NamedTuple):
    """What a dry run found: rows looked at, those unusable, and the line that the first usable one would give."""

    rows: int
    unusable: list[RowUnusable]
    line: bytes | None
    is_failed: bool


class LateAppender:
    """An appender that is begun with its first line."""

    def __init__(self, begin: Callable[[], Appender]) -> None:
        self._begin = begin
        self._appender: Appender | None = None

    def append(self, line: bytes) -> None:
        """Append a line; see `Appender.append`."""
        if self._appender is None:
            self._appender = self._begin()
        self._appender.append(line)


class Segment:
    """The rows that are out. It takes them from *tickets* as long as there is reason to go on without a rest.

    Attributes:
        is_last: There are no more rows.
        problem: Why the input could not be read any further.
    """

    def __init__(self, tickets: Iterator[Ticket], pace: Pace, source: Source, stop: Stop) -> None:
        self.is_last = False
        self.problem: SparkError | None = None
        self._tickets = tickets
        self._pace = pace
        self._source = source
        self._stop = stop
        self._out: dict[int, Ticket] = {}
        self._given = 0
        self._bytes = 0
        self._unusable: deque[tuple[int, Ticket]] = deque()  # each with the index of the request that comes next

    def requests(self) -> Iterator[bytes]:
        """Give the requests, as a backend asks for them."""
        while not self._is_over():
            try:
                ticket = next(self._tickets, None)
            except SparkError as problem:  # raised when what is out has come back
                self.problem = problem
                return
            if ticket is None:
                self.is_last = True
                return
            if ticket.problem is not None:
                self._unusable.append((self._given, ticket))
                continue
            self._out[self._given] = ticket
            self._given += 1
            self._bytes += len(ticket.data)
            self._pace.given()
            yield ticket.data

    def take(self, index: int) -> Ticket:
        """Return the row behind request *index*, which has come back."""
        ticket = self._out.pop(index)
        self._bytes -= len(ticket.data)
        self._pace.answered()
        return ticket

    def take_unusable(self, index: int | None) -> Iterator[Ticket]:
        """Give the rows that never went out, only those before request *index* unless it is None."""
        while self._unusable and (index is None or self._unusable[0][0] <= index):
            yield self._unusable.popleft()[1]

    def _is_over(self) -> bool:
        if self._stop.asked or self._bytes >= MOST_BYTES_OUT or len(self._unusable) >= MOST_UNUSABLE:
            return True
        # Whoever types rows, or sends them now and then, wants the answers to those that are out first.
        is_waiting = bool(self._out or self._unusable) and not self._source.is_ready()
        return is_waiting or self._pace.is_over()
