"""The page of memory that a replica shares with its supervisor: what it is at, and what it is to stop.

Each number is written by one side only and is eight aligned bytes, so neither sees half of one.
"""

import mmap
import struct

OUT_OF_MEMORY = 112  # exit code of a replica that could not get the memory it needed: words would take some
_NUMBER = struct.Struct("=Q")
_AT, _STOP = 0, 8


class Page:
    """One replica's page; each side maps it for itself."""

    def __init__(self, descriptor: int) -> None:
        self._memory = mmap.mmap(descriptor, mmap.PAGESIZE)

    def mark(self, serial: int) -> None:
        """Note, in the replica, that call *serial* begins. Read when the process has died: that call is the one."""
        _NUMBER.pack_into(self._memory, _AT, serial)

    def at(self) -> int:
        """The last call that was begun; 0 if none was."""
        return int(_NUMBER.unpack_from(self._memory, _AT)[0])

    def ask_stop(self, serial: int) -> None:
        """Note, in the supervisor, that call *serial* shall be interrupted."""
        _NUMBER.pack_into(self._memory, _STOP, serial)

    def to_stop(self) -> int:
        """The call that shall be interrupted."""
        return int(_NUMBER.unpack_from(self._memory, _STOP)[0])

    def close(self) -> None:
        """Unmap it."""
        self._memory.close()
