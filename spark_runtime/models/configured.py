"""The models of a project: the table ``[tool.spark.models]`` of the pyproject.toml beside a script or above it.

[tool.spark.models]
pricing = "models/pricing.wasm"

[tool.spark.models.risk]
path = "models/risk.wasm"
replicas = 4
memory_limit = "256MiB"
"""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spark_runtime.config import Model, parse_size
from spark_runtime.errors import BadRequestError

FILE = "pyproject.toml"
TABLE = "tool.spark.models"
MOST_SHOWN = 60

_BARE = re.compile(r"[A-Za-z0-9_-]+")


def configured_models(script: Path, *, watch: bool) -> dict[str, Model]:
    """Return the models of the nearest pyproject.toml at or above the folder of *script*; none if there is no file.

    Args:
        script: It need not exist.
        watch: What models do that do not say whether they are watched.

    Raises:
        BadRequestError: The table makes no sense; the message names file, table and field.
    """
    folder = Path(os.path.realpath(script)).parent
    path = next((each / FILE for each in (folder, *folder.parents) if os.path.isfile(each / FILE)), None)
    if path is None:
        return {}
    return {name: _model(path, name, given, watch=watch) for name, given in _table(path).items()}


def _table(path: Path) -> dict[str, Any]:
    """Return the table of models; empty if the file has none."""
    try:
        content = path.read_bytes()
    except OSError as problem:
        raise BadRequestError(f"{path} cannot be read for its [{TABLE}]: {problem.strerror}") from problem
    if b"spark" not in content:
        return {}  # not ours to judge: the file may have any fault
    import tomllib  # most runs have no such file, and no use for it

    try:
        found: Any = tomllib.loads(content.decode())
    except ValueError as problem:
        raise BadRequestError(f"{path} is not TOML, so its [{TABLE}] cannot be read: {problem}") from problem
    names = TABLE.split(".")
    for depth, name in enumerate(names, 1):
        found = found.get(name, {})
        if not isinstance(found, dict):
            raise BadRequestError(f"{path}: [{'.'.join(names[:depth])}] is {_shown(found)}, not a table")
    return found  # type: ignore[no-any-return]


def _model(path: Path, name: str, given: Any, *, watch: bool) -> Model:
    where = f"{path}: [{TABLE}.{name if _BARE.fullmatch(name) else json.dumps(name)}]"
    fields = {"path": given} if isinstance(given, str) else given
    if not isinstance(fields, dict):
        raise BadRequestError(f"{where} is {_shown(given)}, not the path of a model or a table")
    if "path" not in fields:
        raise BadRequestError(
            f"{where} has no path; give it that of the .wasm file, from the folder of this pyproject.toml"
        )
    values: dict[str, Any] = {"watch": watch}
    for field, value in fields.items():
        if field not in _READERS:
            raise BadRequestError(f"{where} has a field {field!r}, and there are only {', '.join(_READERS)}")
        try:
            values[field] = _READERS[field](value)
        except ValueError as problem:
            raise BadRequestError(f"{where} {field} is {_shown(value)}, not {problem}") from problem
    values["path"] = path.parent / values["path"]
    if "/" in values.get("python", ""):
        values["python"] = str(path.parent / values["python"])
    try:
        return Model(name, **values)
    except BadRequestError as problem:
        raise BadRequestError(f"{path}: [{TABLE}]: {problem}") from problem


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= MOST_SHOWN else text[:MOST_SHOWN] + "…"


# --- what a field may be; the errors say it ---------------------------------------------------------------------------


def _text(value: Any) -> str:
    if isinstance(value, str) and value:
        return value
    raise ValueError("a text")


def _whole(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise ValueError("a whole number")


def _number(value: Any) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    raise ValueError("a number")


def _flag(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    raise ValueError("true or false")


def _size(value: Any) -> int:
    if isinstance(value, str):
        return parse_size(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise ValueError("a number of bytes or a size such as 256MiB")


def _texts(value: Any) -> list[str]:
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return value
    raise ValueError("a list of texts")


def _variables(value: Any) -> dict[str, str]:
    if isinstance(value, dict) and all(isinstance(each, str) for each in value.values()):
        return value
    raise ValueError("a table of texts")


_READERS: dict[str, Callable[[Any], Any]] = {
    "path": _text,
    "replicas": _whole,
    "keep": _flag,
    "kind": _text,
    "engine": _text,
    "python": _text,
    "args": _texts,
    "env": _variables,
    "memory_limit": _size,
    "stack_limit": _size,
    "table_limit": _whole,
    "interrupt": _text,
    "fresh": _flag,
    "retries": _whole,
    "watch": _flag,
    "timeout": _number,
    "entry": _text,
}
