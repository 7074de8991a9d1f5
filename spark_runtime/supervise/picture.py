"""What a run looks like from outside: the picture that every client gets, and the events that change it."""

import time
from collections import deque
from collections.abc import Callable
from typing import Any

from spark_runtime.supervise.jobs import Job
from spark_runtime.supervise.lifecycle import State

Event = dict[str, Any]
RATE_SECONDS = 2.0


class Picture:
    """The present look of a run. `publish` changes it and tells every subscriber."""

    def __init__(self, run_id: str, script: str) -> None:
        self._subscribers: list[Callable[[Event], None]] = []
        self._passed: deque[tuple[float, int]] = deque()
        self.run_id = run_id
        self.script = script
        self.state: State = "starting"
        self.checkpoints = 0
        self.stride = 2  # twice as many checkpoints as pass between two flushes
        self.place = ""
        self.values: dict[str, Any] = {}
        self.loops: dict[str, list[float]] = {}
        self.functions: dict[str, Any] = {}
        self.controls: dict[str, Any] = {}
        self.error: Event | None = None
        self.version = 0
        self.reloads = 0
        self.last_flush = time.monotonic()

    def subscribe(self, subscriber: Callable[[Event], None]) -> Callable[[], None]:
        """Have every later event sent to *subscriber*; return the function that ends that."""
        self._subscribers.append(subscriber)
        return lambda: self._subscribers.remove(subscriber)

    def publish(self, event: str, **fields: Any) -> None:
        """Tell every subscriber."""
        told = {"event": event, **fields}
        for each in list(self._subscribers):
            each(told)

    def flushed(self, checkpoints: int, place: str, values: dict[str, Any], loops: dict[str, list[float]]) -> None:
        """The script has passed *checkpoints* and shows these values."""
        now = time.monotonic()
        self.last_flush = now
        self.stride = max(2 * (checkpoints - self.checkpoints), 2)
        self._passed.append((now, checkpoints))
        while self._passed[0][0] < now - RATE_SECONDS:
            self._passed.popleft()
        self.checkpoints, self.place, self.loops = checkpoints, place or self.place, loops
        self.values.update(values)
        if values:
            self.publish("values", values=values, checkpoints=checkpoints)

    def enter(self, state: State, *, waits: bool) -> None:
        """The run is in another state; *waits* says whether it stays where nothing is left to do."""
        self.state = state
        self.publish("state", state=state, checkpoints=self.checkpoints, waits=waits)

    def note(self, text: str, level: str = "info") -> None:
        """Tell the user one line."""
        self.publish("note", level=level, text=text)

    def warn(self, text: str) -> None:
        """Tell the user one line that matters."""
        self.note(text, "warning")

    def fail(self, kind: str, text: str, path: str, line: int) -> None:
        """Show an error until it is mended. *kind*: syntax, load, script or worker."""
        self.error = {"kind": kind, "text": text, "file": path, "line": line}
        self.publish("error", **self.error)

    def mend(self) -> None:
        """The error that is shown, if one is, holds no more."""
        if self.error is not None:
            self.error = None
            self.publish("mended")

    def reloaded(self, version: int, seconds: float) -> None:
        """New code has passed its first checkpoint, so long after it was saved."""
        self.reloads += 1
        self.publish("reload", version=version, seconds=round(seconds, 4))

    def exposed(self, functions: dict[str, Any], controls: dict[str, Any]) -> None:
        """The script offers these functions and controls."""
        self.functions, self.controls = functions, controls
        self.publish("exposed", functions=functions, controls=controls)

    def job_changed(self, job: Job, step: str) -> None:
        """A call is waiting, running, returned or raised."""
        fields: dict[str, Any] = {"id": job.id, "name": job.name, "step": step}
        if step == "returned":
            fields["result"] = job.answer.result()
        elif step == "raised":
            problem = job.answer.exception()
            fields |= {"error": str(problem), "text": getattr(problem, "text", "")}
        self.publish("job", **fields)

    def begin_worker(self, version: int, checkpoints: int) -> None:
        """A new worker takes over: what it does not expose disappears."""
        self.version = version
        self.checkpoints = checkpoints
        self._passed.clear()
        self.values.clear()
        self.functions, self.controls, self.loops = {}, {}, {}

    def rate(self) -> float:
        """Checkpoints a second, over the last two seconds."""
        if len(self._passed) < 2 or self.state != "running":
            return 0.0
        (first, before), (last, after) = self._passed[0], self._passed[-1]
        return (after - before) / (last - first) if last > first else 0.0

    def whole(self) -> dict[str, Any]:
        """Everything a client that comes late needs."""
        return {
            "run": self.run_id,
            "script": self.script,
            "state": self.state,
            "checkpoints": self.checkpoints,
            "rate": round(self.rate(), 3),
            "place": self.place,
            "values": self.values,
            "loops": self.loops,
            "functions": self.functions,
            "controls": self.controls,
            "version": self.version,
            "reloads": self.reloads,
            "error": self.error,
        }
