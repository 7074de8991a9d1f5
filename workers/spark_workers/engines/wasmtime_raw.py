"""wasmtime through its C interface, called directly: a call of an export costs a twentieth of what it does otherwise.

This file and no other knows libwasmtime's functions and the sizes of its structures. They are bound through `ctypes`
without importing the wasmtime package, and the library is opened when this module is imported, so that a nursery that
preloads it has done so before it forks. `wasmtime_engine` imports it only for versions that it was checked against, and
takes `wasmtime_public`, the same engine through the package's own interface, for others.

What makes it fast, and what it takes to be safe:

* Arguments and results lie in one array for each function, and the five arguments of the call are objects made once.
  One guest runs at a time in a process, so the instances of a module use the same arrays one after the other.
* Linear memory is looked at through one memoryview. It never moves (``memory_may_move`` is off) and never shrinks, so
  its length is asked for again only when an access lies beyond what is known.
* `ctypes` releases the GIL during a call, so another thread can interrupt it.
* A function of the host's is a C callback that reads its arguments where they lie. What it raises is kept, the guest
  is ended by a trap, and whoever called the guest gets what was raised.
* What wasmtime gives out is freed once: stores by `close`, the rest when the last user is gone.
"""

import ctypes
import os
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from spark_workers.engines import code_file, traps
from spark_workers.engines.arguments import CALLABLE, RANGES, convert_all, not_callable, wrong_count
from spark_workers.engines.outline import OutlineUnreadable, read_outline, signature_of
from spark_workers.engines.seam import Number, Settings, Wasi
from spark_workers.engines.stack import stack_bytes
from spark_workers.engines.streams import clean_texts, path_of, read_all
from spark_workers.engines.wasmtime_found import find_installed
from spark_workers.hosts.failures import GuestFailed

_P = ctypes.c_void_p
_SIZE = ctypes.c_size_t
_FUNCTION = 0  # a kind of `ExternItem`
_READ_WRITE = 0x200  # PyBUF_WRITE


class ByteVector(ctypes.Structure):
    """``wasm_byte_vec_t``, and with the same layout ``wasm_frame_vec_t``."""

    _fields_ = (("size", _SIZE), ("data", _P))


class ExternItem(ctypes.Structure):
    """``wasmtime_extern_t``: a function is 16 bytes, a memory 24, what is largest of the others 24 too."""

    _fields_ = (("kind", ctypes.c_uint8), ("of", ctypes.c_uint64 * 3))


#: ``wasmtime_instance_t`` and ``wasmtime_val_raw_t``.
InstanceItem = ctypes.c_uint64 * 2
VALUE_BYTES = 16

GROUP_SIZE = 8  # instances that a group may have

_VIEWS: dict[str, Any] = {
    "i32": ctypes.c_int32,
    "i64": ctypes.c_int64,
    "f32": ctypes.c_float,
    "f64": ctypes.c_double,
}

_KINDS = {"i32": 0, "i64": 1, "f32": 2, "f64": 3}  # ``wasm_valkind_t``
_HOST_FAILED = b"a function of the host's failed"

#: ``wasmtime_func_unchecked_callback_t``: environment, caller, values, their number; returns a trap or 0.
HostCallback = ctypes.CFUNCTYPE(_SIZE, _P, _P, _P, _SIZE)

_EXACT = (-(1 << 24), 1 << 24)  # integers that even the smallest float is exact for

_memory_view = ctypes.pythonapi.PyMemoryView_FromMemory
_memory_view.restype = ctypes.py_object
_memory_view.argtypes = (_P, ctypes.c_ssize_t, ctypes.c_int)


def _open() -> ctypes.CDLL:
    installed = find_installed()
    if installed is None:
        raise ImportError("wasmtime is not installed")
    return ctypes.CDLL(installed.library)


_library = _open()


#: The functions that are bound, by name. A test compares them with what the package declares.
BOUND: dict[str, Any] = {}


def _bind(name: str, result: Any, *arguments: Any) -> Callable[..., Any]:
    function = _library[name]
    function.restype = result
    function.argtypes = arguments
    BOUND[name] = function
    return function


