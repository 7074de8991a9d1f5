"""The output file, which is its own journal: what it says of itself, and what is appended to it.

`Journal` opens, locks and reads; `Appender` writes. Rules that keep it simple:

* A row is done when its line is whole. Nothing else says so, and nothing beside the file is needed.
* Lines are appended in groups from a thread of its own, by plain writes, and the disk is asked for them from time to
  time. After a kill the file has a beginning of the rows and at most one torn line; that line is cut off and made anew.
  After a power failure there may be zeros, and the file counts up to where they begin.
* A write that fails, on a full disk for example, is cut back to the last whole line. The batch ends, and goes on later.
* The file is examined as a whole before anything in it is changed, and a file with one line that no batch wrote, the
  torn last one aside, is never changed.
"""

import fcntl
import os
import threading
import time
from array import array
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from types import TracebackType

from spark_runtime.batch.written import LineFormat, WrittenRow
from spark_runtime.errors import BatchError
from spark_workers.failpoints import hit
from spark_workers.frames import MAX_PAYLOAD

GROUP_BYTES = 256 * 1024
GATHER_SECONDS = 0.05
SYNC_SECONDS = 0.5
MOST_WAITING = 16 * 1024 * 1024
_LONGEST = 4 * MAX_PAYLOAD  # of a line: an answer in quotes, each of them doubled, and what is around it


class BatchStopped(BatchError):
    """The output could not be written any further; it is whole up to where it got. The message says how to go on."""


@dataclass(frozen=True, slots=True)
class Contents:
    """What is in an output file.

    Attributes:
        rows: Whole rows.
        failed: How many of them are error rows.
        size: Bytes up to the end of the last whole row; what is beyond is torn.
        is_ordered: Whether they are rows 0, 1, 2 and so on.
        other_maker: A row that another model made, or other settings; None if there is none.
    """

    rows: int = 0
    failed: int = 0
    size: int = 0
    is_ordered: bool = True
    other_maker: int | None = None


class Journal:
    """An output file, open and locked.

    Attributes:
        path: The file.
    """

    def __init__(self, path: str, form: LineFormat, descriptor: int, is_new: bool) -> None:
        self.path = path
        self.form = form
        self.descriptor = descriptor
        self._is_new = is_new

    @classmethod
    def open(cls, path: str, form: LineFormat) -> "Journal":
        """Open the file, make it if need be, and lock it.

        Raises:
            BatchError: It cannot be opened, or another batch is writing it.
        """
        while True:
            is_new = not os.path.lexists(path)
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
            except OSError as problem:
                raise BatchError(
                    f"cannot write {path}: {problem.strerror}; give the path of a file in a folder that you may write"
                ) from problem
            try:
                _lock(descriptor, path)
                if _is_still(descriptor, path):
                    if is_new:
                        sync_folder(path)
                    return cls(path, form, descriptor, is_new)
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)  # it was removed by its last holder while we waited at the door

    def examine(self, maker: bytes) -> Contents:
        """Return what is in the file.

        Raises:
            BatchError: It holds something that no batch wrote.
        """
        rows = failed = size = 0
        is_ordered, other = True, None
        for line, row in self._lines():
            if row is not None:
                if row.maker != maker and other is None:
                    other = row.number
                is_ordered = is_ordered and row.number == rows
                rows += 1
                failed += row.is_failed
            size += len(line)
        return Contents(rows, failed, size, is_ordered, other)

    def rows(self) -> Generator[WrittenRow, None, None]:
        """Give what the whole rows say of themselves, in the order of the file."""
        return (row for _, row in self._lines() if row is not None)

    def whole_lines(self) -> Iterator[bytes]:
        """Give the whole rows as they are."""
        return (line for line, row in self._lines() if row is not None)

    def cut(self, size: int) -> None:
        """Cut off what is beyond *size*."""
        if os.fstat(self.descriptor).st_size > size:
            os.ftruncate(self.descriptor, size)
            os.fsync(self.descriptor)

    def remove(self) -> None:
        """Remove the file; whoever waits for its lock will notice."""
        os.unlink(self.path)

    def close(self) -> None:
        """Give the lock back. A file that was made for nothing goes again."""
        if self._is_new and os.fstat(self.descriptor).st_size == 0 and _is_still(self.descriptor, self.path):
            self.remove()
        os.close(self.descriptor)

    def keep_empty(self) -> None:
        """Leave the file there even if no row comes into it, as there are none."""
        self._is_new = False

    def _lines(self) -> Iterator[tuple[bytes, WrittenRow | None]]:
        """Give each whole line that is ours with its row, None for the header.

        Raises:
            BatchError: One is not.
        """
        # Opened anew: a duplicate of the descriptor would share its place with those who write.
        with open(self.path, "rb") as file:
            self._check_start(file.peek(64)[:64])
            number = 0
            while line := file.readline(_LONGEST):
                number += 1
                if number == 1 and self.form.header == line:
                    yield line, None
                    continue
                row = self.form.parse(line) if line.endswith(b"\n") and b"\0" not in line else None
                if row is not None and (number > 1 or not self.form.header):
                    yield line, row
                elif self._is_torn(line, number):
                    return
                else:
                    raise self._foreign(number)

    def _check_start(self, start: bytes) -> None:
        """Refuse what is plainly something else before a line of it is read, which may be as long as the file."""
        if b"\0" in start or not self.form.may_be_torn(start.partition(b"\n")[0]):
            raise self._foreign(1)

    def _is_torn(self, line: bytes, number: int) -> bool:
        """Tell whether a batch's work ends like this: in a line without its end, or in zeros after a power failure."""
        if b"\0" in line:
            return number > 1
        return not line.endswith(b"\n") and len(line) < _LONGEST and self.form.may_be_torn(line)

    def _foreign(self, line: int) -> BatchError:
        return BatchError(
            f"{self.path} is not the output of a batch (see its line {line}) and stays as it is; "
            "choose another name for the output"
        )


