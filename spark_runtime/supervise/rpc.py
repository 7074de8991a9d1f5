"""JSON-RPC 2.0 for one client, without I/O: requests in, answers out. The control socket and the page use the same.

Methods: status, pause, resume, step, stop, reload, restart, reset, back, call, wait, cancel, set, quit, subscribe.
A call that takes longer than a second answers with its job, ``{"job": "job-1"}``; `wait` then waits for its result as
long as it takes.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from spark_runtime.errors import CallFailed, RequestRefused, SparkError
from spark_runtime.supervise.jobs import Job
from spark_runtime.supervise.run import Run

JOB_SECONDS = 1.0
MOST_BYTES = 16 * 1024 * 1024

PARSE_ERROR, INVALID_REQUEST, NO_METHOD, INVALID_PARAMS, INTERNAL = -32700, -32600, -32601, -32602, -32603
REFUSED, CALL_FAILED = -32000, -32001

_PLAIN = ("status", "pause", "resume", "step", "stop", "reload", "restart", "reset", "back", "cancel", "quit")


class RpcProblem(Exception):
    """An error answer."""

    def __init__(self, code: int, message: str, data: Any = None) -> None:
        super().__init__(message)
        self.code = code
        self.data = data


class RpcClient:
    """One client's view of a run. *send* takes an answer or an event, as a JSON-able dict, and must not block."""

    def __init__(self, run: Run, send: Callable[[dict[str, Any]], None]) -> None:
        self._run = run
        self._send = send
        self._unsubscribe: Callable[[], None] | None = None
        self._methods: dict[str, Callable[..., Any]] = {
            **{name: getattr(run.requests, name) for name in _PLAIN},
            "call": self._call,
            "wait": self._wait,
            "set": run.requests.turn,
            "subscribe": self._subscribe,
        }

    async def take(self, line: bytes) -> None:
        """Act on one request and send its answer; a notification gets none."""
        request: Any = None
        try:
            request = _parse(line)
            result = await self._act(request)
        except RpcProblem as problem:
            error = {"code": problem.code, "message": str(problem), **({"data": problem.data} if problem.data else {})}
            self._answer(request, {"error": error})
        except Exception as problem:  # noqa: BLE001 - a request that we did not foresee must not end the run
            text = f"{type(problem).__name__}: {problem}"
            self._answer(request, {"error": {"code": INTERNAL, "message": text}})
        else:
            self._answer(request, {"result": result})

    def close(self) -> None:
        """The client is gone."""
        if self._unsubscribe is not None:
            self._unsubscribe()
            self._unsubscribe = None

    def _answer(self, request: Any, outcome: dict[str, Any]) -> None:
        if request is None:  # it could not be read: whose answer this is cannot be said
            self._send({"jsonrpc": "2.0", "id": None, **outcome})
        elif "id" in request:
            self._send({"jsonrpc": "2.0", "id": request["id"], **outcome})

    async def _act(self, request: dict[str, Any]) -> Any:
        method = self._methods.get(request["method"])
        if method is None:
            raise RpcProblem(
                NO_METHOD, f"there is no method {request['method']!r}; there is {', '.join(self._methods)}"
            )
        params = request.get("params", {})
        try:
            result = method(**params) if isinstance(params, dict) else method(*params)
            if isinstance(result, Awaitable):
                result = await result
        except TypeError as problem:
            raise RpcProblem(INVALID_PARAMS, f"{request['method']}: {problem}") from problem
        except CallFailed as problem:
            raise RpcProblem(CALL_FAILED, str(problem), {"kind": problem.kind, "traceback": problem.text}) from problem
        except SparkError as problem:
            raise RpcProblem(REFUSED, str(problem)) from problem
        return result

    async def _call(self, name: str, params: Any = None) -> dict[str, Any]:
        args, kwargs = arguments_of(params)
        job = self._run.requests.call(name, args, kwargs)
        done, _ = await asyncio.wait({job.answer}, timeout=JOB_SECONDS)
        return {"job": job.id, "result": _result(job)} if done else {"job": job.id}

    async def _wait(self, job: str) -> dict[str, Any]:
        found = self._run.jobs.find(job)
        await asyncio.wait({found.answer})
        return {"job": job, "result": _result(found)}

    def _subscribe(self) -> dict[str, Any]:
        if self._unsubscribe is None:
            self._unsubscribe = self._run.picture.subscribe(self._event)
        return self._run.picture.whole()

    def _event(self, event: Mapping[str, Any]) -> None:
        self._send({"jsonrpc": "2.0", "method": "event", "params": plain_event(event)})


def arguments_of(params: Any) -> tuple[list[Any], dict[str, Any]]:
    """Turn the JSON that was given for a call into arguments: an object by name, a list in order, else one value."""
    if params is None:
        return [], {}
    if isinstance(params, dict):
        return [], params
    return (params if isinstance(params, list) else [params]), {}


def plain_event(event: Mapping[str, Any]) -> dict[str, Any]:
    """Return an event as JSON can carry it: what a script printed becomes text."""
    return {
        key: value.decode("utf-8", "replace") if isinstance(value, bytes) else value for key, value in event.items()
    }


def _result(job: Job) -> Any:
    if job.answer.cancelled():
        raise RequestRefused(f"{job.id} was cancelled")
    return job.answer.result()


def _parse(line: bytes) -> dict[str, Any]:
    try:
        request = json.loads(line)
    except (ValueError, RecursionError) as problem:
        raise RpcProblem(PARSE_ERROR, f"not JSON: {problem}") from problem
    if not isinstance(request, dict) or request.get("jsonrpc") != "2.0" or not isinstance(request.get("method"), str):
        raise RpcProblem(INVALID_REQUEST, 'a request is {"jsonrpc": "2.0", "id": ..., "method": ..., "params": ...}')
    if not isinstance(request.get("params", {}), (dict, list)):
        raise RpcProblem(INVALID_PARAMS, "params is an object or a list")
    return request
