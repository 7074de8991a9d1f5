"""Runs the real command for a test: starts it, reads its events, saves files under it, and leaves nothing behind."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SPARK = [sys.executable, "-P", "-m", "spark_cli"]
SECONDS = 20.0

Event = dict[str, Any]


def write(path: Path, source: str) -> Path:
    """Save *source*, dedented, as an editor does that writes a new file and renames it."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(textwrap.dedent(source).lstrip("\n"))
    os.replace(temporary, path)
    return path


class RunProcess:
    """A ``spark run --json`` and everything it has said so far."""

    def __init__(self, script: Path, *options: str, arguments: tuple[str, ...] = (), **environment: str) -> None:
        self.script = script
        self.events: list[Event] = []
        self._arrived: queue.Queue[Event | None] = queue.Queue()
        self._position = 0
        self._lines_taken: dict[str, int] = {}
        command = [*SPARK, "run", str(script), "--json", *options, *(["--", *arguments] if arguments else [])]
        self.process = subprocess.Popen(
            command,
            cwd=script.parent,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self._threads = [threading.Thread(target=self._read_events), threading.Thread(target=self._read_stderr)]
        self.stderr = ""
        for thread in self._threads:
            thread.start()

    # --- what it says ---

    def wait_for(self, event: str, seconds: float = SECONDS, **fields: Any) -> Event:
        """Return the next event of this kind whose fields are these; events before it are passed over.

        A field may be a function that tells whether the value fits.
        """
        return self.wait_until(
            lambda each: each["event"] == event and _fits(each, fields), f"{event} {fields}", seconds
        )

    def wait_until(self, fits: Callable[[Event], bool], what: str = "the event", seconds: float = SECONDS) -> Event:
        """Return the next event that *fits*."""
        limit = time.monotonic() + seconds
        while True:
            while self._position < len(self.events):
                event = self.events[self._position]
                self._position += 1
                if fits(event):
                    return event
            try:
                arrived = self._arrived.get(timeout=max(0.0, limit - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"waited {seconds} s for {what}; {self._story()}") from None
            if arrived is None:
                self._arrived.put(None)
                raise AssertionError(f"the run ended before {what}; {self._story()}")
            self.events.append(arrived)

    def printed(self) -> str:
        """What the script has printed on stdout, of the events seen so far."""
        return "".join(each["data"] for each in self.events if each["event"] == "output")

    def wait_printed(self, text: str, seconds: float = SECONDS) -> None:
        """Wait until the script has printed *text*."""
        if text not in self.printed():
            self.wait_until(lambda each: text in self.printed(), f"the output {text!r}", seconds)

    def wait_count(self, event: str, count: int = 1, seconds: float = SECONDS, **fields: Any) -> Event:
        """Wait until *count* such events have come since the start of the run; return the last of them."""

        def found() -> list[Event]:
            return [each for each in self.events if each["event"] == event and _fits(each, fields)]

        if len(found()) < count:
            self.wait_until(lambda each: len(found()) >= count, f"{count} of {event} {fields}", seconds)
        return found()[count - 1]

    def next_line(self, start: str, seconds: float = SECONDS) -> str:
        """Wait for the next whole line printed that begins with *start*; return the rest of it.

        A line is given once for each *start*, however the events were read meanwhile.
        """
        taken = self._lines_taken.get(start, 0)

        def found() -> list[str]:
            return [line for line in self.printed().split("\n")[:-1] if line.startswith(start)]

        if len(found()) <= taken:
            self.wait_until(lambda each: len(found()) > taken, f"a line {start!r}...", seconds)
        self._lines_taken[start] = taken + 1
        return found()[taken].removeprefix(start).strip()

    def all_events(self, event: str) -> list[Event]:
        """Return every event of this kind seen so far."""
        return [each for each in self.events if each["event"] == event]

    # --- what is done to it ---

    def save(self, source: str, path: Path | None = None) -> None:
        """Save new source for the script, or for another file."""
        write(path or self.script, source)

    def signal(self, number: int) -> None:
        """Send the supervisor a signal."""
        self.process.send_signal(number)

    def ctl(self, *words: str, check: bool = True) -> "subprocess.CompletedProcess[str]":
        """Run ``spark ctl`` for this run."""
        run = next(each["run"] for each in self.events if each["event"] == "start")
        done = subprocess.run(
            [*SPARK, "ctl", "--run", run, *words], capture_output=True, text=True, timeout=SECONDS, check=False
        )
        if check:
            assert done.returncode == 0, done.stderr
        return done

    def status(self) -> dict[str, Any]:
        """Return the picture that clients see."""
        picture: dict[str, Any] = json.loads(self.ctl("status", "--json").stdout)
        return picture

    def wait_end(self, seconds: float = SECONDS) -> int:
        """Wait until the command has ended; return its exit code. All its output has been read then."""
        code = self.process.wait(seconds)
        for thread in self._threads:
            thread.join(seconds)
        while (arrived := self._arrived.get()) is not None:
            self.events.append(arrived)
        self._arrived.put(None)
        return code

    def stop(self) -> int:
        """Ctrl-C, then the exit code."""
        self.signal(signal.SIGINT)
        return self.wait_end()

    def close(self) -> None:
        """End it whatever it does."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(SECONDS)
        for thread in self._threads:
            thread.join(SECONDS)
        for stream in (self.process.stdout, self.process.stderr):
            stream.close()  # type: ignore[union-attr]

    # --- processes ---

    def nurseries(self) -> list[int]:
        """The supervisor's children."""
        return children(self.process.pid)

    def workers(self) -> list[int]:
        """The children of its nurseries."""
        return [worker for nursery in self.nurseries() for worker in children(nursery)]

    def _read_events(self) -> None:
        for line in self.process.stdout:  # type: ignore[union-attr]
            self._arrived.put(json.loads(line))
        self._arrived.put(None)

    def _read_stderr(self) -> None:
        for line in self.process.stderr:  # type: ignore[union-attr]
            self.stderr += line.decode()

    def _story(self) -> str:
        story = [each for each in self.events if each["event"] not in ("values", "exposed")][-15:]
        return "the last events:\n" + "\n".join(str(each)[:400] for each in story) + f"\nstderr:\n{self.stderr[-2000:]}"


@contextlib.contextmanager
def running(script: Path, *options: str, **rest: Any) -> Iterator[RunProcess]:
    """Start a run for the length of a block; whatever happens in it, no process is left after."""
    run = RunProcess(script, *options, **rest)
    try:
        yield run
    finally:
        family = [run.process.pid, *descendants(run.process.pid)]
        run.close()
        wait_gone(family)


def spark(*words: str, cwd: Path, timeout: float = SECONDS, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run the command to its end."""
    return subprocess.run(
        [*SPARK, *words],
        cwd=cwd,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def children(pid: int) -> list[int]:
    """Return the living direct children of a process."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += map(int, task.read_text().split())
    return [child for child in found if lives(child)]


def descendants(pid: int) -> list[int]:
    """Return every living process below a process."""
    return [each for child in children(pid) for each in (child, *descendants(child))]


def lives(pid: int) -> bool:
    """Tell whether a process runs: neither gone nor a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def wait_gone(pids: list[int], seconds: float = 3.0) -> None:
    """Wait until none of the processes lives.

    Raises:
        AssertionError: One does after that time; it is killed then.
    """
    limit = time.monotonic() + seconds
    while any(lives(pid) for pid in pids) and time.monotonic() < limit:
        time.sleep(0.01)
    left = [pid for pid in pids if lives(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left, f"processes {left} outlived the run"


def _fits(event: Event, fields: dict[str, Any]) -> bool:
    return all(
        name in event and (wanted(event[name]) if callable(wanted) else event[name] == wanted)
        for name, wanted in fields.items()
    )
