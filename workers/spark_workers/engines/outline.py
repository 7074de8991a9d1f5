"""Reads the outline of a WASM module without an engine: imports, exports with their types, memories, names.

An engine cannot be asked instead. Types outside of the first version of WASM (v128, typed references) have no place in
the C interface of wasmtime: asking for the type of an export that takes one ends the process. And what a module imports
is worth knowing before a compile that may take seconds.

Nothing is trusted here: every length is checked against what is left, every count against a limit, and whatever does
not fit is `OutlineUnreadable`. Code and data are passed over, not read.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from spark_workers.engines.seam import Extern

MAGIC = b"\0asm"
MODULE = b"\x01\0\0\0"
COMPONENT = b"\x0d\0\x01\0"
MAX_ITEMS = 1_000_000  # of one kind; as many as the engines' own readers allow
MAX_NAME = 100_000

_CUSTOM, _TYPES, _IMPORTS, _FUNCTIONS, _TABLES, _MEMORIES, _GLOBALS, _EXPORTS = 0, 1, 2, 3, 4, 5, 6, 7
_TAGS = 13
_KINDS = ("function", "table", "memory", "global", "tag")

_NUMBERS = {0x7F: "i32", 0x7E: "i64", 0x7D: "f32", 0x7C: "f64", 0x7B: "v128", 0x78: "i8", 0x77: "i16"}
_HEAPS = {
    0x70: "func",
    0x6F: "extern",
    0x6E: "any",
    0x6D: "eq",
    0x6C: "i31",
    0x6B: "struct",
    0x6A: "array",
    0x71: "none",
    0x72: "noextern",
    0x73: "nofunc",
    0x69: "exn",
    0x74: "noexn",
    0x68: "cont",
    0x75: "nocont",
}
_UNKNOWN = "?"


class OutlineUnreadable(ValueError):
    """The bytes are no module, or use a part of the format that is not known here. The message says where."""


@dataclass(slots=True)
class Memory:
    """One memory, in pages of 64 KiB unless it says otherwise. No *maximum*: it may grow as far as its limit."""

    minimum: int
    maximum: int | None
    is_imported: bool = False
    is_64: bool = False
    is_shared: bool = False


@dataclass(slots=True)
class Outline:
    """What a module says about itself."""

    imports: list[Extern] = field(default_factory=list)
    exports: list[Extern] = field(default_factory=list)
    memories: list[Memory] = field(default_factory=list)
    names: dict[int, str] = field(default_factory=dict)  # of exported functions, by their index
    has_names: bool = False


def read_outline(wasm: bytes) -> Outline:
    """Return the outline of the module *wasm*.

    Raises:
        OutlineUnreadable: It has none that can be read.
    """
    if wasm[:8] != MAGIC + MODULE:
        raise OutlineUnreadable("it does not begin as a WASM module does")
    return _Sections(wasm).read()


def signature_of(text: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the types of parameters and results from a function's type, such as ``(i32, i32) -> i64``."""
    before, _, after = text.partition(" -> ")
    return _listed(before), _listed(after)


def _listed(text: str) -> tuple[str, ...]:
    inner = text[1:-1] if text.startswith("(") and not text.startswith("(ref") else text
    return tuple(inner.split(", ")) if inner else ()


def _written(types: list[str]) -> str:
    return types[0] if len(types) == 1 else f"({', '.join(types)})"


class _Reader:
    """A place in the bytes, which only moves forward and never past *end*."""

    def __init__(self, data: bytes, at: int, end: int) -> None:
        self._data = data
        self.at = at
        self.end = end

    def byte(self) -> int:
        if self.at >= self.end:
            raise OutlineUnreadable(f"it ends too early, at byte {self.at}")
        self.at += 1
        return self._data[self.at - 1]

    def peek(self) -> int:
        value = self.byte()
        self.at -= 1
        return value

    def skip(self, length: int) -> None:
        if length > self.end - self.at:
            raise OutlineUnreadable(f"at byte {self.at} it announces {length} bytes and has {self.end - self.at}")
        self.at += length

    def take(self, length: int) -> bytes:
        self.skip(length)
        return self._data[self.at - length : self.at]

    def number(self, bits: int = 32) -> int:
        """An unsigned LEB128 number."""
        value, _, _ = self._leb128(bits)
        if value >> bits:
            raise OutlineUnreadable(f"at byte {self.at} a number is too large")
        return value

    def signed(self, bits: int = 33) -> int:
        """A signed LEB128 number."""
        value, shift, last = self._leb128(bits)
        return value - (1 << shift) if last & 0x40 else value

    def _leb128(self, bits: int) -> tuple[int, int, int]:
        """Return the bits of a number, how many there were, and the last byte, which has the sign."""
        value = shift = 0
        while True:
            byte = self.byte()
            value |= (byte & 0x7F) << shift
            shift += 7
            if not byte & 0x80:
                return value, shift, byte
            if shift >= bits + 7:
                raise OutlineUnreadable(f"at byte {self.at} a number is too long")

    def count(self) -> int:
        """How many items follow. Each takes a byte at least, so that a count is never more than the bytes left."""
        value = self.number()
        if value > MAX_ITEMS or value > self.end - self.at:
            raise OutlineUnreadable(f"at byte {self.at} it announces {value} items")
        return value

    def name(self) -> str:
        length = self.number()
        if length > MAX_NAME:
            raise OutlineUnreadable(f"at byte {self.at} a name has {length} bytes")
        try:
            return self.take(length).decode()
        except UnicodeDecodeError as problem:
            raise OutlineUnreadable(f"at byte {self.at} a name is not UTF-8") from problem


