"""wasmtime through its own Python package: for versions whose structures `wasmtime_raw` does not know.

The same engine to whoever calls it, at twenty times the cost of a call and 40 ms for the import.
"""

import ctypes
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import wasmtime

from spark_workers.engines import code_file, traps
from spark_workers.engines.arguments import CALLABLE, convert_all, not_callable
from spark_workers.engines.outline import OutlineUnreadable, read_outline, signature_of
from spark_workers.engines.seam import Number, Settings, Wasi
from spark_workers.engines.stack import stack_bytes
from spark_workers.engines.streams import clean_texts, path_of
from spark_workers.hosts.failures import GuestFailed

_START = "start"  # what making an instance is called in failures
GROUP_SIZE = 8  # instances that a group may have


class PublicEngine:
    """Fits `seam.Engine`."""

    def __init__(self, settings: Settings) -> None:
        self.can_interrupt = settings.epochs
        self._settings = settings
        self._engine = self._configured(parallel=False)

    def _configured(self, parallel: bool) -> wasmtime.Engine:
        """Make an engine; what is set here is what `wasmtime_raw` sets, so that machine code fits both."""
        config = wasmtime.Config()
        config.parallel_compilation = parallel
        config.epoch_interruption = self._settings.epochs
        config.max_wasm_stack = stack_bytes(self._settings.stack_limit)
        config.memory_may_move = False
        config.wasm_multi_memory = False
        config.shared_memory = False
        return wasmtime.Engine(config)

    def compile(self, wasm: bytes) -> bytes:
        """Return machine code for `load`.

        Raises:
            GuestFailed: "invalid-module".
        """
        try:
            module = wasmtime.Module(self._configured(parallel=True), wasm)
            return code_file.join(module.serialize(), read_outline(wasm))
        except wasmtime.WasmtimeError as problem:
            raise traps.uncompiled(str(problem)) from problem
        except OutlineUnreadable as problem:
            raise GuestFailed("invalid-module", str(problem)) from problem

    def load(self, path: str) -> "PublicCode":
        """Map machine code that `compile` made.

        Raises:
            GuestFailed: "stale-code" if it does not fit; "unsupported-import".
        """
        return PublicCode(self._settings, self._engine, self._loaded(path), code_file.read_signs(path))

    def load_member(self, code: str | bytes) -> "PublicMember":
        """Map or copy machine code that `compile` made, for use in a group.

        Raises:
            GuestFailed: "stale-code" if it does not fit.
        """
        signs = code_file.read_signs(code) if isinstance(code, str) else code_file.signs_in(code)
        return PublicMember(self._loaded(code), signs)

    def _loaded(self, code: str | bytes) -> wasmtime.Module:
        try:
            if isinstance(code, str):
                return wasmtime.Module.deserialize_file(self._engine, code)
            return wasmtime.Module.deserialize(self._engine, code)
        except wasmtime.WasmtimeError as problem:
            raise GuestFailed("stale-code", f"the prepared machine code does not fit: {problem}") from problem

    def function(self, kind: str, run: Callable[..., Any]) -> "HostFunction":
        """Return a function that guests in groups of this engine can import; see `seam.Engine.function`."""
        return HostFunction(kind, run)

    def open_group(self, memory_limit: int) -> "PublicGroup":
        """Return an empty group, whose memories have that limit."""
        return PublicGroup(self._engine, replace(self._settings, memory_limit=memory_limit))

    def interrupt(self) -> None:
        """Stop the guest that runs now, from another thread.

        Raises:
            RuntimeError: The settings did not ask for it.
        """
        if not self.can_interrupt:
            raise RuntimeError("this engine was opened without epochs: it cannot interrupt")
        self._engine.increment_epoch()


class PublicMember:
    """A module as a group takes it. Fits `seam.Member`."""

    def __init__(self, module: wasmtime.Module, signs: code_file.Signs) -> None:
        self.imports = signs.imports
        self.exports = signs.exports
        self.signs = signs
        self.module = module
        self.rename = signs.rename


