"""The states of a run, and which event leads from one to another.

    starting ──> running <──> pausing ──> paused          (and back)
                    │  └──> idle (torch() returned, functions are exposed)
                    ├──> reloading ──> starting
                    ├──> stopping ──> stopped ──> starting
                    ├──> error ──> starting (the next save, a restart)
                    └──> done

Reports come from the worker (running, idle, paused), requests from people and programs (pause, resume, step, stop),
the rest from the supervisor itself: *leave* (new code is ready and the old one is asked to go), *stayed* (it could not
hand over its state and goes on), *start* (a worker is about to run ``torch()``), *halted*, *finished*, *failed* (how
it ended).
"""

from typing import Literal

from spark_runtime.errors import ProtocolViolated, RequestRefused

State = Literal["starting", "running", "idle", "pausing", "paused", "reloading", "stopping", "stopped", "error", "done"]
Event = Literal[
    "running",
    "idle",
    "paused",
    "pause",
    "resume",
    "step",
    "stop",
    "leave",
    "stayed",
    "start",
    "halted",
    "finished",
    "failed",
]

_ENDS: dict[Event, State] = {"halted": "stopped", "finished": "done", "failed": "error", "start": "starting"}

TABLE: dict[State, dict[Event, State]] = {
    "starting": {
        **_ENDS,
        "running": "running",
        "idle": "idle",
        "paused": "paused",
        "pause": "starting",  # noted: the worker starts paused
        "resume": "starting",
        "stop": "stopping",
        "leave": "reloading",
    },
    "running": {
        **_ENDS,
        "running": "running",
        "idle": "idle",
        "paused": "paused",  # the script's own controller
        "pause": "pausing",
        "resume": "running",
        "step": "running",
        "stop": "stopping",
        "leave": "reloading",
    },
    "idle": {
        **_ENDS,
        "running": "running",
        "idle": "idle",
        "paused": "paused",
        "pause": "pausing",
        "resume": "idle",
        "stop": "stopping",
        "leave": "reloading",
    },
    "pausing": {
        **_ENDS,
        "running": "pausing",
        "idle": "pausing",
        "paused": "paused",
        "pause": "pausing",
        "resume": "running",
        "step": "running",
        "stop": "stopping",
        "leave": "reloading",
    },
    "paused": {
        **_ENDS,
        "running": "running",
        "idle": "idle",
        "paused": "paused",
        "pause": "paused",
        "resume": "running",
        "step": "running",
        "stop": "stopping",
        "leave": "reloading",
    },
    "reloading": {
        **_ENDS,
        "running": "reloading",
        "idle": "reloading",
        "paused": "reloading",
        "pause": "reloading",
        "resume": "reloading",
        "stop": "stopping",
        "leave": "reloading",
        "stayed": "running",
    },
    "stopping": {
        **_ENDS,
        "running": "stopping",
        "idle": "stopping",
        "paused": "stopping",
        "stayed": "stopping",
        "stop": "stopping",
    },
    "stopped": {"start": "starting", "halted": "stopped", "failed": "error", "stop": "stopped"},
    "error": {"start": "starting", "failed": "error", "halted": "stopped"},
    "done": {"start": "starting", "finished": "done"},
}

REQUESTS = frozenset({"pause", "resume", "step", "stop"})


def next_state(state: State, event: Event) -> State:
    """Return the state that *event* leads to.

    Raises:
        RequestRefused: Somebody asked for what makes no sense now.
        ProtocolViolated: A report that cannot come in this state.
    """
    after = TABLE[state].get(event)
    if after is not None:
        return after
    if event in REQUESTS:
        raise RequestRefused(f"cannot {event}: the run is {state}")
    raise ProtocolViolated(f"the event {event!r} cannot happen to a run that is {state}")
