"""The second engine: wasmer 1.1, whose wheels end at CPython 3.10, so that it runs under an interpreter of its own.

What it lacks, and what is done about it:

* It has no limits of its own. The limits of memories and tables are written into the module before it is compiled
  (see `wasm_limits`) and into the head of the machine code, so that code with other limits is refused. A guest's
  stack is the main thread's, whose limit is lowered when code is loaded; wasmer makes a trap of the fault. It does so
  even where a guest at the end of its stack has called a function in Python, whose frames it jumps over: the
  interpreter is damaged then, and the process ends itself. What the host allocates for a guest is bounded by the
  process's own limit of data.
* It cannot be interrupted, and holds the interpreter's lock while a guest runs: running calls are stopped by killing.
* Machine code is read, not mapped: nothing is shared between processes, and damaged code ends the process. Whoever
  keeps code checks it; here only its head and its length are looked at.
* It reads modules in text too, and its WASI serves the process's own streams: neither is let through.
* Its objects belong to the thread that made them. That must be the main thread.
"""

import importlib
import os
import re
import struct
from typing import Any, NoReturn

from spark_workers.engines import traps, wasm_limits
from spark_workers.engines.arguments import CALLABLE, convert_all, not_callable
from spark_workers.engines.seam import Extern, Number, Settings, Wasi
from spark_workers.engines.streams import clean_texts
from spark_workers.engines.wasmer_streams import Streams
from spark_workers.hosts.failures import GuestFailed

try:
    import resource
except ImportError:  # not a system that has limits
    resource = None  # type: ignore[assignment]

#: Counted up whenever modules are changed in another way before they are compiled.
FORMAT = 1
#: In this order: the second one compiles without optimizing.
COMPILERS = ("cranelift", "singlepass")

DATA_RESERVE = 256 << 20  # for what the host allocates while it serves a guest
STACK_RESERVE = 256 << 10  # for what Python itself needs above a guest and below

DAMAGED = 70  # the exit code of a process that cannot go on

_LENGTH = struct.Struct(">Q")
_EXIT = re.compile(r"WASI exited with code: (\d+)")
_FRAME = re.compile(r"\s*at (.*) \(.*\[(\d+)\]:(0x[0-9a-f]+)\)$")
_MISSING = re.compile(r'Error while importing "(.*)"\."(.*)": (unknown|incompatible) import', re.DOTALL)
_WASI_VERSIONS = {"wasi_unstable": "SNAPSHOT0", "wasi_snapshot_preview1": "SNAPSHOT1"}
_START = "start"  # what a failure calls the function that runs while an instance is made

_CODES = {name: code for code, name in traps.TRAPS.items()}
#: wasmer's words for traps, and the numbers that `traps` knows them by.
_TRAPS = {
    "call stack exhausted": _CODES[traps.STACK_OVERFLOW],
    "integer divide by zero": _CODES["integer-divide-by-zero"],
    "integer overflow": _CODES["integer-overflow"],
    "indirect call type mismatch": _CODES["bad-signature"],
    "invalid conversion to integer": _CODES["bad-conversion-to-integer"],
    "misaligned heap": _CODES["misaligned-atomic"],
    "out of bounds memory access": _CODES["out-of-bounds-memory"],
    "unaligned atomic access": _CODES["misaligned-atomic"],
    "undefined element: out of bounds table access": _CODES["out-of-bounds-table"],
    "uninitialized element": _CODES["indirect-call-to-null"],
    "unreachable": _CODES["unreachable"],
}
_TYPES = {1: "i32", 2: "i64", 3: "f32", 4: "f64", 5: "v128", 6: "externref", 7: "funcref"}  # wasmer.Type's numbers
_HALVES = {"i32": 1 << 31, "i64": 1 << 63}

#: Types of the parameters and of the results.
Signature = tuple[tuple[str, ...], tuple[str, ...]]


