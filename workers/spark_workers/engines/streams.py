"""What goes in and out of a WASI guest, for the engines."""

import os
import sys
from collections.abc import Iterable

from spark_workers.hosts.failures import GuestFailed


def read_all(descriptor: int) -> bytes:
    """Return what lies in a file from its beginning; its place does not change."""
    size = os.fstat(descriptor).st_size
    parts, place = [], 0
    while place < size:
        part = os.pread(descriptor, size - place, place)
        if not part:
            break
        parts.append(part)
        place += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def path_of(descriptor: int) -> bytes:
    """Return a path under which this process can open what *descriptor* refers to."""
    return b"%s/%d" % (b"/proc/self/fd" if sys.platform == "linux" else b"/dev/fd", descriptor)


def clean_texts(what: str, texts: Iterable[str]) -> list[bytes]:
    """Return *texts* as C has them.

    Raises:
        GuestFailed: "wrong-signature": one holds a NUL character or is no text.
    """
    found = []
    for text in texts:
        try:
            encoded = text.encode()
        except UnicodeEncodeError as problem:
            raise GuestFailed("wrong-signature", f"the {what} {text!r:.80} is no valid text: {problem}") from problem
        if b"\0" in encoded:
            raise GuestFailed("wrong-signature", f"the {what} {text!r:.80} has a NUL character, which cannot be passed")
        found.append(encoded)
    return found
