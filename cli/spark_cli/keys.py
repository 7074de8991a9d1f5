"""Single keys on the terminal. Without a terminal on stdin there are none, and its end-of-file means nothing."""

import asyncio
import os
import signal
import sys
import termios
import tty
from collections.abc import Callable
from typing import Any

from spark_runtime.errors import RequestRefused
from spark_runtime.supervise.run import Run


class Keys:
    """Reads keys while the terminal is ours, and puts the terminal back as it was."""

    def __init__(self, run: Run, show_help: Callable[[], None]) -> None:
        self._run = run
        self._saved: list[Any] | None = None
        self._actions: dict[str, Callable[[], None]] = {
            "p": self._pause_or_resume,
            "s": run.requests.stop,
            "r": run.requests.restart,
            "b": run.requests.back,
            "q": run.requests.quit,
            "h": show_help,
            "?": show_help,
        }

    def open(self) -> None:
        """Begin to read, if stdin is a terminal and we are in its foreground."""
        if not sys.stdin.isatty() or os.tcgetpgrp(sys.stdin.fileno()) != os.getpgrp():
            return
        self._descriptor = sys.stdin.fileno()
        self._saved = termios.tcgetattr(self._descriptor)
        tty.setcbreak(self._descriptor)
        loop = asyncio.get_running_loop()
        loop.add_reader(self._descriptor, self._read)
        loop.add_signal_handler(signal.SIGCONT, self._continued)

    def close(self) -> None:
        """Give the terminal back."""
        if self._saved is not None:
            loop = asyncio.get_running_loop()
            loop.remove_reader(self._descriptor)
            loop.remove_signal_handler(signal.SIGCONT)
            termios.tcsetattr(self._descriptor, termios.TCSADRAIN, self._saved)
            self._saved = None

    def _continued(self) -> None:
        """After Ctrl-Z and fg the shell has set the terminal to its own ways."""
        if os.tcgetpgrp(self._descriptor) == os.getpgrp():
            tty.setcbreak(self._descriptor)

    def _read(self) -> None:
        try:
            pressed = os.read(self._descriptor, 64).decode("ascii", "ignore")
        except OSError:
            pressed = ""
        if not pressed:  # the terminal is gone
            asyncio.get_running_loop().remove_reader(self._descriptor)
            return
        for key in pressed.lower():
            try:
                self._actions.get(key, _nothing)()
            except RequestRefused as problem:
                self._run.picture.note(str(problem))

    def _pause_or_resume(self) -> None:
        if self._run.picture.state in ("paused", "pausing", "stopped", "error"):
            self._run.requests.resume()
        else:
            self._run.requests.pause()


def _nothing() -> None:
    """What other keys do."""
