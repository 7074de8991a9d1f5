"""Where rows go: a file that is its own journal, a stream, or a Parquet file, which gets its rows at the end.

Parquet cannot be appended to. Its rows are JSON lines in ``out.parquet.partial`` until all of them are there; then the
Parquet file is written beside, takes its name in one step, and the journal goes.
"""

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from spark_runtime.batch.inputs import STANDARD
from spark_runtime.batch.journal import Appender, BatchStopped, Contents, Done, Journal, sync_folder
from spark_runtime.batch.parquet import Record, import_pyarrow, read_records, write_records
from spark_runtime.batch.written import LINE_FORMATS, JsonLines, LineFormat
from spark_runtime.errors import BatchError
from spark_workers.failpoints import hit


class Output(Protocol):
    """An output that is open. Attributes: *name*, the *contents* that it had, and the *form* of its lines."""

    name: str
    contents: Contents
    form: LineFormat

    def done(self) -> "Done | None":
        """Return which rows are done; None where none can be."""

    def begin(self) -> Appender:
        """Return what appends lines, behind the last whole one."""

    def restart(self) -> None:
        """Drop what is done."""

    def finish(self) -> None:
        """Take notice that every row is there. The appender is closed.

        Raises:
            BatchStopped: It cannot be completed; the same command tries again.
        """

    def close(self) -> None:
        """Give back what is open, and the lock."""


def open_output(path: str, form: str, maker: bytes) -> Output:
    """Open and lock *path*, ``-`` for standard output.

    Raises:
        BatchError: It cannot be opened, it is not the output of a batch, or another batch is writing it.
    """
    if path == STANDARD:
        if form == "parquet":
            raise BatchError("Parquet cannot be written to a pipe; give -o the name of a file")
        return StreamOutput(os.dup(1), "standard output", LINE_FORMATS[form]())
    if form == "parquet":
        import_pyarrow()
        return ParquetOutput(path, maker)
    if _is_special(path):
        return StreamOutput(os.open(path, os.O_WRONLY), path, LINE_FORMATS[form]())
    return FileOutput(path, LINE_FORMATS[form](), maker)


class StreamOutput:
    """A pipe, a terminal, a device: rows go out and nothing is known of them afterwards."""

    def __init__(self, descriptor: int, name: str, form: LineFormat) -> None:
        self.name = name
        self.contents = Contents()
        self.form = form
        self._descriptor = descriptor

    def done(self) -> None:
        return None

    def begin(self) -> Appender:
        return _headed(Appender(self._descriptor, self.name, None), self.contents, self.form)

    def restart(self) -> None:
        """There is nothing to drop."""

    def finish(self) -> None:
        """There is nothing to complete."""

    def close(self) -> None:
        os.close(self._descriptor)


class FileOutput:
    """A file of JSON lines or CSV."""

    def __init__(self, path: str, form: LineFormat, maker: bytes) -> None:
        self.name = path
        self.form = form
        self._is_begun = False
        self._journal = Journal.open(path, form)
        try:
            self.contents = self._journal.examine(maker)
        except BaseException:
            self._journal.close()
            raise

    def done(self) -> Done:
        return Done(self._journal, self.contents)

    def begin(self) -> Appender:
        self._is_begun = True
        self._journal.cut(self.contents.size)
        return _headed(Appender(self._journal.descriptor, self.name, self.contents.size), self.contents, self.form)

    def restart(self) -> None:
        self.contents = Contents()

    def finish(self) -> None:
        self._journal.keep_empty()
        if not self._is_begun:  # there may be something torn behind the last row, and CSV has a header without rows
            with self.begin():
                pass

    def close(self) -> None:
        self._journal.close()


class ParquetOutput:
    """A Parquet file with its journal beside it. Columns: row, key, output and error, the last two JSON texts."""

    def __init__(self, path: str, maker: bytes) -> None:
        self.name = path
        self.form: LineFormat = JsonLines()
        self._path = Path(path)
        self._has_all = False  # the Parquet file has every row that the journal has
        self._is_restarted = False
        self._is_begun = False
        self._journal = Journal.open(path + ".partial", self.form)
        try:
            self.contents = self._journal.examine(maker)
            if self._path.exists() and self._path.stat().st_size:
                self._take_in(maker)
        except BaseException:
            self._journal.close()
            raise

    def done(self) -> Done:
        return Done(self._journal, self.contents)

    def begin(self) -> Appender:
        self._has_all = False
        self._is_begun = True
        self._journal.cut(self.contents.size)
        if self._is_restarted:  # else the next run would take in what is there
            self._path.unlink(missing_ok=True)
        return Appender(self._journal.descriptor, self._journal.path, self.contents.size)

    def restart(self) -> None:
        self.contents = Contents()
        self._has_all = False
        self._is_restarted = True

    def finish(self) -> None:
        if self._has_all:
            return
        if not self._is_begun:
            with self.begin():
                pass
        temporary = self._path.with_name(f".{self._path.name}.writing")
        try:
            write_records(temporary, self._records())
            hit("batch.before_rename")
            os.replace(temporary, self._path)
            hit("batch.after_rename")
            sync_folder(self.name)
        except OSError as problem:
            temporary.unlink(missing_ok=True)
            raise BatchStopped(
                f"cannot write {self._path}: {problem.strerror or problem}; every row is in {self._journal.path}, so "
                "make room and run the same command again"
            ) from problem
        self._has_all = True

    def close(self) -> None:
        if self._has_all:
            self._journal.remove()
        self._journal.close()

    def _take_in(self, maker: bytes) -> None:
        """Make a journal of a Parquet file that is there, so that it can be gone on with.

        A journal with more rows than the Parquet file is newer, and stays. One with fewer was left by a kill, before
        the Parquet file was taken in or after it was made of it.
        """
        rows = sum(1 for _ in read_records(self._path))
        if rows > self.contents.rows:
            self._journal.cut(0)
            with Appender(self._journal.descriptor, self._journal.path, 0) as appender:
                for record in read_records(self._path):
                    appender.append(_line_of(record))
            self.contents = self._journal.examine(maker)
        self._has_all = rows >= self.contents.rows

    def _records(self) -> Iterator[Record]:
        for line in self._journal.whole_lines():
            row = self.form.parse(line)
            assert row is not None
            value = JsonLines.value(line).decode()
            key = f"{row.content.decode()}-{row.maker.decode()}"
            yield (row.number, key, None, value) if row.is_failed else (row.number, key, value, None)


def _line_of(record: Record) -> bytes:
    number, key, output, error = record
    kind = "error" if output is None else "output"
    return f'{{"row": {number}, "key": "{key}", "{kind}": {error if output is None else output}}}\n'.encode()


def _headed(appender: Appender, contents: Contents, form: LineFormat) -> Appender:
    if contents.size == 0 and form.header:
        appender.append(form.header)
    return appender


def _is_special(path: str) -> bool:
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)
