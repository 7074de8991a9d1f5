"""Runs an asynchronous script: ``torch()`` is one task, and calls are served whenever the loop is free."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from spark_workers.scripts.inbox import Inbox
from spark_workers.scripts.loader import Entry

if TYPE_CHECKING:
    from spark_workers.scripts.session import Session

LOOK_SECONDS = 0.25


class AsyncHost:
    """The tasks of an asynchronous script: its ``torch()`` and the calls that run beside it."""

    def __init__(self, session: Session, inbox: Inbox) -> None:
        self._session = session
        self._inbox = inbox
        self._tasks: set[asyncio.Future[Any]] = set()

    def run(self, entry: Entry) -> None:
        """Run the script until it has ended.

        Raises:
            BaseException: What ended one of its tasks.
        """
        asyncio.run(self._run(entry))

    async def _run(self, entry: Entry) -> None:
        loop = asyncio.get_running_loop()
        woken = asyncio.Event()
        self._inbox.on_message = lambda: _wake(loop, woken)
        main = asyncio.ensure_future(entry())
        self._tasks = {main}
        try:
            while self._tasks or self._session.wants_to_idle():
                woken.clear()
                self._session.deal()
                if self._is_asked_to_go():
                    if not self._tasks:
                        return
                else:
                    self._begin_calls()
                if not self._tasks:
                    self._session.display.enter("paused" if self._session.asks.paused else "idle")
                await self._wait(woken, main)
                self._session.flush()
        finally:
            self._inbox.on_message = None
            for each in self._tasks:
                each.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _wait(self, woken: asyncio.Event, main: asyncio.Future[Any]) -> None:
        """Wait for a message or the end of a task; what is not a call's own answer ends the script."""
        waiting = asyncio.ensure_future(woken.wait())
        done, _ = await asyncio.wait({*self._tasks, waiting}, timeout=LOOK_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        self._tasks -= done
        for each in done - {waiting}:
            each.result()
            if each is main:
                self._session.main_returned()

    def _begin_calls(self) -> None:
        while (call := self._session.calls.take_waiting()) is not None:
            if not self._session.asks.paused:
                self._session.display.enter("running")
            self._tasks.add(asyncio.ensure_future(self._session.calls.serve_one(call)))

    def _is_asked_to_go(self) -> bool:
        return self._session.asks.leave or self._session.asks.stop


def in_event_loop() -> bool:
    """Tell whether this code runs inside an event loop."""
    return asyncio._get_running_loop() is not None


def _wake(loop: asyncio.AbstractEventLoop, woken: asyncio.Event) -> None:
    loop.call_soon_threadsafe(woken.set)
