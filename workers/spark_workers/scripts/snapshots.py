"""How the persisted values travel to the supervisor and back: through shared memory, copied only where they changed.

The supervisor owns the memory (segments). To take a snapshot the worker asks for one segment that holds the pickle
stream and every buffer that differs from the last snapshot, fills it, and tells the supervisor where each part lies.
Whether a buffer changed is decided by comparing the memory itself; version counters miss too many ways of writing.
A restored worker maps the segments privately: nothing is copied until the script writes, and the supervisor's
snapshot stays as it was.
"""

import ctypes
import mmap
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spark_workers import system
from spark_workers.failpoints import hit
from spark_workers.messages import NeedSegment, Place, Segment, Snapshot, Start
from spark_workers.scripts import graph

ALIGNMENT = 64
FIRST_SECONDS = 1.0
USUAL_SECONDS = 30.0
COST_FACTOR = 50  # the script is held for at most a fiftieth of its time
COPY_SECONDS_PER_BYTE = 0.5e-9  # into memory that is not there yet, measured
OBJECT_SECONDS = 1.8e-6
ESTIMATE_OBJECTS = 20_000
MOST_SEGMENTS = 8
WRITE_AT_ONCE = 1 << 30  # one call takes 2 GiB at most

RUNTIME = "\0runtime"  # the key of the runtime's own values in the same graph


class _PyBuffer(ctypes.Structure):
    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.py_object),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


def address_of(view: memoryview) -> int:
    """Return where the memory of a contiguous view begins, read-only memory included."""
    buffer = _PyBuffer()
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(view), ctypes.byref(buffer), 0)
    try:
        return int(buffer.buf or 0)
    finally:
        ctypes.pythonapi.PyBuffer_Release(ctypes.byref(buffer))


_madvise = ctypes.CDLL(None).madvise
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_MADV_POPULATE_WRITE = 23
_memcmp = ctypes.CDLL(None).memcmp
_memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


class SnapshotRefused(Exception):
    """The supervisor has no room for the snapshot; the one before stays."""


@dataclass(frozen=True, slots=True)
class _Kept:
    """Where the last snapshot keeps the content of one buffer."""

    place: tuple[int, int, int]
    view: memoryview