_config_new = _bind("wasm_config_new", _P)
_config_parallel = _bind("wasmtime_config_parallel_compilation_set", None, _P, ctypes.c_bool)
_config_epochs = _bind("wasmtime_config_epoch_interruption_set", None, _P, ctypes.c_bool)
_config_stack = _bind("wasmtime_config_max_wasm_stack_set", None, _P, _SIZE)
_config_may_move = _bind("wasmtime_config_memory_may_move_set", None, _P, ctypes.c_bool)
_config_many_memories = _bind("wasmtime_config_wasm_multi_memory_set", None, _P, ctypes.c_bool)
_config_shared_memory = _bind("wasmtime_config_shared_memory_set", None, _P, ctypes.c_bool)
_engine_new = _bind("wasm_engine_new_with_config", _P, _P)
_engine_delete = _bind("wasm_engine_delete", None, _P)
_engine_increment = _bind("wasmtime_engine_increment_epoch", None, _P)

_module_new = _bind("wasmtime_module_new", _P, _P, ctypes.c_char_p, _SIZE, _P)
_module_delete = _bind("wasmtime_module_delete", None, _P)
_module_serialize = _bind("wasmtime_module_serialize", _P, _P, _P)
_module_load = _bind("wasmtime_module_deserialize_file", _P, _P, ctypes.c_char_p, _P)
_module_copy = _bind("wasmtime_module_deserialize", _P, _P, ctypes.c_char_p, _SIZE, _P)

_linker_new = _bind("wasmtime_linker_new", _P, _P)
_linker_delete = _bind("wasmtime_linker_delete", None, _P)
_linker_wasi = _bind("wasmtime_linker_define_wasi", _P, _P)
_linker_prepare = _bind("wasmtime_linker_instantiate_pre", _P, _P, _P, _P)
_prepared_delete = _bind("wasmtime_instance_pre_delete", None, _P)
_prepared_make = _bind("wasmtime_instance_pre_instantiate", _P, _P, _P, _P, _P)

_store_new = _bind("wasmtime_store_new", _P, _P, _P, _P)
_store_delete = _bind("wasmtime_store_delete", None, _P)
_store_context = _bind("wasmtime_store_context", _P, _P)
_store_limits = _bind("wasmtime_store_limiter", None, _P, *[ctypes.c_int64] * 5)
_context_wasi = _bind("wasmtime_context_set_wasi", _P, _P, _P)
_context_deadline = _bind("wasmtime_context_set_epoch_deadline", None, _P, ctypes.c_uint64)
_instance_new = _bind("wasmtime_instance_new", _P, _P, _P, _P, _SIZE, _P, _P)
_instance_export = _bind("wasmtime_instance_export_get", ctypes.c_bool, _P, _P, ctypes.c_char_p, _SIZE, _P)
_memory_data = _bind("wasmtime_memory_data", _P, _P, _P)
_memory_size = _bind("wasmtime_memory_data_size", _SIZE, _P, _P)
_memory_grow = _bind("wasmtime_memory_grow", _P, _P, _P, ctypes.c_uint64, _P)
_value_type = _bind("wasm_valtype_new", _P, ctypes.c_uint8)
_value_types = _bind("wasm_valtype_vec_new", None, _P, _SIZE, _P)
_function_type = _bind("wasm_functype_new", _P, _P, _P)
_function_type_delete = _bind("wasm_functype_delete", None, _P)
_function_new = _bind("wasmtime_func_new_unchecked", None, _P, _P, HostCallback, _P, _P, _P)

_wasi_new = _bind("wasi_config_new", _P)
_wasi_delete = _bind("wasi_config_delete", None, _P)
_wasi_args = _bind("wasi_config_set_argv", ctypes.c_bool, _P, _SIZE, _P)
_wasi_env = _bind("wasi_config_set_env", ctypes.c_bool, _P, _SIZE, _P, _P)
_wasi_stdin = _bind("wasi_config_set_stdin_bytes", None, _P, _P)
_wasi_stdout = _bind("wasi_config_set_stdout_file", ctypes.c_bool, _P, ctypes.c_char_p)
_wasi_stderr = _bind("wasi_config_set_stderr_file", ctypes.c_bool, _P, ctypes.c_char_p)

