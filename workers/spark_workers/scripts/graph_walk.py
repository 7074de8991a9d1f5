"""Finding out what in a value cannot be pickled, and where it sits.

The fast pickler only says that it failed. `Survey` walks the same way in Python, remembers the trail of objects from
the value down, and goes on after each failure. So it knows the path of the first failure, and all memory of the value
as far as pickling can see it: other values that use this memory must not be kept alone.
"""

from __future__ import annotations

import pickle
import re
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from types import FunctionType
from typing import Any

from .graph_memory import Ledger
from .graph_reduce import Reducer

# The pickler in Python; its methods are in no stub.
_PythonPickler: Any = pickle._Pickler
_LONGEST_PATH = 12
_IN_A_MODULE = re.compile(r'\._(?:modules|parameters|buffers)\["([^"]*)"\]')


class _Sink:
    def write(self, data: object) -> int:
        return 0


class Survey(_PythonPickler):  # type: ignore[misc]  # see there
    """A walk over one value.

    `ledger` has its memory; `trail` and `error` tell of the first failure of the wanted kind, if there is one.
    """

    def __init__(self, value: object, lost: Mapping[str, Ledger], wanted: type[Exception] = Exception) -> None:
        super().__init__(_Sink(), 5, buffer_callback=lambda buffer: None)
        self.ledger = Ledger()
        self.trail: list[Any] = []
        self.error: Exception | None = None
        self._reducer = Reducer(self.ledger, lost, survey=True)
        self._open: list[Any] = []
        self._wanted = wanted
        self.save(value)
        # What a gradient shares is shared as well. The walk finds more of them as it goes.
        for _, extra in self._reducer.extras:
            self.save(extra.fields)

    def reducer_override(self, obj: Any) -> Any:
        handler = self._reducer.handlers[type(obj)]
        return NotImplemented if handler is None else handler(self._reducer, obj)

    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        self._open.append(obj)
        try:
            super().save(obj, save_persistent_id)
        except Exception as error:  # noqa: BLE001 - the user's code; the walk goes on
            if self.error is None and isinstance(error, self._wanted):
                self.error, self.trail = bare(error), list(self._open)
        finally:
            self._open.pop()

    def memoize(self, obj: Any) -> None:
        # After a failure in the middle of a cycle an object may come by twice.
        if id(obj) not in self.memo:
            super().memoize(obj)


def bare(error: Exception) -> Exception:
    """Return *error* without its frames: they hold on to the graph, and to the memory of a device with it."""
    error.__traceback__ = error.__context__ = error.__cause__ = None
    return error


def describe(key: str, error: Exception, trail: Sequence[Any]) -> tuple[str, str]:
    """Return the path to the end of the trail, and one clause that says why it could not be pickled."""
    path, why = key, type(error).__name__
    with suppress(Exception):  # looking at the user's objects runs their code
        path = render(key, trail)
    with suppress(Exception):
        why = reason(error, trail)
    return path, why


def render(key: str, trail: Sequence[Any]) -> str:
    """Return the trail as people write it: ``loader["it"].gen``."""
    labels = [key]
    parent: Any = None
    for above, thing in pairwise(trail):
        if hasattr(above, "untyped_storage"):  # nobody looks for a mistake inside a tensor
            break
        if _is_plumbing(parent, above):
            label = _label(parent, thing) or _attribute_in(above, thing)
        else:
            parent = above
            label = _label(parent, thing)
        if label:
            labels.append(label)
    if len(labels) > _LONGEST_PATH:
        labels[_LONGEST_PATH // 2 : -_LONGEST_PATH // 2] = ["…"]
    return _IN_A_MODULE.sub(r".\1", "".join(labels))


def reason(error: Exception, trail: Sequence[Any]) -> str:
    culprit = trail[-1] if trail else None
    if isinstance(error, RecursionError):
        return "nested too deeply to be pickled"
    if isinstance(error, MemoryError):
        return "not enough memory to pickle it"
    if isinstance(culprit, FunctionType | type):
        where = f"{culprit.__module__}.{culprit.__qualname__}"
        if culprit.__name__ == "<lambda>":
            return "cannot pickle a lambda"
        if "<locals>" in where:
            return f"cannot pickle {where}: it is defined inside a function"
        if isinstance(error, pickle.PicklingError):
            return f"cannot pickle {where}: that name now means something else, or nothing"
    text = str(error)
    if len(error.args) > 1 and isinstance(error.args[0], str) and "{}" in error.args[0]:
        text = error.args[0].format(*error.args[1:])  # as DataLoader's iterators raise it
    lines = text.splitlines()
    return lines[0] if lines else type(error).__name__


def _is_plumbing(parent: Any, thing: Any) -> bool:
    """Whether *thing* is no part of the user's value: the arguments or the state in the reduction of *parent*."""
    if parent is None or isinstance(parent, list | tuple) or type(parent) is dict:
        return False
    return type(thing) in (tuple, dict, list) and not _label(parent, thing)


def _label(parent: Any, child: Any) -> str:
    if isinstance(parent, Mapping):
        for name, value in list(parent.items()):
            if value is child:
                return f"[{_quoted(name)}]"
    elif isinstance(parent, list | tuple | deque):
        for index, value in enumerate(parent):
            if value is child:
                return f"[{index}]"
    attributes = getattr(parent, "__dict__", None)
    found = _attribute_in(attributes, child)
    return found or _slot(parent, child)


def _attribute_in(state: Any, child: Any) -> str:
    for attributes in state if type(state) is tuple else (state,):
        if isinstance(attributes, Mapping):
            for name, value in list(attributes.items()):
                if value is child and isinstance(name, str):
                    return f".{name}"
    return ""


def _slot(parent: Any, child: Any) -> str:
    for base in type(parent).__mro__:
        names = base.__dict__.get("__slots__", ())
        for name in (names,) if isinstance(names, str) else names:
            if getattr(parent, name, None) is child:
                return f".{name}"
    return ""


def _quoted(name: Any) -> str:
    return '"' + name.replace('"', '\\"') + '"' if isinstance(name, str) else repr(name)
