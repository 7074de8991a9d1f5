"""Where rows come from: JSON lines, CSV, or Parquet. Every reader streams, and gives each row as JSON bytes.

A row that cannot be read is given with its problem, so that it gets its error row; only what makes the whole input
useless raises `BatchError`.
"""

import codecs
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from spark_runtime.batch.lines import Lines, LongLine
from spark_runtime.batch.rows import Row, RowUnusable, check_json, describe
from spark_runtime.batch.stop import Stop
from spark_runtime.errors import BatchError

FORMATS = ("jsonl", "csv", "parquet")
STANDARD = "-"

_SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".csv": "csv", ".parquet": "parquet"}
_COUNT_BLOCK = 1 << 20
_WHITE = b" \t\r"


def format_of(path: str, given: str | None, option: str) -> str:
    """Return the format of *path*: the one that is *given*, else what its name says; JSON lines for ``-``.

    Raises:
        BatchError: The name does not say it. *option* is what the message tells to use.
    """
    if given is not None:
        return given
    if path == STANDARD:
        return "jsonl"
    found = _SUFFIXES.get(Path(path).suffix.lower())
    if found is None:
        raise BatchError(
            f"{path}: its name does not say what format it has; name it .jsonl, .csv or .parquet, or add {option}"
        )
    return found


class Source(Protocol):
    """An input that is open."""

    def rows(self) -> Iterator[Row]:
        """Give the rows, once, in order.

        Raises:
            BatchError: The input as a whole cannot be read.
        """

    def is_ready(self) -> bool:
        """Tell whether the next row can be had without waiting for it."""

    def close(self) -> None:
        """Give back what is open."""


def open_source(path: str, form: str, stop: Stop) -> Source:
    """Open *path*, ``-`` for standard input.

    Raises:
        BatchError: It cannot be opened, or pyarrow is missing.
    """
    if form == "parquet":
        if path == STANDARD:
            raise BatchError("Parquet cannot be read from a pipe; save it to a file and give its path")
        from spark_runtime.batch.parquet import ParquetSource

        return ParquetSource(path)
    descriptor = 0 if path == STANDARD else _open(path)
    if form == "csv":
        from spark_runtime.batch.csv_source import CsvSource

        return CsvSource(descriptor, path, stop)
    return JsonLinesSource(descriptor, path, stop)


def count_rows(path: str, form: str) -> int | None:
    """Return about how many rows *path* has, for showing progress; None if that cannot be known.

    Lines are counted, so blank lines and line ends in quotes count too.
    """
    if path == STANDARD or not os.path.isfile(path):
        return None
    try:
        if form == "parquet":
            from spark_runtime.batch.parquet import count

            return count(path)
        lines, last = 0, b"\n"
        with open(path, "rb", buffering=0) as file:
            while block := file.read(_COUNT_BLOCK):
                lines += block.count(b"\n")
                last = block
    except (OSError, BatchError):
        return None  # whoever reads it for real says what is wrong
    whole = lines + (not last.endswith(b"\n"))
    return max(0, whole - 1) if form == "csv" else whole


class JsonLinesSource:
    """One JSON value a line, passed on byte by byte as it is. Blank lines are no rows."""

    def __init__(self, descriptor: int, path: str, stop: Stop) -> None:
        self._descriptor = descriptor
        self._path = path
        self._lines = Lines(descriptor, stop)

    def rows(self) -> Iterator[Row]:
        lines = self._lines
        for line in lines:
            if isinstance(line, LongLine):
                yield Row(line.digest, too_long(lines.number, line.size))
                continue
            data = line.strip(_WHITE)
            if lines.number == 1:
                data = data.removeprefix(codecs.BOM_UTF8)
            if not data:
                continue
            try:
                check_json(data)
            except ValueError as problem:
                self._check_first(data)
                yield Row(data, self._explain(problem, len(line) - len(line.lstrip(_WHITE))))
            else:
                self._check_first(data)
                yield Row(data)

    def is_ready(self) -> bool:
        return self._lines.is_ready()

    def close(self) -> None:
        if self._path != STANDARD:
            os.close(self._descriptor)

    def _explain(self, problem: ValueError, indent: int) -> RowUnusable:
        text, column = describe(problem)
        place = f"line {self._lines.number}"
        if column is not None:
            column += indent
            place += f", column {column}"
        return RowUnusable(f"{place} is not JSON: {text}", self._lines.number, column)

    def _check_first(self, data: bytes) -> None:
        """Refuse a file of one JSON array, which its name allows: every line of it would become an error row."""
        if self._lines.number == 1 and self._path.lower().endswith(".json") and data[:1] == b"[":
            raise BatchError(
                f"{self._path} holds one JSON array, and a batch takes one row a line; "
                f"make it lines, with `jq -c '.[]' {self._path} > rows.jsonl`"
            )


def too_long(line: int, size: int) -> RowUnusable:
    """Return the problem of a row that no frame can carry."""
    return RowUnusable(f"line {line} is {size} bytes long; a row may have 64 MB", line)


def _open(path: str) -> int:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as problem:
        raise BatchError(f"cannot read {path}: {problem.strerror}; give the path of a file with rows") from problem
    if os.path.isdir(path):
        os.close(descriptor)
        raise BatchError(f"{path} is a folder; give the path of a file with rows")
    return descriptor
