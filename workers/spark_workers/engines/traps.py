"""What goes wrong in a guest, in our words: shared by the two ways of calling wasmtime.

**Out of memory** is a matter of evidence, because a guest that is refused memory is told so by a number, -1, and it
alone knows what it makes of that. Engines keep no record of a refusal. Most guests end in ``unreachable`` or in an
access out of bounds soon after, and such a trap is called out of memory when

* a frame of the backtrace is named as the allocation failures of Rust, TinyGo or AssemblyScript are, or
* the memory could not have doubled any more: allocators and vectors grow by doubling, and are refused then.

A guest that asks for far more than its limit at once and gives no sign of it stays a plain trap. The details always
hold trap, backtrace and size of the memory, and the message names both sizes, so that nobody has to believe us.
Hosts know two more signs: an allocator that returns 0, and what the guest wrote before it died.

**Stack overflow** has two forms. The engine's own stack ends in a trap of that name. Compilers of C and Rust keep a
second one inside linear memory, and running over its end is an access out of bounds: a backtrace as long as it can be
that goes round in a few functions is taken as the sign of that.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from spark_workers.hosts.failures import GuestFailed

STACK_OVERFLOW, INTERRUPTED = "stack-overflow", "interrupted"

#: By the number that wasmtime gives each; all but these are of components.
TRAPS = {
    0: STACK_OVERFLOW,
    1: "out-of-bounds-memory",
    2: "misaligned-atomic",
    3: "out-of-bounds-table",
    4: "indirect-call-to-null",
    5: "bad-signature",
    6: "integer-overflow",
    7: "integer-divide-by-zero",
    8: "bad-conversion-to-integer",
    9: "unreachable",
    10: INTERRUPTED,
    11: "out-of-fuel",
    12: "atomic-wait-on-unshared-memory",
    13: "null-reference",
    14: "out-of-bounds-array",
    15: "allocation-too-large",
    16: "cast-failure",
    49: "uncaught-exception",
}
_UNNUMBERED = {"thrown Wasm exception": "uncaught-exception"}
_SENTENCES = {
    "uncaught-exception": "it threw an exception that nothing catches",
    "unreachable": "it reached an `unreachable` instruction, which is how most languages abort or panic",
    "out-of-bounds-memory": "it accessed memory outside of its bounds",
    "out-of-bounds-table": "it accessed a table outside of its bounds",
    "indirect-call-to-null": "it called a function pointer that is null",
    "bad-signature": "it called a function pointer of another type",
    "integer-overflow": "an integer operation overflowed",
    "integer-divide-by-zero": "it divided an integer by zero",
    "bad-conversion-to-integer": "it converted a float that is not an integer's value",
}
_STARVED = ("unreachable", "out-of-bounds-memory", "out-of-bounds-table", "indirect-call-to-null")
_FULL_BACKTRACE, _CIRCLE = 20, 4  # frames that wasmtime keeps at most; functions that call each other without end
_ALLOCATION_NAMES = re.compile(r"handle_alloc_error|rust_oom|alloc_error_handler|out_?of_?memory|growMemory", re.I)
_ALLOCATION_TEXTS = re.compile(rb"memory allocation of \d+ bytes failed|out of memory|std::bad_alloc", re.I)
#: The name of modules of our own that stand between a guest and its host: backtraces do not show them.
BRIDGE = "spark bridge"
MAX_FRAMES = 50
MAX_NAME = 200
_NO_OFFSET = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Frame:
    """One function of a guest's backtrace, the innermost first."""

    name: str
    index: int
    offset: int

    def __str__(self) -> str:
        name = self.name[:MAX_NAME] or "a function without a name"
        place = "" if self.offset == _NO_OFFSET else f", at {self.offset:#x} of the module"
        return f"{name} (function {self.index}{place})"


