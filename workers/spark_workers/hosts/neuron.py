"""Neuron packages: a module built by Emscripten, with the functions it imports and a driver around it.

A request crosses between host and guest once: it is written into a buffer that is kept, the driver runs the model, and
place and length of the answer come back in one number. What the model imports is answered in three ways: copying by a
function of WASM, see `neuron_bridge`, calls of other services by the supervisor, and all else in Python, see
`emscripten`.

An instance that has failed is not used again. A C++ exception that leaves the guest, as a trap does, leaves its stack
pointer where it was and its heap with what nobody frees any more: after some thousand of them nothing would run. So
there is nothing to restore; the next call finds a new instance.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from spark_workers.engines import traps
from spark_workers.engines.code_file import read_parts
from spark_workers.engines.seam import Extern, Function, LinkedInstance, LinkingEngine, Member, Number, Settings
from spark_workers.hosts.emscripten.files import FileTable, Log
from spark_workers.hosts.emscripten.system import System
from spark_workers.hosts.failures import GuestFailed
from spark_workers.hosts.guest import HARMLESS, call_export
from spark_workers.hosts.neuron_parts import (
    ALLOCATE,
    CALCULATE,
    CONSTRUCT,
    DATA,
    DISPATCH,
    DISPATCH_TYPE,
    DRIVER,
    GLUE,
    RELEASE,
    SPARK_SERVICE,
    STUBS,
    read_glue_part,
)

#: Sends a request for another service to the supervisor and returns the answer.
Dispatch = Callable[[bytes], bytes]

_LOW = (1 << 32) - 1
_LEAST_ROOM = 4096
#: Imports that are functions of WASM: by name in C and type, the export of the stubs.
_NATIVE = {
    ("emscripten_memcpy_big", "(i32, i32, i32) -> ()"): "copy",
    ("emscripten_memcpy_js", "(i32, i32, i32) -> ()"): "copy",
    ("emscripten_memcpy_big", "(i32, i32, i32) -> i32"): "copy_back",
}
_GROW = "emscripten_resize_heap"


class NeuronHost:
    """One Neuron package with its instance. Fits `host.Host`."""

    def __init__(self, engine: LinkingEngine, code: str, settings: Settings, dispatch: Dispatch) -> None:
        """Load the file at path *code* and make the first instance.

        Raises:
            GuestFailed: "stale-code", or what goes wrong in the package's constructors.
        """
        self.interrupt = engine.interrupt
        self._settings = settings
        self._plan = Plan(engine, code, settings, dispatch)
        self._log = Log()
        self._instance: NeuronInstance | None = None
        self._make()

    def run(self, request: bytes) -> bytes:
        """Answer one request.

        Raises:
            GuestFailed: trap, out-of-memory, stack-overflow, exit, interrupted, bad-answer, xcall.
        """
        instance = self._instance or self._make()
        try:
            answer = instance.answer(request)
        except GuestFailed as problem:
            raise self._failed(problem) from problem.__cause__
        except BaseException:
            self._drop()
            raise
        if self._settings.fresh:
            self._drop()
        return answer

    def call(self, function: str, arguments: list[Number]) -> list[Number]:
        """Call an export with numbers, by its name in C or in the module; see `host.Host.call`."""
        instance = self._instance or self._make()
        try:
            results = instance.call(function, arguments)
        except GuestFailed as problem:
            if problem.kind in HARMLESS:
                raise
            raise self._failed(problem) from problem.__cause__
        except BaseException:
            self._drop()
            raise
        if self._settings.fresh:
            self._drop()
        return results

    def take_printed(self) -> str:
        """Return what the guest has written since the last time."""
        return self._log.take() if self._log.has_any else ""

    def _make(self) -> "NeuronInstance":
        """Make an instance, ready to run and to be interrupted from now on."""
        instance = self._instance = NeuronInstance(self._plan, self._log)
        try:
            instance.begin()
        except GuestFailed as problem:
            raise self._failed(problem) from problem.__cause__
        except BaseException:
            self._drop()
            raise
        return instance

    def _failed(self, problem: GuestFailed) -> GuestFailed:
        """Return *problem* with what the guest wrote before it; its instance is dropped."""
        self._drop()
        written = self.take_printed()
        if written:
            problem.details["stderr"] = written
        return problem

    def _drop(self) -> None:
        instance, self._instance = self._instance, None
        if instance is not None:
            instance.close()


class Plan:
    """What all instances of a package have in common."""

    def __init__(self, engine: LinkingEngine, code: str, settings: Settings, dispatch: Dispatch) -> None:
        parts = read_parts(code, STUBS, DRIVER, GLUE, DATA)
        if len(parts) < 4:
            raise GuestFailed("stale-code", "the file is not a prepared package; compile again")
        self.engine = engine
        self.settings = settings
        self.dispatch = dispatch
        self.glue = read_glue_part(parts[GLUE])
        self.data = parts[DATA]
        self.package: Member = engine.load_member(code)
        self.stubs: Member = engine.load_member(parts[STUBS])
        self.driver: Member = engine.load_member(parts[DRIVER])
        # By the names in C, where there are such.
        known = {letter: name for name, letter in self.glue.exports.items()}
        self.package.rename(known)
        self.exports = [replace(each, name=known.get(each.name, each.name)) for each in self.package.exports]


class NeuronInstance:
    """One instance of a package, its bridge, and the process that it believes to run in."""

    def __init__(self, plan: Plan, log: Log) -> None:
        self._plan = plan
        self._limit = plan.settings.memory_limit
        self._was_refused = False  # more memory
        self._room = 0
        self._group = plan.engine.open_group(self._limit)
        self._package: LinkedInstance | None = None
        files = FileTable(log, plan.data, plan.glue.files)
        self._system = System(self, files, plan.glue, self._exported)

    # --- the beginning ---

    def begin(self) -> None:
        """Make it, and run what has to run once.

        Raises:
            GuestFailed: As `answer`; it is to be closed then.
        """
        self._link()
        assert self._package is not None
        glue = self._plan.glue
        if glue.constructors:
            _function(self._package, glue.constructors)()
        workbook = _function(self._package, glue.exports[CONSTRUCT])()
        if not self._set(workbook):
            raise self._without_room("its first allocation has no room")

    def _link(self) -> None:
        plan, group = self._plan, self._group
        stubs = group.add(plan.stubs, [])
        package = self._package = group.add(plan.package, [self._given(each, stubs) for each in plan.package.imports])
        exports = plan.glue.exports
        needed = [exports[name] for name in (ALLOCATE, RELEASE, CALCULATE)]
        given = [package.export(name) for name in (plan.glue.memory, *needed)]
        driver = group.add(plan.driver, [*given, stubs.export("table")])
        self._allocate = _function(package, exports[ALLOCATE])
        self._make_room, self._run = _function(driver, ALLOCATE), _function(driver, CALCULATE)
        self._set = _function(driver, "begin")
        self._read, self._write = package.read, package.write

    def _given(self, wanted: Extern, stubs: LinkedInstance) -> Any:
        """Return what the package gets for an import."""
        name = self._plan.glue.imports.get(wanted.name, wanted.name)
        native = _NATIVE.get((name, wanted.type))
        if native is not None:
            return stubs.export(native)
        if name == DISPATCH and wanted.type == DISPATCH_TYPE:
            return self._plan.engine.function(wanted.type, self._dispatch)
        function = self._system.function(name, wanted.type)
        if name == _GROW:
            function = self._noticed(function)
        return self._plan.engine.function(wanted.type, function)

    # --- requests ---

    def answer(self, request: bytes) -> bytes:
        """Answer one request.

        Raises:
            GuestFailed: What happens in the guest; "bad-answer", "out-of-memory".
        """
        if self._plan.settings.epochs:
            self._group.arm()
        length = len(request)
        try:
            if length > self._room:
                self._grow_room(length)
            self._write(self._place, request)
            packed = self._run(length)
        except GuestFailed as problem:
            raise self._explained(problem) from problem.__cause__
        place, count = (packed >> 32) & _LOW, packed & _LOW
        if not place:
            raise self._without_answer()
        return self._read(place, count)

    def _grow_room(self, length: int) -> None:
        """Have a larger buffer for requests. It is kept, and a little larger than asked for, so that this is rare."""
        room = max(_LEAST_ROOM, length + length // 4)
        self._room = 0
        self._place = self._make_room(room) & _LOW
        if not self._place:
            raise self._without_room(f"there is no room for a request of {traps.sized(length)}")
        self._room = room

    def call(self, function: str, arguments: Sequence[Number]) -> list[Number]:
        """Call an export with numbers."""
        assert self._package is not None
        if self._plan.settings.epochs:
            self._group.arm()
        letter = self._plan.glue.exports.get(function, function)
        try:
            return call_export(self._package, self._plan.exports, function, arguments, letter)
        except GuestFailed as problem:
            raise self._explained(problem) from problem.__cause__

    def close(self) -> None:
        """Free everything at once. The package's own ``destroy`` has nothing to do that this does not."""
        self._group.close()

    # --- the memory, as the functions of the host see it; fits `emscripten.memory.Memory` ---

    def size(self) -> int:
        """Bytes that there are now."""
        return self._guest().memory_size()

    def read(self, address: int, length: int) -> bytes:
        """Copy out of it. Raises GuestFailed outside of it."""
        return self._guest().read(address, length)

    def write(self, address: int, data: bytes) -> None:
        """Copy into it. Raises GuestFailed outside of it."""
        self._guest().write(address, data)

    def grow(self, pages: int) -> bool:
        """Add *pages* of 64 KiB, and tell whether they were given."""
        return self._guest().grow(pages)

    def _exported(self, name: str) -> Function | None:
        """Return what the package exports under a name in C."""
        letter = self._plan.glue.exports.get(name)
        return None if letter is None else self._guest().function(letter)

    def _guest(self) -> LinkedInstance:
        if self._package is None:  # its start function calls us before it stands
            raise GuestFailed("trap", "the package calls its host before its memory can be reached", {"trap": "other"})
        return self._package

    # --- functions that the package imports ---

    def _dispatch(self, service: int, place: int, length: int) -> int:
        """Have the supervisor answer a request for another service; return where the answer lies, ended by a zero."""
        answer = b""
        if service == SPARK_SERVICE:  # the vendor's runner answers all others with nothing
            answer = self._plan.dispatch(self.read(place & _LOW, length & _LOW))
        found: int = self._allocate(len(answer) + 1) & _LOW
        if not found:
            raise self._without_room(f"there is no room for another service's answer of {traps.sized(len(answer))}")
        self.write(found, answer + b"\0")
        return found

    def _noticed(self, resize: Callable[..., Any]) -> Callable[..., Any]:
        """Have it remembered that the guest was refused memory: what happens to it then is out of memory."""

        def resized(*numbers: Number) -> Any:
            result = resize(*numbers)
            self._was_refused = not result
            return result

        return resized

    # --- what went wrong ---

    def _explained(self, problem: GuestFailed) -> GuestFailed:
        if self._was_refused and problem.kind == "trap":
            return self._without_room(str(problem), problem.details)
        return problem

    def _without_room(self, what: str, details: dict[str, Any] | None = None) -> GuestFailed:
        memory, own = self._guest().memory_size(), self._plan.glue.heap_limit
        if own and own < self._limit:
            text = f"{what}, with {traps.sized(memory)} of memory, and the package itself allows {traps.sized(own)}"
            return GuestFailed("out-of-memory", text, {**(details or {}), "memory": memory, "memory_limit": own})
        return traps.out_of_memory(what, memory, self._limit, details)

    def _without_answer(self) -> GuestFailed:
        if self._was_refused:
            return self._without_room(f"`{CALCULATE}` gave no answer")
        return GuestFailed("bad-answer", f"`{CALCULATE}` gave no answer", {"memory": self._guest().memory_size()})


def _function(instance: LinkedInstance, name: str) -> Function:
    found = instance.function(name)
    if found is None:  # looked at when the package was prepared
        raise GuestFailed("stale-code", f"the package exports no function `{name}`; compile again")
    return found
