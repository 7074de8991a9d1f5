"""Machine code as a file: what wasmtime serializes, followed by imports and exports with their types.

The types are kept beside the code because asking wasmtime for them can end the process; see `outline`. wasmtime maps
the file as an ELF image and takes no notice of what follows it. So a model that is more than one module is one file
all the same: parts with names stand between code and types, among them machine code of its lesser modules.
"""

import io
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, BinaryIO

import msgpack

from spark_workers.engines.outline import Outline, signature_of
from spark_workers.engines.seam import Extern
from spark_workers.hosts.failures import GuestFailed

_MAGIC = b"SPARKAOT"
_TAIL = 8 + len(_MAGIC)


class Signs:
    """What is known of a module beside its code.

    Attributes:
        imports: In the module's order.
        exports: In the module's order.
        names: Exported functions by their index, for the backtraces of modules without names.
        signatures: Types of parameters and results of exported functions.
        memory: The name of the exported memory, None if there is none.
    """

    def __init__(self, imports: list[Extern], exports: list[Extern], names: dict[int, str]) -> None:
        self.imports = imports
        self.exports = exports
        self.names = names
        self.signatures = {each.name: signature_of(each.type) for each in exports if each.kind == "function"}
        self.memory = next((each.name for each in exports if each.kind == "memory"), None)

    def rename(self, names: dict[str, str]) -> None:
        """Have backtraces call exports by other names: those in *names*, by the exports' own."""
        self.names = {index: names.get(name, name) for index, name in self.names.items()}


def join(code: bytes | bytearray | memoryview, outline: Outline) -> bytes:
    """Return the bytes of a file with *code* and what *outline* says."""
    imports = [(each.module, each.name, each.kind, each.type) for each in outline.imports]
    exports = [(each.module, each.name, each.kind, each.type) for each in outline.exports]
    return _joined([code], [imports, exports, list(outline.names.items())], {})


def with_parts(code: bytes, parts: Mapping[str, bytes]) -> bytes:
    """Return the bytes of a file with the code of *code*, which `join` made, and *parts* beside it."""
    signs, end = _trailer_in(code)
    places, at = {}, end
    for name, part in parts.items():
        places[name] = (at, len(part))
        at += len(part)
    return _joined([memoryview(code)[:end], *parts.values()], signs[:3], places)


def _joined(pieces: list[Any], signs: list[Any], places: Mapping[str, tuple[int, int]]) -> bytes:
    packed: bytes = msgpack.packb([*signs, places])
    return b"".join((*pieces, packed, len(packed).to_bytes(8, "little"), _MAGIC))


def signs_in(code: bytes) -> Signs:
    """Return what is known of the module whose file has the bytes *code*.

    Raises:
        GuestFailed: "stale-code": it is no file of ours.
    """
    return _signs(_trailer_in(code)[0])


def read_signs(path: str) -> Signs:
    """Return what is known of the module whose code is in the file at *path*.

    Raises:
        GuestFailed: "stale-code": it is no file of ours.
    """
    with _opened(path) as file:
        return _signs(_trailer(file)[0])


def read_parts(path: str, *names: str) -> dict[str, bytes]:
    """Return the parts of those names that the file at *path* has; all of them if none is named.

    Raises:
        GuestFailed: "stale-code": it is no file of ours.
    """
    with _opened(path) as file:
        parts = {}
        for name, (at, length) in _trailer(file)[0][3].items():
            if not names or name in names:
                file.seek(at)
                parts[name] = file.read(length)
        return parts


@contextmanager
def _opened(path: str) -> Iterator[BinaryIO]:
    try:
        with open(path, "rb") as file:
            yield file
    except (OSError, ValueError, TypeError, msgpack.UnpackException) as problem:
        raise GuestFailed("stale-code", f"the prepared machine code cannot be read: {problem}") from problem


def _trailer_in(code: bytes) -> tuple[list[Any], int]:
    return _trailer(io.BytesIO(code))


def _trailer(file: BinaryIO) -> tuple[list[Any], int]:
    """Return what stands after code and parts, and where that begins."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _TAIL))
    tail = file.read(_TAIL)
    length = int.from_bytes(tail[:8], "little")
    if tail[8:] != _MAGIC or length > size - _TAIL:
        raise GuestFailed("stale-code", "the file does not end as prepared machine code does; compile again")
    begin = size - _TAIL - length
    file.seek(begin)
    signs: list[Any] = msgpack.unpackb(file.read(length), strict_map_key=False)
    return signs, begin


def _signs(trailer: list[Any]) -> Signs:
    imports, exports, names, _ = trailer
    return Signs([Extern(*each) for each in imports], [Extern(*each) for each in exports], dict(names))
