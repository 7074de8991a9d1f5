"""Reads zip archives that may have been made to do harm.

`zipfile` believes the archive: it finds the directory by searching, takes sizes as they are told, expands what it is
asked to, and lets two entries share their bytes, so that 40 kB become terabytes. This reader knows only what models
need (entries that are stored or deflated, in one file) and refuses everything else with one sentence.

* The directory is read once, from where the end of the archive says it is, and must fill exactly the room up to it.
* Every entry has its own bytes: header and data of no two of them overlap, and none reaches into the directory.
* An entry expands into at most what it announced, which was checked against the limits before.
* Names are plain relative paths. Nothing is ever written to disk, but whoever does it later should be safe, too.
"""

import stat
import struct
import unicodedata
import zlib
from dataclasses import dataclass

MAGIC = b"PK\x03\x04"

_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR64 = struct.Struct("<4sLQL")
_DIRECTORY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF
_LONGEST_COMMENT = 0xFFFF

_ENCRYPTED, _STRONG, _MASKED, _PATCH, _UTF8, _FOLLOWS = 1 << 0, 1 << 6, 1 << 13, 1 << 5, 1 << 11, 1 << 3
_STORED, _DEFLATED = 0, 8
_METHODS = {1: "shrink", 6: "implode", 9: "deflate64", 12: "bzip2", 14: "lzma", 93: "zstd", 95: "xz", 98: "ppmd"}
_SHOWN = 100
_LONGEST_NAME = 1000


class ArchiveRefused(ValueError):
    """An archive that is damaged, or that one does not want to read. The message is a sentence without a subject."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What an archive may have at most.

    Attributes:
        entries: Files and folders in it.
        total: Bytes of all entries, expanded.
        one: Bytes of one entry, expanded.
        ratio: How many times its size an entry may expand, if it is larger than `small`. Deflate reaches 1032.
        small: Bytes up to which the ratio does not matter.
        depth: Folders inside of each other.
    """

    entries: int = 2000
    total: int = 1 << 30
    one: int = 512 << 20
    ratio: int = 200
    small: int = 1 << 20
    depth: int = 16


@dataclass(frozen=True, slots=True)
class _Entry:
    name: str
    method: int
    crc: int
    packed: int
    size: int
    begin: int  # of its data


class Archive:
    """The files of a zip archive, by their paths. Folders, and what macOS adds in ``__MACOSX``, are left out."""

    def __init__(self, data: bytes, limits: Limits | None = None) -> None:
        """Read the directory of the archive *data*.

        Raises:
            ArchiveRefused: It is damaged, or more or other than it may be.
        """
        self._data = data
        self._limits = limits or Limits()
        self._entries = _Directory(data, self._limits).read()

    @property
    def names(self) -> list[str]:
        """Paths of all files, in the order of the directory, with ``/`` between folders."""
        return list(self._entries)

    def size(self, name: str) -> int:
        """Bytes of the file *name*, which is one of `names`."""
        return self._entries[name].size

    def read(self, name: str) -> bytes:
        """Return the content of the file *name*, which is one of `names`.

        Raises:
            ArchiveRefused: It does not expand into what was announced.
        """
        entry = self._entries[name]
        packed = memoryview(self._data)[entry.begin : entry.begin + entry.packed]
        content = bytes(packed) if entry.method == _STORED else _inflated(entry, packed)
        if zlib.crc32(content) != entry.crc:
            raise ArchiveRefused(f"its entry {_quoted(name)} is damaged: the checksum is wrong")
        return content


def _inflated(entry: _Entry, packed: memoryview) -> bytes:
    """Expand, by one byte more than was announced at most: only in this way one learns that there is more."""
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        content = inflater.decompress(packed, entry.size + 1)
    except zlib.error as problem:
        raise ArchiveRefused(f"its entry {_quoted(entry.name)} is damaged: {problem}") from problem
    if len(content) > entry.size:
        raise ArchiveRefused(f"its entry {_quoted(entry.name)} is larger than the {entry.size} bytes it announces")
    if len(content) < entry.size or not inflater.eof or inflater.unused_data:
        raise ArchiveRefused(f"its entry {_quoted(entry.name)} is damaged: it does not end where it says")
    return content


