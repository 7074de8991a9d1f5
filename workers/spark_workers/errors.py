"""The errors that calls of models end in. They live on this side so that a script in a worker gets the very same ones.

`spark_runtime.errors` draws the whole tree; users import from there.
"""

import concurrent.futures
from typing import Any


class SparkError(Exception):
    """Base of everything that the runtime raises on purpose. The message is one sentence for people."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain data: ``error`` (the class), ``message``, and what else is known."""
        return {"error": type(self).__name__, "message": str(self)}


class BadRequestError(SparkError, ValueError):
    """A call or a configuration that makes no sense. The message says what, and what to do."""


class ModelUnusable(SparkError):
    """A model cannot be read, compiled or loaded.

    Attributes:
        kind: One of `spark_workers.hosts.failures.KINDS`, such as ``"invalid-module"``.
        details: What else is known, as plain data.
    """

    def __init__(self, message: str, kind: str = "invalid-module", details: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.kind = kind
        self.details = details or {}

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {**super().to_dict(), "kind": self.kind, **self.details}


class ModelNotFound(ModelUnusable):
    """There is no model of that name, or no file at that path."""

    def __init__(self, message: str) -> None:
        super().__init__(message, "not-found")


class EngineMissing(SparkError):
    """The engine that a model asks for is not installed where it would run. The message says how to get it."""


class SparkClosed(SparkError):
    """This `Spark` was closed; it takes no calls any more."""


class QueueFull(SparkError):
    """As many calls wait as may. Take answers before submitting more, or use `Spark.map`, which waits by itself."""


class ExecuteError(SparkError):
    """One call failed.

    Attributes:
        model: The model's name.
        replica: The replica that was at it, from 1; None if none was.
        details: What else is known, as plain data: ``trap``, ``backtrace``, ``exit_code``, ``stderr``, ...
    """

    def __init__(
        self, message: str, model: str = "", replica: int | None = None, details: dict[str, Any] | None = None
    ) -> None:
        super().__init__(message)
        self.model = model
        self.replica = replica
        self.details = details or {}

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {**super().to_dict(), "model": self.model, "replica": self.replica, **self.details}


class ModelTrapped(ExecuteError):
    """The model trapped. ``details["trap"]`` says which way, ``details["backtrace"]`` where."""


class ModelOutOfMemory(ModelTrapped):
    """The model asked for more memory than its limit allows."""


class ModelStackOverflow(ModelTrapped):
    """The model's calls nest deeper than its stack allows."""


class ModelExited(ExecuteError):
    """A WASI command ended with a code other than 0: ``details["exit_code"]``, ``details["stderr"]``."""


class FunctionMissing(ExecuteError):
    """The model exports no function of that name."""


class WrongSignature(ExecuteError):
    """The exported function takes other arguments than those given."""


class AnswerInvalid(ExecuteError):
    """The model's answer is not JSON, or does not lie in its memory."""


class ReplicaDied(ExecuteError):
    """The replica's process ended while it was at this call.

    The call may have run in part. Repeat it only if running it twice is harmless.
    """


class ExecuteTimeout(ExecuteError, TimeoutError):
    """No answer within the call's time-out, counted from submit. The work was stopped."""


class ExecuteCancelled(ExecuteError, concurrent.futures.CancelledError):
    """The call was cancelled. If it ran, its work was stopped."""


def from_dict(data: dict[str, Any]) -> SparkError:
    """Return the error that `SparkError.to_dict` told as *data*; an `ExecuteError` in place of one not known here."""
    rest = dict(data)
    kind = _KINDS.get(str(rest.pop("error", "")), ExecuteError)
    message = str(rest.pop("message", ""))
    if issubclass(kind, ExecuteError):
        model, replica = str(rest.pop("model", "")), rest.pop("replica", None)
        return kind(message, model, replica if isinstance(replica, int) else None, rest)
    if kind is ModelUnusable:
        return ModelUnusable(message, str(rest.pop("kind", "")), rest)
    return kind(message)


def _below(kind: type[SparkError]) -> dict[str, type[SparkError]]:
    return {kind.__name__: kind} | {
        name: each for below in kind.__subclasses__() for name, each in _below(below).items()
    }


# Made while nothing else has been derived from these: exactly the classes of this file.
_KINDS = _below(SparkError)