def sized(count: int) -> str:
    """Return a number of bytes as people write it, such as ``1.5 MiB``."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size:
            return f"{count / size:.1f}".removesuffix(".0") + f" {unit}"
    return f"{count} bytes"


def trapped(
    function: str, code: int | None, text: str, frames: Sequence[Frame], memory: int, limit: int, stack: int
) -> GuestFailed:
    """Return the failure for a trap in *function*.

    Args:
        function: The export that was called.
        code: wasmtime's number of the trap, if it has one.
        text: What wasmtime says, used where we have no words of our own.
        frames: Where it happened.
        memory: Bytes of linear memory the guest had.
        limit: Bytes it may have.
        stack: Bytes of stack it may have.
    """
    trap = TRAPS.get(code, "other") if code is not None else _UNNUMBERED.get(last_cause(text), "other")
    details = {"trap": trap, "function": function, "memory": memory, "backtrace": [str(each) for each in frames]}
    where = f" in `{frames[0].name[:MAX_NAME]}`" if frames and frames[0].name not in ("", function) else ""
    if trap == INTERRUPTED:
        return GuestFailed("interrupted", f"`{function}` was interrupted{where}", details)
    if trap == STACK_OVERFLOW:
        message = f"`{function}` nests its calls deeper than its stack of {sized(stack)} allows{where}"
        return GuestFailed("stack-overflow", message, details)
    if trap == "out-of-bounds-memory" and _goes_round(frames):
        message = f"`{function}` nests its calls{where} until its stack, the one inside its memory, was used up"
        return GuestFailed("stack-overflow", message, details)
    if trap == "allocation-too-large":
        return out_of_memory(f"`{function}` asked for more memory than it may have", memory, limit, details)
    sentence = _SENTENCES.get(trap) or _first_line(text)
    if trap in _STARVED and (memory * 2 > limit or any(_ALLOCATION_NAMES.search(each.name) for each in frames)):
        return out_of_memory(f"`{function}` trapped{where}: {sentence}", memory, limit, details)
    return GuestFailed("trap", f"`{function}` trapped{where}: {sentence}", details)


def failed(function: str, text: str, memory: int, limit: int) -> GuestFailed:
    """Return the failure for a call that ended neither well nor in a trap: *text* is wasmtime's."""
    said = last_cause(text)
    if "out of memory" in said:  # of the heap for garbage collected objects, which counts as a memory
        return out_of_memory(f"`{function}` failed: {said}", memory, limit)
    details = {"trap": "other", "function": function, "memory": memory}
    return GuestFailed("trap", f"`{function}` failed: {said}", details)


def _goes_round(frames: Sequence[Frame]) -> bool:
    return len(frames) >= _FULL_BACKTRACE and len({each.index for each in frames}) <= _CIRCLE


def out_of_memory(what: str, memory: int, limit: int, details: dict[str, object] | None = None) -> GuestFailed:
    """Return the failure of a guest that needs more memory than it may have."""
    sizes = f"with {sized(memory)} of memory and a limit of {sized(limit)}"
    message = f"{what}, {sizes}; if it needs more, raise memory_limit"
    return GuestFailed("out-of-memory", message, {"memory": memory, "memory_limit": limit, **(details or {})})


def speaks_of_memory(written: bytes) -> bool:
    """Tell whether what a guest wrote before it trapped is the message of an allocation that failed."""
    return _ALLOCATION_TEXTS.search(written) is not None


def ended_by_host(raised: BaseException, function: str, frames: Sequence[Frame], memory: int) -> BaseException:
    """Return what a function of the host's has raised to end a call of *function*, with where the guest was."""
    if isinstance(raised, GuestFailed):
        known = {"function": function, "memory": memory, "backtrace": [str(each) for each in frames]}
        raised.details = {**known, **raised.details}
    return raised


def exited(function: str, code: int) -> GuestFailed:
    """Return the failure for a guest that ended itself; its host knows whether that is one."""
    return GuestFailed("exit", f"`{function}` ended with exit code {code}", {"exit_code": code, "function": function})


def uncompiled(text: str) -> GuestFailed:
    """Return the failure for a module that wasmtime does not compile; *text* is its reason."""
    return GuestFailed("invalid-module", f"it cannot be compiled: {last_cause(text)}")


def not_started(text: str, memory_limit: int, table_limit: int) -> GuestFailed:
    """Return the failure for an instance that could not be made."""
    said = last_cause(text)
    if "memory" in said and ("limit" in said or "exceed" in said):
        message = f"it needs more memory from the start than its limit of {sized(memory_limit)}; raise memory_limit"
        return GuestFailed("out-of-memory", f"{message} ({said})", {"memory_limit": memory_limit})
    if "table" in said and ("limit" in said or "exceed" in said):
        message = f"it needs a larger table from the start than its limit of {table_limit} elements; raise table_limit"
        return GuestFailed("over-limit", f"{message} ({said})", {"table_limit": table_limit})
    if "unknown import" in said or "incompatible import" in said:
        return GuestFailed("unsupported-import", said)
    return GuestFailed("trap", f"no instance of it can be made: {said}", {"trap": "other"})


def outside(address: int, length: int, size: int) -> GuestFailed:
    """Return the failure for bytes that do not lie in a memory of *size* bytes."""
    text = f"{length} bytes at {address} do not lie in the model's memory of {sized(size)}"
    return GuestFailed("bad-answer", text, {"memory": size})


def last_cause(text: str) -> str:
    """Return the innermost cause of an error of wasmtime's, as one line; the ones around it say little."""
    _, _, causes = text.partition("Caused by:")
    lines = [line.strip() for line in (causes or text).strip().splitlines() if line.strip()]
    return re.sub(r"^\d+: ", "", " ".join(lines[-1:]))


def _first_line(text: str) -> str:
    said = last_cause(text)
    return said.removeprefix("wasm trap: ") or "it gave no reason"