class Snapshots:
    """Takes snapshots and restores one. Knows which memory the last one lies in."""

    def __init__(self, send: Callable[[Any], None], answer: Callable[[], tuple[Segment, list[int]]]) -> None:
        self._send = send
        self._answer = answer
        self._kept: dict[tuple[int, int], _Kept] = {}

    def take(self, values: Mapping[str, object], meta: dict[str, Any]) -> tuple[graph.Dropped, ...]:
        """Hand *values* to the supervisor; return the keys that could not be kept, with the reasons.

        Raises:
            SnapshotRefused: There is no memory and no disk for it.
        """
        began = time.monotonic()
        hit("worker.before_snapshot")
        dump = graph.dump(values)
        unchanged = self._unchanged(dump.buffers)
        fresh = [memoryview(dump.stream), *(each for each in dump.buffers if id(each) not in unchanged)]
        places = self._write(fresh)
        hit("worker.before_commit")
        kept: dict[tuple[int, int], _Kept] = {}
        parts: list[Place] = [list(places[0].place)]
        written = iter(places[1:])
        for buffer in dump.buffers:
            place = unchanged.get(id(buffer)) or next(written)
            kept[address_of(buffer), buffer.nbytes] = place
            parts.append(list(place.place))
        meta = {**meta, "keys": list(dump.keys), "offsets": list(dump.offsets)}
        self._send(Snapshot(meta, parts, time.monotonic() - began))
        self._kept = kept
        return dump.dropped

    def restore(self, start: Start, descriptors: Sequence[int]) -> graph.Load:
        """Return the values of the snapshot in *start*, on private memory."""
        private: dict[int, memoryview] = {}
        shared: dict[int, memoryview] = {}
        for segment, descriptor in zip(start.segments, descriptors, strict=True):
            # Read from the descriptor itself: the supervisor may have put the snapshot into a file in place of memory.
            private[segment] = memoryview(mmap.mmap(descriptor, 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE))
            shared[segment] = memoryview(mmap.mmap(descriptor, 0, mmap.MAP_SHARED, mmap.PROT_READ))
            os.close(descriptor)
        views: list[memoryview] = []
        for segment, offset, length in start.parts:
            view = private[segment][offset : offset + length]
            kept = _Kept((segment, offset, length), shared[segment][offset : offset + length])
            if views:  # the first part is the stream, which is never compared
                self._kept[address_of(view), length] = kept
            views.append(view)
        _own_pages([view for view, part in zip(views, start.parts, strict=True) if part[0] == start.parts[0][0]])
        return graph.load(views[0], views[1:], start.meta["keys"], start.meta["offsets"])

    def _unchanged(self, buffers: Sequence[memoryview]) -> dict[int, _Kept]:
        """Return, by the identity of the buffer, where the last snapshot has the same bytes at the same address."""
        found: dict[int, _Kept] = {}
        for buffer in buffers:
            address = address_of(buffer)
            kept = self._kept.get((address, buffer.nbytes))
            if kept is not None and _memcmp(address, address_of(kept.view), buffer.nbytes) == 0:
                found[id(buffer)] = kept
        # A few old buffers can hold a whole old segment each: then it is cheaper to write everything anew.
        return {} if len({kept.place[0] for kept in found.values()}) > MOST_SEGMENTS else found

    def _write(self, buffers: Sequence[memoryview]) -> list[_Kept]:
        offsets, end = [], 0
        for buffer in buffers:
            offsets.append(end)
            end += -(-buffer.nbytes // ALIGNMENT) * ALIGNMENT
        self._send(NeedSegment(max(end, 1)))
        segment, descriptors = self._answer()
        if not descriptors:
            raise SnapshotRefused(f"no room for a snapshot of {end} bytes")
        # Written, not mapped: the kernel copies whole buffers at twice the speed of faulting their pages in, and
        # without the GIL.
        for buffer, offset in zip(buffers, offsets, strict=True):
            _write_at(descriptors[0], buffer, offset)
            hit("worker.mid_snapshot")
        memory = memoryview(mmap.mmap(descriptors[0], segment.size, mmap.MAP_SHARED, mmap.PROT_READ))
        os.close(descriptors[0])
        return [
            _Kept((segment.segment, offset, buffer.nbytes), memory[offset : offset + buffer.nbytes])
            for buffer, offset in zip(buffers, offsets, strict=True)
        ]


def _own_pages(views: list[memoryview]) -> None:
    """Have the kernel copy the pages of *views*, which are mapped privately, all at once.

    The first step after a reload writes to most of what has changed lately, and every first write to a page is a fault
    that copies it. One thread takes 0.5 ms per MB that way, this call as much; but two threads of a library in the
    same step take 2.3, because they wait for each other in the kernel. What has not changed lately, the frozen part of
    a model say, lies in older segments and stays shared.
    """
    nbytes = sum(view.nbytes for view in views)
    if not views or not system.LINUX or system.available_memory() < 3 * nbytes:
        return
    first = address_of(views[0]) // mmap.PAGESIZE * mmap.PAGESIZE
    last = max(address_of(view) + view.nbytes for view in views)
    _madvise(first, last - first, _MADV_POPULATE_WRITE)  # refused by kernels before 5.14, where nothing is lost


def _write_at(descriptor: int, buffer: memoryview, offset: int) -> None:
    done = 0
    while done < buffer.nbytes:
        done += os.pwrite(descriptor, buffer[done : done + WRITE_AT_ONCE], offset + done)


class Schedule:
    """Says when the next snapshot is due: soon after the start, then so that they cost at most a fiftieth."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._next: float | None = None
        self.interval = FIRST_SECONDS

    def begin(self, values: Callable[[], Mapping[str, object]]) -> None:
        """The script runs from now on; the first snapshot comes within a second unless it looks dear."""
        self._values = values
        self._next = self._clock() + FIRST_SECONDS
        self._estimated = False

    def is_due(self) -> bool:
        """Tell whether to take a snapshot at this checkpoint."""
        if self._next is None or self._clock() < self._next:
            return False
        if not self._estimated:
            self._estimated = True
            cost = estimate(self._values())
            if cost * COST_FACTOR > FIRST_SECONDS:
                self._next += cost * COST_FACTOR - FIRST_SECONDS
                return False
        return True

    def taken(self, cost_seconds: float) -> None:
        """A snapshot has just held the script for *cost_seconds*."""
        self._estimated = True
        self.interval = max(USUAL_SECONDS, COST_FACTOR * cost_seconds)
        self._next = self._clock() + self.interval


def estimate(values: Mapping[str, object]) -> float:
    """Guess how many seconds a first snapshot of *values* takes, looking at a bounded number of objects."""
    seen: set[int] = set()
    waiting: list[object] = list(values.values())
    nbytes, objects = 0, 0
    while waiting and len(seen) < ESTIMATE_OBJECTS:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        size = getattr(value, "nbytes", None)
        if isinstance(size, int):
            nbytes += size
        elif isinstance(value, (dict, list, tuple, set)):
            objects += len(value)
            waiting += list(value.values() if isinstance(value, dict) else value)[:ESTIMATE_OBJECTS]
        elif hasattr(value, "__dict__") and not isinstance(value, type):
            objects += len(vars(value))
            waiting += list(vars(value).values())
    return nbytes * COPY_SECONDS_PER_BYTE + max(objects, len(seen)) * OBJECT_SECONDS
