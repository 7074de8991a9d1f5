"""The future of a model's answer: its end by `cancel` is told as an error of ours."""

from concurrent.futures import CancelledError, Future
from typing import Any, NoReturn

from spark_workers.errors import ExecuteCancelled


class StoppableFuture(Future[Any]):
    """A future whose `cancel` may end it at any time; `result` then raises `ExecuteCancelled`."""

    def __init__(self, model: str) -> None:
        super().__init__()
        self.model = model

    def result(self, timeout: float | None = None) -> Any:
        """Wait for the answer.

        Raises:
            SparkError: There is none; `ExecuteCancelled` after a cancel.
            TimeoutError: It has not come yet.
        """
        try:
            return super().result(timeout)
        except CancelledError as problem:
            self._raise_cancelled(problem)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait for the end; return the error, if it ended in one. Raises as `result` while it waits, or cancelled."""
        try:
            return super().exception(timeout)
        except CancelledError as problem:
            self._raise_cancelled(problem)

    def set_cancelled(self) -> None:
        """End it; whoever calls this has made sure that nobody else does."""
        Future.cancel(self)
        self.set_running_or_notify_cancel()

    def _raise_cancelled(self, problem: CancelledError) -> NoReturn:
        if isinstance(problem, ExecuteCancelled):
            raise problem
        text = f"the call of model {self.model!r} was cancelled" if self.model else "the call was cancelled"
        raise ExecuteCancelled(text, self.model) from None
