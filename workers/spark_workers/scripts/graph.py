"""One object graph out of all values that a script persists: a pickle stream and memory out of band, and back.

All values are pickled together, since what they share must stay shared: an optimizer that comes back with copies of
the model's parameters trains the copies, and nobody notices. So one pickler with one memo writes one pickle for each
key, one after another. Memory (`graph_memory`) is never copied: the dump refers to it, and a load makes its arrays and
tensors on top of the memory it is given. Behind the keys' pickles comes one more with what torch leaves out.

Nothing fails as a whole. A dump is a loop of attempts:

    each attempt writes every key that is still in; then
      a key failed              keep it by parts (`graph_parts`), or drop it and remember its memory as lost
      a key touched lost memory drop it too
      intervals have melted     write again with what is now known
      nothing of these          done

and every round leaves less to go wrong in the next. A load that fails is made again by a tolerant reader
(`graph_absent`), and the keys whose graphs hold a placeholder are set aside, to be dumped again as they were.
"""

from __future__ import annotations

import io
import pickle
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

from .graph_absent import Placeholder, read_tolerantly
from .graph_memory import SMALL_BYTES, Ledger
from .graph_parts import NeedsInitializer, parts_of
from .graph_reduce import Extra, Reducer, SharesLost, apply_tolerantly, release_sparse
from .graph_walk import Survey, bare, describe

__all__ = ["Dropped", "Dump", "Load", "NeedsInitializer", "Unreadable", "dump", "load"]

# Deep enough for any model, shallow enough for a stack of 8 MB: the pickler recurses in C, and a script that has set
# the limit to a million would end the interpreter.
_LEAST_DEPTH = 3_000
_MOST_DEPTH = 8_000
_MAX_MELTS = 10


@dataclass(frozen=True, slots=True)
class Dropped:
    """A key that could not be kept; *path* is the place in its value, such as ``loader["it"].gen``."""

    key: str
    path: str
    reason: str


