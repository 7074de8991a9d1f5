"""A WASI guest's standard streams under wasmer: read and written here, on the descriptors that the host chose.

wasmer's own WASI serves a guest's streams from the process's descriptors 0, 1 and 2. Pointing those elsewhere for the
length of a call is simpler, and wrong: it reads through a buffer of the whole process, so that what one guest left
unread is the beginning of the next one's input, and an answer printed without a line's end may stay behind until
somebody else prints. So the calls that move data are answered by functions of ours, and the process's own streams
are never touched. What wasmer answers with a panic is answered with an error number as well.
"""

import errno
import os
import stat
from collections.abc import Callable
from functools import partial
from typing import Any

from spark_workers.engines.seam import Wasi

_SUCCESS = 0
_BAD_DESCRIPTOR = 8
_FAULT = 21
_INVALID = 28
_IO = 29
_NO_SYSTEM_CALL = 52
_NO_SEEKING = 70
#: Error numbers of this system as WASI's.
_ERRORS = {
    errno.EAGAIN: 6,
    errno.EBADF: _BAD_DESCRIPTOR,
    errno.EFBIG: 22,
    errno.EINVAL: _INVALID,
    errno.ENOSPC: 51,
    errno.EPIPE: 64,
}
_MOST_VECTORS = 1024  # as many as the system takes in one call
_VECTOR = 8  # address and length, 32 bits each
_32_BITS = 0xFFFF_FFFF


class Streams:
    """The streams of one instance.

    Attributes:
        memory: The instance's, once there is one.
        is_inside: A function of ours runs, or was left in the middle.
    """

    def __init__(self, wasi: Wasi) -> None:
        self._input = wasi.stdin
        # A file is read from its beginning, wherever its place is: whoever wrote it has left that at the end.
        self._input_at = 0 if stat.S_ISREG(os.fstat(wasi.stdin).st_mode) else None
        self._outputs = {1: wasi.stdout, 2: wasi.stderr}
        self.memory: Any = None
        self.is_inside = False

    def functions(self) -> dict[str, Callable[..., int]]:
        """What takes the place of wasmer's own, by the names of WASI."""
        return {
            "fd_read": self._read,
            "fd_write": self._write,
            "fd_pread": self._seek,
            "fd_pwrite": self._seek,
            "proc_raise": _refuse,
            "sock_recv": _refuse,
            "sock_send": _refuse,
            "sock_shutdown": _refuse,
        }

    def close(self) -> None:
        """Let go of the memory.

        The engine holds these functions, and they the memory, where Python's garbage collector cannot see it.
        """
        self.memory = None

    def _read(self, descriptor: int, vectors: int, count: int, result: int) -> int:
        return self._move(self._take_input if descriptor == 0 else None, vectors, count, result)

    def _write(self, descriptor: int, vectors: int, count: int, result: int) -> int:
        output = self._outputs.get(descriptor)
        return self._move(None if output is None else partial(os.writev, output), vectors, count, result)

    def _seek(self, descriptor: int, vectors: int, count: int, offset: int, result: int) -> int:
        return _NO_SEEKING if descriptor in (0, 1, 2) else _BAD_DESCRIPTOR

    def _take_input(self, parts: list[memoryview]) -> int:
        if self._input_at is None:
            return os.readv(self._input, parts)
        moved = os.preadv(self._input, parts, self._input_at)
        self._input_at += moved
        return moved

    def _move(self, move: Callable[[list[memoryview]], int] | None, vectors: int, count: int, result: int) -> int:
        """Move bytes from or into the parts of memory that the guest named; return WASI's error number."""
        self.is_inside = True
        try:
            return self._moved(move, vectors, count, result)
        finally:
            self.is_inside = False

    def _moved(self, move: Callable[[list[memoryview]], int] | None, vectors: int, count: int, result: int) -> int:
        if move is None:
            return _BAD_DESCRIPTOR
        if self.memory is None:
            return _FAULT  # it asks while it is being made
        if not 0 <= count <= _MOST_VECTORS:
            return _INVALID
        memory = memoryview(self.memory.buffer)
        moved_at = _part(memory, result, 4)
        table = _part(memory, vectors, count * _VECTOR)
        if moved_at is None or table is None:
            return _FAULT
        parts = []
        for address, length in _pairs(table):
            part = _part(memory, address, length)
            if part is None:
                return _FAULT
            parts.append(part)
        try:
            moved = move(parts) if parts else 0
        except OSError as problem:
            return _ERRORS.get(problem.errno or 0, _IO)
        moved_at[:] = moved.to_bytes(4, "little")
        return _SUCCESS


def _refuse(*_: int) -> int:
    return _NO_SYSTEM_CALL


def _part(memory: memoryview, address: int, length: int) -> memoryview | None:
    """Return a part of the memory, or None if it does not lie inside. Addresses arrive as signed numbers."""
    start = address & _32_BITS
    return memory[start : start + length] if start + length <= len(memory) else None


def _pairs(table: memoryview) -> list[tuple[int, int]]:
    numbers = [int.from_bytes(table[at : at + 4], "little") for at in range(0, len(table), 4)]
    return list(zip(numbers[::2], numbers[1::2], strict=True))
