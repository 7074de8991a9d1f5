"""What a C++ exception says of itself: its type, from the type information, and its text, where there is one.

A model that throws and catches nothing ends in the host, which knows two addresses. Types are found by walking from a
class to its base: both begin with a name. The text of the standard exceptions is a string with a count of references,
whose length is written in front of it; so it is recognised wherever it lies in the object, also in classes that are
derived or hold such an exception.
"""

import re

from spark_workers.hosts.emscripten.memory import Heap
from spark_workers.hosts.failures import GuestFailed

_LONGEST = 2000
_DEEPEST = 8
_OBJECT = 64  # bytes of an exception in which its text is looked for
_NAME = re.compile(rb"[A-Za-z0-9_]{1,300}\Z")
_STRING = "NSt3__212basic_stringIcNS_11char_traitsIcEENS_9allocatorIcEEEE"
_STRINGS = (_STRING, _STRING.replace("__2", "__1"))
_LONG = 0x80

_BUILTIN = {"i": "int", "j": "unsigned int", "l": "long", "m": "unsigned long", "b": "bool", "c": "char", "d": "double"}
_BUILTIN.update({"x": "long long", "y": "unsigned long long", "f": "float", "PKc": "const char*", "Pc": "char*"})


def describe(heap: Heap, thrown: int, type_info: int) -> tuple[str, str]:
    """Return type and text of an exception; what cannot be read is empty."""
    names = _names(heap, type_info)
    return (_readable(names[0]) if names else ""), _text(heap, thrown, names)


def _names(heap: Heap, type_info: int) -> list[str]:
    """Return the mangled names of a class and of its bases, as far as there is one base each."""
    names: list[str] = []
    while len(names) < _DEEPEST:
        name = _name(heap, type_info)
        if not name:
            break
        names.append(name)
        if not name[0].isdigit() and name[0] not in "NS":
            break  # no class
        type_info = _word(heap, type_info + 8)
    return names


def _name(heap: Heap, type_info: int) -> str:
    if not type_info:
        return ""
    try:
        raw = heap.bytes_until_zero(heap.u32(type_info + 4), 301)
    except GuestFailed:  # no type information after all
        return ""
    return raw.decode() if _NAME.match(raw) else ""


def _word(heap: Heap, address: int) -> int:
    try:
        return heap.u32(address)
    except GuestFailed:
        return 0


def _text(heap: Heap, thrown: int, names: list[str]) -> str:
    try:
        if names and names[0] in ("PKc", "Pc"):
            return heap.text(heap.u32(thrown), _LONGEST)
        if names and names[0] in _STRINGS:
            return _string(heap, thrown)
        if names and names[0] in ("i", "j", "l", "m"):
            return str(heap.i32(thrown) if names[0] in "il" else heap.u32(thrown))
        if names and names[0] == "d":
            return repr(heap.f64(thrown))
    except GuestFailed:
        return ""
    for offset in range(4, _OBJECT, 4):
        found = _counted(heap, _word(heap, thrown + offset))
        if found is not None:
            return found
    return ""


def _counted(heap: Heap, address: int) -> str | None:
    """Return the text at *address* if length and capacity in front of it say that it is one."""
    if address < 16 or address % 4:
        return None
    try:
        length, capacity = heap.u32(address - 12), heap.u32(address - 8)
        if not 0 < length <= min(capacity, 1 << 20) or heap.read(address + length, 1) != b"\0":
            return None
        raw = heap.read(address, min(length, _LONGEST))
    except GuestFailed:
        return None
    return None if b"\0" in raw else raw.decode(errors="replace")


def _string(heap: Heap, address: int) -> str:
    """Read a ``std::string`` of libc++, whose last byte tells whether its text is inside of it."""
    raw = heap.read(address, 12)
    if raw[11] & _LONG:
        return heap.read(heap.u32(address), min(heap.u32(address + 4), _LONGEST)).decode(errors="replace")
    return raw[: raw[11]].decode(errors="replace")


def _readable(name: str) -> str:
    """Turn a mangled name into the one in the source, where it has only parts; ``St13runtime_error`` is easy."""
    if name in _BUILTIN:
        return _BUILTIN[name]
    if name in _STRINGS:
        return "std::string"
    rest, parts = name, list[str]()
    if rest.startswith("N") and rest.endswith("E"):
        rest = rest[1:-1]
    if rest.startswith("St"):
        rest, parts = rest[2:], ["std"]
    while found := re.match(r"[0-9]{1,3}", rest):
        length = int(found.group())
        part, rest = rest[found.end() : found.end() + length], rest[found.end() + length :]
        parts.append(part)
    parts = [each for each in parts if each not in ("__1", "__2")]
    return "::".join(parts) if parts and not rest else name
