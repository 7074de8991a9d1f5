"""One snapshot in one file: how it is laid out, written and read.

    magic      8 bytes
    version    4 bytes, little endian
    length     8 bytes, of the header
    header     msgpack: {"meta": ..., "parts": [[offset, length, digest], ...]}
    digest     32 bytes, of everything above
    parts      each at a multiple of 64, counted from the first multiple of 64 after the digest
    end        8 bytes, right after the last part; the file ends here

The writer goes over every part once, in chunks: a chunk is digested and written while it is still in the cache.
The digests stand in the header, so the header is written last, into room that was left for it; its length is known
beforehand, because a digest is always 32 bytes. A file whose writing was cut short has zeros in place of the magic.

The reader trusts nothing. The lengths in the header decide where every part and the end must be, and the file must be
exactly that long, so nothing is allocated for a length that the file does not have. What does not fit is
`SnapshotDamaged`, with a sentence.

Rules that keep it simple:

* Nothing here knows what a part or `meta` means, and nothing is ever unpickled.
* Parts are read and written through memoryviews, never copied. All large work (digest, read, write) frees the GIL.
* Files are addressed by offset, never by position, so that threads may read one snapshot side by side.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import stat
import struct
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import msgpack

from spark_runtime.errors import StoreError
from spark_workers.failpoints import hit

if TYPE_CHECKING:
    from typing_extensions import Buffer

MAGIC = b"\x89SPARK\r\n"  # as in PNG: a transfer that changes line ends or strips the eighth bit shows at once
END = b"SPARKEND"
VERSION = 1
PRELUDE = struct.Struct("<8sIQ")
ALIGNMENT = 64
MAX_HEADER = 64 << 20

# Measured on two shared cores (AMD EPYC): sha256 1.7 GB/s, blake2b 0.9, sha512 0.7, blake2s 0.5; all free the GIL. The
# disk takes 0.3 to 1.5 GB/s. sha256 wins because newer x86 and ARM processors compute it in hardware; without that
# (measured by hiding it from OpenSSL) it falls to 0.37 GB/s, which a background thread can bear. crc32 (4 GB/s) finds a
# torn file as well, but a snapshot outlives disks and copies, and "it is what was written" is worth 0.6 s for a GB.
DIGEST_SIZE = 32

# Smaller chunks leave the cache less, larger ones hand the GIL over less often. From 1 MiB to 8 MiB made no difference
# in speed; 256 KiB lost a third in writing, 64 MiB a tenth in reading.
CHUNK = 4 << 20


class SnapshotDamaged(StoreError):
    """A snapshot file is not what was written.

    An older generation may be whole; `RunFolder.newest` looks for it.

    Attributes:
        path: The file.
        where: The place in it: ``"file"``, ``"header"``, ``"end"`` or ``"part 3"``.
        problem: What is wrong there.
    """

    def __init__(self, path: Path, where: str, problem: str) -> None:
        super().__init__(f"snapshot {path} cannot be used, {where}: {problem}")
        self.path = path
        self.where = where
        self.problem = problem

    def __reduce__(self) -> tuple[type[SnapshotDamaged], tuple[Path, str, str]]:
        return type(self), (self.path, self.where, self.problem)


@dataclass(frozen=True, slots=True)
class SnapshotParts:
    """A snapshot as its maker hands it over.

    Attributes:
        meta: Anything that msgpack can hold. Tuples come back as lists.
        parts: Contiguous buffers of any size, also empty. They must not change until the writing is over: a chunk that
            changes before its turn is stored in a mixture with the older ones, and no digest can show that.
    """

    meta: dict[str, object]
    parts: Sequence[Buffer]


@dataclass(frozen=True, slots=True)
class _Part:
    offset: int  # in the file
    length: int
    digest: bytes


class _Header(TypedDict):
    meta: dict[str, object]
    parts: list[object]


@dataclass(frozen=True, slots=True)
class _Head:
    meta: dict[str, object]
    parts: tuple[_Part, ...]


# -- writing


def write_snapshot(path: Path, snapshot: SnapshotParts) -> None:
    """Write *snapshot* to the new file *path* and wait until the disk has it.

    Args:
        path: Must not exist. The caller gives the file its final name, and removes it if this raises.

    Raises:
        OSError: As the system says it, a full disk for example.
        TypeError, ValueError, OverflowError: *snapshot* holds what cannot be written. No file is made.
    """
    parts = [_flat(part) for part in snapshot.parts]
    *offsets, end = _offsets([len(part) for part in parts])
    head = _head_bytes(snapshot.meta, parts, offsets, [bytes(DIGEST_SIZE)] * len(parts))
    start = _aligned(len(head))
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "wb", buffering=0) as file:
        target = file.fileno()
        digests = [_write_part(target, part, start + offset) for part, offset in zip(parts, offsets, strict=True)]
        _write_at(target, memoryview(END), start + end)
        _write_at(target, memoryview(_head_bytes(snapshot.meta, parts, offsets, digests)), 0)
        hit("store.after_header")
        hit("store.before_fsync")
        sync_to_disk(target)


def sync_to_disk(descriptor: int) -> None:
    """Return when the file's content has reached the disk itself."""
    full = getattr(fcntl, "F_FULLFSYNC", None)
    if full is None:
        os.fsync(descriptor)
        return
    try:
        fcntl.fcntl(descriptor, full)  # macOS: fsync alone leaves it in the drive's cache
    except OSError:
        os.fsync(descriptor)  # a file system that has no F_FULLFSYNC, a network one for example


