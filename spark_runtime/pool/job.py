"""One call on its way: what the dispatcher moves, and the future that a caller holds."""

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from spark_workers.futures import StoppableFuture

if TYPE_CHECKING:
    from spark_runtime.pool.dispatch import Lane

_log = logging.getLogger("spark_runtime")

WAITING, SENT, FINISHED = "waiting", "sent", "finished"
NEVER = float("inf")


@dataclass(slots=True)
class Context:
    """What a call brings for the calls that its model makes.

    Attributes:
        given: The request's ``_ctx``: credentials and the like. It belongs to this request, and to no other.
        chain: The models that wait for each other, the outermost first, this call's own at the end.
        inner: The call that its model waits for now.
    """

    given: Mapping[str, Any]
    chain: tuple[str, ...]
    inner: "Call | None" = None


class Job:
    """One call as the pool sees it. *state* is changed under the pool's lock only, and ends at `FINISHED` once.

    Attributes:
        serial: Which piece of work it is; 0 while it waits.
        lane: The way to the replica that has it, or had it last.
        deadline: When it fails, in monotonic seconds.
        limit: Seconds from when a replica gets it, in place of a deadline from the start; None for a fixed one.
        ended: How many replicas ended at it.
        ended_before: How many ended when it was the next that they would have begun.
        context: What it brings for the calls that its model makes; None if that is nothing yet.
        reads: Its caller will read the answer from the replica by itself. Given up when it has to wait for one.
    """

    __slots__ = (
        "context",
        "deadline",
        "ended",
        "ended_before",
        "function",
        "lane",
        "limit",
        "payload",
        "reads",
        "serial",
        "state",
    )

    def __init__(self, function: str, payload: bytes, deadline: float = NEVER, limit: float | None = None) -> None:
        self.function = function
        self.payload = payload
        self.deadline = deadline
        self.limit = limit
        self.state = WAITING
        self.serial = 0
        self.lane: Lane | None = None
        self.ended = 0
        self.ended_before = 0
        self.context: Context | None = None
        self.reads = False

    def resolve(self, answer: bytes, replica: int) -> None:
        """Take the answer. Called once, without the lock, usually on the loop's thread."""
        raise NotImplementedError

    def fail(self, error: Exception) -> None:
        """Take the reason why there is no answer. Called once, without the lock."""
        raise NotImplementedError


class Waiting(Job):
    """A call whose caller only waits for it: a lock in place of a future, which takes longer than the call itself."""

    __slots__ = ("_answer", "_ended", "_error", "_replica")

    def __init__(self, function: str, payload: bytes, deadline: float) -> None:
        super().__init__(function, payload, deadline)
        self._answer = b""
        self._replica = 0
        self._error: Exception | None = None
        self.reads = True
        self._ended = threading.Lock()
        self._ended.acquire()

    def resolve(self, answer: bytes, replica: int) -> None:
        """Take the answer; its caller reads it."""
        self._answer, self._replica = answer, replica
        self._ended.release()

    def fail(self, error: Exception) -> None:
        """Take the error; its caller raises it."""
        self._error = error
        self._ended.release()

    def wait(self) -> tuple[bytes, int]:
        """Return the answer and which replica gave it. Raises what `fail` was given."""
        if self.reads and self.lane is not None:
            self.lane.port.read_for(self, self.lane)
        self._ended.acquire()
        if self._error is not None:
            raise self._error
        return self._answer, self._replica


class Call(Job, StoppableFuture):
    """A call as its caller sees it: a future whose `cancel` also stops a call that runs.

    After a cancel `result` raises `ExecuteCancelled`, which is a `concurrent.futures.CancelledError`.

    Attributes:
        model: The model's name.
        replica: Which replica answered, from 1; 0 until then.
    """

    def __init__(
        self,
        model: str,
        function: str,
        payload: bytes,
        deadline: float,
        read: Callable[[bytes, str, int], Any],
        stop: Callable[["Call"], bool],
    ) -> None:
        Job.__init__(self, function, payload, deadline)
        StoppableFuture.__init__(self, model)
        self.replica = 0
        self._read = read
        self._stop = stop

    def cancel(self) -> bool:
        """Stop the call, wherever it is; return False only when it has already finished."""
        if self.state != FINISHED and self._stop(self):
            self.set_cancelled()
        return self.cancelled()

    def running(self) -> bool:
        """Tell whether a replica has it."""
        return self.state == SENT

    def resolve(self, answer: bytes, replica: int) -> None:
        """Read the answer and hand it over."""
        self.replica = replica
        try:
            value = self._read(answer, self.model, replica)
        except Exception as problem:  # noqa: BLE001 - the answer's fault or one of ours: whoever waits must hear of it
            self.fail(problem)
        else:
            _hand_over(self.set_result, value)

    def fail(self, error: Exception) -> None:
        """Hand the error over."""
        _hand_over(self.set_exception, error)


def _hand_over(settle: Callable[[Any], None], value: Any) -> None:
    """Settle a future; what a callback of its owner's raises, SystemExit included, keeps nobody else's answer back."""
    try:
        settle(value)
    except BaseException:  # noqa: BLE001 - it is told, and there is nobody to raise it to
        _log.exception("a callback of a call raised")
