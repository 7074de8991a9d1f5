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


class MissingModelError(ModelNotFound):
    """No model that is known here is the one that a request names."""

    status = 404
    code = "MISSING_MODEL"

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, as the service tells its errors."""
        return {"error": {"status": self.status, "message": str(self), "code": self.code}}


class OnlineError(SparkError):
    """The endpoint gave no answer to a call, or one that says that it failed.

    Attributes:
        status: The status of the HTTP answer; what a gateway would say where there was none.
        code: The service's word for it, such as ``"UNAUTHORIZED"``.
        details: What else is known, as plain data.
    """

    status = 500
    code = "ONLINE_ERROR"

    def __init__(
        self, message: str, status: int | None = None, code: str = "", details: dict[str, Any] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status or type(self).status
        self.code = code or type(self).code
        self.details = details or {}

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, as the service tells its errors."""
        return {"error": {"status": self.status, "message": str(self), "code": self.code, **self.details}}


class OnlineBadRequestError(OnlineError, BadRequestError):
    """400: the request makes no sense to the endpoint."""

    status = 400
    code = "BAD_REQUEST"


class UnauthorizedError(OnlineError):
    """401: the endpoint does not take the key or the token."""

    status = 401
    code = "UNAUTHORIZED"


class ForbiddenError(OnlineError):
    """403: whoever the key or the token belongs to may not do that."""

    status = 403
    code = "FORBIDDEN"


class NotFoundError(OnlineError):
    """404: the endpoint knows no such model, or no such tenant."""

    status = 404
    code = "NOT_FOUND"


class ConflictError(OnlineError):
    """409: something else is going on there that this call is in the way of."""

    status = 409
    code = "CONFLICT"


class UnsupportedMediaTypeError(OnlineError):
    """415: the endpoint does not read requests of this form."""

    status = 415
    code = "UNSUPPORTED_MEDIA_TYPE"


class UnprocessableEntityError(OnlineError):
    """422: the endpoint reads the request and cannot use it."""

    status = 422
    code = "UNPROCESSABLE_ENTITY"


class RateLimitError(OnlineError):
    """429: too many calls. ``details["retry_after"]``: the seconds to wait, if the endpoint said them."""

    status = 429
    code = "RATE_LIMIT_EXCEEDED"


class InternalServerError(OnlineError):
    """500: the endpoint failed at this call."""

    status = 500
    code = "INTERNAL_SERVER_ERROR"


class ServiceUnavailableError(OnlineError):
    """503: the endpoint takes no calls now."""

    status = 503
    code = "SERVICE_UNAVAILABLE"


class GatewayTimeoutError(OnlineError):
    """504: the endpoint had no answer within its own limit."""

    status = 504
    code = "GATEWAY_TIMEOUT"


class EndpointUnreachable(OnlineError):
    """There is no connection to the endpoint: no such host, refused, cut off, or its certificate is not trusted."""

    status = 503
    code = "ENDPOINT_UNREACHABLE"


class EndpointAnswerInvalid(OnlineError):
    """What the endpoint sent is no answer: not JSON, too long, damaged, or a redirect, which is not followed."""

    status = 502
    code = "ENDPOINT_ANSWER_INVALID"


class FallbackFailed(OnlineError):
    """A call failed on the model here, and then online as well.

    Attributes:
        offline: Why it failed here.
        online: Why it failed at the endpoint; also the ``__cause__``.
    """

    code = "FALLBACK_FAILED"

    def __init__(self, offline: SparkError, online: SparkError) -> None:
        status = online.status if isinstance(online, OnlineError) else 504 if isinstance(online, TimeoutError) else 500
        super().__init__(f"offline: {offline}; online: {online}", status)
        self.offline = offline
        self.online = online
        self.__cause__ = online

    def __reduce__(self) -> tuple[type["FallbackFailed"], tuple[SparkError, SparkError]]:
        """Travel between processes as the two errors that it is made of."""
        return FallbackFailed, (self.offline, self.online)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, both errors included."""
        told = super().to_dict()
        told["error"] |= {"offline": self.offline.to_dict(), "online": self.online.to_dict()}
        return told


def online_error(status: int, message: str, code: str = "", details: dict[str, Any] | None = None) -> OnlineError:
    """Return the error for an endpoint's answer of *status*; a plain `OnlineError` for one without a class."""
    kind = _BY_STATUS.get(status)
    if kind is None:
        return OnlineError(message, status, code or f"HTTP_{status}", details)
    return kind(message, status, code, details)


def from_dict(data: dict[str, Any]) -> SparkError:
    """Return the error that `SparkError.to_dict` told as *data*; an `ExecuteError` in place of one not known here."""
    if isinstance(data.get("error"), dict):
        return _from_service(dict(data["error"]))
    rest = dict(data)
    kind = _KINDS.get(str(rest.pop("error", "")), ExecuteError)
    message = str(rest.pop("message", ""))
    if issubclass(kind, ExecuteError):
        model, replica = str(rest.pop("model", "")), rest.pop("replica", None)
        return kind(message, model, replica if isinstance(replica, int) else None, rest)
    if kind is ModelUnusable:
        return ModelUnusable(message, str(rest.pop("kind", "")), rest)
    return kind(message)


def _from_service(rest: dict[str, Any]) -> SparkError:
    message, code, status = str(rest.pop("message", "")), str(rest.pop("code", "")), rest.pop("status", None)
    offline, online = rest.get("offline"), rest.get("online")
    if code == FallbackFailed.code and isinstance(offline, dict) and isinstance(online, dict):
        return FallbackFailed(from_dict(offline), from_dict(online))
    if code == MissingModelError.code:
        return MissingModelError(message)
    status = status if isinstance(status, int) else OnlineError.status
    for kind in (EndpointUnreachable, EndpointAnswerInvalid):
        if code == kind.code:
            return kind(message, status, code, rest)
    return online_error(status, message, code, rest)


def _below(kind: type[SparkError]) -> dict[str, type[SparkError]]:
    return {kind.__name__: kind} | {
        name: each for below in kind.__subclasses__() for name, each in _below(below).items()
    }


# Made while nothing else has been derived from these: exactly the classes of this file.
_KINDS = _below(SparkError)

_BY_STATUS: dict[int, type[OnlineError]] = {
    kind.status: kind
    for kind in (
        OnlineBadRequestError,
        UnauthorizedError,
        ForbiddenError,
        NotFoundError,
        ConflictError,
        UnsupportedMediaTypeError,
        UnprocessableEntityError,
        RateLimitError,
        InternalServerError,
        ServiceUnavailableError,
        GatewayTimeoutError,
    )
}
