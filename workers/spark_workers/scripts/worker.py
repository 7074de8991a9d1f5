"""The entry of a script worker: from the channel's descriptor to the process's end."""

import builtins
import importlib
import mmap
import os
import socket
import sys
import threading
from typing import Any

from spark_workers import blas
from spark_workers.channel import Channel
from spark_workers.failpoints import hit
from spark_workers.messages import Left, Load, Loaded, LoadFailed, Start
from spark_workers.scripts import loader, main_module, randomness
from spark_workers.scripts.api import spark
from spark_workers.scripts.checkpoint import Bell
from spark_workers.scripts.errors import SparkUsageError
from spark_workers.scripts.inbox import Inbox
from spark_workers.scripts.session import Session
from spark_workers.scripts.tracebacks import format_script_error, place_of
from spark_workers.scripts.tree import Tree, forget_shadowed

EXIT_SECONDS = 1.0
INTERRUPTED = 130


def start(channel_descriptor: int, bell_descriptor: int) -> int:
    """Serve the supervisor at the other end: load one script, run it, leave."""
    blas.restore_threads()
    randomness.reseed()
    channel = Channel(socket.socket(fileno=channel_descriptor))
    bell = Bell(mmap.mmap(bell_descriptor, mmap.PAGESIZE))
    os.close(bell_descriptor)
    os.register_at_fork(after_in_child=channel.close)  # a fork of the script's must not hold the channel open
    message, _ = channel.receive()
    if not isinstance(message, Load):
        raise RuntimeError(f"the first message was {type(message).__name__}, not Load")
    return ScriptWorker(channel, bell, message).run()


class ScriptWorker:
    """One script in one process."""

    def __init__(self, channel: Channel, bell: Bell, load: Load) -> None:
        self._channel = channel
        self._load = load
        self._pid = os.getpid()
        self._tree = Tree(load.roots, load.sources)
        self._inbox = Inbox(channel, self._tree.is_own, bell.knock)
        self._session = Session(channel.send, self._inbox, self._tree, bell)

    def run(self) -> int:
        """Load, wait for the start, run; does not return but ends the process."""
        self._prepare()
        self._inbox.start()
        entry = self._load_script()
        if entry is None:
            return self._end(1, patient=False)
        arrived = self._inbox.take()
        assert arrived is not None
        message, descriptors = arrived
        if not isinstance(message, Start):
            raise RuntimeError(f"after Load came {type(message).__name__}, not Start")
        hit("worker.start")
        return self._run(entry, message, descriptors)

    def _prepare(self) -> None:
        """Make the process look to the script as plain Python would."""
        load = self._load
        sys.argv = [load.program, *load.arguments]
        sys.path.insert(0, load.roots[0])
        sys.modules["__main__"] = main_module  # what multiprocessing's children run in its place
        forget_shadowed(load.roots, self._tree)
        builtins.input = _no_input
        sys.breakpointhook = _no_breakpoint
        spark.attach(self._session)

    def _load_script(self) -> "loader.Entry | None":
        load, tree = self._load, self._tree
        path = next(iter(load.sources))
        try:
            module = loader.load_script(path, load.module, tree, spark)
            entry = loader.find_entry(module, spark.main_entry)
        except BaseException as problem:  # noqa: BLE001 - whatever the script's top level does is told, and this process ends
            where, line = place_of(problem, tree.is_own)
            unusable = isinstance(problem, loader.NoEntry)
            text = f"{problem}\n" if unusable else format_script_error(problem)
            self._channel.send(LoadFailed(unusable, text, where or path, line, tree.files, tree.wanted))
            return None
        tree.publish((path, load.module))
        self._channel.send(Loaded(tree.files, tree.wanted))
        return entry

    def _run(self, entry: "loader.Entry", message: Start, descriptors: list[int]) -> int:
        try:
            reason = self._session.run(entry, message, descriptors)
        except SystemExit as asked:
            return self._leave(Left("exit", _exit_status(asked), "", "", 0))
        except KeyboardInterrupt:
            return self._leave(Left("exit", INTERRUPTED, "", "", 0))
        except BaseException as problem:  # noqa: BLE001 - the script's failure, told with its own traceback
            where, line = place_of(problem, self._tree.is_own)
            text = format_script_error(problem)
            return self._leave(Left("error", 1, text, where, line))
        return self._leave(Left(reason, 0, "", "", 0))

    def _leave(self, left: Left) -> int:
        if os.getpid() != self._pid:  # a fork of the script's own came to its end: the run is not over
            return self._end(left.status, patient=True)
        try:
            # Code that raised before its first checkpoint has shown nothing, and must not look as if it had worked.
            if left.reason != "error" or self._session.display.has_flushed:
                self._session.flush(now=True)
        finally:
            self._channel.send(left)
        return self._end(left.status, patient=left.reason in ("done", "exit", "stopped"))

    def _end(self, status: int, *, patient: bool) -> int:
        """Run what was registered for the exit, then end without tearing down what the kernel frees at once.

        A script that has come to its end is given the time that its threads and exit handlers need. One that makes
        room for newer code, or has failed, has a second.
        """
        if not patient:
            timer = threading.Timer(EXIT_SECONDS, os._exit, (status,))
            timer.daemon = True
            timer.start()
        try:
            if patient:
                threading._shutdown()  # type: ignore[attr-defined]
            importlib.import_module("atexit")._run_exitfuncs()
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
        finally:
            os._exit(status)


def _exit_status(asked: SystemExit) -> int:
    if asked.code is None:
        return 0
    if isinstance(asked.code, int):
        return asked.code & 0xFF
    print(asked.code, file=sys.stderr)
    return 1


def _no_input(prompt: object = "") -> str:
    raise EOFError(
        "input(): under `spark run` a script has no standard input; use spark.control() or expose a function"
    )


def _no_breakpoint(*args: Any, **kwargs: Any) -> None:
    raise SparkUsageError(
        "breakpoint(): under `spark run` a script has no terminal; run it with plain python, or attach a debugger to "
        f"process {os.getpid()}"
    )
