"""Calls models at an endpoint.

Every call has a thread of its own while it is under way, because `requests` blocks; how many are sent at once the
endpoint's configuration says. A call ends within its time whatever the other side does, and when it is cancelled its
connection is cut.
"""

import asyncio
import gzip
import json
import os
import random
import re
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import quote

from spark_runtime.config import Endpoint
from spark_runtime.errors import (
    BadRequestError,
    EndpointAnswerInvalid,
    ExecuteTimeout,
    OnlineError,
    SparkClosed,
    SparkError,
)
from spark_runtime.models.envelope import Envelope, Json
from spark_runtime.models.registry import Wanted
from spark_runtime.online.auth import KEY_HEADER, TOKEN_HEADER, auth_headers, context_headers
from spark_runtime.online.once import Once
from spark_runtime.online.retry import Retry, read_retry_after
from spark_runtime.online.transport import Line, LineCut, LineLate, Reply, Transport
from spark_workers.errors import online_error
from spark_workers.futures import StoppableFuture
from spark_workers.requests import write_request

COMPRESSED_FROM = 4096
_MOST_TEXT = 300

_HINTS = {
    401: "check the key or the token",
    403: "check what the key or the token is allowed to do",
    404: "check the endpoint's url and tenant, and the model that the request names",
    415: "the endpoint does not read such requests; try compress=False",
}


class OnlineCall(StoppableFuture):
    """A call at the endpoint, as its caller sees it: a future whose `cancel` cuts the connection."""

    def __init__(self, model: str, line: Line) -> None:
        super().__init__(model)
        self._line = line
        self._once = Once()

    def cancel(self) -> bool:
        """Stop it, wherever it is; return False only when it has already finished."""
        if self._once.take():
            self._line.cut()
            self.set_cancelled()
        return self.cancelled()

    def end(self, answer: Any, problem: BaseException | None = None) -> None:
        """Hand over what came of it, unless it is over already."""
        if not self._once.take():
            return
        if problem is None:
            self.set_result(answer)
        else:
            self.set_exception(problem)

    def abandon(self, problem: BaseException) -> None:
        """End it with an error and cut the connection."""
        self.end(None, problem)
        self._line.cut()