def _flat(part: Buffer) -> memoryview:
    view = memoryview(part)
    # An empty view cannot be cast when its shape has a zero in it.
    return view.cast("B") if view.nbytes else memoryview(b"")


def _aligned(position: int) -> int:
    return -(-position // ALIGNMENT) * ALIGNMENT


def _offsets(lengths: Sequence[int]) -> Iterator[int]:
    """Yield where each part begins, counted from the first, and at last where the end marker does."""
    end = 0
    for length in lengths:
        begin = _aligned(end)
        yield begin
        end = begin + length
    yield end


def _head_bytes(meta: object, parts: Sequence[memoryview], offsets: Sequence[int], digests: Sequence[bytes]) -> bytes:
    rows = zip(offsets, parts, digests, strict=True)
    table = [[offset, len(part), digest] for offset, part, digest in rows]
    header = _packed({"meta": meta, "parts": table})
    if len(header) > MAX_HEADER:
        raise ValueError(f"a snapshot's header may have {MAX_HEADER} bytes, and this one has {len(header)}")
    content = PRELUDE.pack(MAGIC, VERSION, len(header)) + header
    return content + hashlib.sha256(content).digest()


def _write_part(target: int, part: memoryview, offset: int) -> bytes:
    digest = hashlib.sha256()
    for begin in range(0, len(part), CHUNK):
        chunk = part[begin : begin + CHUNK]
        digest.update(chunk)
        _write_at(target, chunk, offset + begin)
        hit("store.mid_part")
    return digest.digest()


def _write_at(target: int, content: memoryview, offset: int) -> None:
    """Write all of *content*; the system may take it in several pieces."""
    while content:
        written = os.pwrite(target, content, offset)
        content = content[written:]
        offset += written


def _packed(value: object) -> bytes:
    # Names of files may hold what is no UTF-8, as lone surrogates.
    packed: bytes = msgpack.packb(value, unicode_errors="surrogatepass")
    return packed


# -- reading


class StoredSnapshot:
    """A snapshot in a file, open for reading. It stays readable when a newer one takes its place.

    The file is closed by `close`, by the end of a ``with`` block, or with the object.

    Attributes:
        path: The file.
        generation: Its number within its run.
        meta: What the writer was given as meta.
    """

    def __init__(self, path: Path, generation: int, source: int, head: _Head) -> None:
        self.path = path
        self.generation = generation
        self.meta = head.meta
        self._parts = head.parts
        self._source = source
        self._closer = weakref.finalize(self, os.close, source)

    @classmethod
    def open(cls, path: Path, generation: int) -> StoredSnapshot:
        """Open the snapshot and check its header and its length, which takes no longer for a large one.

        Raises:
            SnapshotDamaged: It is no whole snapshot. The content of its parts is left to `verify` and `read_into`.
        """
        try:
            # Without O_NONBLOCK, a named pipe under this name would hold us here for ever.
            source = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError as error:
            raise SnapshotDamaged(path, "file", f"it cannot be opened ({error.strerror})") from error
        try:
            head = _HeadReader(path, source).read()
        except BaseException:
            os.close(source)
            raise
        return cls(path, generation, source, head)

    def part_lengths(self) -> tuple[int, ...]:
        """Return each part's length in bytes."""
        return tuple(part.length for part in self._parts)

    def read_into(self, index: int, target: memoryview) -> None:
        """Fill *target* with part *index*.

        Args:
            target: Writable, contiguous and exactly as long as the part. When this raises, it holds no usable content.

        Raises:
            SnapshotDamaged: The part is not what was written.
            ValueError: *target* has another length, or the snapshot is closed.
        """
        room = _flat(target)
        if len(room) != self._parts[index].length:
            raise ValueError(f"part {index} has {self._parts[index].length} bytes and the target {len(room)}")
        self._read(index, lambda begin, length: room[begin : begin + length])

    def verify(self) -> None:
        """Read every part and compare its digest; about a second for each GB.

        Raises:
            SnapshotDamaged: A part is not what was written.
        """
        scratch = memoryview(bytearray(min(CHUNK, max(self.part_lengths(), default=0))))
        for index in range(len(self._parts)):
            self._read(index, lambda begin, length: scratch[:length])

    def _read(self, index: int, room: Callable[[int, int], memoryview]) -> None:
        """Read part *index* in chunks, each into the memory that *room* gives for its begin and length."""
        if not self._closer.alive:  # its descriptor may by now be another file's
            raise ValueError(f"snapshot {self.path} is closed")
        part = self._parts[index]
        digest = hashlib.sha256()
        for begin in range(0, part.length, CHUNK):
            chunk = room(begin, min(CHUNK, part.length - begin))
            _read_at(self.path, f"part {index}", self._source, chunk, part.offset + begin)
            digest.update(chunk)
        if digest.digest() != part.digest:
            raise SnapshotDamaged(self.path, f"part {index}", "its content is not what was written")

    def close(self) -> None:
        """Close the file. Reading is over; a second call does nothing."""
        self._closer()

    def __enter__(self) -> StoredSnapshot:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _HeadReader:
    """Reads and checks everything but the parts of one file."""

    def __init__(self, path: Path, source: int) -> None:
        self._path = path
        self._source = source

    def read(self) -> _Head:
        state = os.fstat(self._source)
        if not stat.S_ISREG(state.st_mode):
            raise self._damage("file", "it is no regular file")
        content = self._header(state.st_size)
        header = self._unpacked(content)
        start = _aligned(PRELUDE.size + len(content) + DIGEST_SIZE)
        parts = tuple(self._parts(header["parts"], start))
        end = parts[-1].offset + parts[-1].length if parts else start
        self._check_end(end, state.st_size)
        return _Head(header["meta"], parts)

    def _header(self, file_size: int) -> bytearray:
        """Return the header's bytes after the checks that need no understanding of it."""
        if file_size < PRELUDE.size:
            raise self._damage("file", f"it has only {file_size} bytes")
        prelude = self._bytes(PRELUDE.size, 0)
        magic, version, length = PRELUDE.unpack(prelude)
        if magic != MAGIC:
            raise self._damage(
                "file", "it does not begin like a snapshot; its writing was cut short, or it is something else"
            )
        if version > VERSION:
            raise self._damage(
                "file",
                f"it has format {version} and this spark-runtime knows {VERSION}; "
                "upgrade spark-runtime to the version that wrote it",
            )
        if version < VERSION:
            raise self._damage("file", f"it has format {version}, which never was")
        if length > min(MAX_HEADER, file_size - PRELUDE.size - DIGEST_SIZE):
            raise self._damage("header", f"it claims {length} bytes in a file of {file_size}")
        header = self._bytes(length, PRELUDE.size)
        digest = hashlib.sha256(prelude)
        digest.update(header)
        if digest.digest() != bytes(self._bytes(DIGEST_SIZE, PRELUDE.size + length)):
            raise self._damage("header", "its content is not what was written")
        return header

    def _unpacked(self, content: bytearray) -> _Header:
        try:
            header: object = msgpack.unpackb(content, strict_map_key=False, unicode_errors="surrogatepass")
        except (ValueError, TypeError, OverflowError, msgpack.UnpackException) as error:
            raise SnapshotDamaged(self._path, "header", f"it is no msgpack ({error})") from error
        if isinstance(header, dict) and header.keys() == {"meta", "parts"}:
            meta, parts = header["meta"], header["parts"]
            if isinstance(meta, dict) and isinstance(parts, list):
                return {"meta": meta, "parts": parts}
        raise self._damage("header", "it has not the fields of a snapshot")

    def _parts(self, table: list[object], start: int) -> Iterator[_Part]:
        """Yield the parts; each must be just where the lengths before it say."""
        end = 0
        for index, row in enumerate(table):
            match row:
                case [int(offset), int(length), bytes(digest)] if offset == _aligned(end) and length >= 0:
                    yield _Part(start + offset, length, digest)
                    end = offset + length
                case _:
                    raise self._damage("header", f"its entry for part {index} makes no sense")

    def _check_end(self, end: int, file_size: int) -> None:
        if file_size != end + len(END):
            raise self._damage("end", f"the file has {file_size} bytes in place of {end + len(END)}")
        if self._bytes(len(END), end) != END:
            raise self._damage("end", "the end marker is missing")

    def _bytes(self, length: int, offset: int) -> bytearray:
        room = bytearray(length)
        _read_at(self._path, "header", self._source, memoryview(room), offset)
        return room

    def _damage(self, where: str, problem: str) -> SnapshotDamaged:
        return SnapshotDamaged(self._path, where, problem)


def _read_at(path: Path, where: str, source: int, room: memoryview, offset: int) -> None:
    """Fill *room* from *offset* on; the system may give it in several pieces."""
    while room:
        try:
            count = os.preadv(source, [room], offset)
        except OSError as error:  # a bad sector harms this snapshot and no other
            raise SnapshotDamaged(path, where, f"the disk cannot read it ({error.strerror})") from error
        if not count:
            raise SnapshotDamaged(path, where, "the file ends before it")
        room = room[count:]
        offset += count
