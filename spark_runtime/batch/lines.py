"""Lines of a file or a pipe, read by blocks. A line may be of any length; only so much of it is ever held."""

import hashlib
import os
import select
from collections import deque
from typing import NamedTuple

from spark_runtime.batch.rows import MAX_ROW
from spark_runtime.batch.stop import Stop

BLOCK = 256 * 1024


class LongLine(NamedTuple):
    """In place of a line over the limit: its length, and a digest of it."""

    size: int
    digest: bytes


class Lines:
    """An iterator over the lines behind a descriptor, without their ends.

    When *stop* is asked it ends, at once, and gives back no line that is cut.

    Attributes:
        number: The number of the line given last, from 1.
    """

    def __init__(self, descriptor: int, stop: Stop, limit: int = MAX_ROW) -> None:
        self.number = 0
        self._descriptor = descriptor
        self._stop = stop
        self._limit = limit
        self._whole: deque[bytes | LongLine] = deque()
        self._parts: list[bytes] = []  # of the line that has begun
        self._size = 0
        self._digest: hashlib.blake2b | None = None  # in place of the parts, over the limit
        self._ended = False

    def __iter__(self) -> "Lines":
        return self

    def __next__(self) -> bytes | LongLine:
        while not self._whole:
            if self._ended:
                raise StopIteration
            self._fill()
        self.number += 1
        return self._whole.popleft()

    def is_ready(self) -> bool:
        """Tell whether the next line, or the end, is there without waiting."""
        while not self._whole and not self._ended and select.select([self._descriptor], [], [], 0)[0]:
            self._fill()
        return bool(self._whole) or self._ended

    def _fill(self) -> None:
        """Wait for one block and take it apart."""
        select.select([self._descriptor, self._stop.fileno()], [], [])
        if self._stop.asked:
            self._ended = True
            return
        block = os.read(self._descriptor, BLOCK)
        if not block:
            self._ended = True
            if self._size:
                self._end_line()
            return
        first, newline, rest = block.partition(b"\n")
        self._add(first)
        if newline:
            self._end_line()
            *lines, last = rest.split(b"\n")
            self._whole.extend(lines)
            self._add(last)

    def _add(self, part: bytes) -> None:
        """Add to the line that has begun."""
        self._size += len(part)
        if self._digest is None and self._size > self._limit:
            self._digest = hashlib.blake2b(b"".join(self._parts))
            self._parts.clear()
        if self._digest is not None:
            self._digest.update(part)
        elif part:
            self._parts.append(part)

    def _end_line(self) -> None:
        if self._digest is None:
            self._whole.append(b"".join(self._parts))
        else:
            self._whole.append(LongLine(self._size, self._digest.digest()))
        self._parts.clear()
        self._size = 0
        self._digest = None