class WasmerEngine:
    """wasmer in this process.

    Raises:
        GuestFailed: "engine-missing".
    """

    can_interrupt = False

    def __init__(self, settings: Settings) -> None:
        try:
            self._wasmer: Any = importlib.import_module("wasmer")
        except Exception as problem:  # its stub for newer interpreters raises; a broken library whatever it likes
            raise GuestFailed("engine-missing", f"wasmer cannot be imported here: {problem}") from problem
        self._settings = settings
        self._head = (
            f"sparkrt wasmer {self._wasmer.__version__} format {FORMAT} "
            f"memory {settings.memory_limit} table {settings.table_limit}\n"
        ).encode()

    def compile(self, wasm: bytes) -> bytes:
        """Return machine code for `load`, with the settings' limits in it.

        Raises:
            GuestFailed: "invalid-module", "engine-missing" without a compiler, "out-of-memory" and "over-limit" for a
                module that is over its limits from the start.
        """
        limited = wasm_limits.limit_module(wasm, self._settings.memory_limit, self._settings.table_limit)
        store = self._wasmer.Store(self._wasmer.engine.Universal(_compiler()))
        try:
            code: bytes = self._wasmer.Module(store, limited).serialize()
        except BaseException as problem:
            raise traps.uncompiled(_words(problem)) from problem
        return b"".join((self._head, _LENGTH.pack(len(code)), code))

    def load(self, path: str) -> "WasmerCode":
        """Read machine code that `compile` made, and lower this process's limits to what its guest may use.

        Raises:
            GuestFailed: "stale-code" if something else made it, with other limits, or it is not whole.
        """
        code = self._checked(path)
        # Without a compiler, which a replica has no use for.
        store = self._wasmer.Store(self._wasmer.engine.Universal())
        try:
            module = self._wasmer.Module.deserialize(store, code)
        except BaseException as problem:
            raise GuestFailed("stale-code", f"wasmer does not take the machine code: {_words(problem)}") from problem
        _limit_process(self._settings)
        return WasmerCode(self._wasmer, store, module, self._settings)

    def interrupt(self) -> None:
        """Raise RuntimeError: wasmer cannot be interrupted, the process must be replaced."""
        raise RuntimeError("wasmer cannot be interrupted; end the process in its place")

    def _checked(self, path: str) -> bytes:
        try:
            with open(path, "rb") as file:
                head = file.read(len(self._head) + _LENGTH.size)
                code = file.read()
        except OSError as problem:
            raise GuestFailed("stale-code", f"the machine code cannot be read: {problem}") from problem
        if head != self._head + _LENGTH.pack(len(code)):
            raise GuestFailed("stale-code", "the machine code was made by another engine, for other limits, or is cut")
        return code


class WasmerCode:
    """A loaded module.

    Attributes:
        imports: What it wants.
        exports: What it offers.
        signatures: Parameters and results of its functions, by name.
        memory_name: The name of its memory, empty if it exports none.
    """

    def __init__(self, wasmer: Any, store: Any, module: Any, settings: Settings) -> None:
        self._wasmer = wasmer
        self._store = store
        self._module = module
        self._settings = settings
        self.imports = [Extern(each.module, each.name, *_described(each.type)) for each in module.imports]
        self.exports = [Extern("", each.name, *_described(each.type)) for each in module.exports]
        self.signatures: dict[str, Signature] = {
            each.name: _signature(each.type) for each in module.exports if hasattr(each.type, "params")
        }
        self.memory_name = next((each.name for each in self.exports if each.kind == "memory"), "")
        self._wasi = {
            each.module: _WASI_VERSIONS[each.module] for each in self.imports if each.module in _WASI_VERSIONS
        }

    def instantiate(self, wasi: Wasi | None) -> "WasmerInstance":
        """Make an instance, and run its start function if it has one.

        Raises:
            GuestFailed: "unsupported-import", or what the start function did.
        """
        streams = Streams(wasi) if wasi is not None and self._wasi else None
        instance = WasmerInstance(self, self._settings, streams)
        try:
            imports = self._wasi_functions(wasi, streams) if wasi is not None and streams is not None else {}
            instance.attach(self._wasmer.Instance(self._module, imports))
        except BaseException as problem:
            instance.close()
            refusal = self._refusal(str(problem))
            if refusal is not None:
                raise refusal from problem
            instance.fail(_START, problem)
        return instance

    def _wasi_functions(self, wasi: Wasi, streams: Streams) -> dict[str, dict[str, Any]]:
        """Return wasmer's own functions, and in place of some of them ours."""
        program, *arguments = wasi.args or ("model",)
        clean_texts("argument", wasi.args)
        clean_texts("environment variable", [*wasi.env, *wasi.env.values()])
        try:
            state = self._wasmer.wasi.StateBuilder(program).arguments(arguments).environments(dict(wasi.env)).finalize()
        except RuntimeError as problem:
            raise GuestFailed("wrong-signature", f"WASI cannot pass its environment: {problem}") from problem
        found: dict[str, dict[str, Any]] = {}
        for name, version in self._wasi.items():
            functions = state.generate_imports(self._store, getattr(self._wasmer.wasi.Version, version))[name]
            for ours, function in streams.functions().items():
                if ours in functions:
                    functions[ours] = self._wasmer.Function(self._store, function, functions[ours].type)
            found[name] = functions
        return found

    def _refusal(self, text: str) -> GuestFailed | None:
        """Return what it means that no instance can be made, or None if it was made and its start function failed."""
        if (missing := _MISSING.match(text)) is not None:
            module, name, how = missing.groups()
            what = "which there is not" if how == "unknown" else "with a type that it does not have here"
            return GuestFailed("unsupported-import", f"it imports `{name[:200]}` of `{module[:200]}`, {what}")
        if "Missing export memory" in text:
            return GuestFailed("invalid-module", "it uses WASI, and exports no memory named `memory` as WASI demands")
        if "Insufficient resources" in text:
            return GuestFailed("out-of-memory", f"there is not enough memory for an instance: {text}")
        return None


