"""Tables in requests and answers: rows of objects, and the same as a header row and rows of values.

    [{"a": 1, "b": 2}, None, {"a": 3}]        rows
    [["a", "b"], [1, 2], None, [3]]           columnar

Every key is said once, so columnar is what many rows travel in. A row of values belongs to the headers by position and
may be short; ``None`` in place of a row is a blank row. A table inside a table is columnar as well.

The format is the one of the JavaScript `ColumnarSerializer`, and what this one writes is what that one writes. Some
things do not come back as they were, because the format has no place for the difference: a key that a row lacks becomes
an explicit ``None`` where another value follows in its row; a single object comes back in a list; a list of lists is
taken for a table; a list with objects and numbers in it is not a table and does not come back at all.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

from spark_runtime.errors import BadRequestError

Row = dict[str, Any]


class ColumnarSerializer:
    """Turns rows into columnar form and back. It has no state: what is given is never changed nor remembered."""

    def serialize(self, data: Any) -> Any:
        """Return rows (a list of objects, or one object) in columnar form, and what is columnar already as it is.

        Raises:
            BadRequestError: It is neither, or nested too deep.
        """
        if _is_columnar(data):
            return data
        if not isinstance(data, list | tuple | Mapping):
            raise BadRequestError(f"rows are a list of objects, not {_name(data)}{_hint(data, 'serialize_string')}")
        try:
            return _write(data)
        except RecursionError as problem:
            raise BadRequestError("the rows are nested too deep") from problem

    def deserialize(self, data: Any) -> Any:
        """Return columnar data as rows, and what is not columnar as it is.

        Raises:
            BadRequestError: A row has more values than there are headers, a header is no text or number, data is
                nested too deep, or it is text with columnar data in it.
        """
        if isinstance(data, str) and _is_columnar(_parsed(data)):
            raise BadRequestError("this is text, not columnar data; use deserialize_string")
        try:
            return _read(data) if _is_columnar(data) else data
        except RecursionError as problem:
            raise BadRequestError("the columnar data is nested too deep") from problem

    def serialize_string(self, text: str) -> str:
        """As `serialize`, from JSON to JSON."""
        return _to_json(self.serialize(_from_json(text)))

    def deserialize_string(self, text: str) -> str:
        """As `deserialize`, from JSON to JSON."""
        data = _from_json(text)
        return _to_json(data if isinstance(data, str) else self.deserialize(data))

    @staticmethod
    def is_deserializable(data: Any) -> bool:
        """Tell whether *data*, or the JSON in it if it is text, is in columnar form."""
        return _is_columnar(_parsed(data))

    @staticmethod
    def is_empty(data: Any) -> bool:
        """Tell whether *data*, or the JSON in it if it is text, is columnar without a value, or blank rows only."""
        found = _parsed(data)
        if not isinstance(found, list | tuple):
            return False
        if found and all(row is None for row in found):  # what `serialize` makes of blank rows only
            return True
        return _is_columnar(found) and all(not row for row in found)


def _is_columnar(data: Any) -> bool:
    """Tell it by the shape alone: a list that begins with a list, and goes on with lists and blank rows."""
    if not isinstance(data, list | tuple):
        return False
    return all(isinstance(row, list | tuple) or (row is None and index > 0) for index, row in enumerate(data))


def _is_single(data: Any) -> bool:
    """Tell whether this is one object, ``[[headers, values]]``."""
    return len(data) == 1 and _is_columnar(data[0]) and bool(data[0])


# --- columnar to rows -------------------------------------------------------------------------------------------------


def _read(data: Any) -> Any:
    if _is_single(data):
        rows = _read_rows(data[0][0], data[0][1:])
        return rows[0] if rows else None
    return _read_rows(data[0], data[1:]) if data else []


def _read_rows(headers: Any, rows: Any) -> list[Row | None]:
    return [None if row is None else _read_row(headers, row, index) for index, row in enumerate(rows)]


def _read_row(headers: Any, values: Any, index: int) -> Row:
    row = {_key(header): _read_cell(value) for header, value in zip(headers, values, strict=False)}
    if len(values) > len(headers):
        raise BadRequestError(f"Empty column detected at row {index} and column {len(headers)}")
    return row


def _read_cell(value: Any) -> Any:
    if _is_columnar(value):
        return _read(value)
    if isinstance(value, list | tuple):
        return [_read_item(item) for item in value]
    return value


def _read_item(item: Any) -> Any:
    if isinstance(item, list | tuple) and len(item) > 1 and item[0] is None and _is_columnar(item[1:]):
        raise BadRequestError("Header row cannot be null")
    return _read(item) if _is_columnar(item) else item


def _key(header: Any) -> str:
    if isinstance(header, str):
        return header
    if isinstance(header, bool) or not isinstance(header, int | float):
        raise BadRequestError(f"Column header must be a string or number. Found {_name(header)} instead.")
    if isinstance(header, float) and math.isfinite(header) and header == int(header):
        return str(int(header))  # JSON knows one kind of number: 1.0 is the key "1"
    return str(header)


# --- rows to columnar -------------------------------------------------------------------------------------------------


def _write(data: Any) -> list[Any]:
    if isinstance(data, Mapping):
        headers: dict[Any, int] = {}
        values = _write_row(data, headers)
        return [list(headers), values]
    return _write_list(data)


def _write_list(rows: Any) -> list[Any]:
    headers: dict[Any, int] = {}
    written: list[Any] = []
    is_table = True
    for row in rows:
        entry = row
        if isinstance(row, Mapping):
            entry = _write_row(row, headers)
        elif isinstance(row, list | tuple):
            entry = _write_list(row)
        elif row is not None:
            is_table = False
        if headers and not is_table:  # an object among numbers stands for itself, with headers of its own
            entry = [[list(headers), entry]]
            headers.clear()
        written.append(entry)
    if headers:
        return [list(headers), *written]
    has_rows = any(entry is not None for entry in written)
    if has_rows and all(entry is None or entry == [] for entry in written):
        return [[], *written]  # objects without keys: the header row is empty, and must be there
    return written


def _write_row(row: Mapping[Any, Any], headers: dict[Any, int]) -> list[Any]:
    """Return the values of a row in the order of *headers*, to which new keys are added."""
    values: list[Any] = []
    for key, value in row.items():
        index = headers.setdefault(key, len(headers))
        values.extend([None] * (index + 1 - len(values)))
        values[index] = _write(value) if isinstance(value, list | tuple | Mapping) else value
    return values


# --- JSON -------------------------------------------------------------------------------------------------------------


def _parsed(data: Any) -> Any:
    if not isinstance(data, str):
        return data
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def _from_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as problem:
        raise BadRequestError(f"this is not JSON: {problem}") from problem


def _to_json(data: Any) -> str:
    return json.dumps(data, ensure_ascii=False, separators=(",", ":"))


def _name(value: Any) -> str:
    if value is None:
        return "null"
    return {bool: "boolean", int: "number", float: "number", str: "string", list: "array", dict: "object"}.get(
        type(value), type(value).__name__
    )


def _hint(data: Any, instead: str) -> str:
    return f"; for JSON as text there is {instead}" if isinstance(data, str) else ""
