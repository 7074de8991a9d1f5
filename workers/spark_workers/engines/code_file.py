"""Machine code as a file: what wasmtime serializes, followed by imports and exports with their types.

The types are kept beside the code because asking wasmtime for them can end the process; see `outline`. wasmtime maps
the file as an ELF image and takes no notice of what follows it.
"""

import os

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


def join(code: bytes | bytearray | memoryview, outline: Outline) -> bytes:
    """Return the bytes of a file with *code* and what *outline* says."""
    imports = [(each.module, each.name, each.kind, each.type) for each in outline.imports]
    exports = [(each.module, each.name, each.kind, each.type) for each in outline.exports]
    packed: bytes = msgpack.packb([imports, exports, list(outline.names.items())])
    return b"".join((code, packed, len(packed).to_bytes(8, "little"), _MAGIC))


def read_signs(path: str) -> Signs:
    """Return what is known of the module whose code is in the file at *path*.

    Raises:
        GuestFailed: "stale-code": it is no file of ours.
    """
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL))
            tail = file.read(_TAIL)
            length = int.from_bytes(tail[:8], "little")
            if tail[8:] != _MAGIC or length > size - _TAIL:
                raise GuestFailed("stale-code", f"{path} does not end as prepared machine code does; compile again")
            file.seek(size - _TAIL - length)
            imports, exports, names = msgpack.unpackb(file.read(length))
    except (OSError, ValueError, msgpack.UnpackException) as problem:
        raise GuestFailed("stale-code", f"the prepared machine code cannot be read: {problem}") from problem
    return Signs([Extern(*each) for each in imports], [Extern(*each) for each in exports], dict(names))
