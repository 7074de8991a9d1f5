"""Python values as plain data: what a page can show and another program can read.

`plain` keeps everything that JSON knows and turns the rest into something that says what it was. `summary` does the
same within bounds, for values that are shown thirty times a second. Neither ever raises: a value that cannot be looked
at must not end a training.
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

SUMMARY_ITEMS = 64  # of one container
SUMMARY_TOTAL = 2000  # of all of them
SUMMARY_TEXT = 2000
SUMMARY_DEPTH = 5
RESULT_ITEMS = 1_000_000
RESULT_DEPTH = 50


class Shown:
    """Base of our own objects that know themselves what to show."""

    def shown(self) -> object:
        """Return what stands for this object."""
        raise NotImplementedError


def plain(value: object) -> Any:
    """Return *value* as None, bool, int, float, str, list or dict, whole."""
    return _Picture(RESULT_ITEMS, sys.maxsize, RESULT_ITEMS).convert(value, RESULT_DEPTH)


def summary(value: object) -> Any:
    """Return a bounded picture of *value*: long texts and containers are cut, arrays described."""
    return _Picture(SUMMARY_ITEMS, SUMMARY_TEXT, SUMMARY_TOTAL).convert(value, SUMMARY_DEPTH)


def is_text(value: str) -> bool:
    """Tell whether *value* can be encoded; a lone half of a surrogate pair cannot."""
    if value.isascii():
        return True
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


class _Picture:
    """One value being converted, and how much of it may still be shown."""

    def __init__(self, items: int, text: int, total: int) -> None:
        self._items = items
        self._longest = text
        self._left = total

    def convert(self, value: object, depth: int) -> Any:
        """Return *value* as plain data."""
        try:
            return self._convert(value, depth)
        except Exception as problem:  # noqa: BLE001 - the user's own code runs in here: properties, __len__, __iter__
            return f"<{type(value).__name__} cannot be shown: {type(problem).__name__}>"

    def _convert(self, value: object, depth: int) -> Any:
        self._left -= 1
        kind = type(value)
        if value is None or kind in (bool, float):
            return value
        if isinstance(value, int) and kind is int:
            return value if -(2**63) <= value < 2**64 else str(value)
        if isinstance(value, str) and kind is str:
            return self._text(value)
        if self._left <= 0:
            return "…"
        if hasattr(value, "shape") and hasattr(value, "dtype"):
            return self._array(value)
        if depth <= 0:
            return f"<{kind.__name__}>"
        if isinstance(value, Mapping):
            return self._mapping(value, depth)
        if isinstance(value, (list, tuple, set, frozenset)):
            return self._sequence(value, depth)
        return self._object(value, depth)

    def _mapping(self, value: Mapping[Any, Any], depth: int) -> dict[str, Any]:
        shown: dict[str, Any] = {}
        for key, item in list(value.items())[: self._items]:
            name = key if isinstance(key, str) else str(self.convert(key, depth - 1))
            shown[self._text(name)] = self.convert(item, depth - 1)
        if len(value) > self._items:
            shown["…"] = f"{len(value) - self._items} more"
        return shown

    def _sequence(self, value: Any, depth: int) -> list[Any]:
        shown = [self.convert(item, depth - 1) for item in list(value)[: self._items]]
        if len(value) > self._items:
            shown.append(f"… {len(value) - self._items} more")
        return shown

    def _object(self, value: Any, depth: int) -> Any:
        if isinstance(value, Shown):
            return self.convert(value.shown(), depth)
        if isinstance(value, enum.Enum):
            return self.convert(value.value, depth - 1)
        for base in (bool, int, float, str):
            if isinstance(value, base):
                return self._convert(base(value), depth)
        if isinstance(value, (bytes, bytearray, memoryview)):
            return self._text(bytes(value[: self._items]).hex())
        if isinstance(value, (datetime, date, time, timedelta, PurePath, complex)):
            return self._text(str(value))
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            names = {field.name: getattr(value, field.name, None) for field in dataclasses.fields(value)}
            return self._mapping(names, depth)
        if isinstance(value, types.SimpleNamespace):
            return self._mapping(vars(value), depth)
        if isinstance(value, types.ModuleType) or callable(value) or not hasattr(value, "__dict__"):
            return self._name(value)
        visible = {name: item for name, item in vars(value).items() if not name.startswith("_") and not callable(item)}
        return self._mapping(visible, depth) if visible else self._name(value)

    def _array(self, value: Any) -> Any:
        """A single number as itself, a small array as lists, anything larger as shape and type."""
        described = {"array": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
        size = math.prod(value.shape)
        if size > min(self._items, self._left) or not hasattr(value, "tolist"):
            return described
        try:
            content = value.detach().cpu().tolist() if hasattr(value, "detach") else value.tolist()
        except (RuntimeError, NotImplementedError, TypeError):
            return described  # a tensor without data, or one that is not stored densely
        return self.convert(content, RESULT_DEPTH)

    def _name(self, value: object) -> str:
        return self._text(repr(value))

    def _text(self, value: str) -> str:
        if not is_text(value):
            value = value.encode("utf-8", "backslashreplace").decode()
        return value if len(value) <= self._longest else value[: self._longest] + "…"
