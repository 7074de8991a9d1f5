"""The memory that snapshots lie in. The supervisor owns it, so that it outlives every worker.

A segment is a memfd. Pages that exist are ten times cheaper to write than new ones, so segments are used again; but
only when nobody can see the change: not while the newest snapshot or the disk writer needs it, and not while a process
has it mapped, because writing changes the untouched pages of private mappings. A worker that was started from a
segment holds it until it is dead, and after that until no process that it left behind maps it.
"""

import fcntl
import mmap
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from spark_workers import system

ROOM = 1.2  # a snapshot goes to memory only if this many times its size is free
SPARE = 1.125  # how much larger than asked a segment is, so that the next snapshot fits as well
SMALL = 1 << 20  # below this a snapshot into new pages costs next to nothing
NAME = "sparkrt-segment"


@dataclass(eq=False)
class OwnedSegment:
    """One piece of memory and who needs it as it is."""

    number: int
    descriptor: int
    size: int
    holders: set[str] = field(default_factory=set)
    was_mapped: bool = False  # a process that may have left others behind has had it mapped

    def view(self) -> memoryview:
        """Map it for reading."""
        return memoryview(mmap.mmap(self.descriptor, self.size, mmap.MAP_SHARED, mmap.PROT_READ))


class Segments:
    """Knows every segment and who holds it."""

    def __init__(self, disk_folder: Path) -> None:
        self._disk_folder = disk_folder
        self._segments: dict[int, OwnedSegment] = {}
        self._last = 0

    def __getitem__(self, number: int) -> OwnedSegment:
        return self._segments[number]

    def __contains__(self, number: object) -> bool:
        return number in self._segments

    def take(self, size: int, holder: str) -> OwnedSegment:
        """Return a segment of at least *size* bytes for *holder* to write: a free one, else a new one.

        Raises:
            OSError: Neither memory nor disk has room.
        """
        for segment in sorted(self._segments.values(), key=lambda each: each.size):
            if segment.size >= size and self._is_free(segment):
                segment.holders.add(holder)
                return segment
        self._drop_free()  # too small for what is needed now
        self._last += 1
        segment = self._create(self._last, _rounded(size), size)
        segment.holders.add(holder)
        self._segments[segment.number] = segment
        return segment

    def wants_spare(self, size: int) -> bool:
        """Tell whether the next snapshot of *size* bytes would have to go into pages that do not exist yet."""
        if size < SMALL or system.available_memory() < 2 * ROOM * size:
            return False
        return not any(each.size >= size and self._is_free(each) for each in self._segments.values())

    def make_spare(self, size: int) -> OwnedSegment:
        """Create a segment with its pages. Takes a while and touches no ledger: for another thread. See `add`."""
        segment = self._create(-1, _rounded(size), size)
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(segment.descriptor, 0, segment.size)
        return segment

    def add(self, spare: OwnedSegment) -> None:
        """Take a spare segment into the books."""
        self._last += 1
        spare.number = self._last
        self._segments[spare.number] = spare

    def hold(self, numbers: set[int], holder: str, *, mapped: bool = False) -> None:
        """*holder* needs exactly these segments from now on."""
        for number, segment in self._segments.items():
            if number in numbers:
                segment.holders.add(holder)
                segment.was_mapped = segment.was_mapped or mapped
            else:
                segment.holders.discard(holder)

    def release(self, holder: str) -> None:
        """*holder* needs none of them any more."""
        self.hold(set(), holder)

    def close(self) -> None:
        """Give all memory back."""
        for segment in self._segments.values():
            os.close(segment.descriptor)
        self._segments.clear()

    def _is_free(self, segment: OwnedSegment) -> bool:
        if segment.holders:
            return False
        if segment.was_mapped:
            segment.was_mapped = _is_mapped_anywhere(os.fstat(segment.descriptor).st_ino)
        return not segment.was_mapped

    def _drop_free(self) -> None:
        for number, segment in list(self._segments.items()):
            if not segment.holders:  # whoever still maps it keeps the pages; nothing writes to them any more
                os.close(segment.descriptor)
                del self._segments[number]

    def _create(self, number: int, size: int, needed: int) -> OwnedSegment:
        if system.available_memory() >= ROOM * needed and hasattr(os, "memfd_create"):
            descriptor = os.memfd_create(NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(descriptor, size)
            # Nobody can shrink it under a reader, which would be a bus error there.
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            return OwnedSegment(number, descriptor, size)
        with tempfile.TemporaryFile(dir=self._disk_folder) as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)  # a full disk is an error here, not a bus error later
            else:
                os.ftruncate(file.fileno(), size)
            return OwnedSegment(number, os.dup(file.fileno()), size)


def _rounded(size: int) -> int:
    return -(-int(size * SPARE) // mmap.PAGESIZE) * mmap.PAGESIZE


def _is_mapped_anywhere(inode: int) -> bool:
    """Tell whether another process of this user maps the memory *inode*; those of others never got a descriptor."""
    wanted = f" {inode} "
    for entry in os.listdir("/proc") if system.LINUX else []:
        if not entry.isdigit() or entry == str(os.getpid()):
            continue
        try:
            with open(f"/proc/{entry}/maps") as maps:
                if any(wanted in line for line in maps):
                    return True
        except OSError:
            continue  # ended meanwhile, or another user's
    return False