_bytes_new = _bind("wasm_byte_vec_new", None, _P, _SIZE, ctypes.c_char_p)
_bytes_delete = _bind("wasm_byte_vec_delete", None, _P)
_error_message = _bind("wasmtime_error_message", None, _P, _P)
_error_frames = _bind("wasmtime_error_wasm_trace", None, _P, _P)
_error_exit = _bind("wasmtime_error_exit_status", ctypes.c_bool, _P, _P)
_error_delete = _bind("wasmtime_error_delete", None, _P)
_trap_new = _bind("wasmtime_trap_new", _P, ctypes.c_char_p, _SIZE)
_trap_message = _bind("wasm_trap_message", None, _P, _P)
_trap_code = _bind("wasmtime_trap_code", ctypes.c_bool, _P, _P)
_trap_frames = _bind("wasm_trap_trace", None, _P, _P)
_trap_delete = _bind("wasm_trap_delete", None, _P)
_frames_delete = _bind("wasm_frame_vec_delete", None, _P)
_frame_index = _bind("wasm_frame_func_index", ctypes.c_uint32, _P)
_frame_offset = _bind("wasm_frame_module_offset", _SIZE, _P)
_frame_name = _bind("wasmtime_frame_func_name", _P, _P)
_frame_module = _bind("wasmtime_frame_module_name", _P, _P)

# The one call that is hot: without argument types, which would look at each argument again every time.
_call_function = ctypes.CDLL(_library._name).wasmtime_func_call_unchecked
_call_function.restype = _SIZE


# --- errors ----------------------------------------------------------------------------------------------------------


def _text_of(vector: ByteVector) -> str:
    return ctypes.string_at(vector.data, vector.size).rstrip(b"\0").decode(errors="replace") if vector.size else ""


def _taken(pointer: int, message: Callable[..., Any], delete: Callable[..., Any]) -> str:
    """Return the text of an error or a trap, and free it."""
    vector = ByteVector()
    message(pointer, ctypes.byref(vector))
    text = _text_of(vector)
    _bytes_delete(ctypes.byref(vector))
    delete(pointer)
    return text


def _error_text(error: int) -> str:
    return _taken(error, _error_message, _error_delete)


def _exit_code(error: int) -> int | None:
    code = ctypes.c_int()
    return code.value if _error_exit(error, ctypes.byref(code)) else None


def _frames_of(failure: int, names: dict[int, str], read: Callable[..., Any] = _trap_frames) -> list[traps.Frame]:
    vector = ByteVector()
    read(failure, ctypes.byref(vector))
    count = min(vector.size, traps.MAX_FRAMES)
    pointers = (_P * count).from_address(vector.data) if count else ()
    frames = []
    for each in pointers:
        if _text_at(_frame_module(each)) != traps.BRIDGE:
            index = _frame_index(each)
            name = _text_at(_frame_name(each)) or names.get(index, "")
            frames.append(traps.Frame(name, index, _frame_offset(each)))
    _frames_delete(ctypes.byref(vector))
    return frames


def _text_at(vector: int | None) -> str:
    return _text_of(ByteVector.from_address(vector)) if vector else ""


# --- the engine ------------------------------------------------------------------------------------------------------


def _freed(owner: object, delete: Callable[..., Any], pointer: int) -> Callable[[], object]:
    """Free *pointer* when *owner* is gone, or when the function that is returned is called; not at exit."""
    finalizer = weakref.finalize(owner, delete, pointer)
    finalizer.atexit = False  # the end of the process frees everything at once
    return finalizer


