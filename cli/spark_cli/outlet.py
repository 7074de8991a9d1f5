"""Writes to a stream from a thread of its own, so that a terminal on hold or a slow pipe never holds the run up."""

import asyncio
import queue
import threading
from collections.abc import Callable
from typing import BinaryIO

HIGH = 1 << 20
LOW = 1 << 18


class Outlet:
    """Bytes go in at once and out as fast as the stream takes them.

    *hold* is called with True when more than a megabyte waits, and with False when it is gone: whoever produces the
    bytes should wait meanwhile. When the stream is closed on the other side, what is written is dropped.
    """

    def __init__(self, stream: BinaryIO, hold: Callable[[bool], None]) -> None:
        self._stream = stream
        self._hold = hold
        self._loop = asyncio.get_running_loop()
        self._waiting = 0
        self._is_held = False
        self._closed = asyncio.Event()
        self._queue: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="spark-output", daemon=True)
        self._thread.start()

    def write(self, data: bytes) -> None:
        """Have *data* written, after what came before."""
        self._waiting += len(data)
        if self._waiting > HIGH and not self._is_held:
            self._is_held = True
            self._hold(True)
        self._queue.put(data)

    async def aclose(self) -> None:
        """Wait until everything is written; may be called twice."""
        self._queue.put(None)
        await self._closed.wait()

    def _run(self) -> None:
        is_broken = False
        while (data := self._queue.get()) is not None:
            if not is_broken:
                try:
                    self._stream.write(data)
                    self._stream.flush()
                except (OSError, ValueError):
                    is_broken = True  # nobody reads any more; the run goes on without being seen
            self._loop.call_soon_threadsafe(self._written, len(data))
        self._loop.call_soon_threadsafe(self._closed.set)

    def _written(self, size: int) -> None:
        self._waiting -= size
        if self._is_held and self._waiting < LOW:
            self._is_held = False
            self._hold(False)
