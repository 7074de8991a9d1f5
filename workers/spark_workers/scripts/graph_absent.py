"""Reading a stream in which something cannot be made: a class is gone, or its `__setstate__` fails.

The first reader is the fast one of `pickle`, which stops at the first trouble. `Tolerant` then reads the same stream
again and puts a `Placeholder` where an object cannot be made. A placeholder notes what the stream would have done to
the object, and is pickled as just that; so once the class is back, the next load gives the object itself.

An object whose *state* fails has by then been handed out to others. It cannot be replaced, so the load notes the
object's number (creations are counted, and a stream always creates in the same order) and starts over, with a
placeholder in its place from the beginning.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from typing import Any, ClassVar, NoReturn

# The readers in Python. Their methods are in no stub, and have been the same since protocol 5 came.
_Unpickler: Any = pickle._Unpickler
_NOTHING = object()
_MAX_PASSES = 100


class Placeholder:
    """Stands for an object that could not be made; `reason` says why."""

    __slots__ = ("args", "extra", "func", "items", "memoized", "pairs", "reason", "setters", "state")

    def __init__(self, func: Any, args: Any, reason: str) -> None:
        self.func = func
        self.args = args
        self.reason = reason
        self.state: Any = _NOTHING
        self.items: list[Any] = []
        self.pairs: list[tuple[Any, Any]] = []
        self.setters: list[tuple[Any, Any]] = []
        self.extra: dict[str, Any] | None = None
        self.memoized = False

    # pickle asks whether the first thing in a reduction can be called; a missing function is such a thing.
    def __call__(self, *args: object) -> NoReturn:
        raise TypeError(f"a value that could not be read was called: {self.reason}")

    def __reduce__(self) -> tuple[Any, ...]:
        state, setter = self.state, None
        if self.setters:
            setter, state = self.setters[-1]
        return (
            self.func,
            self.args,
            None if state is _NOTHING else state,
            iter(self.items) if self.items else None,
            iter(self.pairs) if self.pairs else None,
            setter,
        )


def find(module: str, name: str) -> Any:
    """Return what *name* means in *module* now; this is what a placeholder for a class is pickled as."""
    found: Any = import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


def new(cls: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Make an object as `pickle` does, without calling its `__init__`."""
    return cls.__new__(cls, *args, **kwargs)


