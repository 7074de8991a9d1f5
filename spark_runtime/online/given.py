"""Values that a user gives as such or as a function, also an async one."""

import asyncio
import inspect
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


def value_of(
    given: Any, *arguments: Any, seconds: float | None = None, loop: asyncio.AbstractEventLoop | None = None
) -> Any:
    """Return *given*, or what the function *given* returns; wait for it if it is awaitable.

    Args:
        arguments: For the function.
        seconds: How long it may take; None for as long as it wants.
        loop: Where an async function runs: the loop of whoever asks, which may hold connections of his. Not that of
            this very thread, which waits here. None for a loop of its own.

    Raises:
        TimeoutError: It took longer. A function that cannot be stopped is left behind, on a thread of its own.
        Exception: Whatever the function raises.
    """
    if not callable(given):
        return given

    def call() -> Any:
        found = given(*arguments)
        if not inspect.isawaitable(found):
            return found
        waiting = asyncio.wait_for(_wait(found), seconds)
        if loop is None:
            return asyncio.run(_wait(waiting))
        return asyncio.run_coroutine_threadsafe(_wait(waiting), loop).result(seconds)

    return within(seconds, call)


def within(seconds: float | None, function: Callable[[], T]) -> T:
    """Return what *function* returns, if it does so in time; nothing can stop it, so it gets a thread of its own.

    Raises:
        TimeoutError: It did not.
    """
    done: Future[T] = Future()

    def run() -> None:
        try:
            done.set_result(function())
        except BaseException as problem:  # noqa: BLE001 - whoever waits gets it
            done.set_exception(problem)

    threading.Thread(target=run, name="spark-given", daemon=True).start()
    return done.result(seconds)


async def _wait(found: Awaitable[T]) -> T:
    return await found
