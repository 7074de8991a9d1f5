"""Finds out from Emscripten's JavaScript which letter is which function. It is read, never run.

A build gives the imports and exports of its module one-letter names, other ones each time, and only the glue knows
what they stand for. It comes in many forms: old (``asmLibraryArg``, ``Module["asm"]["x"]``), new (``wasmImports``,
``wasmExports["x"]``), minified by different tools. So nothing here depends on white space or quotes, and little on
variables. The module itself says which letters there are, and the glue is searched for

* the object that gives a value to every letter that is imported: that is what is handed to the module;
* assignments of an exported letter to names, through the functions that pass arguments on.

The text may have been made to do harm. It is cut into tokens once, brackets are matched once, and every search looks
at each token a bounded number of times: no recursion, and no pattern that could go back and forth.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from spark_workers.engines.outline import Outline
from spark_workers.packages.javascript import Script, ScriptUnreadable

#: What a Neuron model must export, by the names in C.
REQUIRED = ("construct", "node_calc_v3", "malloc", "free")


#: What the JavaScript of older builds did otherwise than that of later ones.
QUIRKS = {
    "year": "mktime does not bring the year into its bounds",
    "yearday": "the day of the year counts hours, so that it is one less in the first hour of a summer's day",
    "weeks": "strftime's %U, %V and %W are sometimes off by one",
    "percent": "strftime's %% takes part in conversions that follow it",
}


class GlueUnreadable(ValueError):
    """The glue does not say what one has to know. The message names what is missing, as a sentence without subject."""


@dataclass(frozen=True, slots=True)
class Preloaded:
    """One file of the preload archive: bytes *start* to *end* of it, under an absolute path."""

    path: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Glue:
    """What the glue says. Names in C are without underscores in front, since how many there are varies.

    Attributes:
        imports: The names in C of imported functions, by the names in the module; empty if it has none.
        exports: The names in the module, by the names in C, such as ``node_calc_v3``, ``malloc``, ``stackSave``.
        memory: The exported memory.
        table: The exported table of functions; empty if there is none.
        constructors: The export to call once before all others; empty if there is none.
        files: What lies where in the preload archive.
        heap_limit: Bytes to which the memory may grow; 0 if it must not grow.
        time_bits: How wide ``time_t`` is where functions take a pointer to one, 32 or 64.
        zone_names: What `tzset_js` calls a time zone: "long" (such as Central European Standard Time) or "offset"
            (such as UTC+0100).
        quirks: What older builds did otherwise, see `QUIRKS`. A model was tested with them.
    """

    imports: dict[str, str]
    exports: dict[str, str]
    memory: str
    table: str = ""
    constructors: str = ""
    files: tuple[Preloaded, ...] = ()
    heap_limit: int = 2 << 30
    time_bits: int = 32
    zone_names: str = "long"
    quirks: tuple[str, ...] = ()

    def as_data(self) -> dict[str, Any]:
        """Return it as plain data, for a message or a file."""
        return asdict(self)

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> "Glue":
        """Return what `as_data` made plain."""
        files = tuple(Preloaded(**each) for each in data["files"])
        return cls(**{**data, "files": files, "quirks": tuple(data["quirks"])})


def read_glue(text: str, outline: Outline) -> Glue:
    """Find out what *text* says about the module with that *outline*.

    Names that the build did not minify are taken as they are, so that a module with plain names needs no glue.

    Raises:
        GlueUnreadable: It is no JavaScript, or does not say what a letter stands for.
    """
    try:
        script = Script(text)
    except ScriptUnreadable as problem:
        raise GlueUnreadable(f"its JavaScript cannot be read: {problem}") from problem
    return _Reading(script, outline).glue()


_EXPORTS = frozenset(("wasmExports", "asm", "exports", "asmExports"))
_IMPORTS = ("wasmImports", "asmLibraryArg")
_WRAPPERS = frozenset(("createExportWrapper", "makeWrapper"))
_HEAP_MAXIMA = ("getHeapMax", "_emscripten_get_heap_max", "emscripten_get_heap_max", "maxHeapSize")
_POINTED_TIMES = ("__localtime_js", "__gmtime_js", "_localtime_r", "___localtime_r", "_gmtime_r", "___gmtime_r")
_CLOCKS = ("_clock_gettime", "___clock_gettime")
_CONSTRUCTORS = ("wasm_call_ctors", "initialize")
_RUNS_FIRST = frozenset(("addOnInit", "unshift", "push"))
_MAKERS = ("__mktime_js", "_mktime")
_OTHERS = ("__tzset_js", "_tzset_impl", "_strftime", "initRuntime")
_MOST_MEANINGS, _LONGEST_BODY = 10, 20_000
_STEPS = 24  # from an export back to the names that it gets
_MOST_FILES, _MOST_MENTIONS = 10_000, 100_000
_SHORT = 3  # letters of a name that a build made up


class _Reading:
    """Looks for what one has to know in one script."""

    def __init__(self, script: Script, outline: Outline) -> None:
        self._script = script
        self._tokens = script.tokens
        self._outline = outline
        self._functions = {each.name for each in outline.exports if each.kind == "function"}
        self._where = self._index({*_HEAP_MAXIMA, *_POINTED_TIMES, *_CLOCKS, *_MAKERS, *_OTHERS})

    def glue(self) -> Glue:
        exports = self._exports()
        missing = [name for name in REQUIRED if name not in exports]
        if missing:
            names = ", ".join(f"`{name}`" for name in missing)
            raise GlueUnreadable(f"its JavaScript does not say which export is {names}, so it is no Neuron model")
        return Glue(
            imports=self._imports(),
            exports=exports,
            memory=self._only("memory", exports),
            table=self._only("table", exports),
            constructors=self._constructors(exports),
            files=self._files(),
            heap_limit=self._heap_limit(),
            time_bits=self._time_bits(),
            zone_names=self._zone_names(),
            quirks=tuple(self._quirks()),
        )

    def _index(self, names: set[str]) -> dict[str, list[int]]:
        """Return where those names are given a meaning, at a few places each."""
        found: dict[str, list[int]] = {name: [] for name in names}
        for index, sign in enumerate(self._tokens):
            if sign not in found or len(found[sign]) == _MOST_MEANINGS:
                continue
            if self._tokens[index - 1] == "function" or self._tokens[index + 1] == "=":
                found[sign].append(index)
        return found

    # --- exports ---

    def _exports(self) -> dict[str, str]:
        """Return names of exports by the names in C: those said of a known object first, then those said of any."""
        found = self._assigned(is_known=True)
        if any(name not in found for name in REQUIRED):
            found = {**self._assigned(is_known=False), **found}
        taken = set(found.values())
        for export in self._functions - taken:
            found.setdefault(export.lstrip("_") or export, export)
        return found

    def _assigned(self, is_known: bool) -> dict[str, str]:
        best: dict[str, tuple[int, str]] = {}
        for export, begin in self._accesses(is_known):
            for name in self._targets(begin):
                short = name.lstrip("_") or name
                score = len(name) - len(short)
                if short not in best or score < best[short][0]:
                    best[short] = score, export
        return {name: export for name, (_, export) in best.items()}

    def _accesses(self, is_known: bool) -> Iterator[tuple[str, int]]:
        """Yield each mention of an exported function, and where the expression begins."""
        tokens, partner, functions, left = self._tokens, self._script.partner, self._functions, _MOST_MENTIONS
        for index in range(1, len(tokens) - 2):
            sign = tokens[index]
            if sign == "[" and tokens[index + 1][:1] == '"' and partner[index] == index + 2:
                export = tokens[index + 1][1:]
            elif sign == ".":
                export = tokens[index + 1]
            elif sign in _WRAPPERS and tokens[index + 1] == "(" and tokens[index + 2][1:] in functions:
                yield tokens[index + 2][1:], index
                continue
            else:
                continue
            if export not in functions:
                continue
            left -= 1
            if left < 0:
                return
            name, begin = self._object(index)
            if name in _EXPORTS if is_known else name:
                yield export, begin

    def _object(self, index: int) -> tuple[str, int]:
        """Return the last name of the object whose member is asked for at *index*, and where it begins."""
        tokens, last, at = self._tokens, "", index
        for _ in range(_STEPS):
            if tokens[at - 1] == "]" and (value := self._script.string(at - 2)) is not None and tokens[at - 3] == "[":
                name, at = value, at - 3
                last = last or name
                continue  # there is something in front of it
            if not self._script.is_name(at - 1):
                break
            last, at = last or tokens[at - 1], at - 1
            if tokens[at - 1] not in (".", "?."):
                break
            at -= 1
        return last, at

    def _targets(self, at: int) -> list[str]:
        """Return the names to which the value that begins at *at* is given, also through functions that call it."""
        tokens, names = self._tokens, list[str]()
        for _ in range(_STEPS):
            before = tokens[at - 1]
            if before == "=":
                name, at = self._object(at - 1)
                if not name:
                    break
                names.append(name)
            elif before in ("(", "return", "{", "async"):
                at -= 1
            elif before == "=>":
                at = self._script.partner[at - 2] if tokens[at - 2] == ")" else at - 2
            elif before == ")" and tokens[at] == "{":
                at = self._script.partner[at - 1]
                if tokens[at - 1] == "function":
                    at -= 1
                elif tokens[at - 2] == "function":
                    return [*names, tokens[at - 1]]
            else:
                break
            if at < 1:
                break
        return names

    def _only(self, kind: str, exports: dict[str, str]) -> str:
        """Return the export of a kind of which there is one; of several, or none, the glue has to say."""
        found = [each.name for each in self._outline.exports if each.kind == kind]
        if kind == "memory" and not found:
            raise GlueUnreadable("its module exports no memory, which a Neuron model has to")
        if len(found) < 2:
            return found[0] if found else ""
        wanted = "wasmMemory" if kind == "memory" else "wasmTable"
        for index, sign in enumerate(self._tokens):
            if (
                sign == "["
                and self._script.string(index + 1) in found
                and wanted in self._targets(self._object(index)[1])
            ):
                return self._tokens[index + 1][1:]
        plain = {"memory": "memory", "table": "__indirect_function_table"}[kind]
        if plain in found:
            return plain
        raise GlueUnreadable(
            f"its module exports {len(found)} of the kind {kind}, and its JavaScript names none of them"
        )

    def _constructors(self, exports: dict[str, str]) -> str:
        for name in _CONSTRUCTORS:
            if name in exports:
                return exports[name]
        for export, begin in self._accesses(is_known=False):
            if self._tokens[begin - 1] == "(" and self._tokens[begin - 2] in _RUNS_FIRST:
                return export
        for begin, end in self._bodies("initRuntime"):
            for export, at in self._accesses(is_known=True):
                if begin <= at < end:
                    return export
        if any(exports[name] == name for name in REQUIRED):
            return ""  # nothing is minified here, so that it would be there by its name
        raise GlueUnreadable("its JavaScript does not say which export runs the constructors")

    # --- imports ---

    def _imports(self) -> dict[str, str]:
        wanted = {each.name for each in self._outline.imports if each.kind == "function"}
        if not wanted:
            return {}
        found: dict[str, str] | None = None
        for index, sign in enumerate(self._tokens):
            if sign == "{":
                values = self._literal(index)
                if values is None or not wanted <= values.keys():
                    continue
                if self._tokens[index - 2] in _IMPORTS:
                    found = values
                    break
                found = found or values
        if found is None:
            return self._plain(wanted)
        return {name: found[name].lstrip("_") or name for name in sorted(wanted)}

    def _plain(self, wanted: set[str]) -> dict[str, str]:
        """Take names as they are, where no build has made them short."""
        short = sorted(name for name in wanted if len(name) <= _SHORT)
        if short:
            names = ", ".join(f"`{name}`" for name in short[:10])
            raise GlueUnreadable(f"its JavaScript has no object that says what the imports {names} are")
        return {name: name.lstrip("_") for name in sorted(wanted)}

    def _literal(self, index: int) -> dict[str, str] | None:
        """Return what the object that begins at *index* gives to each key, by name; None if it is no such object."""
        tokens, end = self._tokens, self._script.partner[index]
        found: dict[str, str] = {}
        at = index + 1
        while at < end:
            key = self._script.string(at)
            if key is None:
                if not self._script.is_name(at) and not tokens[at][:1].isdigit():
                    return None
                key = tokens[at]
            after = tokens[at + 1]
            if after == ":":
                value, at = self._value(at + 2, end)
            elif after == "(":  # a method
                value, at = key, self._next(at + 1, end)
            elif after == "," or at + 1 == end:
                value, at = key, at + 1
            else:
                return None
            found[key] = value
            at += 1
        return found

    def _value(self, at: int, end: int) -> tuple[str, int]:
        """Return the name that a value goes by, empty if it has none, and where its comma or the end is."""
        stop = self._next(at, end)
        if self._tokens[at] in ("async", "function", "("):  # a function that is written here, if not in brackets
            return (self._tokens[at + 1] if self._script.is_name(at + 1) and self._tokens[at] != "(" else ""), stop
        last = ""
        for index in range(at, min(stop, at + _STEPS)):
            sign = self._tokens[index]
            if self._script.is_name(index):
                last = sign
            elif sign[:1] == '"':
                last = sign[1:]
            elif sign == "=>":
                return "", stop
            elif sign in (",", "{"):
                break
        return last, stop

    def _next(self, at: int, end: int) -> int:
        """Return where the next comma outside of brackets is, or *end*."""
        while at < end and self._tokens[at] != ",":
            at = max(self._script.partner[at], at) + 1
        return min(at, end)

    # --- files ---

    def _files(self) -> tuple[Preloaded, ...]:
        found: dict[str, Preloaded] = {}
        for index, sign in enumerate(self._tokens):
            if sign in ('"files', "files") and self._tokens[index + 1] == ":" and self._tokens[index + 2] == "[":
                for each in self._table(index + 2):
                    found[each.path] = each
                if len(found) > _MOST_FILES:
                    raise GlueUnreadable(f"its JavaScript preloads more than {_MOST_FILES} files")
        return tuple(found.values())

    def _table(self, index: int) -> list[Preloaded]:
        """Return the files that the list at *index* describes; none if it is something else."""
        end = self._script.partner[index]
        found: list[Preloaded] = []
        at = index + 1
        while at < end:
            if self._tokens[at] != "{":
                return []
            fields = self._literal(at)
            after = self._script.partner[at] + 1
            if fields is None or self._tokens[after] not in (",", "]"):
                return []
            name, begin, stop = fields.get("filename"), self._field(at, "start"), self._field(at, "end")
            if not name or begin is None or stop is None or begin > stop:
                return []
            found.append(Preloaded("/" + name.lstrip("/"), begin, stop))
            at = after + 1
        return found

    def _field(self, index: int, key: str) -> int | None:
        """Return the number that the object at *index* has under *key*."""
        for at in range(index + 1, min(self._script.partner[index], index + 4 * _STEPS)):
            if self._tokens[at] in (key, '"' + key) and self._tokens[at + 1] == ":":
                return self._script.number(at + 2)
        return None

    # --- facts ---

    def _bodies(self, name: str) -> Iterator[tuple[int, int]]:
        """Yield where functions of that name begin and end."""
        tokens, partner = self._tokens, self._script.partner
        for index in self._where[name]:
            at = index + 1
            if tokens[at] == "=":
                at += 1
                while tokens[at] in ("async", "function"):
                    at += 1
            elif tokens[index - 1] != "function":
                continue
            after = partner[at] + 1 if tokens[at] == "(" else at + 1
            if tokens[after] == "=>":
                after += 1
            if tokens[after] == "{":
                yield after, min(partner[after], after + _LONGEST_BODY)
            elif tokens[after - 1] == "=>":
                yield after, min(self._next_statement(after), after + _LONGEST_BODY)

    def _next_statement(self, at: int) -> int:
        while at < len(self._tokens) and self._tokens[at] not in (";", ",", ")", "}", ""):
            at = max(self._script.partner[at], at) + 1
        return at

    def _heap_limit(self) -> int:
        for name in _HEAP_MAXIMA:
            for index in self._where[name]:
                if self._tokens[index + 1] == "=" and (value := self._script.number(index + 2)) is not None:
                    return value
            for begin, end in self._bodies(name):
                for at in range(begin, min(end, begin + _STEPS)):
                    if (value := self._script.number(at)) is not None:
                        return value
        memory = self._outline.memories[0] if self._outline.memories else None
        return 2 << 30 if memory is None or memory.maximum is None else memory.maximum << 16

    def _time_bits(self) -> int:
        for name in _POINTED_TIMES:
            for begin, end in self._bodies(name):
                if "readI53FromI64" in self._tokens[begin:end]:
                    return 64
        for name in _CLOCKS:
            for begin, end in self._bodies(name):
                body = self._tokens[begin:end]
                # Nanoseconds are after the seconds, so that they tell how wide those are.
                if any(pair == ("+", "8") for pair in pairwise(body)):
                    return 64
        return 32

    def _zone_names(self) -> str:
        for name in ("__tzset_js", "_tzset_impl"):
            for begin, end in self._bodies(name):
                if "padStart" in self._tokens[begin:end]:
                    return "offset"
        return "long"

    def _quirks(self) -> Iterator[str]:
        makers, readers = self._words(*_MAKERS), self._words(*_POINTED_TIMES)
        if makers and makers.count("20") == 1:  # the place of the year is read and not written
            yield "year"
        if readers and not any("ydayfromdate" in each.replace("_", "").lower() for each in readers):
            yield "yearday"
        formatter = self._words("_strftime")
        if "firstSunday" in formatter:
            yield "weeks"
        if formatter and '"\0\0' not in formatter:
            yield "percent"

    def _words(self, *names: str) -> list[str]:
        """Return the tokens of all functions with those names."""
        return [each for name in names for begin, end in self._bodies(name) for each in self._tokens[begin:end]]
