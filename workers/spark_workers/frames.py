"""Bytes in, frames out. No I/O happens here: whoever owns the socket reads and writes it.

A frame is a header of eight bytes and a payload:

    "SK"   version   descriptors   length, 32 bits, big endian   payload ...

*descriptors* says how many file descriptors travel beside the frame (``SCM_RIGHTS`` on its first byte). The length is
checked against a limit before anything is allocated, because the other end may be anything from a broken build to a
script that wrote to the wrong descriptor.
"""

import struct
from dataclasses import dataclass

MAGIC = b"SK"
VERSION = 1
HEADER = struct.Struct(">2sBBI")
MAX_PAYLOAD = 64 * 1024 * 1024
MAX_DESCRIPTORS = 200  # Linux passes 253 in one message


class FrameBroken(ValueError):
    """The bytes are not frames of ours. The stream cannot be used any more."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One payload and how many descriptors came with it."""

    payload: bytes
    descriptors: int = 0


def encode_frame(payload: bytes, descriptors: int = 0) -> bytes:
    """Return the bytes of one frame.

    Raises:
        FrameBroken: The payload is longer than the other end would accept.
    """
    if len(payload) > MAX_PAYLOAD:
        raise FrameBroken(f"a frame of {len(payload)} bytes is over the limit of {MAX_PAYLOAD}")
    if descriptors > MAX_DESCRIPTORS:
        raise FrameBroken(f"{descriptors} descriptors in one frame, {MAX_DESCRIPTORS} at most")
    return HEADER.pack(MAGIC, VERSION, descriptors, len(payload)) + payload


class FrameDecoder:
    """Collects received bytes and gives back whole frames.

    After `FrameBroken` every further call raises it again: where a stream lost its place once, nothing that follows
    can be trusted.
    """

    def __init__(self, limit: int = MAX_PAYLOAD) -> None:
        self._limit = limit
        self._buffer = bytearray()
        self._broken: str | None = None

    def feed(self, data: bytes | memoryview) -> None:
        """Add received bytes."""
        self._buffer += data

    def next_frame(self) -> Frame | None:
        """Return the next whole frame, or None until more bytes arrive.

        Raises:
            FrameBroken: Wrong magic or version, or a length over the limit.
        """
        found = self._next()
        return Frame(*found) if found is not None else None

    def next_payload(self) -> bytes | None:
        """As `next_frame`, for a side that is sent no descriptors.

        Raises:
            FrameBroken: As `next_frame`, or a frame announces descriptors.
        """
        found = self._next()
        if found is None:
            return None
        if found[1]:
            self._fail(f"a frame announces {found[1]} descriptors where none may come")
        return found[0]

    def _next(self) -> tuple[bytes, int] | None:
        if self._broken is not None:
            raise FrameBroken(self._broken)
        if len(self._buffer) < HEADER.size:
            self._check_prefix()
            return None
        descriptors, length = self._header()
        end = HEADER.size + length
        if len(self._buffer) < end:
            return None
        with memoryview(self._buffer) as view:
            payload = bytes(view[HEADER.size : end])
        del self._buffer[:end]
        return payload, descriptors

    def take_rest(self) -> bytes:
        """Return the bytes of frames that were not asked for, and forget them."""
        rest = bytes(self._buffer)
        self._buffer.clear()
        return rest

    def is_empty(self) -> bool:
        """Tell whether the stream stands between two frames."""
        return not self._buffer

    def _check_prefix(self) -> None:
        if not MAGIC.startswith(self._buffer[:2]):
            self._fail(f"a frame begins with {bytes(self._buffer[:2])!r}")

    def _header(self) -> tuple[int, int]:
        magic, version, descriptors, length = HEADER.unpack_from(self._buffer)
        if magic != MAGIC:
            self._fail(f"a frame begins with {magic!r}")
        if version != VERSION:
            self._fail(f"frame version {version}, this side speaks {VERSION}")
        if descriptors > MAX_DESCRIPTORS:
            self._fail(f"a frame announces {descriptors} descriptors")
        if length > self._limit:
            self._fail(f"a frame announces {length} bytes, over the limit of {self._limit}")
        return descriptors, length

    def _fail(self, reason: str) -> None:
        self._broken = reason
        self._buffer.clear()
        raise FrameBroken(reason)