class _Sections:
    """Reads section after section; index spaces grow as the module declares them."""

    def __init__(self, wasm: bytes) -> None:
        self._data = wasm
        self._outline = Outline()
        self._types: list[str] = []
        self._spaces: dict[str, list[str]] = {kind: [] for kind in _KINDS}

    def read(self) -> Outline:
        whole = _Reader(self._data, 8, len(self._data))
        readers: dict[int, Callable[[_Reader], None]] = {
            _CUSTOM: self._custom,
            _TYPES: self._read_types,
            _IMPORTS: self._read_imports,
            _FUNCTIONS: self._read_functions,
            _TABLES: self._read_tables,
            _MEMORIES: self._read_memories,
            _GLOBALS: self._read_globals,
            _EXPORTS: self._read_exports,
            _TAGS: self._read_tags,
        }
        while whole.at < whole.end:
            number, size = whole.byte(), whole.number()
            begin = whole.at
            whole.skip(size)
            if number in readers:
                readers[number](_Reader(self._data, begin, whole.at))
        return self._outline

    # --- sections ---

    def _custom(self, reader: _Reader) -> None:
        self._outline.has_names = self._outline.has_names or reader.name() == "name"

    def _read_types(self, reader: _Reader) -> None:
        for _ in range(reader.count()):
            if reader.peek() == 0x4E:  # a group of types that may refer to each other
                reader.byte()
                for _ in range(reader.count()):
                    self._types.append(_type(reader))
            else:
                self._types.append(_type(reader))
            if len(self._types) > MAX_ITEMS:
                raise OutlineUnreadable(f"it has more than {MAX_ITEMS} types")

    def _read_imports(self, reader: _Reader) -> None:
        for _ in range(reader.count()):
            module, name, number = reader.name(), reader.name(), reader.byte()
            kind = _kind(number)
            text = self._import_type(reader, kind)
            self._spaces[kind].append(text)
            self._outline.imports.append(Extern(module, name, kind, text))

    def _import_type(self, reader: _Reader, kind: str) -> str:
        if kind == "function":
            return self._type_at(reader.number())
        if kind == "table":
            return _table(reader)
        if kind == "memory":
            return self._memory(reader, is_imported=True)
        if kind == "global":
            return _global(reader)
        return self._tag(reader)

    def _read_functions(self, reader: _Reader) -> None:
        self._spaces["function"] += [self._type_at(reader.number()) for _ in range(reader.count())]

    def _read_tables(self, reader: _Reader) -> None:
        for _ in range(reader.count()):
            has_value = reader.peek() == 0x40
            if has_value:
                reader.take(2)
            self._spaces["table"].append(_table(reader))
            if has_value and not _skip_expression(reader):
                self._give_up("table", reader)
                return

    def _read_memories(self, reader: _Reader) -> None:
        for _ in range(reader.count()):
            self._spaces["memory"].append(self._memory(reader, is_imported=False))

    def _read_globals(self, reader: _Reader) -> None:
        for _ in range(reader.count()):
            self._spaces["global"].append(_global(reader))
            if not _skip_expression(reader):
                self._give_up("global", reader)
                return

    def _give_up(self, kind: str, reader: _Reader) -> None:
        """A first value that is computed in a way not known here: of the items after it the types stay unknown."""
        self._spaces[kind] += [_UNKNOWN] * min(reader.end - reader.at, MAX_ITEMS)

    def _read_exports(self, reader: _Reader) -> None:
        for _ in range(reader.count()):
            name, kind, index = reader.name(), _kind(reader.byte()), reader.number()
            space = self._spaces[kind]
            if index >= len(space):
                raise OutlineUnreadable(f"it exports {kind} {index}, of {len(space)}")
            self._outline.exports.append(Extern("", name, kind, space[index]))
            if kind == "function":
                self._outline.names.setdefault(index, name)

    def _read_tags(self, reader: _Reader) -> None:
        for _ in range(reader.count()):
            self._spaces["tag"].append(self._tag(reader))

    # --- what they are made of ---

    def _type_at(self, index: int) -> str:
        if index >= len(self._types):
            raise OutlineUnreadable(f"it uses type {index}, of {len(self._types)}")
        return self._types[index]

    def _tag(self, reader: _Reader) -> str:
        reader.byte()
        return self._type_at(reader.number())

    def _memory(self, reader: _Reader, is_imported: bool) -> str:
        flags, minimum, maximum = _limits(reader)
        if flags & 8:
            reader.number()  # a page size of its own, as a power of two
        self._outline.memories.append(Memory(minimum, maximum, is_imported, bool(flags & 4), bool(flags & 2)))
        return f"{'i64 ' if flags & 4 else ''}{_range(minimum, maximum)} pages{' shared' if flags & 2 else ''}"


