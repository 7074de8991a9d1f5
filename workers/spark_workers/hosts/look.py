"""What kind of model a module is, told from what it imports and exports, and what `spark models inspect` shows of it.

| kind      | told by                                                          | called                              |
|-----------|------------------------------------------------------------------|-------------------------------------|
| command   | exports ``_start``                                               | a new instance for every request    |
| reactor   | as plain, and imports WASI or exports ``_initialize``            | one instance, over WASI             |
| plain     | exports ``execute`` (or its *entry*), ``alloc`` or ``malloc``, and a memory | one instance             |
| functions | anything else: no requests, but its exports can be called        | one instance                        |

The only imports there is an answer to are those of WASI. A host for modules that import more adds its names to
`supports`, its kind to `kind_of` and itself to the table in `host`.
"""

from collections.abc import Sequence
from typing import Any

from spark_workers.engines.outline import Outline
from spark_workers.engines.seam import Extern, Settings
from spark_workers.hosts.failures import GuestFailed

PREVIEW1 = "wasi_snapshot_preview1"
START, INITIALIZE = "_start", "_initialize"
ENTRY_TYPE, ALLOCATOR_TYPE = "(i32, i32) -> i64", "(i32) -> i32"
ALLOCATORS, RELEASERS, RESET = ("alloc", "malloc"), ("dealloc", "free"), "reset"
RELEASER_TYPES = ("(i32) -> ()", "(i32, i32) -> ()")
SHOWN = 20
MOST_LISTED, LONGEST_NAME, LONGEST_TYPE = 1000, 200, 500

_PREVIEW1_NAMES = frozenset(
    """
    args_get args_sizes_get clock_res_get clock_time_get environ_get environ_sizes_get fd_advise fd_allocate fd_close
    fd_datasync fd_fdstat_get fd_fdstat_set_flags fd_fdstat_set_rights fd_filestat_get fd_filestat_set_size
    fd_filestat_set_times fd_pread fd_prestat_dir_name fd_prestat_get fd_pwrite fd_read fd_readdir fd_renumber fd_seek
    fd_sync fd_tell fd_write path_create_directory path_filestat_get path_filestat_set_times path_link path_open
    path_readlink path_remove_directory path_rename path_symlink path_unlink_file poll_oneoff proc_exit proc_raise
    random_get sched_yield sock_accept sock_recv sock_send sock_shutdown
    """.split()  # noqa: SIM905 - as a list it is one name to a line
)

#: Whose imports these are, by how module or name begin, and what can be done.
_HINTS = (
    (("wbg", "__wbindgen", "./"), "", "it was built for JavaScript by wasm-bindgen; build it for wasm32-wasip1"),
    (("gojs", "go"), "", "it was built by Go for JavaScript; build it with GOOS=wasip1"),
    (("wasi_unstable", "wasi_snapshot_preview0"), "", "that is the WASI of 2019; build it with newer tools"),
    (("wasi:", "$root"), "", "it is a part of a component; build it for wasm32-wasip1"),
    (("a", "env"), "emscripten_", "it was built by Emscripten for JavaScript; link it with -sSTANDALONE_WASM"),
    (("a", "env"), "invoke_", "it was built by Emscripten for JavaScript; link it with -sSTANDALONE_WASM"),
    (("env",), "abort", "if it is AssemblyScript, build it with `asc --use abort=`"),
    (("env",), "memory", "link it without --import-memory"),
)


def is_wasi(imports: Sequence[Extern]) -> bool:
    """Tell whether a module with these *imports* needs WASI."""
    return any(each.module == PREVIEW1 for each in imports)


def supports(item: Extern) -> bool:
    """Tell whether there is something to give for this import."""
    return item.kind == "function" and item.module == PREVIEW1 and item.name in _PREVIEW1_NAMES


def check_imports(imports: Sequence[Extern]) -> None:
    """Make sure that every import can be given.

    Raises:
        GuestFailed: "unsupported-import", with the first of them, the number of the others, and a hint.
    """
    missing = [each for each in imports if not supports(each)]
    if not missing:
        return
    first, others = missing[0], len(missing) - 1
    text = f"it imports the {first.kind} `{_named(first)}`, which is not part of WASI preview 1 and has no host here"
    if others:
        text += f", and {others} other{'s' * (others > 1)} like it"
    hint = next((hint for each in missing for hint in _hints(each)), "")
    raise GuestFailed(
        "unsupported-import",
        f"{text}; {hint}" if hint else text,
        {"imports": [_named(each) for each in missing[:SHOWN]], "left_out": max(0, len(missing) - SHOWN)},
    )


def _hints(item: Extern) -> list[str]:
    def fits(modules: tuple[str, ...], name: str) -> bool:
        # Short names are whole names: Emscripten's "a" is not the beginning of every other.
        begins = any(item.module == each or (len(each) > 3 and item.module.startswith(each)) for each in modules)
        return (begins or (modules[0] == "wbg" and item.module.startswith("./"))) and item.name.startswith(name)

    return [hint for modules, name, hint in _HINTS if fits(modules, name)]