class OnlineClient:
    """Calls the models of one endpoint. Thread-safe, and usable under asyncio.

    Args:
        endpoint: Where they are, who calls, and how long it may take.
        retry: When a call is repeated; as often as the endpoint's configuration says if None.
        clock: Monotonic seconds.
        chance: A number from 0 to 1, at random.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        retry: Retry | None = None,
        clock: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self.endpoint = endpoint
        self._clock = clock
        self._chance = chance
        self._retry = retry or Retry(endpoint.retries)
        self._calls: weakref.WeakSet[OnlineCall] = weakref.WeakSet()
        self._changing = threading.Lock()
        self._is_closed = False
        self._open()
        _clients.add(self)

    def execute(
        self,
        envelope: Envelope,
        wanted: Wanted | None = None,
        *,
        timeout: float | None = None,
        context: Mapping[str, Any] | None = None,
    ) -> Json:
        """Return the endpoint's whole answer. See `submit` for the arguments.

        Raises:
            OnlineError: There is none, or it says that the call failed; see `spark_runtime.errors` for the ways.
            ExecuteTimeout: Not in time.
            BadRequestError, SparkClosed: It was not tried.
        """
        call = self.submit(envelope, wanted, timeout=timeout, context=context)
        try:
            answer: Json = call.result()
        except BaseException:
            call.cancel()  # nobody waits for it any more: a KeyboardInterrupt for example
            raise
        return answer

    async def aexecute(
        self,
        envelope: Envelope,
        wanted: Wanted | None = None,
        *,
        timeout: float | None = None,
        context: Mapping[str, Any] | None = None,
    ) -> Json:
        """As `execute`, for asyncio: an async function for the credential runs on this loop. Cancelling cuts off."""
        call = self.submit(envelope, wanted, timeout=timeout, context=context, loop=asyncio.get_running_loop())
        answer: Json = await asyncio.wrap_future(call)
        return answer

    def submit(
        self,
        envelope: Envelope,
        wanted: Wanted | None = None,
        *,
        timeout: float | None = None,
        context: Mapping[str, Any] | None = None,
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> OnlineCall:
        """Begin a call; return its future.

        Args:
            envelope: The request.
            wanted: Which model; what the request says of it if None.
            timeout: Seconds from now, in place of the endpoint's own.
            context: For a call that a model makes: the ``_ctx`` of the request that the model is at. Its tenant and
                its credentials are used, and the endpoint's own where it has none.
            loop: Where an async function for the credential runs; a loop of its own if None.

        Raises:
            BadRequestError: The request names no model, or cannot be sent.
            SparkClosed: The client was closed.
        """
        wanted = (wanted or envelope.wanted).resolved()
        tenant = str((context or {}).get("tenant") or self.endpoint.tenant)
        url = address(self.endpoint, tenant, wanted, is_columnar=envelope.is_columnar)
        body = write_request(_body(envelope, wanted))
        seconds = self.endpoint.timeout if timeout is None else timeout
        line = Line(self._clock() + seconds, self.endpoint.connect_timeout, self._clock)
        call = OnlineCall(str(wanted), line)
        sent = _Sent(url, body, tenant, context or {}, loop)
        with self._changing:
            if self._is_closed:
                raise SparkClosed("this client is closed")
            self._calls.add(call)
        threading.Thread(target=self._run, args=(call, sent, line, seconds), name="spark-online", daemon=True).start()
        return call

    def close(self) -> None:
        """Fail the calls that are under way with `SparkClosed`, and close the connections."""
        with self._changing:
            self._is_closed = True
            calls = list(self._calls)
        for call in calls:
            call.abandon(SparkClosed("the client was closed before the call was done"))
        self._transport.close()

    def disown(self) -> None:
        """Forget the connections in a fork of this process: they belong to its parent."""
        self._changing = threading.Lock()
        self._calls = weakref.WeakSet()
        self._open()

    # --- on the call's own thread ---

    def _open(self) -> None:
        endpoint = self.endpoint
        ca_file = None if endpoint.ca_file is None else str(endpoint.ca_file)
        self._transport = Transport(endpoint.connections, ca_file, trust_env=endpoint.trust_env)
        self._turns = threading.BoundedSemaphore(endpoint.connections)

    def _run(self, call: OnlineCall, sent: "_Sent", line: Line, seconds: float) -> None:
        try:
            answer = self._repeat(sent, line)
        except LineCut:
            pass  # whoever cut it has told the caller
        except (LineLate, TimeoutError) as problem:
            text = f"no answer from {self._name} within {seconds:g} s ({call.model})"
            late = ExecuteTimeout(text, call.model, details={"endpoint": self.endpoint.url})
            late.__cause__ = problem
            call.end(None, late)
        except SparkError as problem:
            call.end(None, problem)
        except BaseException as problem:  # noqa: BLE001 - a fault of ours: whoever waits must hear of it
            fault = SparkError(f"an internal error at an online call, please report it: {problem!r}")
            fault.__cause__ = problem
            call.end(None, fault)
        else:
            call.end(answer)

    def _repeat(self, sent: "_Sent", line: Line) -> Json:
        headers = self._headers(sent, line)
        repeated = 0
        while True:
            try:
                return self._once(sent, headers, line)
            except OnlineError as problem:
                pause = self._retry.pause(repeated, problem, self._chance())
                # What the endpoint said tells more than that the time is over.
                if pause is None or pause >= line.left():
                    raise
            line.pause(pause)
            repeated += 1

    def _headers(self, sent: "_Sent", line: Line) -> dict[str, str]:
        own = context_headers(sent.context, sent.tenant)
        if own is None:
            own = auth_headers(self.endpoint, line.left(), sent.loop)
        return {"Content-Type": "application/json", "Accept": "application/json", **own}

    def _once(self, sent: "_Sent", headers: Mapping[str, str], line: Line) -> Json:
        body, extra = sent.body, {}
        if self.endpoint.compress and len(body) > COMPRESSED_FROM:
            body, extra = gzip.compress(body, 6), {"Content-Encoding": "gzip"}
        if not self._turns.acquire(timeout=line.left()):
            raise LineLate
        try:
            reply = self._transport.send(line, "POST", sent.url, {**headers, **extra}, body, self.endpoint.max_bytes)
        finally:
            self._turns.release()
        return self._answer(reply, headers)

    def _answer(self, reply: Reply, headers: Mapping[str, str]) -> Json:
        """Return what the endpoint answered. Raises OnlineError if that is no answer."""
        if 200 <= reply.status < 300:
            return self._parse(reply)
        if 300 <= reply.status < 400:
            to = re.sub(r"[?#].*", "", reply.headers.get("location", ""))[:_MOST_TEXT]
            raise EndpointAnswerInvalid(
                f"{self._name} answers {reply.status}, a redirect to {to!a}, and redirects are not followed; "
                "give the final address as the endpoint's url",
                details={"http_status": reply.status},
            )
        message, code = _told(reply)
        for name in (KEY_HEADER, TOKEN_HEADER):  # an endpoint may repeat what it did not like
            message = _without(message, headers.get(name, ""))
        hint = f"; {_HINTS[reply.status]}" if reply.status in _HINTS else ""
        details: dict[str, Any] = {"endpoint": self.endpoint.url}
        if request_id := reply.headers.get("x-request-id"):
            details["request_id"] = _printable(request_id)
        if (asked := read_retry_after(reply.headers.get("retry-after", ""))) is not None:
            details["retry_after"] = asked
        raise online_error(reply.status, f"{self._name} answers {reply.status}: {message}{hint}", code, details)

    def _parse(self, reply: Reply) -> Json:
        try:
            answer = json.loads(reply.body)
        except (ValueError, RecursionError) as problem:
            shown = _printable(reply.body[:80].decode(errors="replace"))
            text = f"it begins with {shown!a}" if reply.body else "it is empty"
            raise EndpointAnswerInvalid(f"the answer of {self._name} is not JSON; {text}") from problem
        if not isinstance(answer, dict):
            raise EndpointAnswerInvalid(f"the answer of {self._name} is not an object, but {type(answer).__name__}")
        return answer

    @property
    def _name(self) -> str:
        return f"{self.endpoint.url.rstrip('/')}/{self.endpoint.tenant}"


class _Sent:
    """What one call sends, and for whom."""

    __slots__ = ("body", "context", "loop", "tenant", "url")

    def __init__(
        self, url: str, body: bytes, tenant: str, context: Mapping[str, Any], loop: asyncio.AbstractEventLoop | None
    ) -> None:
        self.url = url
        self.body = body
        self.tenant = tenant
        self.context = context
        self.loop = loop


def address(endpoint: Endpoint, tenant: str, wanted: Wanted, *, is_columnar: bool) -> str:
    """Return where a request goes.

    Args:
        endpoint: Of which service.
        tenant: Whose model it is.
        wanted: Which model; without uris (`Wanted.resolved`).
        is_columnar: It is a v4 request, which says in its body which model it means.

    Raises:
        BadRequestError: The request names no model.
    """
    public = "/public" if endpoint.auth == "public" else ""
    start = f"{endpoint.url.rstrip('/')}/{quote(tenant, safe='')}/api"
    if not wanted.names_a_model():
        raise BadRequestError("which model is to be called online? The request names none, nor does the call")
    if is_columnar:
        return f"{start}/v4{public}/execute"
    start = f"{start}/v3{public}"
    if wanted.version_id:
        return f"{start}/version/{quote(wanted.version_id, safe='')}"
    if wanted.folder and wanted.service:
        service = wanted.service + (f"[{wanted.version}]" if wanted.version else "")
        return f"{start}/folders/{quote(wanted.folder, safe='')}/services/{quote(service, safe='')}/execute"
    if wanted.service_id:
        return f"{start}/service/{quote(wanted.service_id, safe='')}"
    return f"{start}/execute"


def _body(envelope: Envelope, wanted: Wanted) -> Json:
    """Return what is sent: the whole request. A v4 request that does not say which model it means is told to."""
    request = envelope.request
    if not envelope.is_columnar or request.get("version_id") or request.get("service"):
        return request
    if wanted.version_id:
        return {**request, "version_id": wanted.version_id}
    version = f"[{wanted.version}]" if wanted.version else ""
    named = f"{wanted.folder}/{wanted.service}{version}" if wanted.service else wanted.service_id
    return {**request, "service": named}


def _told(reply: Reply) -> tuple[str, str]:
    """Return message and code of an answer that is an error: what its JSON says, else how it begins."""
    try:
        told = json.loads(reply.body)
    except (ValueError, RecursionError):
        told = None
    error = told.get("error") if isinstance(told, dict) else None
    error = error if isinstance(error, dict) else {}
    message = error.get("message")
    if not isinstance(message, str) or not message.strip():
        message = reply.body[:_MOST_TEXT].decode(errors="replace") if told is None else json.dumps(told)
    code = error.get("code")
    shown = _printable(message.strip()[:_MOST_TEXT]) or _printable(reply.reason[:_MOST_TEXT])
    return shown or "nothing more", code if isinstance(code, str) and re.fullmatch(r"\w{1,60}", code) else ""


def _without(text: str, secret: str) -> str:
    bare = secret.removeprefix("Bearer ")
    return text.replace(bare, "***") if bare else text


def _printable(text: str) -> str:
    return "".join(each if each.isprintable() else " " for each in text)


_clients: "weakref.WeakSet[OnlineClient]" = weakref.WeakSet()


def _disown_all() -> None:
    for client in list(_clients):
        client.disown()


os.register_at_fork(after_in_child=_disown_all)