class _Directory:
    """Reads the directory, and checks every entry of it before the first is expanded."""

    def __init__(self, data: bytes, limits: Limits) -> None:
        self._data = data
        self._limits = limits
        self._total = 0
        self._begin = self._end = 0  # of the directory
        self._taken: list[tuple[int, int, str]] = []
        self._seen: dict[str, str] = {}

    def read(self) -> dict[str, _Entry]:
        count = self._find()
        found: dict[str, _Entry] = {}
        at = self._begin
        for _ in range(count):
            entry, at = self._entry(at)
            if entry is not None:
                found[entry.name] = entry
        if at != self._end:
            raise ArchiveRefused(f"its directory is damaged: it has other entries than the {count} it announces")
        self._check_overlap()
        return found

    # --- the end, which says where the directory is ---

    def _find(self) -> int:
        """Set where the directory lies, and return how many entries it announces."""
        at = self._find_end()
        _, disk, first, here, count, size, offset, _ = _END.unpack_from(self._data, at)
        if _FULL16 in (disk, first, here, count) or _FULL32 in (size, offset):
            at, (disk, first, here, count, size, offset) = self._find_end64(at)
        if disk or first or here != count:
            raise ArchiveRefused("it is one part of an archive of several files; give it as one")
        if count > self._limits.entries:
            raise ArchiveRefused(f"it has {count} entries, more than the {self._limits.entries} that are allowed")
        if offset + size != at:
            raise ArchiveRefused("it is damaged: its directory is not where its end says it is")
        self._begin, self._end = offset, at
        return int(count)

    def _find_end(self) -> int:
        lowest = max(0, len(self._data) - _END.size - _LONGEST_COMMENT)
        at = len(self._data)
        while True:
            at = self._data.rfind(b"PK\x05\x06", lowest, at)
            if at < 0:
                begins = "it begins as one but its end is missing" if self._data[:4] == MAGIC else "it has no directory"
                raise ArchiveRefused(f"it is no complete zip archive: {begins}; build or copy it again")
            comment = int.from_bytes(self._data[at + 20 : at + 22], "little")
            if at + _END.size + comment == len(self._data):
                return at

    def _find_end64(self, end: int) -> tuple[int, tuple[int, ...]]:
        locator = end - _LOCATOR64.size
        if locator < 0 or self._data[locator : locator + 4] != b"PK\x06\x07":
            raise ArchiveRefused("it is damaged: it announces a larger directory (zip64) and has none")
        _, disk, at, disks = _LOCATOR64.unpack_from(self._data, locator)
        if disk or disks != 1 or at + _END64.size > locator or self._data[at : at + 4] != b"PK\x06\x06":
            raise ArchiveRefused("it is damaged: its larger directory (zip64) is not where it says")
        _, size, _, _, number, first, here, count, length, offset = _END64.unpack_from(self._data, at)
        if at + 12 + size != locator:
            raise ArchiveRefused("it is damaged: its larger directory (zip64) has another size than it says")
        return at, (number, first, here, count, length, offset)

    # --- one entry ---

    def _entry(self, at: int) -> tuple[_Entry | None, int]:
        """Return the entry that is described at *at*, None for one to leave out, and where the next one is."""
        if at + _DIRECTORY.size > self._end or self._data[at : at + 4] != b"PK\x01\x02":
            raise ArchiveRefused("its directory is damaged: an entry does not begin as one does")
        fields = _DIRECTORY.unpack_from(self._data, at)
        _, _, _, flags, method, _, _, crc, packed, size, *lengths, disk, _, attributes, offset = fields
        name_at = at + _DIRECTORY.size
        extra_at = name_at + lengths[0]
        after = extra_at + lengths[1] + lengths[2]
        if after > self._end:
            raise ArchiveRefused("its directory is damaged: an entry is longer than the directory")
        raw = self._data[name_at:extra_at]
        name = _checked_name(raw, flags, self._limits.depth)
        extra = self._data[extra_at : extra_at + lengths[1]]
        size, packed, offset, disk = _widened(name, extra, size, packed, offset, disk)
        if disk:
            raise ArchiveRefused(f"its entry {_quoted(name)} is in another file of the archive; give it as one")
        _check_kind(name, flags, method, attributes >> 16, packed, size)
        begin = self._take(name, raw, flags, method, offset, packed)
        self._check_size(name, packed, size)
        self._check_twice(name)
        if name.endswith("/"):
            if size:
                raise ArchiveRefused(f"its entry {_quoted(name)} is a folder with content")
            return None, after
        if "__MACOSX" in name:
            return None, after
        return _Entry(name, method, crc, packed, size, begin), after

    def _take(self, name: str, raw: bytes, flags: int, method: int, offset: int, packed: int) -> int:
        """Compare the entry's own header with the directory, remember which bytes it takes, return where data begin."""
        if offset + _LOCAL.size > self._begin or self._data[offset : offset + 4] != MAGIC:
            raise ArchiveRefused(f"its entry {_quoted(name)} is not where the directory says")
        _, _, own_flags, own_method, *_, name_length, extra_length = _LOCAL.unpack_from(self._data, offset)
        name_at = offset + _LOCAL.size
        begin = name_at + name_length + extra_length
        if self._data[name_at : name_at + name_length] != raw or own_method != method:
            raise ArchiveRefused(f"its entry {_quoted(name)} says something else of itself than the directory does")
        if (own_flags ^ flags) & (_ENCRYPTED | _STRONG | _MASKED):
            raise ArchiveRefused(f"its entry {_quoted(name)} is encrypted only in one of two places")
        if begin + packed > self._begin:
            raise ArchiveRefused(f"its entry {_quoted(name)} reaches over its end")
        self._taken.append((offset, begin + packed, name))
        return int(begin)

    def _check_size(self, name: str, packed: int, size: int) -> None:
        limits = self._limits
        if size > limits.one:
            raise ArchiveRefused(f"its entry {_quoted(name)} has {size} bytes, more than the {limits.one} allowed")
        if size > limits.small and size > packed * limits.ratio:
            how = f"more than {limits.ratio} times, from {packed} to {size} bytes"
            raise ArchiveRefused(f"its entry {_quoted(name)} expands {how}")
        self._total += size
        if self._total > limits.total:
            raise ArchiveRefused(f"it expands to more than the {limits.total} bytes that are allowed")

    def _check_twice(self, name: str) -> None:
        """Refuse names that are one on some file system. They say different things to different readers."""
        key = unicodedata.normalize("NFC", name.rstrip("/")).casefold()
        if key in self._seen:
            raise ArchiveRefused(f"it has two entries of one name: {_quoted(self._seen[key])} and {_quoted(name)}")
        self._seen[key] = name

    def _check_overlap(self) -> None:
        self._taken.sort()
        for (_, end, first), (begin, _, second) in zip(self._taken, self._taken[1:], strict=False):
            if begin < end:
                raise ArchiveRefused(f"its entries {_quoted(first)} and {_quoted(second)} share bytes")


