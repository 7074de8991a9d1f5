"""Offline first, then online: when a call that failed here goes to the endpoint, and what its caller is told.

A request goes online when the model is missing here or cannot be loaded, when it trapped, took too long, or its process
died. It does not when it was cancelled, when it was refused for what it is, nor when the endpoint has had its say
already: a model that calls another one online fails with that one's 4xx. An answer that names validation problems *is*
the answer, so it never comes here at all.
"""

import logging
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from spark_runtime.errors import (
    EngineMissing,
    ExecuteCancelled,
    ExecuteTimeout,
    FallbackFailed,
    ModelExited,
    ModelNotFound,
    ModelTrapped,
    ModelUnusable,
    NurseryDied,
    OnlineError,
    ReplicaDied,
    SparkError,
    WorkerDied,
)
from spark_runtime.online.once import Once
from spark_workers.futures import StoppableFuture

OFFLINE, ONLINE = "offline", "online"
SERVED_BY = "served_by"

T = TypeVar("T")

_REASONS: tuple[tuple[type[SparkError], str], ...] = (
    (ModelNotFound, "the model is missing"),
    (ModelUnusable, "the model cannot be loaded"),
    (EngineMissing, "the model cannot be loaded"),
    (ModelTrapped, "the model trapped"),
    (ModelExited, "the model ended"),
    (ExecuteTimeout, "the model took too long"),
    (ReplicaDied, "the model's process died"),
    (WorkerDied, "the model's process died"),
    (NurseryDied, "the model's process died"),
)

_log = logging.getLogger("spark_runtime")


def reason_to_go_online(problem: BaseException) -> str | None:
    """Return why a call that failed here with *problem* goes to the endpoint, in words; None if it does not."""
    if isinstance(problem, ExecuteCancelled) or _was_refused_online(problem):
        return None
    return next((reason for kind, reason in _REASONS if isinstance(problem, kind)), None)


def _was_refused_online(problem: BaseException) -> bool:
    """Tell whether the endpoint, asked for a part of the answer, said that the request is at fault."""
    cause: BaseException | None = problem
    for _ in range(20):
        if isinstance(cause, OnlineError) and 400 <= cause.status < 500:
            return True
        if cause is None:
            break
        cause = cause.__cause__
    return False


def mark(answer: Any, served_by: str, *, is_columnar: bool = False) -> Any:
    """Return *answer* with a note which path gave it: in ``response_meta``, at the top of a columnar one."""
    if not isinstance(answer, dict):
        return answer
    if is_columnar and "response_data" not in answer:
        return {**answer, SERVED_BY: served_by}
    meta = answer.get("response_meta")
    return {**answer, "response_meta": {**(meta if isinstance(meta, dict) else {}), SERVED_BY: served_by}}


def call_with_fallback(model: str, offline: Callable[[], T], online: Callable[[], T]) -> tuple[T, str]:
    """Return the answer of *offline*, or else that of *online*, and which of them it is.

    Raises:
        SparkError: What *offline* raised, if that is no reason to go online; `FallbackFailed` if both failed.
    """
    try:
        return offline(), OFFLINE
    except SparkError as problem:
        first = problem
        _tell_or_raise(model, problem)
    try:
        return online(), ONLINE
    except SparkError as problem:
        raise both_failed(first, problem) from problem


async def acall_with_fallback(
    model: str, offline: Callable[[], Awaitable[T]], online: Callable[[], Awaitable[T]]
) -> tuple[T, str]:
    """As `call_with_fallback`, for asyncio."""
    try:
        return await offline(), OFFLINE
    except SparkError as problem:
        first = problem
        _tell_or_raise(model, problem)
    try:
        return await online(), ONLINE
    except SparkError as problem:
        raise both_failed(first, problem) from problem


def both_failed(offline: SparkError, online: SparkError) -> SparkError:
    """Return the error for a call that failed on both paths; a cancelled one was cancelled, whatever was before."""
    return online if isinstance(online, ExecuteCancelled) else FallbackFailed(offline, online)


def _tell_or_raise(model: str, problem: SparkError) -> None:
    reason = reason_to_go_online(problem)
    if reason is None:
        raise problem
    _log.warning("%s, so the call of %s goes online (%s)", reason, ascii(model), _one_line(problem))


def _one_line(problem: BaseException) -> str:
    return "".join(each if each.isprintable() else " " for each in str(problem)[:500])


class FallbackCall(StoppableFuture):
    """A call on both paths, as its caller sees it: one future. Its `cancel` stops the path that it is on.

    Args:
        model: The model's name, for people.
        offline: Begins the call here, and returns its future.
        online: Begins it at the endpoint; called when the first one failed, on the thread that says so.
        finish: Makes the caller's answer of an answer and the path that it came by.
    """

    def __init__(
        self,
        model: str,
        offline: Callable[[], Future[Any]],
        online: Callable[[], Future[Any]],
        finish: Callable[[Any, str], Any] = lambda answer, path: mark(answer, path),
    ) -> None:
        super().__init__(model)
        self._online = online
        self._finish = finish
        self._once = Once()
        self._under_way: Future[Any] | None = None
        self._is_cancelled = False
        try:
            self._follow(offline(), self._offline_ended)
        except SparkError as problem:
            self._failed_offline(problem)

    def cancel(self) -> bool:
        """Stop it, wherever it is; return False only when it has already finished."""
        if self._once.take():
            self._is_cancelled = True
            under_way = self._under_way
            if under_way is not None:
                under_way.cancel()
            self.set_cancelled()
        return self.cancelled()

    def _follow(self, future: "Future[Any]", ended: "Callable[[Future[Any]], None]") -> None:
        self._under_way = future
        if self._is_cancelled:  # between the two paths
            future.cancel()
        future.add_done_callback(ended)

    def _offline_ended(self, future: "Future[Any]") -> None:
        problem = _problem(future)
        if problem is None:
            self._end(future.result(), OFFLINE)
        elif isinstance(problem, SparkError):
            self._failed_offline(problem)
        else:
            self._fail(problem)

    def _failed_offline(self, problem: SparkError) -> None:
        if self._is_cancelled:
            return
        try:
            _tell_or_raise(self.model, problem)
        except SparkError:
            self._fail(problem)
            return
        self._offline_problem = problem
        try:
            self._follow(self._online(), self._online_ended)
        except SparkError as other:
            self._fail(both_failed(problem, other))

    def _online_ended(self, future: "Future[Any]") -> None:
        problem = _problem(future)
        if problem is None:
            self._end(future.result(), ONLINE)
        elif isinstance(problem, SparkError):
            self._fail(both_failed(self._offline_problem, problem))
        else:
            self._fail(problem)

    def _end(self, answer: Any, path: str) -> None:
        if not self._once.take():
            return
        try:
            answer = self._finish(answer, path)
        except Exception as problem:  # noqa: BLE001 - whoever waits must hear of it
            self.set_exception(problem)
        else:
            self.set_result(answer)

    def _fail(self, problem: BaseException) -> None:
        if self._once.take():
            self.set_exception(problem)


def _problem(future: "Future[Any]") -> BaseException | None:
    """Return what a future that is done ended in; None if that is an answer."""
    try:
        return future.exception()
    except BaseException as problem:  # noqa: BLE001 - cancelled: what it raises is the error
        return problem