class WasmerInstance:
    """One instance with a memory of its own."""

    def __init__(self, code: WasmerCode, settings: Settings, streams: Streams | None) -> None:
        self._code = code
        self._settings = settings
        self._streams = streams
        self._externs: dict[str, Any] = {}
        self._functions: dict[str, WasmerFunction] = {}
        self._memory: Any = None
        self._view = memoryview(b"")

    def attach(self, raw: Any) -> None:
        """Take the engine's own instance, once it is made."""
        # Not getattr(raw.exports, name), which finds attributes of Python's too, such as __class__.
        self._externs = {name: extern for name, extern in raw.exports}
        self._memory = self._externs.get(self._code.memory_name)
        if self._streams is not None:
            self._streams.memory = self._memory

    def function(self, name: str) -> "WasmerFunction | None":
        """Return the exported function of that name, or None."""
        found = self._functions.get(name)
        if found is None and name in self._code.signatures:
            found = WasmerFunction(name, self._externs[name], self._code.signatures[name], self)
            self._functions[name] = found
        return found

    def arm(self) -> None:
        """Do nothing: there are no interrupts."""

    def memory_size(self) -> int:
        """Bytes of linear memory now; 0 if it exports none."""
        size: int = 0 if self._memory is None else self._memory.data_size
        return size

    def read(self, address: int, length: int) -> bytes:
        """Copy out of the exported memory. Raises GuestFailed("bad-answer") outside of it."""
        return bytes(self._part(address, length))

    def write(self, address: int, data: bytes) -> None:
        """Copy into the exported memory. Raises GuestFailed("bad-answer") outside of it."""
        self._part(address, len(data))[:] = data

    def close(self) -> None:
        """Free everything at once."""
        if self._streams is not None:
            self._streams.close()
        self._view = memoryview(b"")
        self._memory = None
        self._externs.clear()
        self._functions.clear()

    def fail(self, function: str, problem: BaseException) -> NoReturn:
        """Raise what *problem*, which came out of a run of *function*, is to the outside.

        An exception of Python's (KeyboardInterrupt in a function that the guest called) stays what it is.
        """
        if _is_panic(problem):
            text = f"wasmer itself failed in `{function}`: {problem}"
            raise GuestFailed("trap", text, {"trap": "engine-failure", "function": function}) from problem
        if not isinstance(problem, RuntimeError):
            raise problem
        failure = self._failure(function, str(problem))
        if failure.kind == traps.STACK_OVERFLOW and self._streams is not None and self._streams.is_inside:
            _end_damaged_process(function)
        raise failure from problem

    def _failure(self, function: str, text: str) -> GuestFailed:
        what, *lines = text.removeprefix("RuntimeError: ").split("\n")
        if (ended := _EXIT.match(what)) is not None:
            return traps.exited(function, int(ended[1]))
        found = [match for line in lines[: traps.MAX_FRAMES] if (match := _FRAME.match(line)) is not None]
        frames = [traps.Frame(_named(match[1]), int(match[2]), int(match[3], 16)) for match in found]
        settings, memory = self._settings, self.memory_size()
        return traps.trapped(
            function, _TRAPS.get(what), what, frames, memory, settings.memory_limit, settings.stack_limit
        )

    def _part(self, address: int, length: int) -> memoryview:
        end = address + length
        if end > len(self._view) and self._memory is not None:
            # It may have grown. It stays where it is: wasmer reserves all that a memory can ever be.
            self._view = memoryview(self._memory.buffer)
        if address < 0 or length < 0 or end > len(self._view):
            raise traps.outside(address, length, self.memory_size())
        return self._view[address:end]