class Done:
    """Which rows are done, and whether they are those of the input. Rows must be asked for in order, each once."""

    def __init__(self, journal: Journal, contents: Contents) -> None:
        self._path = journal.path
        self._rows = journal.rows()
        self._count = contents.rows if contents.is_ordered else 0
        # Of a file in any order the contents are held: eight bytes a row, zero for one that is missing.
        self._contents = array("Q") if contents.is_ordered else self._collect(journal)

    def has(self, number: int, content: bytes) -> bool:
        """Tell whether row *number* is done.

        Raises:
            BatchError: It is, but it was another row then.
        """
        if number < self._count:
            is_same = next(self._rows).content == content
        elif number < len(self._contents) and self._contents[number]:
            is_same = self._contents[number] == _as_number(content)
        else:
            return False
        if not is_same:
            raise BatchError(
                f"the input has changed since {self._path} was begun: row {number} was another one then; put the "
                "input back, or choose another output, or begin anew with --restart"
            )
        return True

    def check_end(self, rows: int) -> None:
        """Take notice that the input has *rows* rows.

        Raises:
            BatchError: More of them are done.
        """
        done = max(self._count, len(self._contents))
        if done > rows:
            raise BatchError(
                f"the input has changed since {self._path} was begun: it has {rows} rows now, and row {done - 1} is "
                "done; put the input back, or choose another output, or begin anew with --restart"
            )

    def close(self) -> None:
        """Give the file back."""
        self._rows.close()

    def _collect(self, journal: Journal) -> "array[int]":
        contents = array("Q")
        for count, row in enumerate(journal.rows()):
            if row.number > 2 * count + 1_000_000:
                raise BatchError(f"{self._path} has a row {row.number} too early; choose another name for the output")
            if row.number >= len(contents):
                contents.extend([0] * (row.number + 1 - len(contents)))
            if contents[row.number]:
                raise BatchError(
                    f"{self._path} has row {row.number} twice, which no batch does; choose another name for the output"
                )
            contents[row.number] = _as_number(row.content)
        return contents


def _as_number(content: bytes) -> int:
    return int(content, 16) or 1  # zero is for a row that is missing