class RawEngine:
    """Fits `seam.Engine`."""

    def __init__(self, settings: Settings) -> None:
        self.can_interrupt = settings.epochs
        self.pointer = self._configured(settings, parallel=False)
        self.settings = settings
        self.raised: BaseException | None = None  # by a function of the host's, until its guest has ended
        self._types: dict[str, tuple[int, tuple[str, ...], tuple[str, ...]]] = {}
        _freed(self, _engine_delete, self.pointer)

    @staticmethod
    def _configured(settings: Settings, parallel: bool) -> int:
        """Make an engine; *parallel* only to compile, because a process with those threads must not fork."""
        config = _config_new()
        _config_parallel(config, parallel)
        _config_epochs(config, settings.epochs)
        _config_stack(config, stack_bytes(settings.stack_limit))
        _config_may_move(config, False)
        _config_many_memories(config, False)  # the limit is for each memory
        _config_shared_memory(config, False)  # and no limit is for a shared one
        pointer: int = _engine_new(config)
        return pointer

    def compile(self, wasm: bytes) -> bytes:
        """Return machine code for `load`.

        Raises:
            GuestFailed: "invalid-module".
        """
        engine, module, vector = self._configured(self.settings, parallel=True), _P(), ByteVector()
        try:
            error = _module_new(engine, wasm, len(wasm), ctypes.byref(module))
            if error:
                raise traps.uncompiled(_error_text(error))
            outline = read_outline(wasm)
            error = _module_serialize(module, ctypes.byref(vector))
            if error:
                raise traps.uncompiled(_error_text(error))
            return code_file.join(memoryview((ctypes.c_char * vector.size).from_address(vector.data)), outline)
        except OutlineUnreadable as problem:
            raise GuestFailed("invalid-module", str(problem)) from problem
        finally:
            if vector.data:
                _bytes_delete(ctypes.byref(vector))
            if module:
                _module_delete(module)
            _engine_delete(engine)

    def load(self, path: str) -> "RawCode":
        """Map machine code that `compile` made.

        Raises:
            GuestFailed: "stale-code" if it does not fit; "unsupported-import".
        """
        return RawCode(self, self._mapped(path), code_file.read_signs(path))

    def load_member(self, code: str | bytes) -> "RawMember":
        """Map or copy machine code that `compile` made, for use in a group.

        Raises:
            GuestFailed: "stale-code" if it does not fit.
        """
        if isinstance(code, str):
            return RawMember(self, self._mapped(code), code_file.read_signs(code))
        signs = code_file.signs_in(code)
        module = _P()
        _check_fit(_module_copy(self.pointer, code, len(code), ctypes.byref(module)))
        assert module.value is not None
        return RawMember(self, module.value, signs)

    def _mapped(self, path: str) -> int:
        module = _P()
        _check_fit(_module_load(self.pointer, os.fsencode(path), ctypes.byref(module)))
        assert module.value is not None
        return module.value

    def type_of(self, kind: str) -> tuple[int, tuple[str, ...], tuple[str, ...]]:
        """Return the type of a function of ours: as wasmtime knows it, its parameters and its results."""
        found = self._types.get(kind)
        if found is None:
            params, results = signature_of(kind)
            found = self._types[kind] = _new_function_type(params, results), params, results
            _freed(self, _function_type_delete, found[0])
        return found

    def function(self, kind: str, run: Callable[..., Any]) -> "HostFunction":
        """Return a function that guests in groups of this engine can import; see `seam.Engine.function`."""
        return HostFunction(self, kind, run)

    def open_group(self, memory_limit: int) -> "RawGroup":
        """Return an empty group, whose memories have that limit."""
        return RawGroup(self, replace(self.settings, memory_limit=memory_limit))

    def interrupt(self) -> None:
        """Stop the guest that runs now, from another thread.

        Raises:
            RuntimeError: The settings did not ask for it.
        """
        if not self.can_interrupt:
            raise RuntimeError("this engine was opened without epochs: it cannot interrupt")
        _engine_increment(self.pointer)


def _check_fit(error: int | None) -> None:
    if error:
        raise GuestFailed("stale-code", f"the prepared machine code does not fit: {_error_text(error)}")


