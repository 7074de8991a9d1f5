"""What channels and nurseries need of the loop that they live on: asyncio's, or the pool's own."""

from collections.abc import Callable
from typing import Any, Protocol


class Timer(Protocol):
    """Something that will be called."""

    def cancel(self) -> None:
        """Have it not called."""


class Loop(Protocol):
    """The part of asyncio's loop that is used. Callbacks run on the loop's own thread, one at a time."""

    def add_reader(self, fd: int, callback: Callable[..., Any], *args: Any) -> None:
        """Call *callback* whenever *fd* can be read."""

    def remove_reader(self, fd: int) -> bool:
        """Undo it."""

    def add_writer(self, fd: int, callback: Callable[..., Any], *args: Any) -> None:
        """Call *callback* whenever *fd* can be written."""

    def remove_writer(self, fd: int) -> bool:
        """Undo it."""

    def call_later(self, delay: float, callback: Callable[..., Any], *args: Any) -> Timer:
        """Call *callback* once, after *delay* seconds."""