@dataclass(frozen=True, slots=True)
class Dump:
    """What `dump` made of the values.

    Attributes:
        stream: One pickle for each key, then one more; they share one memo and can only be read in order.
        buffers: The live memory of the values, in the order in which the stream refers to it: flat, contiguous, format
            ``B``, at least 4096 bytes each. Copy it before the values may change.
        keys: The keys that were kept, in the order of the stream.
        offsets: Where each key's pickle starts in the stream.
        dropped: The keys that were not.
    """

    stream: bytes
    buffers: list[memoryview]
    keys: tuple[str, ...]
    offsets: tuple[int, ...]
    dropped: tuple[Dropped, ...]


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Why a key was set aside."""

    key: str
    reason: str


@dataclass(frozen=True, slots=True)
class Load:
    """What `load` made of a dump.

    Attributes:
        values: The values by key. One that was kept by parts is a `NeedsInitializer`.
        aside: Values that hold placeholders. They are of no use to the script, but can be dumped again together with
            the rest, and are whole again when what they lack is back.
        unreadable: Why, for each key in *aside*.
    """

    values: dict[str, object]
    aside: dict[str, object]
    unreadable: tuple[Unreadable, ...]


def dump(values: Mapping[str, object]) -> Dump:
    """Write *values* as one graph. Never fails: what cannot be kept is named in the result."""
    # Reductions make views of tensors, which must not look as if they had a history.
    without_history = getattr(sys.modules.get("torch"), "no_grad", nullcontext)
    with _undisturbed(), without_history():
        return _Dumping(values).run()


def load(stream: Any, buffers: Sequence[memoryview], keys: Sequence[str], offsets: Sequence[int]) -> Load:
    """Read a dump back.

    Args:
        stream: The stream of the dump, as bytes or anything like them.
        buffers: Its buffers in order, writable. The loaded values lie in them: no memory is copied.
        keys: Its keys in order.
        offsets: Its offsets; a stream cut or mixed up with another is noticed by them.

    Raises:
        pickle.UnpicklingError: The stream is damaged. Trouble with single values does not raise, see `Load.aside`.
    """
    with _undisturbed():
        try:
            return _load_fast(stream, buffers, keys, offsets)
        except Exception:  # noqa: BLE001 - classes in the stream may raise anything; the tolerant reader finds out
            return _load_tolerantly(stream, buffers, keys, offsets)
        finally:
            release_sparse()


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, reducer: Reducer) -> None:
        buffers: list[memoryview] = []
        super().__init__(file, 5, buffer_callback=lambda buffer: _take(buffer, buffers))
        self.reducer = reducer
        self.handlers = reducer.handlers
        self.buffers = buffers

    def reducer_override(self, obj: Any) -> Any:
        handler = self.handlers[type(obj)]
        return NotImplemented if handler is None else handler(self.reducer, obj)


# No method of the pickler, which would then hold itself, its memo and so the whole graph until gc comes by.
def _take(buffer: pickle.PickleBuffer, buffers: list[memoryview]) -> bool:
    """Return whether the buffer is to be written into the stream."""
    memory = buffer.raw()
    if memory.nbytes < SMALL_BYTES:
        return True
    buffers.append(memory)
    return False


class _Dumping:
    """The attempts of one dump, and what they have taught so far."""

    def __init__(self, values: Mapping[str, object]) -> None:
        self.values = dict(values)
        self.parts: dict[str, NeedsInitializer] = {}
        self.errors: dict[str, Exception] = {}
        self.dropped: dict[str, Dropped] = {}
        self.ledger = Ledger()
        self.lost: dict[str, Ledger] = {}
        self.melts = 0

    def run(self) -> Dump:
        while True:
            kept = {key: self.parts.get(key, value) for key, value in self.values.items() if key not in self.dropped}
            attempt = _Attempt(kept, self.ledger, self.lost)
            attempt.write()
            for key, error in attempt.faults.items():
                self._refuse(key, error)
            if not attempt.faults and not self.ledger.torn:
                return attempt.result(tuple(self.dropped.values()))
            self._mend(attempt)

    def _refuse(self, key: str, error: Exception) -> None:
        """Keep the key by parts from now on, or drop it if that is not possible."""
        if isinstance(error, SharesLost):
            self._drop(key, error)
            return
        parts = None if key in self.parts else _parts_or_none(self.values[key])
        if parts is None:
            self._drop(key, self.errors.get(key, error))
        else:
            self.parts[key] = parts
            self.errors[key] = error

    def _drop(self, key: str, error: Exception) -> None:
        value = self.values[key]
        trail, why = [value], error
        if not isinstance(error, MemoryError):
            survey = Survey(value, self.lost, SharesLost if isinstance(error, SharesLost) else Exception)
            self.lost[key] = survey.ledger
            # The walk in Python is shallower than the pickler in C: that it was too deep for the walk says nothing.
            if survey.error is not None and (type(survey.error) is not RecursionError or type(error) is RecursionError):
                trail, why = survey.trail, survey.error
        self.dropped[key] = Dropped(key, *describe(key, why, trail))

    def _mend(self, attempt: _Attempt) -> None:
        if self.ledger.torn:
            self.ledger.mend()
            self.melts += 1
        if self.melts > _MAX_MELTS:
            for key in attempt.tore:
                self.dropped[key] = Dropped(key, key, "its memory lies differently each time it is looked at")


class _Attempt:
    """One go at writing all keys that are still in. `faults` says what went wrong, `tore` who melted intervals."""

    def __init__(self, values: Mapping[str, object], ledger: Ledger, lost: Mapping[str, Ledger]) -> None:
        self.values = values
        self.ledger = ledger
        self.lost = lost
        self.faults: dict[str, Exception] = {}
        self.tore: list[str] = []
        self.offsets: list[int] = []
        self._start()

    def _start(self) -> None:
        self.file = io.BytesIO()
        self.reducer = Reducer(self.ledger, self.lost)
        self.pickler = _Pickler(self.file, self.reducer)

    def write(self) -> None:
        for key, value in self.values.items():
            torn_before = self.ledger.torn
            try:
                self._write_key(key, value)
            except Exception as error:  # noqa: BLE001 - the user's code may raise anything
                self.faults[key] = bare(error)
                # The memo now has things that were never written in full. The other keys go into a stream that nobody
                # will read, so as to learn of all faults in one attempt.
                self._start()
            if self.ledger.torn and not torn_before:
                self.tore.append(key)
        if not self.faults:
            self._write_extras()

    def _write_key(self, key: str, value: object) -> None:
        self.offsets.append(self.file.tell())
        self.reducer.key = key
        if isinstance(value, NeedsInitializer):
            for tensor in value.depends:
                self.reducer.check(tensor)
        self.pickler.dump(value)

    def _write_extras(self) -> None:
        extras = self.reducer.settle()
        try:
            self.pickler.dump([extra for _, extra in extras])
        except Exception as error:  # noqa: BLE001 - a subclass of a tensor may raise anything
            culprits = [key for key, extra in extras if not self._can_write(extra)]
            self.faults.update(dict.fromkeys(culprits or [key for key, _ in extras], bare(error)))

    def _can_write(self, extra: Extra) -> bool:
        try:
            self._start()
            self.reducer.settle()
            self.pickler.dump(extra)
        except Exception:  # noqa: BLE001 - as above
            return False
        return True

    def result(self, dropped: tuple[Dropped, ...]) -> Dump:
        buffers = self.pickler.buffers
        return Dump(self.file.getvalue(), buffers, tuple(self.values), tuple(self.offsets), dropped)


def _parts_or_none(value: object) -> NeedsInitializer | None:
    try:
        return parts_of(value)
    except Exception:  # noqa: BLE001 - the user's state_dict; then the value is dropped for its first reason
        return None


def _load_fast(stream: Any, buffers: Sequence[memoryview], keys: Sequence[str], offsets: Sequence[int]) -> Load:
    file = io.BytesIO(stream)
    reader = pickle.Unpickler(file, buffers=buffers)  # noqa: S301 - a worker reads what a worker of this run wrote
    values: dict[str, object] = {}
    for key, offset in zip(keys, offsets, strict=True):
        if file.tell() != offset:
            raise pickle.UnpicklingError(f"the value of {key!r} starts at {file.tell()} and should at {offset}")
        values[key] = reader.load()
    for extra in reader.load():
        extra.apply()
    return Load(values, {}, ())


def _load_tolerantly(stream: Any, buffers: Sequence[memoryview], keys: Sequence[str], offsets: Sequence[int]) -> Load:
    *loaded, extras = read_tolerantly(stream, buffers, offsets)
    apply_tolerantly(extras)
    values: dict[str, object] = {}
    aside: dict[str, object] = {}
    unreadable: list[Unreadable] = []
    for key, value in zip(keys, loaded, strict=True):
        placeholder = _first_placeholder(value)
        if placeholder is None:
            values[key] = value
        else:
            aside[key] = value
            unreadable.append(Unreadable(key, placeholder.reason))
    return Load(values, aside, tuple(unreadable))


class _Found(Exception):
    """Raised to end a search."""


class _Search(_Pickler):
    """Pickles into nothing until it meets a placeholder. Pickling sees what a dump would see, and gc does not."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO(), Reducer(Ledger(), {}, survey=True))
        self.found: Placeholder | None = None

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is Placeholder:
            self.found = obj
            raise _Found
        return super().reducer_override(obj)


def _first_placeholder(value: object) -> Placeholder | None:
    search = _Search()
    with suppress(Exception):  # found, or what was read cannot be written: the next dump will tell of that
        search.dump(value)
    return search.found


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Keep warnings from the user, and the stack from running over."""
    with warnings.catch_warnings(), _safe_depth():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _safe_depth() -> Iterator[None]:
    limit = sys.getrecursionlimit()
    least = _LEAST_DEPTH if threading.current_thread() is threading.main_thread() else 0
    try:
        sys.setrecursionlimit(min(max(limit, least), _MOST_DEPTH))
    except RecursionError:  # the script is deeper than that already
        pass
    try:
        yield
    finally:
        sys.setrecursionlimit(limit)
