"""The process that a guest built by Emscripten believes to run in.

A host makes one `System` for each instance. It exists before the instance does, because the instance imports its
functions: memory and exports are asked for when they are needed first::

    system = System(memory, FileTable(log, data, glue.files), glue, guest)
    imports[letter] = system.function(glue.imports[letter], "(i32, i32) -> i32")

Which function is meant is decided by its name in C and by the type of the import, since both changed over the years:
a time may be a pointer, two numbers of 32 bits, or one of 64. `FUNCTIONS` in `functions` has them all.
"""

import time
from collections.abc import Callable
from typing import Any

from spark_workers.engines.outline import signature_of
from spark_workers.engines.seam import Number
from spark_workers.hosts.emscripten.files import FileTable
from spark_workers.hosts.emscripten.memory import Heap, Memory
from spark_workers.hosts.failures import GuestFailed
from spark_workers.packages.glue import Glue

HostFunction = Callable[..., Number | None]
GuestFunction = Callable[..., Any]

_LETTERS = {"i32": "i", "i64": "j", "f32": "f", "f64": "d"}
_ZERO: dict[tuple[str, ...], Number | None] = {(): None, ("f32",): 0.0, ("f64",): 0.0}


class System:
    """What one instance knows of the world: its memory, files and clocks.

    Attributes:
        heap: Its memory.
        files: Its files and open descriptors.
        glue: What its build says: how far memory may grow, how wide times are.
        high: The upper half of a result of 64 bits, where functions return the lower one only.
        zone_pointers: Where names of time zones lie in its memory, as soon as they do.
    """

    def __init__(
        self, memory: Memory, files: FileTable, glue: Glue, guest: Callable[[str], GuestFunction | None]
    ) -> None:
        """Make one.

        Args:
            memory: Its memory. Nothing is asked of it before one of the functions is called.
            files: Its files, those of the preload archive and the standard ones.
            glue: What its build says.
            guest: Gives the function that the module exports under a name in C, or None. Asked for when it is needed
                first: ``malloc`` for exceptions and names of zones, ``errno_location`` and a few others.
        """
        self.heap = Heap(memory)
        self.files = files
        self.glue = glue
        self.high = 0
        self.zone_pointers: tuple[int, int] | None = None
        self._guest = guest

    def function(self, name: str, type_: str) -> HostFunction:
        """Return the function for an import, to be called with its arguments as numbers.

        It returns a number for an import that has a result, and None for one without. One that is not known here, or
        not with this type, fails when it is called.

        Args:
            name: In C, without underscores in front.
            type_: Such as ``(i32, i32) -> i32``.
        """
        # The functions are written in terms of this class, so that they cannot be imported before it is there.
        from spark_workers.hosts.emscripten.functions import FUNCTIONS

        params, results = signature_of(type_)
        letters = "".join(_LETTERS.get(each, "?") for each in params)
        found = FUNCTIONS.get(name)
        if found is None:
            return _unknown(name, f"it called `{name}`, an import that has no host here")
        implementation = found.get(letters)
        if implementation is None or len(results) > 1:
            return _unknown(name, f"it called `{name}` {type_}, which has no host here with that type")
        return _bound(implementation, self, results)

    def call(self, name: str, *arguments: Number) -> int | None:
        """Call what the module exports under a name in C; None if there is no such function."""
        function = self._guest(name)
        return None if function is None else int(function(*arguments) or 0)

    def allocate(self, size: int) -> int:
        """Return memory of the guest's, 0 if there is none."""
        return (self.call("malloc", size) or 0) & 0xFFFFFFFF

    def set_errno(self, number: int) -> None:
        """Set the guest's ``errno``, if it has one that can be reached."""
        address = self.call("errno_location")
        if address:
            self.heap.set_i32(address, number)

    def set_high(self, value: int) -> None:
        """Keep the upper half of a result, where the guest looks for it."""
        self.high = value & 0xFFFFFFFF
        for name in ("emscripten_tempret_set", "setTempRet0"):
            if self._guest(name) is not None:
                self.call(name, self.high - (1 << 32) if self.high >> 31 else self.high)
                return

    def milliseconds(self) -> float:
        """Return the time that never goes back, as ``performance.now()``."""
        return time.perf_counter_ns() / 1e6


def _bound(implementation: HostFunction, system: System, results: tuple[str, ...]) -> HostFunction:
    default = _ZERO.get(results, 0)
    is_float = results in (("f32",), ("f64",))
    mask = (1 << 64) - 1 if results == ("i64",) else (1 << 32) - 1

    def call(*arguments: Number) -> Number | None:
        value = implementation(system, *arguments)
        if not results:
            return None
        if value is None:
            return default
        if is_float:
            return float(value)
        value = int(value) & mask
        return value - mask - 1 if value > mask >> 1 else value

    return call


def _unknown(name: str, text: str) -> HostFunction:
    def call(*arguments: Number) -> Number | None:
        raise GuestFailed("trap", text, {"trap": "unknown-import", "import": name})

    return call
