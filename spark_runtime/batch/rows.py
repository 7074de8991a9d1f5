"""A row on its way to the model: JSON as bytes, or the reason why it is none."""

import hashlib
import json
from typing import Any, NamedTuple, NoReturn

from spark_runtime.errors import BatchError
from spark_workers.frames import MAX_PAYLOAD

#: A longer row does not fit into a frame with what travels around it. It becomes an error row.
MAX_ROW = MAX_PAYLOAD - 4096


class RowUnusable(BatchError):
    """One row of the input cannot be given to the model. It becomes an error row and the batch goes on.

    Attributes:
        line: Where it begins in the file, from 1; None where the format has no lines.
        column: Where in that line, from 1, if that is known.
    """

    def __init__(self, message: str, line: int | None = None, column: int | None = None) -> None:
        super().__init__(message)
        self.line = line
        self.column = column

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        where = {"line": self.line, "column": self.column}
        return {**super().to_dict(), **{name: value for name, value in where.items() if value is not None}}


class Row(NamedTuple):
    """One row. *data* is what the model gets and what the row's key is made of; with a *problem* only the latter."""

    data: bytes
    problem: RowUnusable | None = None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


# Made once, and never asked for a value: integers are read as floats because Python refuses to read one of more than
# 4300 digits, which is still JSON. `raw_decode` because `decode` looks for white space twice, at a third of the cost.
_decode = json.JSONDecoder(parse_int=float, parse_constant=_refuse_constant).raw_decode


def check_json(data: bytes) -> None:
    """Return if *data* is one JSON value in UTF-8, with nothing around it.

    NaN and the infinities are none. Names may come twice in an object: which one counts is the model's choice.

    Raises:
        ValueError: It is not, or nests deeper than can be checked.
    """
    text = data.decode()
    try:
        end = _decode(text)[1]
    except RecursionError:
        raise ValueError("it nests too deep") from None
    if end != len(text):
        raise json.JSONDecodeError("Extra data", text, len(text) - len(text[end:].lstrip()))


def describe(problem: ValueError) -> tuple[str, int | None]:
    """Return what is wrong and in which column, from what `check_json` raised."""
    if isinstance(problem, json.JSONDecodeError):
        return problem.msg, problem.pos + 1
    if isinstance(problem, UnicodeDecodeError):
        return f"byte 0x{problem.object[problem.start]:02x} is not UTF-8", problem.start + 1
    return str(problem), None


def content_key(data: bytes) -> bytes:
    """Return what stands for the content of a row in the output: 16 hexadecimal digits."""
    return hashlib.blake2b(data, digest_size=8).hexdigest().encode()
