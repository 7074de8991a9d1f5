"""The files that a guest sees: those of the preload archive, a few devices, and nothing that it could change.

Descriptors, flags and errors are as in Emscripten's file system, whose numbers of errors are those of WASI.
"""

import os
import posixpath
from collections.abc import Sequence
from dataclasses import dataclass, field

from spark_workers.packages.glue import Preloaded

EBADF, EEXIST, EINVAL, EISDIR, EMFILE, ENOENT, ENOTDIR, ENOTTY = 8, 20, 28, 31, 33, 44, 54, 59
EOVERFLOW, EROFS, ESPIPE = 61, 69, 70

WRITES, CREATES, ONLY_NEW, CUTS, FOLDER = 0o3, 0o100, 0o200, 0o1000, 0o200000
MOST_OPEN = 4096
PRINTED_LIMIT = 64 * 1024

#: In every guest, under the root.
_FOLDERS = ("tmp", "home", "home/web_user", "dev", "dev/shm", "dev/shm/tmp", "proc", "proc/self", "proc/self/fd")
_CONSOLES = ("/dev/stdin", "/dev/stdout", "/dev/stderr", "/dev/tty", "/dev/tty1")
_RANDOM, _NULL = ("/dev/random", "/dev/urandom"), "/dev/null"
_DEVICES = frozenset((*_CONSOLES, *_RANDOM, _NULL))


class FileError(Exception):
    """What a call of the file system answers with, as a positive number."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Log:
    """What a guest printed since the last time, up to a limit."""

    def __init__(self, limit: int = PRINTED_LIMIT) -> None:
        self._limit = limit
        self._kept = bytearray()
        self._left_out = 0

    @property
    def has_any(self) -> bool:
        """Tell whether there is something to take."""
        return bool(self._kept)

    def write(self, data: bytes) -> None:
        """Keep *data*, or count them."""
        room = self._limit - len(self._kept)
        self._kept += data[:room] if room > 0 else b""
        self._left_out += max(0, len(data) - max(room, 0))

    def take(self) -> str:
        """Return it, and begin anew."""
        text = self._kept.decode(errors="replace")
        if self._left_out:
            text += f"\n[{self._left_out} more bytes were left out]\n"
        self._kept, self._left_out = bytearray(), 0
        return text


@dataclass(slots=True)
class _Stream:
    path: str
    flags: int
    content: memoryview | None = field(default=None, repr=False)  # None: a folder or a device
    place: int = 0

    @property
    def is_device(self) -> bool:
        return self.path in _DEVICES


class FileTable:
    """The files and the open descriptors of one instance; 0, 1 and 2 are open from the start."""

    def __init__(self, log: Log, data: bytes = b"", files: Sequence[Preloaded] = ()) -> None:
        """Take the preload archive *data*, in which *files* lie.

        Raises:
            ValueError: One of them does not lie in it.
        """
        self._log = log
        self._files: dict[str, memoryview] = {}
        self._folders = {"/", *(f"/{each}" for each in _FOLDERS)}
        whole = memoryview(data)
        for each in files:
            if not 0 <= each.start <= each.end <= len(data):
                text = f"the preloaded file {each.path[:200]!a} does not lie in the {len(data)} bytes of its archive"
                raise ValueError(text)
            path = posixpath.normpath(each.path)
            self._files[path] = whole[each.start : each.end]
            while path != "/":
                path = posixpath.dirname(path)
                self._folders.add(path)
        self._open = {
            0: _Stream("/dev/stdin", 0),
            1: _Stream("/dev/stdout", 1),
            2: _Stream("/dev/stderr", 1),
        }

    # Every method raises FileError for what is wrong with a descriptor or path.

    def open(self, path: str, flags: int, folder: int | None = None) -> int:
        """Open *path*, under the open folder *folder* if it is relative and there is one; return the descriptor."""
        if not path:
            raise FileError(ENOENT)
        if folder is not None and not path.startswith("/"):
            path = posixpath.join(self._stream(folder).path, path)
        full = posixpath.normpath("/" + path.lstrip("/"))
        return self._add(_Stream(full, flags, self._content(full, flags)))

    def _content(self, path: str, flags: int) -> memoryview | None:
        writes = bool(flags & WRITES or flags & CUTS)
        if path in _DEVICES:
            self._check_new(flags)
            if flags & FOLDER:
                raise FileError(ENOTDIR)
            return None
        if path in self._folders:
            self._check_new(flags)
            if writes:
                raise FileError(EISDIR)
            return None
        content = self._files.get(path)
        if content is None:
            raise FileError(EROFS if flags & CREATES and posixpath.dirname(path) in self._folders else ENOENT)
        self._check_new(flags)
        if flags & FOLDER:
            raise FileError(ENOTDIR)
        if writes:
            raise FileError(EROFS)
        return content

    def _check_new(self, flags: int) -> None:
        if flags & CREATES and flags & ONLY_NEW:
            raise FileError(EEXIST)

    def _add(self, stream: _Stream, lowest: int = 0) -> int:
        number = lowest
        while number in self._open:
            number += 1
        if number > MOST_OPEN:
            raise FileError(EMFILE)
        self._open[number] = stream
        return number

    def _stream(self, number: int) -> _Stream:
        stream = self._open.get(number)
        if stream is None:
            raise FileError(EBADF)
        return stream

    def close(self, number: int) -> None:
        """Close a descriptor."""
        self._stream(number)
        del self._open[number]

    def duplicate(self, number: int, lowest: int) -> int:
        """Open the same again, under the first free descriptor from *lowest* on."""
        stream = self._stream(number)
        return self._add(_Stream(stream.path, stream.flags, stream.content), lowest)

    def flags(self, number: int) -> int:
        """Return the flags with which a descriptor was opened."""
        return self._stream(number).flags

    def add_flags(self, number: int, flags: int) -> None:
        """Set more flags."""
        self._stream(number).flags |= flags

    def is_console(self, number: int) -> bool:
        """Tell whether a descriptor is one of standard input, output and error."""
        return self._stream(number).path in _CONSOLES

    def read(self, number: int, length: int) -> bytes:
        """Read on. There is nothing on standard input."""
        stream = self._stream(number)
        if stream.flags & WRITES == 1:
            raise FileError(EBADF)
        if stream.content is not None:
            data = bytes(stream.content[stream.place : stream.place + length])
            stream.place += len(data)
            return data
        if stream.path in _RANDOM:
            return os.urandom(length)
        if stream.is_device:
            return b""
        raise FileError(EISDIR)

    def write(self, number: int, data: bytes) -> int:
        """Write to the log, or to nowhere; return how many bytes there were."""
        stream = self._stream(number)
        if stream.flags & WRITES == 0:
            raise FileError(EBADF)
        if stream.path in _CONSOLES:
            self._log.write(data.replace(b"\0", b""))  # Emscripten leaves zero bytes out
        return len(data)

    def seek(self, number: int, offset: int, whence: int) -> int:
        """Move in a file, and return the place."""
        stream = self._stream(number)
        if stream.is_device:
            raise FileError(ESPIPE)
        if whence not in (0, 1, 2):
            raise FileError(EINVAL)
        base = (0, stream.place, 0 if stream.content is None else len(stream.content))[whence]
        if base + offset < 0:
            raise FileError(EINVAL)
        stream.place = base + offset
        return stream.place