class PublicCode(PublicMember):
    """A module that needs nothing but WASI, or nothing. Fits `seam.Code`."""

    def __init__(
        self,
        settings: Settings,
        engine: wasmtime.Engine,
        module: wasmtime.Module,
        signs: code_file.Signs,
    ) -> None:
        super().__init__(module, signs)
        self._settings = settings
        self._engine = engine
        linker = wasmtime.Linker(engine)
        linker.define_wasi()
        try:
            self._prepared = linker.instantiate_pre(module)
        except wasmtime.WasmtimeError as problem:
            raise GuestFailed("unsupported-import", traps.last_cause(str(problem))) from problem

    def instantiate(self, wasi: Wasi | None) -> "PublicInstance":
        """Make an instance; a reactor's ``_initialize`` is *not* called here.

        Raises:
            GuestFailed: out-of-memory and over-limit if it is too large from the start; what its start function does.
        """
        store, prepared = _opened_store(self._engine, self._settings), self._prepared
        if wasi is not None:
            store.set_wasi(_configured(wasi))
        return PublicInstance(self, store, self._settings, lambda: prepared.instantiate(store))


def _opened_store(engine: wasmtime.Engine, settings: Settings, instances: int = 1) -> wasmtime.Store:
    store = wasmtime.Store(engine)
    store.set_limits(settings.memory_limit, settings.table_limit, instances=instances, memories=1)
    if settings.epochs:
        store.set_epoch_deadline(1)
    return store


class PublicInstance:
    """Fits `seam.Instance`."""

    def __init__(
        self,
        code: PublicMember,
        store: wasmtime.Store,
        settings: Settings,
        make: Callable[[], wasmtime.Instance],
        guest: "PublicInstance | None" = None,
    ) -> None:
        self.signs = code.signs
        self._other = guest  # whom failures are about, if it is not this one: the one with the memory
        self._settings = settings
        self._memory: wasmtime.Memory | None = None
        self.store = store
        instance = self.run(_START, make)
        self._exports = instance.exports(self.store)
        if code.signs.memory is not None:
            self._memory = self._exports[code.signs.memory]

    def run(self, name: str, action: Callable[[], Any]) -> Any:
        """Do something that enters the guest, and tell in our words how it fails."""
        guest = self._other or self
        try:
            return action()
        except wasmtime.ExitTrap as problem:
            raise traps.exited(name, problem.code) from problem
        except wasmtime.Trap as problem:
            code = problem.trap_code
            number = None if code is None else int(code.value)
            frames = _frames_of(problem, guest.signs.names)
            limits = self._settings.memory_limit, stack_bytes(self._settings.stack_limit)
            found = traps.trapped(name, number, problem.message, frames, guest.memory_size(), *limits)
            raise found from problem
        except wasmtime.WasmtimeError as problem:
            text, memory_limit = str(problem), self._settings.memory_limit
            if name == _START:
                raise traps.not_started(text, memory_limit, self._settings.table_limit) from problem
            raise traps.failed(name, text, guest.memory_size(), memory_limit) from problem
        except GuestFailed as problem:  # by a function of the host's
            raise traps.ended_by_host(problem, name, [], guest.memory_size()) from problem.__cause__

    def function(self, name: str) -> "PublicFunction | None":
        """Return the exported function of that name, or None."""
        signature = self.signs.signatures.get(name)
        return None if signature is None else PublicFunction(self, name, self._exports[name], *signature)

    def close(self) -> None:
        """Free everything at once. Its functions cannot be called any more."""
        self._memory = None
        self.store.close()

    def arm(self) -> None:
        """Have interrupts that come from now on stop this instance, and none that came before."""
        self.store.set_epoch_deadline(1)

    def export(self, name: str) -> Any:
        """Return the export of that name, for another instance of the same group to import; None if there is none."""
        return self._exports.get(name)

    def grow(self, pages: int) -> bool:
        """Make the exported memory larger by so many pages of 64 KiB; tell whether it may be."""
        if self._memory is None:
            return False
        try:
            self._memory.grow(self.store, pages)
        except wasmtime.WasmtimeError:
            return False
        return True

    def memory_size(self) -> int:
        """Bytes of linear memory now; 0 if it exports none."""
        return 0 if self._memory is None else self._memory.data_len(self.store)

    def read(self, address: int, length: int) -> bytes:
        """Copy out of the exported memory.

        Raises:
            GuestFailed: "bad-answer" outside of it.
        """
        return ctypes.string_at(self._place(address, length), length) if length else b""

    def write(self, address: int, data: bytes) -> None:
        """Copy into the exported memory.

        Raises:
            GuestFailed: "bad-answer" outside of it.
        """
        if data:
            ctypes.memmove(self._place(address, len(data)), data, len(data))

    def _place(self, address: int, length: int) -> int:
        size = self.memory_size()
        if self._memory is None or address < 0 or length < 0 or address + length > size:
            raise traps.outside(address, length, size)
        return ctypes.addressof(self._memory.data_ptr(self.store).contents) + address


