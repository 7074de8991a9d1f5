"""Writes limits into a WASM module, for an engine that has none of its own.

A module says how far each of its memories and tables may grow. Where it says nothing, or more than a model may have,
the limit is written in its place before the module is compiled: ``memory.grow`` and ``table.grow`` then answer -1 as
the specification has it. Only the two sections that hold these numbers are read, and anything in them that is not in
the specification is refused, because what is not understood cannot be limited.
"""

from collections.abc import Callable, Iterator

from spark_workers.engines.traps import sized
from spark_workers.hosts.failures import GuestFailed

PAGE = 64 * 1024
_HEADER = b"\0asm\x01\0\0\0"
_TABLES = 4
_MEMORIES = 5
_REFERENCES = (0x6F, 0x70)  # externref and funcref
_HAS_MAXIMUM = 1
_SHARED = 3


def limit_module(wasm: bytes, memory_limit: int, table_limit: int) -> bytes:
    """Return *wasm* with no memory over *memory_limit* bytes and no table over *table_limit* elements.

    Raises:
        GuestFailed: "invalid-module" if it is no module, or cut short; "out-of-memory" and "over-limit" if it wants
            more memory or longer tables than that from the start.
    """
    if not wasm.startswith(_HEADER):
        raise GuestFailed("invalid-module", "it does not begin as a WASM module of version 1 does")

    def bounded_table(reader: "_Reader") -> bytes:
        return _table(reader, table_limit)

    def bounded_memory(reader: "_Reader") -> bytes:
        return _memory(reader, memory_limit)

    parts = [_HEADER]
    for number, section in _sections(wasm):
        if number == _TABLES:
            section = _each(section, bounded_table)
        elif number == _MEMORIES:
            section = _each(section, bounded_memory)
        parts += [bytes((number,)), _unsigned(len(section)), section]
    return b"".join(parts)


class _Reader:
    """A place in some bytes, which moves on as they are read."""

    def __init__(self, data: bytes, place: int = 0) -> None:
        self._data = data
        self._place = place

    def is_at_end(self) -> bool:
        return self._place == len(self._data)

    def byte(self) -> int:
        return self.take(1)[0]

    def take(self, length: int) -> bytes:
        end = self._place + length
        if end > len(self._data):
            raise GuestFailed("invalid-module", "the module is cut short")
        taken = self._data[self._place : end]
        self._place = end
        return taken

    def unsigned(self) -> int:
        """An LEB128 number of 32 bits."""
        value = 0
        for shift in range(0, 35, 7):
            byte = self.byte()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
        raise GuestFailed("invalid-module", "the module holds a number that is too long")


def _sections(wasm: bytes) -> Iterator[tuple[int, bytes]]:
    reader = _Reader(wasm, len(_HEADER))
    while not reader.is_at_end():
        yield reader.byte(), reader.take(reader.unsigned())


def _each(section: bytes, bounded: Callable[[_Reader], bytes]) -> bytes:
    reader = _Reader(section)
    count = reader.unsigned()
    parts = [_unsigned(count), *(bounded(reader) for _ in range(count))]
    if not reader.is_at_end():
        raise GuestFailed("invalid-module", "the module's tables or memories are described in an unknown way")
    return b"".join(parts)


def _memory(reader: _Reader, limit: int) -> bytes:
    flags, least, most = _limits(reader)
    if least * PAGE > limit:
        text = f"it needs {sized(least * PAGE)} of memory from the start, over its limit of {sized(limit)}"
        raise GuestFailed("out-of-memory", f"{text}; raise memory_limit", {"memory_limit": limit})
    pages = limit // PAGE
    return _encoded(flags, least, pages if most is None else min(most, pages))


def _table(reader: _Reader, limit: int) -> bytes:
    kind = reader.byte()
    if kind not in _REFERENCES:
        raise GuestFailed("invalid-module", f"it has a table of an unknown kind, {kind:#x}")
    flags, least, most = _limits(reader)
    if least > limit:
        text = f"it needs a table of {least} elements from the start, over its limit of {limit}; raise table_limit"
        raise GuestFailed("over-limit", text, {"table_limit": limit})
    return bytes((kind,)) + _encoded(flags, least, limit if most is None else min(most, limit))


def _limits(reader: _Reader) -> tuple[int, int, int | None]:
    flags = reader.byte()
    if flags not in (0, _HAS_MAXIMUM, _SHARED):
        raise GuestFailed("invalid-module", f"it has a memory or a table of an unknown kind, {flags:#x}")
    return flags, reader.unsigned(), reader.unsigned() if flags else None


def _encoded(flags: int, least: int, most: int) -> bytes:
    return bytes((flags or _HAS_MAXIMUM,)) + _unsigned(least) + _unsigned(most)


def _unsigned(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
