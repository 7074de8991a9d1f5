"""The call that a script makes at every step, and what it gives back.

With nothing to do a checkpoint adds one to a number and reads another, the bell, which lies in memory shared with the
supervisor. One half of the bell is changed by the supervisor, about thirty times a second while the script runs, so
that values are shown; the other half by the worker's side thread when a message has arrived. So there is no clock to
read here. There is no race either: each half has one writer and only counts.
"""

import asyncio
import mmap
import time
import warnings
from collections.abc import Awaitable, Callable, Generator
from typing import Any, cast

TURN_SECONDS = 0.001


class Bell:
    """The bell: two bytes of shared memory, read together."""

    def __init__(self, page: mmap.mmap) -> None:
        self._bytes = memoryview(page)
        self.face = self._bytes.cast("H")  # face[0] is both halves

    def knock(self) -> None:
        """Change the worker's half: a message is in the inbox."""
        self._bytes[1] = (self._bytes[1] + 1) % 256


class Turn:
    """Returned by a checkpoint; ``await`` gives other tasks a turn, at least every millisecond."""

    __slots__ = ("_next",)

    def __init__(self) -> None:
        self._next = 0.0

    def __await__(self) -> Generator[Any, None, None]:
        now = _clock()
        if now < self._next:
            return _NO_WAIT
        self._next = now + TURN_SECONDS
        return asyncio.sleep(0).__await__()


class PauseTurn:
    """Returned by a checkpoint in asynchronous code while paused: only ``await`` can wait there."""

    __slots__ = ("_awaited", "_wait")

    def __init__(self, wait: Callable[[], Awaitable[None]]) -> None:
        self._wait = wait
        self._awaited = False

    def __await__(self) -> Generator[Any, None, None]:
        self._awaited = True
        return self._wait().__await__()

    def __del__(self) -> None:
        if not self._awaited:
            warnings.warn(
                "spark.checkpoint() was not awaited, so it could not wait: write `await spark.checkpoint()`",
                RuntimeWarning,
                stacklevel=2,
            )


_clock = time.monotonic
_NO_WAIT = cast("Generator[Any, None, None]", iter(()))  # an iterator that is at its end: nothing to wait for
DONE = Turn()

Checkpoint = Callable[[], "Turn | PauseTurn"]


def make_checkpoint(
    bell: memoryview, slow: Callable[[], "Turn | PauseTurn"], pending: Callable[[], bool]
) -> tuple[Checkpoint, Callable[[], int], Callable[[int], None]]:
    """Return the checkpoint, a function that tells how many were passed, and one that sets that number.

    A closure rather than a method: its variables are cells, and the call costs a third less.
    """
    count = 0
    seen = -1

    def checkpoint() -> Turn | PauseTurn:
        nonlocal count, seen
        count += 1
        if bell[0] == seen:
            return DONE
        rang = bell[0]
        seen = -1  # stays so if slow() raises: what was asked is still asked
        turn = slow()
        if not pending():
            seen = rang
        return turn

    def passed() -> int:
        return count

    def start_at(number: int) -> None:
        nonlocal count, seen
        count, seen = number, -1

    return checkpoint, passed, start_at


def idle_checkpoint() -> Turn:
    """The checkpoint of a script that runs without the runtime, or of a process that the script forked."""
    return DONE
