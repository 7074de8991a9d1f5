"""The three files that stand in for standard input, output and error of a WASI guest."""

import os
import resource
import tempfile
import weakref

from spark_workers.engines.seam import Settings, Wasi
from spark_workers.engines.streams import read_all

OUTPUT_LIMIT = 1 << 30
PRINTED_LIMIT = 64 * 1024
TAIL = 8 * 1024
NAME = "model"  # args[0] of every guest


class Files:
    """Knows what a guest has written and how much of that has been taken.

    They are memory where there are memfds. The kernel bounds them, through the process's limit for the size of files,
    because a guest that prints in a loop would fill the machine's memory; the guest sees an error when it writes more.

    An engine may open a file anew and go on at a place of its own. So what was taken is cut off, but counted: the
    next write leaves a hole in front of it, which takes no room.
    """

    def __init__(self) -> None:
        self._stdin, self._stdout, self._stderr = _file("stdin"), _file("stdout"), _file("stderr")
        self._taken = {self._stdout: 0, self._stderr: 0}
        weakref.finalize(self, _close_all, [self._stdin, self._stdout, self._stderr])
        _bound_files(OUTPUT_LIMIT)

    def as_seen_by_guest(self, settings: Settings) -> Wasi:
        """Return what a guest is given: these files, its arguments, and no other environment than its own."""
        return Wasi([NAME, *settings.args], settings.env, self._stdin, self._stdout, self._stderr)

    def begin(self, request: bytes = b"") -> None:
        """Empty all of them for a new instance, and put *request* into standard input."""
        for descriptor in (self._stdin, self._stdout, self._stderr):
            os.ftruncate(descriptor, 0)
            os.lseek(descriptor, 0, os.SEEK_SET)
        self._taken = {self._stdout: 0, self._stderr: 0}
        rest, place = memoryview(request), 0
        while place < len(rest):
            place += os.pwrite(self._stdin, rest[place:], place)

    def answer(self) -> bytes:
        """Return all of standard output."""
        return read_all(self._stdout)

    def is_full(self) -> bool:
        """Tell whether the guest has written as much as it may to one of its files."""
        return any(os.fstat(each).st_size - taken >= OUTPUT_LIMIT for each, taken in self._taken.items())

    def take_stderr_tail(self) -> bytes:
        """Return the end of what was written to standard error since the last time; the rest is let go."""
        size = os.fstat(self._stderr).st_size
        begin = max(self._taken[self._stderr], size - TAIL)
        data = os.pread(self._stderr, size - begin, begin) if size > begin else b""
        self._let_go(self._stderr, size)
        return data

    def take_printed(self, with_stdout: bool) -> str:
        """Return what was written since the last time, the first 64 KiB of each file."""
        printed = self._take(self._stdout) if with_stdout else ""
        return printed + self._take(self._stderr)

    def _take(self, descriptor: int) -> str:
        size, taken = os.fstat(descriptor).st_size, self._taken[descriptor]
        if size <= taken:
            return ""
        data = os.pread(descriptor, min(size - taken, PRINTED_LIMIT), taken)
        left_out = size - taken - len(data)
        self._let_go(descriptor, size)
        text = data.decode(errors="replace")
        return f"{text}\n[{left_out} more bytes were left out]\n" if left_out else text

    def _let_go(self, descriptor: int, size: int) -> None:
        if size > self._taken[descriptor]:
            os.ftruncate(descriptor, 0)
            self._taken[descriptor] = size
            _bound_files(size + OUTPUT_LIMIT)


def _close_all(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _file(name: str) -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create(f"spark-{name}")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


_bound = 0


def _bound_files(size: int) -> None:
    """Let no file of this process, which writes no others, grow over *size* bytes; never less than was said before.

    Python ignores SIGXFSZ already, so a write over it is an error and not the end.
    """
    global _bound
    if size > _bound:
        _bound = size
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size if hard == resource.RLIM_INFINITY else min(size, hard), hard))