class Tolerant(_Unpickler):  # type: ignore[misc]  # see there
    """One pass over a stream. *broken* holds the reasons by the number of the creation, and grows during the pass."""

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(_Unpickler.dispatch)

    def __init__(self, file: io.BytesIO, buffers: Iterable[Any], broken: dict[int, str]) -> None:
        super().__init__(file, buffers=buffers)
        self.broken = broken
        self.made: dict[int, int] = {}
        self.kept: list[Any] = []
        self.count = 0

    def find_class(self, module: str, name: str) -> Any:
        try:
            return super().find_class(module, name)
        except Exception as error:  # noqa: BLE001 - an import runs the user's code
            return Placeholder(find, (module, name), f"{module}.{name} is missing ({_clause(error)})")

    def _make(self, func: Any, args: Any, what: Any, make: Callable[[], Any]) -> Any:
        """Make an object, or a placeholder which is pickled as the call of *func*; *what* is named in the reason."""
        number = self.count
        self.count += 1
        reason = self.broken.get(number) or _inherited(func, args)
        if reason is None:
            try:
                made = make()
            except Exception as error:  # noqa: BLE001 - the user's code
                reason = f"{_name(what)} failed: {_clause(error)}"
            else:
                self.made[id(made)] = number
                self.kept.append(made)  # so that the id stays its own
                return made
        return Placeholder(func, args, reason)

    def _fails(self, thing: Any, error: Exception, step: str) -> None:
        """Note that *thing* must be a placeholder in the next pass."""
        if id(thing) in self.made:
            self.broken.setdefault(self.made[id(thing)], f"{_name(type(thing))}{step} failed: {_clause(error)}")
            return
        # A tuple as a key has no number; one of its members is to blame, and which one is not known.
        members = [one for one in thing if id(one) in self.made] if type(thing) in (tuple, frozenset) else []
        if not members:
            raise error
        for member in members:
            self._fails(member, error, step)

    def load_reduce(self) -> None:
        args = self.stack.pop()
        func = self.stack.pop()
        if func is find:
            self.append(self.find_class(*args))
        else:
            self.append(self._make(func, args, func, lambda: func(*args)))

    def load_newobj(self) -> None:
        args = self.stack.pop()
        cls = self.stack.pop()
        self.append(self._make(new, (cls, args, {}), cls, lambda: cls.__new__(cls, *args)))

    def load_newobj_ex(self) -> None:
        kwargs = self.stack.pop()
        args = self.stack.pop()
        cls = self.stack.pop()
        self.append(self._make(new, (cls, args, kwargs), cls, lambda: cls.__new__(cls, *args, **kwargs)))

    def load_build(self) -> None:
        thing = self.stack[-2]
        if type(thing) is Placeholder:
            thing.state = self.stack.pop()
            return
        try:
            _Unpickler.load_build(self)
        except Exception as error:  # noqa: BLE001 - the user's code
            self._fails(thing, error, ".__setstate__")

    def load_append(self) -> None:
        self._extend([self.stack.pop()])

    def load_appends(self) -> None:
        self._extend(self.pop_mark())

    def _extend(self, items: list[Any]) -> None:
        thing = self.stack[-1]
        if type(thing) is Placeholder:
            thing.items.extend(items)
            return
        try:
            for item in items:
                thing.append(item)
        except Exception as error:  # noqa: BLE001 - the user's code
            self._fails(thing, error, ".append")

    def load_setitem(self) -> None:
        value = self.stack.pop()
        self._update([self.stack.pop(), value])

    def load_setitems(self) -> None:
        self._update(self.pop_mark())

    def _update(self, items: list[Any]) -> None:
        thing = self.stack[-1]
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(thing) is Placeholder:
                thing.pairs.append((key, value))
                continue
            try:
                thing[key] = value
            except Exception as error:  # noqa: BLE001 - the user's code
                # A plain dictionary fails only because of the key's own __hash__ or __eq__.
                self._fails(key if type(thing) is dict else thing, error, " as a key")

    def load_additems(self) -> None:
        for item in self.pop_mark():
            self._add(self.stack[-1], item)

    def _add(self, thing: Any, item: Any) -> None:
        try:
            thing.add(item)
        except Exception as error:  # noqa: BLE001 - the user's code
            self._fails(item, error, " as a member of a set")

    def load_frozenset(self) -> None:
        members: set[Any] = set()
        for item in self.pop_mark():
            self._add(members, item)
        self.append(frozenset(members))

    def load_memoize(self) -> None:
        if type(self.stack[-1]) is Placeholder:
            self.stack[-1].memoized = True
        _Unpickler.load_memoize(self)

    # A reduction of six parts ends with a call whose result is thrown away: setter(thing, state). It is the only call
    # whose result is not remembered.
    def load_pop(self) -> None:
        top = self.stack[-1] if self.stack else None
        if type(top) is Placeholder and not top.memoized and type(top.args) is tuple and len(top.args) == 2:
            target, state = top.args
            if type(target) is Placeholder:
                target.setters.append((top.func, state))
            else:
                self._fails(target, RuntimeError(top.reason), "'s state")
        _Unpickler.load_pop(self)

    for _code, _load in (
        (pickle.REDUCE, load_reduce),
        (pickle.NEWOBJ, load_newobj),
        (pickle.NEWOBJ_EX, load_newobj_ex),
        (pickle.BUILD, load_build),
        (pickle.APPEND, load_append),
        (pickle.APPENDS, load_appends),
        (pickle.SETITEM, load_setitem),
        (pickle.SETITEMS, load_setitems),
        (pickle.ADDITEMS, load_additems),
        (pickle.FROZENSET, load_frozenset),
        (pickle.MEMOIZE, load_memoize),
        (pickle.POP, load_pop),
    ):
        dispatch[_code[0]] = _load


def read_tolerantly(stream: Any, buffers: Sequence[memoryview], offsets: Sequence[int]) -> list[Any]:
    """Return the objects that start at *offsets* and the one behind them, with placeholders for what cannot be made.

    Raises:
        pickle.UnpicklingError: The stream itself is damaged.
    """
    broken: dict[int, str] = {}
    for _ in range(_MAX_PASSES):
        known = len(broken)
        loaded = _read_once(stream, buffers, offsets, broken)
        if len(broken) == known:
            return loaded
    raise pickle.UnpicklingError(f"still new failures after {_MAX_PASSES} passes: {list(broken.values())[-1]}")


def _read_once(stream: Any, buffers: Sequence[memoryview], offsets: Sequence[int], broken: dict[int, str]) -> list[Any]:
    file = io.BytesIO(stream)
    reader = Tolerant(file, buffers, broken)
    loaded: list[Any] = []
    try:
        for offset in offsets:
            if file.tell() != offset:
                raise pickle.UnpicklingError(f"a value starts at {file.tell()} and should at {offset}")
            loaded.append(reader.load())
        loaded.append(reader.load())
    except Exception as error:
        raise pickle.UnpicklingError(f"damaged at byte {file.tell()}: {_clause(error)}") from error
    return loaded


def _inherited(func: Any, args: Any) -> str | None:
    for thing in (func, *args):
        if type(thing) is Placeholder:
            return thing.reason
    return None


def _name(what: Any) -> str:
    name = getattr(what, "__qualname__", None)
    return f"{what.__module__}.{name}" if name else repr(type(what))


def _clause(error: BaseException) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