class RawMember:
    """A module as a group takes it. Fits `seam.Member`."""

    def __init__(self, engine: RawEngine, module: int, signs: code_file.Signs) -> None:
        self.engine = engine  # which outlives us
        self.imports = signs.imports
        self.exports = signs.exports
        self.signs = signs
        self.module = module
        self.rename = signs.rename
        self._slots: dict[str, Slots] = {}
        _freed(self, _module_delete, module)

    def slots_of(self, name: str) -> "Slots | None":
        """Return the slots of the exported function of that name, or None."""
        found = self._slots.get(name)
        if found is None and name in self.signs.signatures:
            found = self._slots[name] = Slots(*self.signs.signatures[name])
        return found


class RawCode(RawMember):
    """A module that needs nothing but WASI, or nothing. Fits `seam.Code`."""

    def __init__(self, engine: RawEngine, module: int, signs: code_file.Signs) -> None:
        super().__init__(engine, module, signs)
        self._prepared = self._link()
        _freed(self, _prepared_delete, self._prepared)

    def _link(self) -> int:
        """Find every import once, for all instances."""
        linker, prepared = _linker_new(self.engine.pointer), _P()
        try:
            error = _linker_wasi(linker) or _linker_prepare(linker, self.module, ctypes.byref(prepared))
        finally:
            _linker_delete(linker)
        if error:
            raise GuestFailed("unsupported-import", traps.last_cause(_error_text(error)))
        assert prepared.value is not None
        return prepared.value

    def instantiate(self, wasi: Wasi | None) -> "RawInstance":
        """Make an instance; a reactor's ``_initialize`` is *not* called here.

        Raises:
            GuestFailed: out-of-memory and over-limit if it is too large from the start; what its start function does.
        """
        store = RawStore(self.engine, self.engine.settings)
        if wasi is not None:
            store.let_see(wasi)
        item = InstanceItem()
        error = _prepared_make(self._prepared, store.context, ctypes.byref(item), ctypes.byref(store.trap))
        return RawInstance(self, store, item, error)


class RawStore:
    """Where instances live, and what the last call into one of them has left behind."""

    def __init__(self, engine: RawEngine, settings: Settings, instances: int = 1) -> None:
        self.engine = engine
        self.settings = settings
        store = _store_new(engine.pointer, None, None)
        self.free = _freed(self, _store_delete, store)
        self.context: int = _store_context(store)
        self.trap = _P()
        # Whom failures are about: the one with the memory. Weakly, so that no cycle keeps a store that nobody uses.
        self.guest: weakref.ref[RawInstance] | None = None
        _store_limits(store, settings.memory_limit, settings.table_limit, instances, -1, 1)
        if settings.epochs:
            self.arm()

    def arm(self) -> None:
        """Have interrupts that come from now on stop what runs here, and none that came before."""
        _context_deadline(self.context, 1)

    def let_see(self, wasi: Wasi) -> None:
        """Give the guest its files, arguments and environment."""
        config, stdin = _wasi_new(), read_all(wasi.stdin)
        args = clean_texts("argument", wasi.args)
        names = clean_texts("environment variable", wasi.env)
        values = clean_texts("environment variable", wasi.env.values())
        # Bytes and files, because anything else, such as a callback, is served by tasks of tokio on other threads:
        # every write then costs two changes of thread, and a short command twice the time.
        vector = ByteVector()
        _bytes_new(ctypes.byref(vector), len(stdin), stdin)
        _wasi_stdin(config, ctypes.byref(vector))  # takes it
        accepted = (
            _wasi_args(config, len(args), _texts(args)),
            _wasi_env(config, len(names), _texts(names), _texts(values)),
            _wasi_stdout(config, path_of(wasi.stdout)),
            _wasi_stderr(config, path_of(wasi.stderr)),
        )
        if not all(accepted):
            _wasi_delete(config)
            raise GuestFailed("trap", f"WASI cannot be set up: {accepted}", {"trap": "other"})
        error = _context_wasi(self.context, config)  # takes it
        if error:
            raise GuestFailed("trap", f"WASI cannot be set up: {_error_text(error)}", {"trap": "other"})

    def failure(self, function: str, error: int) -> BaseException:
        """Return the failure that a call of *function* left behind, and free what it left."""
        trap, self.trap.value = self.trap.value, None
        raised, self.engine.raised = self.engine.raised, None
        guest = None if self.guest is None else self.guest()
        names, memory = ({}, 0) if guest is None else (guest.names, guest.memory_size())
        if trap:
            code = ctypes.c_uint8()
            number = code.value if _trap_code(trap, ctypes.byref(code)) else None
            frames = _frames_of(trap, names)
            text = _taken(trap, _trap_message, _trap_delete)
            limits = self.settings.memory_limit, stack_bytes(self.settings.stack_limit)
            return traps.trapped(function, number, text, frames, memory, *limits)
        exit_code = _exit_code(error)
        frames = [] if raised is None else _frames_of(error, names, _error_frames)
        text = _error_text(error)
        if raised is not None:
            return traps.ended_by_host(raised, function, frames, memory)
        if exit_code is not None:
            return traps.exited(function, exit_code)
        return traps.failed(function, text, memory, self.settings.memory_limit)