class Appender:
    """Appends lines to a descriptor from a thread of its own, many at a time.

    *size* is where a journal ends; None for what is no file and keeps no place: a pipe, a terminal. Leave it as a
    context: everything that was appended is written then.
    """

    def __init__(self, descriptor: int, name: str, size: int | None) -> None:
        self._descriptor = descriptor
        self._name = name
        self._size = size
        self._changed = threading.Condition()
        self._waiting: list[bytes] = []
        self._waiting_bytes = 0
        self._is_closing = False
        self._failure: OSError | None = None
        self._synced = time.monotonic()
        self._is_dirty = False
        self._thread = threading.Thread(target=self._run, name="spark-batch-output", daemon=True)

    def __enter__(self) -> "Appender":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        self._thread.join()
        if kind is None:
            self._check()

    def append(self, line: bytes) -> None:
        """Have *line* written soon; wait if very much is waiting already.

        Raises:
            BatchStopped: Writing has failed; the file is whole.
            BrokenPipeError: Nobody reads what is no file.
        """
        hit("batch.row")
        with self._changed:
            if self._waiting_bytes >= MOST_WAITING:
                self._changed.wait_for(lambda: self._waiting_bytes < MOST_WAITING or self._failure is not None)
            if self._failure is not None:
                self._check()
            if not self._waiting:
                self._changed.notify_all()
            self._waiting.append(line)
            self._waiting_bytes += len(line)

    def _check(self) -> None:
        if isinstance(self._failure, BrokenPipeError):
            raise self._failure
        if self._failure is not None:
            raise BatchStopped(
                f"cannot write {self._name} any further: {self._failure.strerror or self._failure}; the rows in it are "
                "whole, so make room and run the same command again to go on"
            ) from self._failure

    def _run(self) -> None:
        while True:
            with self._changed:
                idle_seconds = SYNC_SECONDS if self._is_dirty else None
                self._changed.wait_for(lambda: bool(self._waiting) or self._is_closing, idle_seconds)
                is_last = self._is_closing
            if self._waiting and not is_last:
                self._gather()
            with self._changed:
                lines, self._waiting, self._waiting_bytes = self._waiting, [], 0
                self._changed.notify_all()
            try:
                if lines:
                    self._write(b"".join(lines))
                if self._is_dirty and (is_last or time.monotonic() - self._synced >= SYNC_SECONDS):
                    self._sync()
            except OSError as problem:
                with self._changed:
                    self._failure = problem
                    self._waiting_bytes = 0
                    self._changed.notify_all()
                return
            if is_last:
                return

    def _gather(self) -> None:
        """Give more lines a moment to come, so that one write takes many."""
        until = time.monotonic() + GATHER_SECONDS
        with self._changed:
            while not self._is_closing and self._waiting_bytes < GROUP_BYTES:
                left = until - time.monotonic()
                if left <= 0:
                    return
                self._changed.wait(left)

    def _write(self, data: bytes) -> None:
        rest = memoryview(data)
        try:
            hit("batch.append")
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError:
            self._cut_back(data[: len(data) - len(rest)])
            raise
        if self._size is not None:
            self._size += len(data)
            self._is_dirty = True

    def _cut_back(self, written: bytes) -> None:
        """Leave only the whole lines of a write that has failed in the middle."""
        if self._size is not None:
            os.ftruncate(self._descriptor, self._size + written.rfind(b"\n") + 1)

    def _sync(self) -> None:
        hit("batch.sync")
        _sync_data(self._descriptor)
        self._synced = time.monotonic()
        self._is_dirty = False


_sync_data = getattr(os, "fdatasync", os.fsync)


def sync_folder(path: str) -> None:
    """Return when the disk knows the name *path*."""
    descriptor = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # some network file systems cannot do it for a folder; the file's own sync says what is wrong
    finally:
        os.close(descriptor)


def _lock(descriptor: int, path: str) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as problem:
        raise BatchError(f"another batch is writing {path}; wait for its end, or choose another output") from problem
    except OSError:
        pass  # a file system without locks: keeping two batches apart is then up to the user; see docs/batch.md


def _is_still(descriptor: int, path: str) -> bool:
    """Tell whether *path* still names the file that is open."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
