"""Memory as intervals of addresses: what the arrays, tensors and storages of a graph share, and how it is found again.

While a graph is dumped, everything with raw memory says where it lies (`Ledger.place`) and is written as an offset into
an `Interval`. Two objects alias if and only if they lie in one interval, whoever made them: numpy, torch or both. On
the other side an interval is a `Region`, and arrays and storages are made on top of its memory without a copy.

Three rules keep this simple:

* Intervals never overlap. A newcomer that overlaps one, or several, melts them into one interval; the offsets written
  before are then wrong, so the ledger is `torn` and the dump is made again with what is known by now.
* Whoever is placed is kept alive as long as the ledger lives. An address that was freed and used again would otherwise
  look like an alias; reading it could end the process.
* Small intervals travel inside the stream, as they would cost a buffer and a page each; aliasing does not depend on it.
"""

from __future__ import annotations

import ctypes
import pickle
from bisect import bisect_left, bisect_right
from collections import defaultdict
from typing import Any

SMALL_BYTES = 4096
HOST = "cpu"


class Interval:
    """Memory from address *start* up to *stop*, which *owners* keep alive."""

    __slots__ = ("owners", "start", "stop")

    def __init__(self, start: int, stop: int, owners: tuple[object, ...]) -> None:
        self.start = start
        self.stop = stop
        self.owners = owners

    def view(self) -> memoryview:
        """Return the live memory; the view keeps the owners alive."""
        array = (ctypes.c_ubyte * (self.stop - self.start)).from_address(self.start)
        array.owners = self.owners  # type: ignore[attr-defined]  # ctypes arrays take attributes
        return memoryview(array).cast("B")

    def __reduce__(self) -> tuple[Any, ...]:
        length = self.stop - self.start
        if length < SMALL_BYTES:
            return Region, (bytearray(ctypes.string_at(self.start, length)),)
        return Region, (pickle.PickleBuffer(self.view()),)


class Region:
    """An interval on the loading side: the memory that arrays and storages are made on."""

    __slots__ = ("memory",)

    def __init__(self, memory: bytearray | memoryview) -> None:
        self.memory = memoryview(memory)

    def part(self, offset: int, length: int) -> Region:
        return Region(self.memory[offset : offset + length])

    def address(self) -> int:
        return ctypes.addressof(ctypes.c_char.from_buffer(self.memory))


class Table:
    """Intervals of one address space, sorted and disjoint."""

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.intervals: list[Interval] = []
        self.torn = False

    def place(self, address: int, length: int, owner: object) -> tuple[Interval, int]:
        """Return the interval that holds this memory, and the offset in it; makes or melts intervals as needed."""
        stop = address + length
        first, last = self._overlapping(address, stop)
        touched = self.intervals[first:last]
        if len(touched) == 1 and touched[0].start <= address and stop <= touched[0].stop:
            return touched[0], address - touched[0].start
        start = min(address, *(one.start for one in touched)) if touched else address
        stop = max(stop, *(one.stop for one in touched)) if touched else stop
        owners = [*(owner for one in touched for owner in one.owners), owner]
        interval = Interval(start, stop, tuple(owners))
        self.intervals[first:last] = [interval]
        self.starts[first:last] = [start]
        self.torn = self.torn or bool(touched)
        return interval, address - start

    def overlaps(self, address: int, length: int) -> bool:
        first, last = self._overlapping(address, address + length)
        return first < last

    def _overlapping(self, start: int, stop: int) -> tuple[int, int]:
        first = max(bisect_right(self.starts, start) - 1, 0)
        if first < len(self.intervals) and self.intervals[first].stop <= start:
            first += 1
        return first, max(first, bisect_left(self.starts, stop))


class Ledger:
    """All memory that one dump has met: the host's, and that of each device under the device's name."""

    def __init__(self) -> None:
        self.tables: defaultdict[str, Table] = defaultdict(Table)
        # A device's storage, by device, address and length, and its copy in host memory. They outlive a dump that has
        # to be made again: copying from a device is the slow part.
        self.device_storages: dict[tuple[str, int, int], Any] = {}
        self.host_copies: dict[tuple[str, int, int], Any] = {}

    def place(self, address: int, length: int, owner: object, space: str = HOST) -> tuple[Interval, int]:
        return self.tables[space].place(address, length, owner)

    def overlaps(self, address: int, length: int, space: str = HOST) -> bool:
        return space in self.tables and self.tables[space].overlaps(address, length)

    @property
    def torn(self) -> bool:
        """Whether intervals have melted, so that offsets handed out before are wrong."""
        return self.tables[HOST].torn

    def mend(self) -> None:
        self.tables[HOST].torn = False


def extent(address: int, shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> tuple[int, int]:
    """Return the first address of a non-empty array and the one behind its last; strides may be negative."""
    low = address + sum((n - 1) * step for n, step in zip(shape, strides, strict=True) if step < 0)
    high = address + sum((n - 1) * step for n, step in zip(shape, strides, strict=True) if step > 0)
    return low, high + itemsize


# What the stream calls. These names are part of every snapshot on disk: one that moves leaves a forwarding name behind.


def load_array(
    region: Region, offset: int, dtype: Any, shape: tuple[int, ...], strides: tuple[int, ...], writeable: bool
) -> Any:
    import numpy as np

    array: Any = np.ndarray(shape, dtype, region.memory, offset, strides)
    if not writeable:
        array.flags.writeable = False
    return array


def load_empty_array(dtype: Any, shape: tuple[int, ...], writeable: bool) -> Any:
    import numpy as np

    array: Any = np.empty(shape, dtype)
    array.flags.writeable = writeable
    return array


def load_storage(region: Region, offset: int, length: int) -> Any:
    import torch

    tensor: Any = torch.frombuffer(region.memory, dtype=torch.uint8, count=length, offset=offset)
    return tensor.untyped_storage()


def load_device_storage(region: Region, offset: int, length: int, device: str) -> Any:
    import torch

    storage: Any = torch.UntypedStorage(length, device=device)
    storage.copy_(load_storage(region, offset, length))
    return storage


def load_blank_storage(length: int, device: str) -> Any:
    import torch

    return torch.UntypedStorage(length, device=device)


def load_typed_storage(untyped: Any, dtype: Any) -> Any:
    import torch

    return torch.storage.TypedStorage(wrap_storage=untyped, dtype=dtype, _internal=True)


def load_tensor_v3(
    untyped: Any, offset: int, size: Any, stride: Any, requires_grad: bool, hooks: Any, dtype: Any, *metadata: Any
) -> Any:
    import torch

    storage = load_typed_storage(untyped, torch.uint8)
    rebuild: Any = torch._utils._rebuild_tensor_v3
    return rebuild(storage, offset, size, stride, False, hooks, dtype, *metadata).requires_grad_(requires_grad)


def load_generator(device: str, state: Any) -> Any:
    import torch

    generator: Any = torch.Generator(device)
    generator.set_state(state)
    return generator


def same(thing: object) -> object:
    return thing
