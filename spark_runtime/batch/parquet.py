"""Rows from and to Parquet. pyarrow is imported here and nowhere else."""

import base64
import datetime
import decimal
import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spark_runtime.batch.rows import MAX_ROW, Row, RowUnusable
from spark_runtime.errors import BatchError

if TYPE_CHECKING:
    import pyarrow.parquet

READ_ROWS = 1024
GROUP_ROWS = 65_536
GROUP_BYTES = 32 * 1024 * 1024
_MARK = b"spark-batch"


def import_pyarrow() -> Any:
    """Return the module ``pyarrow.parquet``.

    Raises:
        BatchError: It is not installed.
    """
    try:
        import pyarrow.parquet
    except ImportError as problem:
        raise BatchError("Parquet needs pyarrow; get it with: pip install 'spark-runtime[parquet]'") from problem
    return pyarrow.parquet


class ParquetSource:
    """The rows of a Parquet file as JSON objects.

    Dates and times become ISO 8601 texts, decimals texts of their digits, bytes base64, a duration its seconds, a map
    a list of pairs, and NaN null.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._file = _open(path)

    def rows(self) -> Iterator[Row]:
        number = -1
        names = self._file.schema_arrow.names
        if len(set(names)) < len(names):
            raise BatchError(f"{self._path}: two columns have one name; give each its own")
        try:
            for batch in self._file.iter_batches(batch_size=READ_ROWS):
                for each in batch.to_pylist():
                    number += 1
                    yield _row(number, each)
        except (OSError, ValueError) as problem:  # pyarrow's errors are these
            raise BatchError(f"{self._path} is damaged after row {number}: {_one_line(problem)}") from problem

    def is_ready(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()


def count(path: str) -> int:
    """Return the number of rows, from the file's end."""
    file = _open(path)
    try:
        return int(file.metadata.num_rows)
    finally:
        file.close()


def _open(path: str) -> "pyarrow.parquet.ParquetFile":
    parquet = import_pyarrow()
    try:
        open(path, "rb").close()  # its error says in a few words what is wrong, pyarrow's does not
        file: pyarrow.parquet.ParquetFile = parquet.ParquetFile(path)
    except OSError as problem:
        text = problem.strerror or _one_line(problem)
        raise BatchError(f"cannot read {path}: {text}; give the path of a Parquet file") from problem
    except ValueError as problem:
        raise BatchError(f"{path} is not Parquet: {_one_line(problem)}") from problem
    return file


def _one_line(problem: Exception) -> str:
    return str(problem).partition("\n")[0]


_to_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False, default=lambda value: _plain(value)).encode


def _row(number: int, values: dict[str, Any]) -> Row:
    try:
        try:
            data = _to_json(values).encode()
        except ValueError:
            data = _to_json(_without_nan(values)).encode()
    except (TypeError, ValueError, RecursionError) as problem:
        return Row(repr(values).encode(errors="replace"), RowUnusable(f"row {number} cannot be JSON: {problem}"))
    if len(data) > MAX_ROW:
        return Row(data, RowUnusable(f"row {number} is {len(data)} bytes long; a row may have 64 MB"))
    return Row(data)


def _plain(value: object) -> Any:
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    if isinstance(value, decimal.Decimal):
        return str(value)
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    raise TypeError(f"there is no JSON for a {type(value).__name__}")


def _without_nan(value: Any) -> Any:
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, dict):
        return {name: _without_nan(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return value


# --- output ----------------------------------------------------------------------------------------------------------

#: Number, key, output and error, the last two as JSON; one of them is None.
Record = tuple[int, str, str | None, str | None]


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Write a Parquet file by row groups; it is on the disk when this returns.

    Raises:
        OSError: As the system says it.
    """
    import pyarrow

    parquet = import_pyarrow()
    types: dict[str, pyarrow.DataType] = {"row": pyarrow.int64()}
    types |= dict.fromkeys(("key", "output", "error"), pyarrow.string())
    schema = pyarrow.schema(types, metadata={_MARK: b"1"})
    with open(path, "wb") as file:
        with parquet.ParquetWriter(file, schema) as writer:
            for group in _groups(records):
                columns = [list(column) for column in zip(*group, strict=True)]
                arrays = [pyarrow.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
                writer.write_table(pyarrow.Table.from_arrays(arrays, schema=schema))
        file.flush()
        os.fsync(file.fileno())


def read_records(path: Path) -> Iterator[Record]:
    """Give what `write_records` wrote.

    Raises:
        BatchError: Somebody else wrote it, or it is damaged.
    """
    refusal = BatchError(f"{path} is not the output of a batch and stays as it is; choose another name for the output")
    try:
        file = _open(str(path))
    except BatchError as problem:
        raise refusal from problem
    try:
        if _MARK not in (file.schema_arrow.metadata or {}):
            raise refusal
        for batch in file.iter_batches(batch_size=READ_ROWS):
            yield from zip(*(column.to_pylist() for column in batch.columns), strict=True)
    except (OSError, ValueError) as problem:
        raise BatchError(f"{path} is damaged: {_one_line(problem)}; remove it, and run the batch again") from problem
    finally:
        file.close()


def _groups(records: Iterable[Record]) -> Iterator[list[Record]]:
    group: list[Record] = []
    size = 0
    for record in records:
        group.append(record)
        size += len(record[2] or record[3] or "")
        if len(group) >= GROUP_ROWS or size >= GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group
