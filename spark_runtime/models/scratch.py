"""A file without a place in any folder: what a compile worker reads from and writes to.

On Linux it is memory (memfd): it has a path that replicas can open, ``/proc/<our process>/fd/<number>``, needs no disk
and leaves nothing behind, whatever is killed. Elsewhere it is a temporary file, removed when it is closed or forgotten.
"""

from __future__ import annotations

import fcntl
import os
import weakref
from collections.abc import Callable

_HAS_MEMFD = hasattr(os, "memfd_create") and os.path.isdir("/proc/self/fd")


class Scratch:
    """An open file with a path, for this user only.

    Attributes:
        descriptor: For reading and writing; not inherited by children.
        path: Where a process of this user can open it, as long as it is not closed.
    """

    def __init__(self, data: bytes = b"") -> None:
        """Raises OSError if there is no room."""
        if _HAS_MEMFD:
            self.descriptor = os.memfd_create("spark-model", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            self.path = f"/proc/{os.getpid()}/fd/{self.descriptor}"
            self.close: Callable[[], object] = weakref.finalize(self, os.close, self.descriptor)
        else:
            import tempfile

            self.descriptor, self.path = tempfile.mkstemp(prefix="spark-model-")
            self.close = weakref.finalize(self, _close_and_remove, self.descriptor, self.path)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(self.descriptor, view) :]
            os.lseek(self.descriptor, 0, os.SEEK_SET)
        except BaseException:
            self.close()
            raise

    def size(self) -> int:
        """Return how many bytes are in it."""
        return os.fstat(self.descriptor).st_size

    def seal(self) -> None:
        """Let nobody change it any more, not even who still holds a descriptor of it, where the system can do that."""
        if not _HAS_MEMFD:
            return
        try:
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
            fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, seals)
        except OSError:
            pass  # whoever maps it for writing has not ended yet; the code is then as it was found to be, unsealed


def _close_and_remove(descriptor: int, path: str) -> None:
    os.close(descriptor)
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass  # somebody tidied the temporary folder up