def _checked_name(raw: bytes, flags: int, depth: int) -> str:
    if not raw or len(raw) > _LONGEST_NAME:
        raise ArchiveRefused(f"it has an entry with a name of {len(raw)} bytes")
    try:
        name = raw.decode()
    except UnicodeDecodeError:
        if flags & _UTF8:
            raise ArchiveRefused("it has an entry whose name is not the UTF-8 it says it is") from None
        name = raw.decode("cp437")  # what zip was made with
    why = _why_not(name, depth)
    if why:
        raise ArchiveRefused(f"it has an entry {_quoted(name)}: {why}")
    return name


def _why_not(name: str, depth: int) -> str:
    """Return what is wrong with a name; nothing if it is a plain relative path."""
    if any(unicodedata.category(each) in ("Cc", "Cs", "Zl", "Zp") for each in name):
        return "a name must not have control characters"
    if "\\" in name:
        return "a name must not have backslashes"
    parts = name.rstrip("/").split("/")
    if name.startswith("/") or (len(parts[0]) > 1 and parts[0][1] == ":"):
        return "a path must be relative"
    if ".." in parts:
        return "a path must not lead upwards"
    if "." in parts or "" in parts:
        return "a path must be written in its shortest form"
    if len(parts) > depth:
        return f"it is more than {depth} folders deep"
    return ""


def _widened(name: str, extra: bytes, *fields: int) -> tuple[int, int, int, int]:
    """Replace those of size, packed size, offset and disk that say "too large for me" by the values in *extra*."""
    limits = (_FULL32, _FULL32, _FULL32, _FULL16)
    wanted = [each == limit for each, limit in zip(fields, limits, strict=True)]
    found = list(fields)
    at = 0
    done = not any(wanted)
    while at + 4 <= len(extra) and not done:
        number, length = struct.unpack_from("<2H", extra, at)
        part = extra[at + 4 : at + 4 + length]
        at += 4 + length
        if number != 1:
            continue
        place = 0
        for index, is_wanted in enumerate(wanted):
            width = 4 if index == 3 else 8
            if not is_wanted:
                continue
            if place + width > len(part):
                raise ArchiveRefused(f"its entry {_quoted(name)} announces larger sizes (zip64) and has none")
            found[index] = int.from_bytes(part[place : place + width], "little")
            place += width
        done = True
    if not done:
        raise ArchiveRefused(f"its entry {_quoted(name)} announces larger sizes (zip64) and has none")
    return found[0], found[1], found[2], found[3]


def _check_kind(name: str, flags: int, method: int, mode: int, packed: int, size: int) -> None:
    if flags & (_ENCRYPTED | _STRONG | _MASKED):
        raise ArchiveRefused(f"its entry {_quoted(name)} is encrypted; make the archive without a password")
    if flags & _PATCH or method not in (_STORED, _DEFLATED):
        how = _METHODS.get(method, f"method {method}")
        raise ArchiveRefused(f"its entry {_quoted(name)} is compressed with {how}; make the archive with deflate")
    if method == _STORED and packed != size:
        raise ArchiveRefused(f"its entry {_quoted(name)} is stored and has two sizes: {packed} and {size}")
    kind = stat.S_IFMT(mode)  # 0 if it was not made on Unix
    if kind == stat.S_IFLNK:
        raise ArchiveRefused(f"its entry {_quoted(name)} is a link; put the file itself there")
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise ArchiveRefused(f"its entry {_quoted(name)} is neither a file nor a folder")


def _quoted(name: str) -> str:
    shown = name if len(name) <= _SHOWN else name[:_SHOWN] + "…"
    return ascii(shown)
