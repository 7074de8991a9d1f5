"""Calls that models make of other services, while they answer: "XCalls".

The replica that asks waits, and its model's other calls wait behind it. So two rules keep a chain of calls from waiting
for itself. A model that is in the chain already is not called again, whether by itself or in a circle, however many
replicas it has. And a call that is made in a chain has no more time than the call that makes it, and no more than
`MOST_SECONDS` if that one has no limit: chains that hold what each other wants come to an end.
"""

import json
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from spark_runtime.errors import SparkError
from spark_runtime.models.registry import Wanted
from spark_runtime.pool.job import NEVER, Call, Context, Job

MOST_EDGES = 15
MOST_SECONDS = 60.0

#: Gives the model its answer, or a sentence that says why there is none.
Reply = Callable[[bytes, str], None]


class Submit(Protocol):
    """Begins a call."""

    def __call__(self, model: str, request: Any, context: Context, timeout: float) -> Call: ...


class Outcalls:
    """Answers what models ask. It holds nothing: what belongs to a call is in the call's own `Context`."""

    def __init__(self, find: Callable[[Wanted], str], submit: Submit) -> None:
        """Take what finds a model, as its name, and what begins a call of one."""
        self._find = find
        self._submit = submit

    def begin(self, model: str, job: Job, text: bytes, reply: Reply) -> None:
        """Begin the call that *model* asks for while it is at *job*. Does not wait; any thread."""
        if job.context is None:
            job.context = Context({}, (model,))
        context = job.context
        try:
            asked = _Asked.read(text)
            target = self._find(asked.wanted)
            _check_chain(context.chain, target)
            inner = Context(context.given, (*context.chain, target))
            seconds = min(MOST_SECONDS, job.deadline - time.monotonic()) if job.deadline != NEVER else MOST_SECONDS
            call = context.inner = self._submit(target, asked.body, inner, max(seconds, 0.001))
        except (SparkError, ValueError) as problem:
            reply(b"", f"it calls another service: {problem}")
            return
        call.add_done_callback(partial(_ended, asked, context, reply))


def _check_chain(chain: tuple[str, ...], target: str) -> None:
    if target in chain:
        circle = " → ".join(map(repr, (*chain, target)))
        raise ValueError(f"{target!r} waits for this very call, so it would wait for ever: {circle}")
    if len(chain) > MOST_EDGES:
        raise ValueError(f"{len(chain)} calls in a chain, and {MOST_EDGES} may be: {' → '.join(map(repr, chain))}")


def _ended(asked: "_Asked", context: Context, reply: Reply, done: "Future[Any]") -> None:
    context.inner = None
    try:
        answer = json.dumps(asked.enclosed(done.result()), ensure_ascii=False, separators=(",", ":"))
        reply(answer.encode("utf-8", "replace"), "")
    except CancelledError:
        reply(b"", f"its call of {asked.wanted} was cancelled")
    except SparkError as problem:
        reply(b"", f"its call of {asked.wanted} failed: {problem}")


@dataclass(frozen=True, slots=True)
class _Asked:
    """What a model asks for."""

    wanted: Wanted
    body: Any
    version: int

    @classmethod
    def read(cls, text: bytes) -> "_Asked":
        """Read it. Raises ValueError with a sentence."""
        try:
            asked = json.loads(text)
            body = asked.get("request_body") or {}
            body = json.loads(body) if isinstance(body, str) else body
        except (ValueError, AttributeError, RecursionError) as problem:
            raise ValueError(f"what it asks for is not JSON of the kind that is known: {problem}") from problem

        def told(name: str) -> str:
            value = asked.get(name)
            return "" if value is None else str(value)

        meta = body.get("request_meta") if isinstance(body, dict) else None
        wanted = Wanted(
            folder=told("folder_name"),
            service=told("service_name"),
            service_id=told("service_id"),
            service_uri=told("service_uri"),
            transaction_date=meta.get("transaction_date") if isinstance(meta, dict) else None,
        )
        if not wanted.names_a_model():
            raise ValueError("it does not say which service it wants")
        version = asked.get("xcall_version")
        return cls(wanted, body, version if isinstance(version, int) else 1)

    def enclosed(self, answer: Any) -> Any:
        """Return an answer as this version of the protocol wraps it."""
        if self.version >= 2:
            whole = answer if isinstance(answer, dict) else {"data": answer}
            meta = {"http_status_code": 202, "http_response_time": 0, "error_details": None}
            return {**whole, "xcall_meta": meta}
        name = f"folders/{self.wanted.folder}/services/{self.wanted.service}"
        metadata = {"calltype": "SparkService", "name": name, "status": 202, "error_code": "", "response_time": 0}
        return {"metadata": metadata, "data": answer}
