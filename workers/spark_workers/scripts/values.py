"""Python values as plain data: what a page can show and another program can read.

`plain` keeps everything that JSON knows and turns the rest into something that says what it was. `summary` does the
same within bounds, for values that are shown thirty times a second.
"""

import dataclasses
import enum
import math
import sys
import types
from collections.abc import Mapping
from datetime import date, datetime, time, timedelta
from pathlib import PurePath
from typing import Any

SUMMARY_ITEMS = 64
SUMMARY_TEXT = 2000
SUMMARY_DEPTH = 5
RESULT_ITEMS = 1_000_000
RESULT_DEPTH = 50


@dataclasses.dataclass(slots=True)
class _Limits:
    items: int
    text: int
    array_items: int


def plain(value: object) -> Any:
    """Return *value* as None, bool, int, float, str, list or dict, whole."""
    return _convert(value, RESULT_DEPTH, _Limits(RESULT_ITEMS, sys.maxsize, RESULT_ITEMS))


def summary(value: object) -> Any:
    """Return a bounded picture of *value*: long texts and containers are cut, arrays described."""
    return _convert(value, SUMMARY_DEPTH, _Limits(SUMMARY_ITEMS, SUMMARY_TEXT, SUMMARY_ITEMS))


def _convert(value: object, depth: int, limits: _Limits) -> Any:
    kind = type(value)
    if value is None or kind in (bool, float):
        return value
    if kind is int:
        return value if -(2**63) <= value < 2**64 else str(value)  # type: ignore[operator]
    if kind is str:
        return _text(value, limits)  # type: ignore[arg-type]
    if depth <= 0:
        return _text(_name(value), limits)
    if isinstance(value, Mapping):
        return _mapping(value, depth, limits)
    if isinstance(value, (list, tuple, set, frozenset)):
        return _items(value, depth, limits)
    return _object(value, depth, limits)


def _mapping(value: Mapping[Any, Any], depth: int, limits: _Limits) -> dict[str, Any]:
    shown: dict[str, Any] = {}
    for key, item in list(value.items())[: limits.items]:
        shown[key if isinstance(key, str) else str(_convert(key, depth - 1, limits))] = _convert(
            item, depth - 1, limits
        )
    if len(value) > limits.items:
        shown["…"] = f"{len(value) - limits.items} more"
    return shown


def _items(value: Any, depth: int, limits: _Limits) -> list[Any]:
    shown = [_convert(item, depth - 1, limits) for item in list(value)[: limits.items]]
    if len(value) > limits.items:
        shown.append(f"… {len(value) - limits.items} more")
    return shown


def _object(value: Any, depth: int, limits: _Limits) -> Any:
    if isinstance(value, enum.Enum):
        return _convert(value.value, depth - 1, limits)
    if isinstance(value, (bool, int, float, str)):
        return _convert(next(base for base in (bool, int, float, str) if isinstance(value, base))(value), depth, limits)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return _text(bytes(value[: limits.items]).hex(), limits)
    if isinstance(value, (datetime, date, time, timedelta, PurePath, complex)):
        return str(value)
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return _array(value, limits)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = {field.name: getattr(value, field.name, None) for field in dataclasses.fields(value)}
        return _mapping(names, depth, limits)
    if isinstance(value, types.SimpleNamespace):
        return _mapping(vars(value), depth, limits)
    if isinstance(value, types.ModuleType) or callable(value) or not hasattr(value, "__dict__"):
        return _text(_name(value), limits)
    visible = {name: item for name, item in vars(value).items() if not name.startswith("_") and not callable(item)}
    return _mapping(visible, depth, limits) if visible else _text(_name(value), limits)


def _array(value: Any, limits: _Limits) -> Any:
    """A single number as itself, a small array as lists, anything larger as shape and type."""
    size = math.prod(value.shape)
    if size <= limits.array_items and hasattr(value, "tolist"):
        content = value.detach().cpu() if hasattr(value, "detach") else value
        return _convert(content.tolist(), RESULT_DEPTH, limits)
    return {"array": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}


def _name(value: object) -> str:
    try:
        return repr(value)
    except Exception as problem:  # noqa: BLE001 - a broken __repr__ of the user's must not stop the run
        return f"<{type(value).__name__}, whose repr raises {type(problem).__name__}>"


def _text(value: str, limits: _Limits) -> str:
    return value if len(value) <= limits.text else value[: limits.text] + "…"
