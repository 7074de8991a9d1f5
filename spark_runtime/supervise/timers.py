"""Timers with names: each name has one at most, and starting it again moves it."""

import asyncio
from collections.abc import Callable


class Timers:
    """What will happen later, by name."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._handles: dict[str, asyncio.TimerHandle] = {}

    def start(self, name: str, seconds: float, act: Callable[[], None]) -> None:
        """Do *act* in so many *seconds*, in place of what was to happen under this name."""
        self.cancel(name)
        self._handles[name] = self._loop.call_later(seconds, act)

    def cancel(self, name: str) -> None:
        """Do not do what was to happen under this name, if anything."""
        handle = self._handles.pop(name, None)
        if handle is not None:
            handle.cancel()

    def close(self) -> None:
        """Cancel all."""
        for name in list(self._handles):
            self.cancel(name)