class RawInstance:
    """Fits `seam.Instance`."""

    def __init__(self, code: RawMember, store: RawStore, item: Any, error: int | None) -> None:
        self._code = code
        self._store = store
        self._functions: dict[str, RawFunction | None] = {}
        self._memory = ExternItem()
        self._has_memory = False
        self._view = memoryview(b"")
        self._size = 0
        self.context = store.context
        self.trap = store.trap
        self.arm = store.arm
        self.failure = store.failure
        self.names = code.signs.names
        self._item = item
        if error or self.trap:
            raise self._not_started(error)
        if store.guest is None or code.signs.memory is not None:
            store.guest = weakref.ref(self)
        self._find_memory()

    def _not_started(self, error: int | None) -> BaseException:
        if self.trap or _exit_code(error or 0) is not None:
            return self.failure("start", error or 0)
        settings = self._store.settings
        return traps.not_started(_error_text(error or 0), settings.memory_limit, settings.table_limit)

    def _find_memory(self) -> None:
        name = self._code.signs.memory
        if name is not None:
            self._has_memory = self.find(name, self._memory)
            self._look_again()

    def find(self, name: str, item: ExternItem) -> bool:
        """Write the export of that name to *item*; tell whether there is one."""
        encoded = name.encode()
        found: bool = _instance_export(
            self.context, ctypes.byref(self._item), encoded, len(encoded), ctypes.byref(item)
        )
        return found

    def function(self, name: str) -> "RawFunction | None":
        """Return the exported function of that name, or None."""
        if name not in self._functions:
            self._functions[name] = self._make_function(name)
        return self._functions[name]

    def _make_function(self, name: str) -> "RawFunction | None":
        slots, item = self._code.slots_of(name), ExternItem()
        if slots is None or not self.find(name, item) or item.kind != _FUNCTION:
            return None
        return RawFunction(self, name, item, slots)

    def export(self, name: str) -> ExternItem | None:
        """Return the export of that name, for another instance of the same group to import; None if there is none."""
        item = ExternItem()
        return item if self.find(name, item) else None

    def close(self) -> None:
        """Free everything at once. Its functions cannot be called any more."""
        self.retire()
        self._store.free()

    def retire(self) -> None:
        """Make every further use an error in place of a crash: the store is about to go."""
        self._view, self._size, self._has_memory = memoryview(b""), 0, False
        for function in self._functions.values():
            if function is not None:
                function.retire()
        self._functions.clear()

    def memory_size(self) -> int:
        """Bytes of linear memory now; 0 if it exports none."""
        self._look_again()
        return self._size

    def _look_again(self) -> None:
        """Find out how large the memory has become."""
        if not self._has_memory:
            return
        size = _memory_size(self.context, ctypes.byref(self._memory.of))
        if size != self._size:
            base = _memory_data(self.context, ctypes.byref(self._memory.of))
            self._view = _memory_view(base, size, _READ_WRITE)
            self._size = size

    def grow(self, pages: int) -> bool:
        """Make the exported memory larger by so many pages of 64 KiB; tell whether it may be."""
        if not self._has_memory:
            return False
        before = ctypes.c_uint64()
        error = _memory_grow(self.context, ctypes.byref(self._memory.of), pages, ctypes.byref(before))
        if error:
            _error_delete(error)
        self._look_again()
        return not error

    def read(self, address: int, length: int) -> bytes:
        """Copy out of the exported memory.

        Raises:
            GuestFailed: "bad-answer" outside of it.
        """
        end = address + length
        if end > self._size or address < 0 or length < 0:
            self._check(address, length)
        return self._view[address:end].tobytes()

    def write(self, address: int, data: bytes) -> None:
        """Copy into the exported memory.

        Raises:
            GuestFailed: "bad-answer" outside of it.
        """
        end = address + len(data)
        if end > self._size or address < 0:
            self._check(address, len(data))
        self._view[address:end] = data

    def _check(self, address: int, length: int) -> None:
        self._look_again()
        if address < 0 or length < 0 or address + length > self._size:
            raise traps.outside(address, length, self._size)