def _kind(number: int) -> str:
    if number >= len(_KINDS):
        raise OutlineUnreadable(f"it has an import or export of the unknown kind {number}")
    return _KINDS[number]


def _range(minimum: int, maximum: int | None) -> str:
    return f"{minimum} or more" if maximum is None else f"{minimum} to {maximum}"


def _limits(reader: _Reader) -> tuple[int, int, int | None]:
    flags = reader.byte()
    if flags > 15:
        raise OutlineUnreadable(f"at byte {reader.at} limits have the unknown flags {flags}")
    minimum = reader.number(64)
    return flags, minimum, reader.number(64) if flags & 1 else None


def _table(reader: _Reader) -> str:
    element = _value_type(reader)
    _, minimum, maximum = _limits(reader)
    return f"{_range(minimum, maximum)} {element}"


def _global(reader: _Reader) -> str:
    value, changes = _value_type(reader), reader.byte() & 1
    return f"mut {value}" if changes else value


def _type(reader: _Reader) -> str:
    """One type of the type section: functions as text, others by their form, since nothing can be called with them."""
    form = reader.byte()
    if form in (0x50, 0x4F):  # a subtype, open or final, and what it extends
        for _ in range(reader.count()):
            reader.number()
        form = reader.byte()
    if form == 0x65:  # shared
        form = reader.byte()
    if form == 0x60:
        params = [_value_type(reader) for _ in range(reader.count())]
        results = [_value_type(reader) for _ in range(reader.count())]
        return f"({', '.join(params)}) -> {_written(results)}"
    if form == 0x5F:
        for _ in range(reader.count()):
            _global(reader)
        return "struct"
    if form == 0x5E:
        _global(reader)
        return "array"
    if form == 0x5D:
        reader.signed()
        return "continuation"
    raise OutlineUnreadable(f"at byte {reader.at} there is a type of the unknown form {form:#x}")


def _value_type(reader: _Reader) -> str:
    code = reader.byte()
    if code in _NUMBERS:
        return _NUMBERS[code]
    if code in (0x64, 0x63):
        return f"(ref {'null ' if code == 0x63 else ''}{_heap_type(reader)})"
    if code in _HEAPS:
        return f"{_HEAPS[code]}ref"
    raise OutlineUnreadable(f"at byte {reader.at} there is the unknown type {code:#x}")


def _heap_type(reader: _Reader) -> str:
    if reader.peek() == 0x65:
        reader.byte()
    value = reader.signed()
    if value >= 0:
        return str(value)
    return _HEAPS.get(value & 0x7F, _UNKNOWN)


def _skip_expression(reader: _Reader) -> bool:
    """Pass over the expression for a first value; tell whether all of it is known here."""
    while True:
        code = reader.byte()
        if code == 0x0B:
            return True
        if code == 0x41:
            reader.signed(32)
        elif code == 0x42:
            reader.signed(64)
        elif code == 0x43:
            reader.take(4)
        elif code == 0x44:
            reader.take(8)
        elif code in (0x23, 0xD2):
            reader.number()
        elif code == 0xD0:
            _heap_type(reader)
        elif code in (0x6A, 0x6B, 0x6C, 0x7C, 0x7D, 0x7E):
            pass  # the sum, difference and product of two numbers
        elif code == 0xFD and reader.number() == 12:
            reader.take(16)
        else:
            return False
