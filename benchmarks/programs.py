"""What the benchmarks share: programs that report moments through a pipe, and tables."""

import contextlib
import json
import os
import select
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

SECONDS = 120.0

# Begins every measured script. A line on a pipe costs 2 µs, and the clock is one for all processes.
REPORT = """
import os, time
VERSION = 0
PIPE = os.open({pipe!r}, os.O_WRONLY)
def report(what):
    os.write(PIPE, f"{{VERSION}} {{what}} {{time.monotonic_ns()}}\\n".encode())
"""


class Program:
    """A command that runs a script, and the moments that the script reports."""

    def __init__(self, folder: Path, command: Sequence[str], **environment: str) -> None:
        self.log = folder / "output"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                cwd=folder,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._pipe = os.open(folder / "pipe", os.O_RDWR | os.O_NONBLOCK) if (folder / "pipe").exists() else -1
        self._text = b""
        self._moments: dict[tuple[int, str], int] = {}

    def wait_for(self, version: int, what: str, seconds: float = SECONDS) -> int:
        """Return when, in nanoseconds of the monotonic clock, this version of the script reported this."""
        limit = time.monotonic() + seconds
        while (version, what) not in self._moments:
            left = limit - time.monotonic()
            if left <= 0 or self.process.poll() is not None:
                end = self.log.read_text(errors="replace")[-2000:]
                raise SystemExit(f"version {version} never reported {what!r}; the program said:\n{end}")
            if select.select([self._pipe], [], [], min(left, 1.0))[0]:
                self._read()
        return self._moments[version, what]

    def reported(self, version: int, prefix: str) -> str:
        """Return the report of this version that begins so."""
        return next(what for number, what in self._moments if number == version and what.startswith(prefix))

    def events(self) -> list[dict[str, Any]]:
        """Return what a ``spark run --json`` has said so far."""
        lines = self.log.read_text(errors="replace").splitlines()
        return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]

    def wait_quiet(self, seconds: float = SECONDS) -> None:
        """Wait until nothing is left to do: imports ahead, snapshots on their way to disk."""
        limit, quiet = time.monotonic() + seconds, 0
        while quiet < 2 and time.monotonic() < limit:
            before = self._cpu_seconds()
            time.sleep(0.5)
            quiet = quiet + 1 if self._cpu_seconds() - before < 0.075 else 0

    def end(self) -> None:
        """Ctrl-C; whatever is left of it after a while is killed, by its id."""
        family = {pid: _born(pid) for pid in (self.process.pid, *descendants(self.process.pid))}
        self.process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(60)
        for pid, born in family.items():
            if born and _born(pid) == born:  # not another process that was given the id meanwhile
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.process.wait()
        if self._pipe >= 0:
            os.close(self._pipe)

    def _cpu_seconds(self) -> float:
        ticks = 0
        for pid in (self.process.pid, *descendants(self.process.pid)):
            with contextlib.suppress(OSError):
                ticks += sum(map(int, _status(pid)[11:13]))
        return ticks / os.sysconf("SC_CLK_TCK")

    def _read(self) -> None:
        *lines, self._text = (self._text + os.read(self._pipe, 65536)).split(b"\n")
        for line in lines:
            version, what, moment = line.decode().split()
            self._moments[int(version), what] = int(moment)


def prepare(folder: Path) -> str:
    """Make the folder of a program; return the beginning of its script."""
    folder.mkdir()
    os.mkfifo(folder / "pipe")
    return REPORT.format(pipe=str(folder / "pipe")).lstrip()


@contextlib.contextmanager
def running(folder: Path, command: Sequence[str], **environment: str) -> Iterator[Program]:
    """Have the program run for the length of a block."""
    program = Program(folder, command, **environment)
    try:
        yield program
    finally:
        program.end()


def spark_run(folder: Path, script: Path, *options: str) -> contextlib.AbstractContextManager[Program]:
    """``spark run --json`` for the length of a block, found by nobody else's `spark ctl`."""
    command = [sys.executable, "-m", "spark_cli", "run", str(script), "--json", *options]
    return running(folder, command, SPARKRT_RUNTIME_DIR=str(folder))


def save(script: Path, source: str) -> int:
    """Save as an editor does; return the moment. The new file is written elsewhere, so a watcher sees one event."""
    fresh = script.parent.parent / "fresh"
    fresh.write_text(source)
    moment = time.monotonic_ns()
    os.replace(fresh, script)
    return moment


def descendants(pid: int) -> list[int]:
    """Return every process below a process."""
    below = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, task.read_text().split()):
                below += [child, *descendants(child)]
    return below


def _born(pid: int) -> str:
    """When a process was started; empty if there is none."""
    try:
        return _status(pid)[19]
    except OSError:
        return ""


def _status(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Median, and from the least to the most."""
    middle, least, most = (f"{each:.{digits}f}" for each in (statistics.median(values), min(values), max(values)))
    return f"{middle} ({least}-{most})"


def show(title: str, columns: Iterable[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table that a Markdown file can take as it is."""
    table = Table(box=box.MARKDOWN)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console(width=200)
    console.print(f"\n{title}", highlight=False)
    console.print(table)
