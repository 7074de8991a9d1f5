"""What the script shows while it runs: values, series, functions, its own state, and the runtime's notes."""

import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from spark_workers.messages import Entered, Exposed, Flush, Imported, Message, Note
from spark_workers.scripts.exposed import ExposedNames
from spark_workers.scripts.loops import Loops
from spark_workers.scripts.tree import Tree, installed_modules

FLUSH_SECONDS = 1 / 30
FLUSH_FACTOR = 100  # showing values costs the script at most a hundredth of its time
MANY_MODULES = 20
LONGEST_SECONDS = 1.0
FIRST_IMPORTS_SECONDS = 0.3
IMPORTS_SECONDS = 1.0
MOST_POINTS = 100_000  # of a series between two flushes


class Display:
    """Sends what changed, at most thirty times a second."""

    def __init__(self, exposed: ExposedNames, loops: Loops, tree: Tree, send: Callable[[Message], None]) -> None:
        self.status = "starting"
        self.has_flushed = False
        self._told = ""
        self._exposed = exposed
        self._loops = loops
        self._tree = tree
        self._send = send
        self._series: list[list[Any]] = []
        self._next_flush = 0.0
        self._modules = self._files = 0
        # Looking through all modules takes a while, which the first step after a reload should not wait for.
        self._next_imports = time.monotonic() + FIRST_IMPORTS_SECONDS

    def enter(self, status: str) -> None:
        """Tell the supervisor what the script does now, if that changed."""
        self.status = status
        if status != self._told:
            self._told = status
            self._send(Entered(status))

    def forget_status(self) -> None:
        """Something was asked, and the supervisor thinks of another state: tell the next one even if it is the same."""
        self._told = ""

    def note(self, text: str, level: str = "info") -> None:
        """Tell the user something, in the runtime's name."""
        self._send(Note(level, text))

    def log(self, checkpoints: int, numbers: dict[str, Any]) -> None:
        """Add a point to the series that the page plots."""
        if len(self._series) < MOST_POINTS:
            self._series.append([checkpoints, time.time(), numbers])

    def flush(self, checkpoints: int, *, now: bool = False) -> None:
        """Show what changed since the last time; before its time only with *now*."""
        began = time.monotonic()
        if began < self._next_flush and not now:
            return
        if not self._exposed.is_announced:
            self._send(Exposed(*self._exposed.describe()))
        worked = time.thread_time()
        series, self._series = self._series, []
        self.has_flushed = True
        self._send(Flush(checkpoints, self._place(), self._exposed.changes(), series, self._loops.progress()))
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        cost = time.thread_time() - worked  # not the clock on the wall: a worker that was stopped has not worked
        self._next_flush = began + min(LONGEST_SECONDS, max(FLUSH_SECONDS, cost * FLUSH_FACTOR))
        self._tell_imports(began)

    def _tell_imports(self, now: float) -> None:
        """Tell new files of the user's at once, and what a nursery may import ahead when much has been added."""
        grown = len(sys.modules) - self._modules > MANY_MODULES and now >= self._next_imports
        if not grown and len(self._tree.files) == self._files:
            return
        self._files = len(self._tree.files)
        installed: list[str] = []
        if grown:
            self._modules = len(sys.modules)
            self._next_imports = now + IMPORTS_SECONDS
            installed = installed_modules(self._tree)
        self._send(Imported(dict(self._tree.files), installed))

    def _place(self) -> str:
        """Where the checkpoint stands in the user's code."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            if self._tree.is_own(frame.f_code.co_filename):
                return f"{frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_lineno}"
            frame = frame.f_back
        return ""
