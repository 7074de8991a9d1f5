"""What a host may ask of an engine: five verbs (compile, load, instantiate, call, interrupt), and nothing else.

An engine is one module with a class that fits `Engine`, found by `open_engine`. Whatever goes wrong in a guest or a
module leaves an engine as `GuestFailed`.

Hosts that give their guests more than WASI link several modules and functions of their own: a `Group`. Only engines
that fit `LinkingEngine` can do that; wasmer is not asked to.
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

Number = int | float

_ENGINES = {
    "wasmtime": ("spark_workers.engines.wasmtime_engine", "WasmtimeEngine"),
    "wasmer": ("spark_workers.engines.wasmer_engine", "WasmerEngine"),
}


@dataclass(frozen=True, slots=True)
class Settings:
    """How a model is to be run; see `spark_runtime.config.Model` for what each means."""

    args: list[str] = field(default_factory=list)
    env: dict[str, str] = field(default_factory=dict)
    memory_limit: int = 2 << 30
    stack_limit: int = 512 * 1024
    table_limit: int = 1_000_000
    epochs: bool = False
    fresh: bool = False
    entry: str = "execute"


@dataclass(frozen=True, slots=True)
class Extern:
    """One import or export. *kind* is function, memory, table, global or tag; *type* is text such as ``(i32) -> i64``.

    *module* is empty for an export.
    """

    module: str
    name: str
    kind: str
    type: str


@dataclass(frozen=True, slots=True)
class Wasi:
    """What a WASI guest sees. *stdin* to *stderr* are descriptors, which stay the caller's.

    They are three files. *stdin* is read from its beginning. *stdout* and *stderr* are empty when an instance is made
    and written from their beginning; an engine may open them anew, so that the place of ours need not move.
    """

    args: Sequence[str]
    env: dict[str, str]
    stdin: int
    stdout: int
    stderr: int


class Function(Protocol):
    """An exported function; calling it is the hot path. Arguments and results are numbers in the guest's types."""

    @property
    def params(self) -> tuple[str, ...]:
        """Types of the parameters: i32, i64, f32, f64; others cannot be called."""

    @property
    def results(self) -> tuple[str, ...]:
        """Types of the results."""

    def __call__(self, *arguments: Number) -> Any:
        """Return None, one number, or a tuple of them. Integers come back signed.

        Raises:
            GuestFailed: trap, out-of-memory, stack-overflow, exit, interrupted, wrong-signature.
        """


class Instance(Protocol):
    """One instance with a memory of its own."""

    def function(self, name: str) -> Function | None:
        """Return the exported function of that name, or None."""

    def arm(self) -> None:
        """Have interrupts that come from now on stop this instance, and none that came before.

        Called once before each run, and only where the engine can interrupt.
        """

    def memory_size(self) -> int:
        """Bytes of linear memory now; 0 if it exports none."""

    def read(self, address: int, length: int) -> bytes:
        """Copy out of the exported memory. Raises GuestFailed("bad-answer") outside of it."""

    def write(self, address: int, data: bytes) -> None:
        """Copy into the exported memory. Raises GuestFailed("bad-answer") outside of it."""

    def close(self) -> None:
        """Free everything at once."""


class Code(Protocol):
    """A loaded module, shared by its instances."""

    @property
    def imports(self) -> list[Extern]: ...

    @property
    def exports(self) -> list[Extern]: ...

    def instantiate(self, wasi: Wasi | None) -> Instance:
        """Make an instance; a reactor's ``_initialize`` is *not* called here. Raises GuestFailed."""


class Engine(Protocol):
    """One engine in one process, for one model."""

    can_interrupt: bool

    def compile(self, wasm: bytes) -> bytes:
        """Return machine code for `load`. Only a compile worker calls this."""

    def load(self, path: str) -> Code:
        """Map machine code that `compile` made. Raises GuestFailed("stale-code") if it does not fit."""

    def interrupt(self) -> None:
        """Stop the guest that runs now, from another thread. The call fails with "interrupted"."""


class Member(Protocol):
    """A loaded module that becomes an instance in a group."""

    @property
    def imports(self) -> list[Extern]: ...

    @property
    def exports(self) -> list[Extern]: ...

    def rename(self, names: dict[str, str]) -> None:
        """Have backtraces call exports by other names: those in *names*, by the exports' own."""


class LinkedInstance(Instance, Protocol):
    """An instance in a group. It is closed with the group."""

    def export(self, name: str) -> Any:
        """Return the export of that name, to be given to another member; None if there is none."""

    def grow(self, pages: int) -> bool:
        """Make the exported memory larger by so many pages of 64 KiB; tell whether it may be."""


class Group(Protocol):
    """Instances that live and end together: one may import what another exports.

    The one that exports a memory is the guest: failures tell its functions and its memory.
    """

    def add(self, member: Any, given: Sequence[Any]) -> LinkedInstance:
        """Make an instance that imports what is *given*, in the order of its imports.

        Each is what `LinkedInstance.export` or `LinkingEngine.function` returned.

        Raises:
            GuestFailed: "unsupported-import" if something does not fit; as `Code.instantiate`.
        """

    def arm(self) -> None:
        """As `Instance.arm`, for all of them."""

    def close(self) -> None:
        """Free everything at once."""


class LinkingEngine(Engine, Protocol):
    """An engine that links modules with each other and with functions of the host's."""

    def load_member(self, code: str | bytes) -> Member:
        """Map the machine code at a path, or copy it. Raises GuestFailed("stale-code") if it does not fit."""

    def function(self, kind: str, run: Callable[..., Any]) -> Any:
        """Return a function that guests can import, of a type such as ``(i32, i64) -> f64``.

        *run* gets numbers, integers signed, and returns a number or, for a type without a result, anything. A
        `GuestFailed` that it raises ends the guest's call and is what the caller gets; so does any other exception.
        """

    def open_group(self, memory_limit: int) -> Group:
        """Return an empty group. Its one memory may have *memory_limit* bytes."""


def open_engine(name: str, settings: Settings) -> Engine:
    """Return the engine *name*.

    Raises:
        GuestFailed: "engine-missing".
    """
    module, cls = _ENGINES[name]
    engine: Engine = getattr(importlib.import_module(module), cls)(settings)
    return engine