class WasmerFunction:
    """An exported function."""

    def __init__(self, name: str, raw: Any, signature: Signature, instance: WasmerInstance) -> None:
        self.params, self.results = signature
        self._name = name
        self._call = raw
        self._instance = instance
        self._takes_numbers = all(each in CALLABLE for each in (*self.params, *self.results))
        self._integers = [(at, _HALVES[kind]) for at, kind in enumerate(self.params) if kind in _HALVES]

    def __call__(self, *arguments: Number) -> Any:
        """Return None, one number, or a tuple of them. Integers come back signed.

        Raises:
            GuestFailed: trap, out-of-memory, stack-overflow, exit, wrong-signature.
        """
        if not self._takes_numbers:
            raise not_callable(self._name, self.params, self.results)
        given = convert_all(self._name, self.params, arguments)
        for at, half in self._integers:  # wasmer takes signed ones only
            if given[at] >= half:
                given[at] -= 2 * half
        try:
            return self._call(*given)
        except BaseException as problem:  # noqa: BLE001  it is raised again; the engine's panics are no Exception
            self._instance.fail(self._name, problem)


# --- the engine's own ways -------------------------------------------------------------------------------------------


def _compiler() -> Any:
    for name in COMPILERS:
        # Not wasmer_compiler_llvm: importing it ends the process.
        try:
            return importlib.import_module(f"wasmer_compiler_{name}").Compiler
        except ImportError:
            continue
    raise GuestFailed("engine-missing", "wasmer has no compiler here; install wasmer_compiler_cranelift")


def _is_panic(problem: BaseException) -> bool:
    """Tell whether the engine's own code gave up. The class cannot be imported, and derives from BaseException."""
    return type(problem).__module__ == "pyo3_runtime"


def _end_damaged_process(function: str) -> NoReturn:
    """End this process, in which wasmer has jumped out of the middle of Python functions.

    Their locks stay taken and the interpreter's count of nested calls is wrong: after some 200 times every call fails.
    """
    text = (
        f"spark: {ascii(function)[:200]} used up its stack in a call of its host; the replica ends, and is replaced\n"
    )
    os.write(2, text.encode())
    os._exit(DAMAGED)


def _words(problem: BaseException) -> str:
    """Return what the engine says, on one line; raise what is not its own (KeyboardInterrupt, say) again."""
    if not isinstance(problem, RuntimeError | ValueError | TypeError) and not _is_panic(problem):
        raise problem
    return " ".join(str(problem).split())


def _named(name: str) -> str:
    return "" if name == "<unnamed>" else name


def _signature(type_: Any) -> Signature:
    return tuple(_TYPES[int(each)] for each in type_.params), tuple(_TYPES[int(each)] for each in type_.results)


def _described(type_: Any) -> tuple[str, str]:
    """Return kind and text of an import or export."""
    if hasattr(type_, "params"):
        params, results = _signature(type_)
        given = results[0] if len(results) == 1 else f"({', '.join(results)})"
        return "function", f"({', '.join(params)}) -> {given}"
    if hasattr(type_, "mutable"):
        return "global", f"{'mut ' if type_.mutable else ''}{_TYPES[int(type_.type)]}"
    size = f"{type_.minimum} or more" if type_.maximum is None else f"{type_.minimum} to {type_.maximum}"
    if hasattr(type_, "shared"):
        return "memory", f"{size} pages{' shared' if type_.shared else ''}"
    return "table", f"{size} {_TYPES[int(type_.type)]}"


# --- the process's own limits ----------------------------------------------------------------------------------------


def _limit_process(settings: Settings) -> None:
    """Lower the limits of stack and data to what is in use now and what the guest may have.

    The kernel looks at the stack's limit when the main thread's stack grows, so lowering it works at any time. Memory
    counts twice because a fresh instance may be made before the last one is gone.
    """
    used = _memory_in_use()
    if resource is None or used is None:
        return  # not Linux: what is written into the module holds everywhere
    _lower(resource.RLIMIT_STACK, used["VmStk"] + settings.stack_limit + STACK_RESERVE)
    _lower(resource.RLIMIT_DATA, used["VmData"] + 2 * settings.memory_limit + DATA_RESERVE)


def _memory_in_use() -> dict[str, int] | None:
    try:
        with open("/proc/self/status") as file:
            fields = dict(line.split(":", 1) for line in file)
        return {name: int(fields[name].split()[0]) * 1024 for name in ("VmStk", "VmData")}
    except (OSError, KeyError):
        return None


def _lower(which: int, limit: int) -> None:
    now, most = resource.getrlimit(which)
    if now == resource.RLIM_INFINITY or limit < now:
        resource.setrlimit(which, (limit, most))
