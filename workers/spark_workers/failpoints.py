"""Named places where a test can make the runtime fail, in every process, chosen by the environment.

    SPARKRT_FAIL=name:action[,name@3:action...]

*name@3* acts on the third time the place is passed, without a number on the first and every later one. Actions:

    kill      SIGKILL to this process          stop      SIGSTOP to this process
    enospc    OSError: no space left           error     FailpointHit
    sleep     sleep for a tenth of a second    exit      os._exit(1)

A place that nothing names costs one look into an empty dictionary. Processes read the variable at their start.
"""

import errno
import os
import signal
import time


class FailpointHit(RuntimeError):
    """Raised by the action ``error``: a test asked for it."""


def _parse(text: str) -> dict[str, tuple[int, str]]:
    points: dict[str, tuple[int, str]] = {}
    for item in filter(None, text.split(",")):
        place, _, action = item.partition(":")
        name, _, turn = place.partition("@")
        points[name] = (int(turn or 0), action)
    return points


_points = _parse(os.environ.get("SPARKRT_FAIL", ""))
_passed: dict[str, int] = {}


def hit(name: str) -> None:
    """Fail here if the environment asks for it."""
    if name in _points:
        _act(name)


def _act(name: str) -> None:
    turn, action = _points[name]
    _passed[name] = _passed.get(name, 0) + 1
    if turn and _passed[name] != turn:
        return
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif action == "exit":
        os._exit(1)
    elif action == "sleep":
        time.sleep(0.1)
    elif action == "enospc":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
    elif action == "error":
        raise FailpointHit(name)
    else:
        raise ValueError(f"SPARKRT_FAIL: {name} has the unknown action {action!r}")
