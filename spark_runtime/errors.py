"""Every error of the runtime.

SparkError
├── ScriptUnusable       the user's: the script cannot be run at all (missing, a folder, misnamed, unreadable)
├── CallFailed           the script's: an exposed function raised, or there is none of that name
├── RequestRefused       the user's: what was asked does not fit the run's state
├── WorkerDied           the machine's: a worker ended while it owed an answer
├── NurseryDied          the machine's: the process that starts workers ended
├── ProtocolViolated     ours: the other side sent what it must not
├── NoSuchRun            the user's: there is no run to talk to, or more than one
├── StoreError           the state folder: see supervise/store.py
├── BadRequestError      the user's: the call or the configuration makes no sense (also a ValueError)
├── ModelUnusable        the model's: it cannot be read, compiled or loaded at all
│   └── ModelNotFound    the user's: no model of that name, or no such file
├── EngineMissing        the machine's: the engine or the interpreter that a model asks for is not there
├── SparkClosed          the user's: this Spark was closed
├── QueueFull            the user's: more calls wait than may
├── BatchError           the user's: input or output of a batch cannot be used; see batch/
└── ExecuteError         one call failed; names model and replica
    ├── ModelTrapped     the model's: it trapped (division by zero, unreachable, out of bounds, ...)
    │   ├── ModelOutOfMemory   it asked for more than its memory limit
    │   └── ModelStackOverflow
    ├── ModelExited      the model's: a WASI command ended with a code other than 0
    ├── FunctionMissing  the user's: the model exports no such function
    ├── WrongSignature   the user's: the export takes other arguments
    ├── AnswerInvalid    the model's: its answer is not JSON, or does not lie in its memory
    ├── ReplicaDied      the machine's: the process ended while it was at this call
    ├── ExecuteTimeout   no answer in time (also a TimeoutError)
    └── ExecuteCancelled cancelled (also a concurrent.futures.CancelledError)
"""

import concurrent.futures
from typing import Any


class SparkError(Exception):
    """Base of everything that the runtime raises on purpose. The message is one sentence for people."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain data: ``error`` (the class), ``message``, and what else is known."""
        return {"error": type(self).__name__, "message": str(self)}


class ScriptUnusable(SparkError):
    """The script cannot be run. The message names the file and what to do."""


class CallFailed(SparkError):
    """A call of an exposed function failed in the script.

    Attributes:
        kind: The name of the exception's class.
        text: The script's traceback; empty when the function was never reached.
    """

    def __init__(self, kind: str, message: str, text: str) -> None:
        super().__init__(f"{kind}: {message}" if message else kind)
        self.kind = kind
        self.text = text


class RequestRefused(SparkError):
    """What was asked makes no sense in the state that the run is in."""


class WorkerDied(SparkError):
    """The worker ended while it owed an answer.

    The call may have run in part. Repeat it only if running it twice is harmless.
    """


class NurseryDied(SparkError):
    """The process that starts workers ended, and its workers with it."""


class ProtocolViolated(SparkError):
    """The other side of a channel sent something that does not belong there. It is not used any more."""


class NoSuchRun(SparkError):
    """There is no run to talk to, or several and none was named."""


class StoreError(SparkError):
    """The state folder cannot be used as asked. The message names the path and what to do."""


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


class BatchError(SparkError):
    """Input or output of a batch cannot be used. The message names the file and what to do."""


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
