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
│       └── MissingModelError  no model here is the one that a request names
├── EngineMissing        the machine's: the engine or the interpreter that a model asks for is not there
├── SparkClosed          the user's: this Spark was closed
├── QueueFull            the user's: more calls wait than may
├── BatchError           the user's: input or output of a batch cannot be used; see batch/
├── OnlineError          the endpoint's: no answer to a call, or one that says that it failed; has status and code
│   ├── OnlineBadRequestError      400, also a BadRequestError
│   ├── UnauthorizedError          401
│   ├── ForbiddenError             403
│   ├── NotFoundError              404
│   ├── ConflictError              409
│   ├── UnsupportedMediaTypeError  415
│   ├── UnprocessableEntityError   422
│   ├── RateLimitError             429
│   ├── InternalServerError        500
│   ├── ServiceUnavailableError    503
│   ├── GatewayTimeoutError        504
│   ├── EndpointUnreachable        no connection, or a certificate that is not trusted
│   ├── EndpointAnswerInvalid      not JSON, too long, damaged, or a redirect
│   └── FallbackFailed             failed on the model here, then online as well; carries both
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

from spark_workers.errors import (
    AnswerInvalid,
    BadRequestError,
    ConflictError,
    EndpointAnswerInvalid,
    EndpointUnreachable,
    EngineMissing,
    ExecuteCancelled,
    ExecuteError,
    ExecuteTimeout,
    FallbackFailed,
    ForbiddenError,
    FunctionMissing,
    GatewayTimeoutError,
    InternalServerError,
    MissingModelError,
    ModelExited,
    ModelNotFound,
    ModelOutOfMemory,
    ModelStackOverflow,
    ModelTrapped,
    ModelUnusable,
    NotFoundError,
    OnlineBadRequestError,
    OnlineError,
    QueueFull,
    RateLimitError,
    ReplicaDied,
    ServiceUnavailableError,
    SparkClosed,
    SparkError,
    UnauthorizedError,
    UnprocessableEntityError,
    UnsupportedMediaTypeError,
    WrongSignature,
)

__all__ = [
    "AnswerInvalid",
    "BadRequestError",
    "BatchError",
    "CallFailed",
    "ConflictError",
    "EndpointAnswerInvalid",
    "EndpointUnreachable",
    "EngineMissing",
    "ExecuteCancelled",
    "ExecuteError",
    "ExecuteTimeout",
    "FallbackFailed",
    "ForbiddenError",
    "FunctionMissing",
    "GatewayTimeoutError",
    "InternalServerError",
    "MissingModelError",
    "ModelExited",
    "ModelNotFound",
    "ModelOutOfMemory",
    "ModelStackOverflow",
    "ModelTrapped",
    "ModelUnusable",
    "NoSuchRun",
    "NotFoundError",
    "NurseryDied",
    "OnlineBadRequestError",
    "OnlineError",
    "ProtocolViolated",
    "QueueFull",
    "RateLimitError",
    "ReplicaDied",
    "RequestRefused",
    "ScriptUnusable",
    "ServiceUnavailableError",
    "SparkClosed",
    "SparkError",
    "StoreError",
    "UnauthorizedError",
    "UnprocessableEntityError",
    "UnsupportedMediaTypeError",
    "WorkerDied",
    "WrongSignature",
]


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


class BatchError(SparkError):
    """Input or output of a batch cannot be used. The message names the file and what to do."""
