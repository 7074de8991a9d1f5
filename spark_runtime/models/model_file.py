"""A model's file, read once. Only its first bytes are looked at: parsing is a compile worker's business.

It is a WASM module, or a zip: a Neuron package.
"""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path

from spark_runtime.errors import ModelNotFound, ModelUnusable

SIZE_LIMIT = 1 << 30

_MAGIC = b"\0asm"
_ZIP = b"PK\x03\x04"
_CORE = b"\x01\0\0\0"
_COMPONENT = b"\x0d\0\x01\0"  # version 13 of layer 1
_CHUNK = 1 << 20

# What people give by mistake, by how it begins, with the way out.
_LOOKS = (
    (b"PK\x05\x06", "an empty zip archive"),
    (b"\x1f\x8b", "compressed with gzip; unpack it first"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd; unpack it first"),
    (b"\x7fELF", "a native library or program; build the model for wasm32"),
    (b"version https://git-lfs", "a pointer of Git LFS; run `git lfs pull` to get the file itself"),
    (b"BC\xc0\xde", "LLVM bitcode; link it with wasm-ld"),
    (b"!<arch>\n", "a static library; link it with wasm-ld"),
    (b"#!", "a script"),
    (b"<", "a web page or XML"),
)


@dataclass(frozen=True, slots=True)
class ModelFile:
    """The bytes of a model and what they are called.

    Attributes:
        path: Where the file lies, absolute.
        sha256: Of the bytes, in hexadecimal.
    """

    path: Path
    data: bytes = field(repr=False)
    sha256: str

    @property
    def size(self) -> int:
        """How many bytes there are."""
        return len(self.data)

    @property
    def is_package(self) -> bool:
        """Tell whether it is a zip, and so a Neuron package."""
        return self.data.startswith(_ZIP)

    @classmethod
    def read(cls, path: str | Path) -> ModelFile:
        """Read the file once; whoever compiles gets the bytes that were hashed, whatever happens to the file.

        Raises:
            ModelNotFound: There is no such file.
            ModelUnusable: It cannot be read, or is neither a WASM module nor a zip by its first bytes.
        """
        try:
            absolute = Path(os.path.abspath(path))
            data = _read(absolute)
        except FileNotFoundError as problem:
            raise ModelNotFound(f"there is no file {path}; give the path of a .wasm file") from problem
        except NotADirectoryError as problem:
            raise ModelNotFound(f"{path} leads through a file; give the path of a .wasm file") from problem
        except OSError as problem:
            raise ModelUnusable(f"{path} cannot be read: {problem.strerror or problem}", "unreadable") from problem
        except ValueError as problem:  # a NUL in it
            raise ModelNotFound(f"{str(path)!r} cannot be the path of a file") from problem
        _check_beginning(absolute, data)
        return cls(absolute, data, hashlib.sha256(data).hexdigest())


def _read(path: Path) -> bytes:
    # O_NONBLOCK: opening a FIFO that nobody writes to would hang. It changes nothing for a regular file.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            raise ModelUnusable(f"{path} is a folder; give the path of a .wasm file in it", "unreadable")
        if not stat.S_ISREG(status.st_mode):
            raise ModelUnusable(f"{path} is not a regular file; give the path of a .wasm file", "unreadable")
        if status.st_size > SIZE_LIMIT:
            _refuse_size(path)
        return _read_all(descriptor, path, status.st_size)
    finally:
        os.close(descriptor)


def _read_all(descriptor: int, path: Path, expected: int) -> bytes:
    data = os.read(descriptor, expected + 1)  # usually all of it, without a copy
    if len(data) == expected:
        return data
    parts = [data]  # it grows or shrinks while we read, or it is larger than one read gives
    total = len(data)
    while part := os.read(descriptor, _CHUNK):
        parts.append(part)
        total += len(part)
        if total > SIZE_LIMIT:
            _refuse_size(path)
    return b"".join(parts)


def _refuse_size(path: Path) -> None:
    raise ModelUnusable(f"{path} is larger than {SIZE_LIMIT >> 30} GiB, the most a model may have", "over-limit")


def _check_beginning(path: Path, data: bytes) -> None:
    """Raise `ModelUnusable` where the first bytes tell that this is no module; say what it looks like."""
    magic, version = data[:4], data[4:8]
    if magic == _ZIP or (magic == _MAGIC and version == _CORE):
        return
    if not data:
        raise ModelUnusable(f"{path} is empty; build the model again")
    if magic != _MAGIC:
        raise ModelUnusable(f"{path} is not a WASM module, it is {_describe(data)}")
    if version == _COMPONENT:
        raise ModelUnusable(
            f"{path} is a WASM component, and models are core modules; build it for wasm32-wasip1 or "
            "wasm32-unknown-unknown"
        )
    if len(version) < 4:
        raise ModelUnusable(f"{path} is a WASM module that was cut off; build or copy it again")
    raise ModelUnusable(f"{path} is WASM of version {int.from_bytes(version, 'little')}, and only version 1 can be run")


def _describe(data: bytes) -> str:
    for beginning, words in _LOOKS:
        if data.startswith(beginning):
            return words
    start = data[:512].lstrip()
    if start.startswith((b"(module", b"(component", b";;", b"(;")):
        return "WebAssembly text; translate it with wat2wasm"
    if start.startswith((b"{", b"[")):
        return "JSON"
    try:
        data[:64].decode("ascii")
    except ValueError:
        return "something else (it begins with " + data[:4].hex(" ") + ")"
    return "a text"