class RawGroup:
    """Fits `seam.Group`."""

    def __init__(self, engine: RawEngine, settings: Settings) -> None:
        self._store = RawStore(engine, settings, GROUP_SIZE)
        self._instances: list[RawInstance] = []
        self._given: list[HostFunction | ExternItem] = []  # whose callbacks must live as long as the store
        self.arm = self._store.arm

    def add(self, member: RawMember, given: Sequence["HostFunction | ExternItem"]) -> RawInstance:
        """Make an instance that imports what is *given*, in the order of its imports.

        Raises:
            GuestFailed: "unsupported-import" if something does not fit; as `RawCode.instantiate`.
        """
        items = (ExternItem * max(1, len(given)))()
        self._given += given
        for place, each in enumerate(given):
            items[place] = each.item(self._store.context) if isinstance(each, HostFunction) else each
        store, item = self._store, InstanceItem()
        error = _instance_new(
            store.context, member.module, items, len(given), ctypes.byref(item), ctypes.byref(store.trap)
        )
        instance = RawInstance(member, store, item, error)
        self._instances.append(instance)
        return instance

    def close(self) -> None:
        """Free everything at once. Its functions cannot be called any more."""
        for instance in self._instances:
            instance.retire()
        self._instances.clear()
        self._store.free()
        self._given.clear()


class HostFunction:
    """A function of the host's as guests import it; one callback for all the groups of its engine."""

    def __init__(self, engine: RawEngine, kind: str, run: Callable[..., Any]) -> None:
        self._type, params, results = engine.type_of(kind)
        self._callback = HostCallback(_entry(engine, params, results, run))

    def item(self, context: int) -> ExternItem:
        """Return it as the store of that context knows it."""
        item = ExternItem(_FUNCTION)
        _function_new(context, self._type, self._callback, None, None, ctypes.byref(item.of))
        return item


def _new_function_type(params: Sequence[str], results: Sequence[str]) -> int:
    vectors = []
    for kinds in (params, results):
        vector, types = ByteVector(), (_P * max(1, len(kinds)))(*(_value_type(_KINDS[each]) for each in kinds))
        _value_types(ctypes.byref(vector), len(kinds), types)  # takes them
        vectors.append(vector)
    pointer: int = _function_type(*map(ctypes.byref, vectors))  # takes both
    return pointer


