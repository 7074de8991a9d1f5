"""The processes that this one has started itself, to tell them from those that fall to it when their parents end.

Whoever starts a child process in the supervisor does it here: a run kills whatever else it finds among its children.
"""

import os
import subprocess
import threading
from typing import Any

from spark_workers import system


class Children:
    """Every child that was started and has not been reaped."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._started: set[subprocess.Popen[bytes]] = set()

    def start(self, command: list[str], **options: Any) -> "subprocess.Popen[bytes]":
        """Start a child as `subprocess.Popen` does. It is forgotten when it has been waited for, by whomever."""
        with self._lock:  # else a child that is there but not yet known could be taken for an orphan
            self._forget_reaped()
            process = subprocess.Popen(command, **options)
            self._started.add(process)
        return process

    def orphans(self) -> list[int]:
        """Return the children of this process that nobody here has started, dead ones included."""
        with self._lock:
            self._forget_reaped()
            own = {each.pid for each in self._started}
            return [pid for pid in system.children(os.getpid()) if pid not in own]

    def forget_all(self) -> None:
        """In a fork of this process: its parent's children are not its own, and the lock may be held for ever."""
        self._lock = threading.Lock()
        self._started = set()

    def _forget_reaped(self) -> None:
        self._started = {each for each in self._started if each.poll() is None}


our_children = Children()
os.register_at_fork(after_in_child=our_children.forget_all)
