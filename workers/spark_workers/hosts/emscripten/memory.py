"""How functions of the host reach into the memory of a guest."""

import struct
from typing import Protocol

PAGE = 65536

_I32, _U32, _I64, _F64 = struct.Struct("<i"), struct.Struct("<I"), struct.Struct("<q"), struct.Struct("<d")
_CHUNK = 256


def joined(low: int, high: int) -> int:
    """Return the signed number of 64 bits whose halves these are."""
    value = (low & 0xFFFFFFFF) | (high & 0xFFFFFFFF) << 32
    return value - (1 << 64) if value >> 63 else value


class Memory(Protocol):
    """The linear memory of one instance. Addresses and lengths are never negative here."""

    def size(self) -> int:
        """Bytes that there are now."""

    def read(self, address: int, length: int) -> bytes:
        """Copy out of it. Raises GuestFailed outside of it."""

    def write(self, address: int, data: bytes) -> None:
        """Copy into it. Raises GuestFailed outside of it."""

    def grow(self, pages: int) -> bool:
        """Add *pages* of 64 KiB, and tell whether they were given."""


class Heap:
    """A memory, with the numbers and texts that lie in it. Addresses may be i32 as they come: they are unsigned."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory

    def read(self, address: int, length: int) -> bytes:
        """Return *length* bytes; none at all are nowhere, so that their address does not matter."""
        return self.memory.read(address & 0xFFFFFFFF, length) if length else b""

    def write(self, address: int, data: bytes) -> None:
        """Store *data*."""
        if data:
            self.memory.write(address & 0xFFFFFFFF, data)

    def i32(self, address: int) -> int:
        """Return the signed number of 32 bits there."""
        value: int = _I32.unpack(self.read(address, 4))[0]
        return value

    def u32(self, address: int) -> int:
        """Return the unsigned number of 32 bits there."""
        value: int = _U32.unpack(self.read(address, 4))[0]
        return value

    def i64(self, address: int) -> int:
        """Return the signed number of 64 bits there."""
        value: int = _I64.unpack(self.read(address, 8))[0]
        return value

    def f64(self, address: int) -> float:
        """Return the double there."""
        value: float = _F64.unpack(self.read(address, 8))[0]
        return value

    def set_i32(self, address: int, value: int) -> None:
        """Store the low 32 bits of *value*."""
        self.write(address, _U32.pack(value & 0xFFFFFFFF))

    def set_i64(self, address: int, value: int) -> None:
        """Store the low 64 bits of *value*."""
        self.write(address, (value & 0xFFFFFFFFFFFFFFFF).to_bytes(8, "little"))

    def text(self, address: int, most: int = 1 << 20) -> str:
        """Return the text that ends in a zero byte there, or after *most* bytes; what is no UTF-8 becomes U+FFFD."""
        return self.bytes_until_zero(address, most).decode(errors="replace")

    def bytes_until_zero(self, address: int, most: int = 1 << 20) -> bytes:
        """Return the bytes up to the next zero byte, at most *most*.

        There are none at a null pointer and outside of the memory, as in JavaScript.
        """
        address &= 0xFFFFFFFF
        parts, length = list[bytes](), 0
        most = min(most, self.memory.size() - address) if address else 0
        while length < most:
            part = self.read(address + length, min(_CHUNK << len(parts), most - length))
            end = part.find(b"\0")
            if end >= 0:
                parts.append(part[:end])
                break
            parts.append(part)
            length += len(part)
        return b"".join(parts)