class PublicGroup:
    """Fits `seam.Group`."""

    def __init__(self, engine: wasmtime.Engine, settings: Settings) -> None:
        self._settings = settings
        self._store = _opened_store(engine, settings, GROUP_SIZE)
        self._guest: PublicInstance | None = None

    def add(self, member: PublicMember, given: Sequence[Any]) -> PublicInstance:
        """Make an instance that imports what is *given*, in the order of its imports.

        Raises:
            GuestFailed: "unsupported-import" if something does not fit; as `PublicCode.instantiate`.
        """
        store = self._store
        items = [each.item(store) if isinstance(each, HostFunction) else each for each in given]
        guest = None if member.signs.memory is not None else self._guest
        make = lambda: wasmtime.Instance(store, member.module, items)  # noqa: E731
        instance = PublicInstance(member, store, self._settings, make, guest)
        self._guest = guest or instance
        return instance

    def arm(self) -> None:
        """Have interrupts that come from now on stop what runs here, and none that came before."""
        self._store.set_epoch_deadline(1)

    def close(self) -> None:
        """Free everything at once. Its functions cannot be called any more."""
        self._store.close()


class HostFunction:
    """A function of the host's as guests import it. What it raises the package itself hands on."""

    def __init__(self, kind: str, run: Callable[..., Any]) -> None:
        params, results = signature_of(kind)
        types: dict[str, Callable[[], wasmtime.ValType]] = {
            "i32": wasmtime.ValType.i32,
            "i64": wasmtime.ValType.i64,
            "f32": wasmtime.ValType.f32,
            "f64": wasmtime.ValType.f64,
        }
        self._type = wasmtime.FuncType([types[each]() for each in params], [types[each]() for each in results])
        self._run: Callable[..., Any] = run
        if not results:
            self._run = lambda *numbers: _nothing(run(*numbers))
        elif results[0][0] == "f":
            self._run = lambda *numbers: float(run(*numbers))
        else:
            bits = int(results[0][1:])
            self._run = lambda *numbers: _signed(run(*numbers), bits)

    def item(self, store: wasmtime.Store) -> wasmtime.Func:
        """Return it as that store knows it."""
        return wasmtime.Func(store, self._type, self._run)


def _nothing(_result: object) -> None:
    """A function without a result must return None."""


def _signed(value: int, bits: int) -> int:
    low = value & ((1 << bits) - 1)
    return low - (1 << bits) if low >> (bits - 1) else low


class PublicFunction:
    """Fits `seam.Function`."""

    def __init__(
        self,
        instance: PublicInstance,
        name: str,
        function: wasmtime.Func,
        params: tuple[str, ...],
        results: tuple[str, ...],
    ) -> None:
        self.params = params
        self.results = results
        self._name = name
        self._instance = instance
        self._function = function

    def __call__(self, *arguments: Number) -> Any:
        """Return None, one number, or a tuple of them. Integers come back signed.

        Raises:
            GuestFailed: trap, out-of-memory, stack-overflow, exit, interrupted, wrong-signature.
        """
        if not all(each in CALLABLE for each in (*self.params, *self.results)):
            raise not_callable(self._name, self.params, self.results)
        numbers = convert_all(self._name, self.params, arguments)
        values = [float(each) if kind[0] == "f" else each for kind, each in zip(self.params, numbers, strict=True)]
        store = self._instance.store
        result = self._instance.run(self._name, lambda: self._function(store, *values))
        return tuple(result) if isinstance(result, list) else result


def _configured(wasi: Wasi) -> wasmtime.WasiConfig:
    config = wasmtime.WasiConfig()
    config.argv = [each.decode() for each in clean_texts("argument", wasi.args)]
    clean_texts("environment variable", [*wasi.env, *wasi.env.values()])
    config.env = list(wasi.env.items())
    config.stdin_file = path_of(wasi.stdin)
    config.stdout_file = os.fsdecode(path_of(wasi.stdout))
    config.stderr_file = os.fsdecode(path_of(wasi.stderr))
    return config


def _frames_of(trap: wasmtime.Trap, names: dict[int, str]) -> list[traps.Frame]:
    frames = trap.frames[: traps.MAX_FRAMES]
    return [
        traps.Frame(each.func_name or names.get(each.func_index, ""), each.func_index, each.module_offset)
        for each in frames
        if each.module_name != traps.BRIDGE
    ]
