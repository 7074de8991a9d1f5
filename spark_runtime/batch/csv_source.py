"""Rows from CSV. The header names the columns, and each further record becomes a JSON object.

A cell has no type, so what it looks like decides: nothing is null; true and false, also as Python and Excel write
them, are booleans; what JSON would read as a number is one, in its very digits; all else is a text. A whole number
over 2**53, which a double cannot hold, stays a text, and so does 007, which is no number of JSON's.
"""

import csv
import json
import math
import os
import re
from collections.abc import Iterator

from spark_runtime.batch.inputs import STANDARD, too_long
from spark_runtime.batch.lines import Lines, LongLine
from spark_runtime.batch.rows import MAX_ROW, Row, RowUnusable
from spark_runtime.batch.stop import Stop
from spark_runtime.errors import BatchError

_WORDS = {
    "": "null",
    "true": "true",
    "True": "true",
    "TRUE": "true",
    "false": "false",
    "False": "false",
    "FALSE": "false",
}
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?")
_EXACT = 2**53
_to_text = json.JSONEncoder(ensure_ascii=False).encode


def cell_to_json(cell: str) -> str:
    """Return a cell as JSON."""
    word = _WORDS.get(cell)
    if word is not None:
        return word
    match = _NUMBER.fullmatch(cell)
    if match is not None:
        is_whole = match[1] is None and match[2] is None
        if (len(cell) <= 17 and abs(int(cell)) <= _EXACT) if is_whole else math.isfinite(float(cell)):
            return cell
    return _to_text(cell)


class CsvSource:
    """Records under a header. Blank lines are no rows."""

    def __init__(self, descriptor: int, path: str, stop: Stop) -> None:
        self._descriptor = descriptor
        self._path = path
        self._lines = Lines(descriptor, stop)
        self._read: list[bytes] = []  # the lines of the record that is being read
        self._long: LongLine | None = None  # one of them that was over the limit
        # The limit is the process's, and the default of 128 KiB is an error in the middle of a valid file.
        csv.field_size_limit(MAX_ROW)

    def rows(self) -> Iterator[Row]:
        reader = csv.reader(self._texts(), strict=True)
        header = self._header(reader)
        names = [_to_text(name) + ": " for name in header]
        while True:
            self._read.clear()
            first = self._lines.number + 1
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as problem:
                yield Row(self._raw(), RowUnusable(f"line {first} is not CSV: {problem}", first))
                continue
            if self._long is not None:
                yield Row(self._long.digest, too_long(first, self._long.size))
                self._long = None
            elif fields:
                yield self._row(first, names, fields)

    def is_ready(self) -> bool:
        return self._lines.is_ready()

    def close(self) -> None:
        if self._path != STANDARD:
            os.close(self._descriptor)

    def _texts(self) -> Iterator[str]:
        for line in self._lines:
            if isinstance(line, LongLine):
                self._long = line
                yield "\n"
            else:
                self._read.append(line)
                # What is not UTF-8 shows when the row is encoded again, and spoils that row alone.
                yield line.decode("utf-8-sig" if self._lines.number == 1 else "utf-8", "surrogateescape") + "\n"

    def _header(self, reader: Iterator[list[str]]) -> list[str]:
        try:
            header = next((fields for fields in reader if fields), [])
        except csv.Error as problem:
            raise BatchError(f"{self._path}: its header is not CSV: {problem}; mend its first line") from problem
        if self._long is not None:
            raise BatchError(f"{self._path}: its first line is longer than 64 MB; is it CSV?")
        twice = sorted({name for name in header if header.count(name) > 1})
        if twice:
            raise BatchError(f"{self._path}: two columns are named {twice[0]!r}; give each its own name in the header")
        if any("\udc80" <= char <= "\udcff" for name in header for char in name):
            raise BatchError(f"{self._path}: its header is not UTF-8; save the file as UTF-8")
        return header

    def _row(self, line: int, names: list[str], fields: list[str]) -> Row:
        if len(fields) != len(names):
            text = f"line {line} has {len(fields)} fields and the header {len(names)}"
            return Row(self._raw(), RowUnusable(text, line))
        cells = [name + cell_to_json(cell) for name, cell in zip(names, fields, strict=True)]
        try:
            data = ("{" + ", ".join(cells) + "}").encode()
        except UnicodeEncodeError:
            return Row(self._raw(), RowUnusable(f"line {line} is not UTF-8", line))
        if len(data) > MAX_ROW:
            return Row(self._raw(), too_long(line, len(data)))
        return Row(data)

    def _raw(self) -> bytes:
        return b"\n".join(self._read)