def _entry(
    engine: RawEngine, params: Sequence[str], results: Sequence[str], run: Callable[..., Any]
) -> Callable[[Any, Any, int, int], int]:
    """Return what a guest enters when it calls *run*. Nothing may be raised from there, so it is kept."""
    places = [(_VIEWS[kind].from_address, at * VALUE_BYTES) for at, kind in enumerate(params)]
    store = _VIEWS[results[0]].from_address if results else None

    def fail(problem: BaseException) -> int:
        engine.raised = problem
        trap: int = _trap_new(_HOST_FAILED, len(_HOST_FAILED))
        return trap

    def enter(_environment: Any, _caller: Any, values: int, _count: int) -> int:
        try:
            result = run(*[view(values + at).value for view, at in places])
            if store is not None:
                store(values).value = result
        except BaseException as problem:  # noqa: BLE001 - whoever called the guest gets it
            return fail(problem)
        return 0

    def enter_at_once(_environment: Any, _caller: Any, values: int, _count: int) -> int:
        try:  # for clocks, which some models ask thousands of times in a call
            store(values).value = run()  # type: ignore[misc]
        except BaseException as problem:  # noqa: BLE001
            return fail(problem)
        return 0

    return enter_at_once if store is not None and not places else enter


class Slots:
    """Where arguments and results of one function lie, the results over the arguments. Its instances share them."""

    def __init__(self, params: tuple[str, ...], results: tuple[str, ...]) -> None:
        self.params = params
        self.results = results
        self.is_callable = all(each in CALLABLE for each in (*params, *results))
        self.count = max(len(params), len(results), 1)
        self.values = (ctypes.c_uint8 * (self.count * VALUE_BYTES))()
        self.places = self._views(params)
        self.answers = [(values, index) for values, index, _, _ in self._views(results)]

    def _views(self, kinds: Sequence[str]) -> list[tuple[Any, int, int, int]]:
        """For each value: array and index where it lies, and the integers that can be stored there as they are."""
        if not self.is_callable:
            return []
        return [(*self._view(kind, at), *RANGES.get(kind, _EXACT)) for at, kind in enumerate(kinds)]

    def _view(self, kind: str, at: int) -> tuple[Any, int]:
        element = _VIEWS[kind]
        width = VALUE_BYTES // ctypes.sizeof(element)
        return (element * (self.count * width)).from_buffer(self.values), at * width


class RawFunction:
    """Fits `seam.Function`."""

    def __init__(self, instance: RawInstance, name: str, item: ExternItem, slots: Slots) -> None:
        self.params = slots.params
        self.results = slots.results
        self._name = name
        self._instance = instance
        self._slots = slots
        self._places, self._answers = slots.places, slots.answers
        # Objects made once; the function takes pointers in these five places.
        self._fixed = (
            _P(instance.context),
            ctypes.byref(item.of),
            ctypes.byref(slots.values),
            _SIZE(slots.count),
            ctypes.byref(instance.trap),
        )
        self._trap = instance.trap

    def __call__(self, *arguments: Number) -> Any:
        """Return None, one number, or a tuple of them. Integers come back signed.

        Raises:
            GuestFailed: trap, out-of-memory, stack-overflow, exit, interrupted, wrong-signature.
        """
        if len(arguments) != len(self._places) or not self._slots.is_callable:
            raise self._refused(arguments)
        for (values, index, low, high), value in zip(self._places, arguments):  # noqa: B905 - slower when strict
            if type(value) is not int or not low <= value <= high:
                self._store(arguments)
                break
            values[index] = value
        error = _call_function(*self._fixed)
        if error or self._trap:
            raise self._instance.failure(self._name, error)
        answers = self._answers
        if len(answers) == 1:
            values, index = answers[0]
            return values[index]
        return tuple(values[index] for values, index in answers) if answers else None

    def retire(self) -> None:
        """Make every further call an error in place of a crash: the instance is gone."""
        del self._fixed

    def _store(self, arguments: Sequence[Number]) -> None:
        """Put the arguments in their places when they are not integers that fit as they are."""
        numbers = convert_all(self._name, self.params, arguments)
        for (values, index, _, _), number in zip(self._places, numbers, strict=True):
            values[index] = number

    def _refused(self, arguments: Sequence[Number]) -> GuestFailed:
        if not self._slots.is_callable:
            return not_callable(self._name, self.params, self.results)
        return wrong_count(self._name, self.params, len(arguments))


def _texts(texts: Sequence[bytes]) -> Any:
    return (ctypes.c_char_p * max(len(texts), 1))(*texts)
