"""A script's standard output and error, read from their pipes and passed on in whole lines."""

import asyncio
import os
from collections.abc import Callable

LINE_SECONDS = 0.05  # a piece without an end of line is passed on after this
READ_SIZE = 64 * 1024


class OutputPipe:
    """Reads one pipe. *on_text* gets bytes that end with ``\\n`` or ``\\r`` where there is one within 50 ms."""

    def __init__(self, descriptor: int, on_text: Callable[[bytes], None]) -> None:
        os.set_blocking(descriptor, False)
        self._descriptor = descriptor
        self._on_text = on_text
        self._rest = b""
        self._timer: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()
        self._is_open = True
        self._loop.add_reader(descriptor, self._read)

    def pause(self, paused: bool) -> None:
        """Stop reading while nobody takes what is read: the script then waits at its next print, as it would anyway."""
        if self._is_open and paused:
            self._loop.remove_reader(self._descriptor)
        elif self._is_open:
            self._loop.add_reader(self._descriptor, self._read)

    def drain(self) -> None:
        """Pass on everything that is in the pipe, then close it."""
        while self._is_open and self._read():
            pass
        self._pass_rest()
        self._close()

    def _read(self) -> bool:
        try:
            data = os.read(self._descriptor, READ_SIZE)
        except BlockingIOError:
            return False
        if not data:
            self._pass_rest()
            self._close()
            return False
        self._take(self._rest + data)
        return True

    def _take(self, data: bytes) -> None:
        end = max(data.rfind(b"\n"), data.rfind(b"\r")) + 1
        whole, self._rest = data[:end], data[end:]
        if whole:
            self._on_text(whole)
        if self._rest and self._timer is None:
            self._timer = self._loop.call_later(LINE_SECONDS, self._pass_rest)

    def _pass_rest(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        rest, self._rest = self._rest, b""
        if rest:
            self._on_text(rest)

    def _close(self) -> None:
        if self._is_open:
            self._is_open = False
            self._loop.remove_reader(self._descriptor)
            os.close(self._descriptor)