def _named(item: Extern) -> str:
    return f"{item.module}.{item.name}"[:LONGEST_NAME]


def functions_of(exports: Sequence[Extern]) -> dict[str, str]:
    """Return the exported functions and their types."""
    return {each.name: each.type for each in exports if each.kind == "function"}


def kind_of(imports: Sequence[Extern], exports: Sequence[Extern], entry: str) -> str:
    """Return the kind of a model: command, reactor, plain or functions; see above."""
    functions = functions_of(exports)
    if functions.get(START) == "() -> ()":
        return "command"
    if why_no_requests(exports, entry):
        return "functions"
    return "reactor" if is_wasi(imports) or INITIALIZE in functions else "plain"


def allocator_of(functions: dict[str, str]) -> str | None:
    """Return the name of the function that gives room for a request."""
    return next((name for name in ALLOCATORS if functions.get(name) == ALLOCATOR_TYPE), None)


def releaser_of(functions: dict[str, str]) -> str | None:
    """Return the name of the function that takes back the room of a request or an answer, if there is one."""
    if functions.get(RESET) == "() -> ()":
        return RESET
    return next((name for name in RELEASERS if functions.get(name) in RELEASER_TYPES), None)


def why_no_requests(exports: Sequence[Extern], entry: str) -> str:
    """Return why a module cannot take requests in its memory; nothing if it can."""
    functions = functions_of(exports)
    if entry not in functions:
        return (
            f"it exports no function `{entry}`: a model that takes requests exports `{entry}` {ENTRY_TYPE} and"
            f" `alloc` or `malloc`, or as a WASI command `_start`; it exports {listed(functions)}"
        )
    if functions[entry] != ENTRY_TYPE:
        return (
            f"its `{entry}` is {functions[entry]:.{LONGEST_TYPE}}; one that takes requests is {ENTRY_TYPE}:"
            " pointer and length to pointer << 32 | length"
        )
    if allocator_of(functions) is None:
        return f"it has `{entry}` but no `alloc` or `malloc` {ALLOCATOR_TYPE} to make room for a request"
    if not any(each.kind == "memory" for each in exports):
        return f"it has `{entry}` but does not export its memory, so a request cannot be put there"
    return ""


def listed(names: Sequence[str] | dict[str, str]) -> str:
    """Return *names* as a part of a sentence, the first of them only if there are many."""
    shown = [f"`{name[:LONGEST_NAME]}`" for name in list(names)[:SHOWN]]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "") if shown else "no function at all"


def report(outline: Outline, size: int, settings: Settings) -> dict[str, Any]:
    """Return what there is to know about a module, as plain data.

    ``kind`` is what hosts are opened with, ``runs`` a line for people. Long lists and names are cut; ``left_out`` says
    how many imports and exports are not listed.
    """
    kind = kind_of(outline.imports, outline.exports, settings.entry)
    functions = functions_of(outline.exports)
    entries = {"command": START, "functions": ""}
    return {
        "kind": kind,
        "entry": entries.get(kind, settings.entry),
        "runs": _statement(kind, functions, outline, settings.entry),
        **look_at(outline, size),
    }


def look_at(outline: Outline, size: int) -> dict[str, Any]:
    """Return the part of a report that says what is in a module of *size* bytes, whatever kind of model it is."""
    return {
        "imports": [_shown(each) for each in outline.imports[:MOST_LISTED]],
        "exports": [_shown(each) for each in outline.exports[:MOST_LISTED]],
        "left_out": max(0, len(outline.imports) - MOST_LISTED) + max(0, len(outline.exports) - MOST_LISTED),
        "memories": [
            {"min": each.minimum, "max": each.maximum, "imported": each.is_imported} for each in outline.memories[:16]
        ],
        "size": size,
        "has_names": outline.has_names,
    }


def _shown(item: Extern) -> dict[str, str]:
    names = {"module": item.module[:LONGEST_NAME], "name": item.name[:LONGEST_NAME]}
    return {**names, "kind": item.kind, "type": item.type[:LONGEST_TYPE]}


def _statement(kind: str, functions: dict[str, str], outline: Outline, entry: str) -> str:
    if kind == "command":
        return "as a WASI command: the request on standard input, the answer on standard output, afresh each time"
    if kind == "functions":
        reason = why_no_requests(outline.exports, entry)
        return f"its functions can be called with numbers; it takes no requests: {reason}"
    releaser = releaser_of(functions)
    freed = f", freed with `{releaser}`" if releaser else ", never freed"
    start = f" after `{INITIALIZE}`" if INITIALIZE in functions else ""
    over = f" over WASI{start}" if kind == "reactor" and is_wasi(outline.imports) else start
    return f"`{entry}` takes and returns bytes in its memory{over}; room from `{allocator_of(functions)}`{freed}"
