"""The wasmer engine in its own interpreter: a CPython 3.10 with wasmer; elsewhere only that it says what is missing."""

from __future__ import annotations

import importlib
import os
import resource
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from spark_workers.engines.seam import Code, Instance, Settings, Wasi, open_engine
from spark_workers.engines.wasm_limits import limit_module
from spark_workers.engines.wasmer_engine import DAMAGED
from spark_workers.hosts.failures import GuestFailed

MODELS = Path(__file__).parents[1] / "models"
PAGE = 64 * 1024

try:
    wasmer: Any = importlib.import_module("wasmer")
except ImportError as problem:
    wasmer = None
    REASON = f"{problem}; under a CPython 3.10: pip install wasmer==1.1.0 wasmer_compiler_cranelift==1.1.0"
else:
    REASON = ""
with_wasmer = pytest.mark.skipif(wasmer is None, reason=REASON)


@pytest.fixture(autouse=True)
def _limits_of_this_process() -> Iterator[None]:
    """Loading a model lowers limits of the process, which is the tests' here."""
    before = {which: resource.getrlimit(which) for which in (resource.RLIMIT_STACK, resource.RLIMIT_DATA)}
    yield
    for which, limits in before.items():
        resource.setrlimit(which, limits)


@pytest.fixture
def prepare(tmp_path: Path) -> Callable[..., Callable[[], Code]]:
    """Compile the name of a model, or text; return what loads it."""

    def prepare(source: str, **settings: Any) -> Callable[[], Code]:
        engine = open_engine("wasmer", Settings(**settings))
        wasm = (MODELS / f"{source}.wasm").read_bytes() if "(" not in source else wasmer.wat2wasm(source)
        path = tmp_path / "code"
        path.write_bytes(engine.compile(wasm))
        return lambda: engine.load(str(path))

    return prepare


@pytest.fixture
def load(prepare: Callable[..., Callable[[], Code]]) -> Callable[..., Code]:
    """Compile and load the name of a model, or text."""
    return lambda source, **settings: prepare(source, **settings)()


def failure(act: Callable[..., Any], *arguments: Any) -> GuestFailed:
    """Return how *act* failed."""
    with pytest.raises(GuestFailed) as caught:
        act(*arguments)
    return caught.value


def call(instance: Instance, name: str, *arguments: Any) -> Any:
    """Call an export that must be there."""
    function = instance.function(name)
    assert function is not None
    return function(*arguments)


def in_child(act: Callable[[], str], exit_code: int = 0) -> str:
    """Return what *act* returns in a process of its own, which a fault would end.

    It must not compile: this process has done so on several threads, which its children do not have.
    """
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(write, act().encode())
        finally:
            os._exit(0)
    os.close(write)
    with open(read) as file:
        told = file.read()
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == exit_code
    return told


# --- without wasmer --------------------------------------------------------------------------------------------------


@pytest.mark.skipif(wasmer is not None, reason="wasmer is here")
def test_without_wasmer_the_engine_is_missing() -> None:
    problem = failure(open_engine, "wasmer", Settings())
    assert problem.kind == "engine-missing"
    assert "wasmer" in str(problem)


# --- limits written into modules, which needs no engine --------------------------------------------------------------

HEAD = b"\0asm\x01\0\0\0"
CUSTOM = b"\0\x05\x04name"


def memory(limits: bytes) -> bytes:
    """A module with one memory, between two sections that nobody touches."""
    return HEAD + CUSTOM + bytes((5, len(limits) + 1, 1)) + limits + CUSTOM


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b"\x00\x01", b"\x01\x01\x10"),  # no maximum
        (b"\x01\x01\x02", b"\x01\x01\x02"),  # a smaller one
        (b"\x01\x01\x80\x80\x04", b"\x01\x01\x10"),  # a larger one
        (b"\x03\x10\xff\xff\x03", b"\x03\x10\x10"),  # shared
    ],
)
def test_a_memory_is_given_the_limit_as_its_maximum(before: bytes, after: bytes) -> None:
    assert limit_module(memory(before), 16 * PAGE + 5, 10) == memory(after)


@pytest.mark.parametrize(
    ("before", "after"),
    [(b"\x70\x00\x01", b"\x70\x01\x01\x0a"), (b"\x6f\x01\x00\x05\x70\x00\x0a", b"\x6f\x01\x00\x05\x70\x01\x0a\x0a")],
)
def test_each_table_is_given_the_limit_as_its_maximum(before: bytes, after: bytes) -> None:
    def tables(types: bytes) -> bytes:
        body = bytes((types.count(b"\x70") + types.count(b"\x6f"),)) + types
        return HEAD + bytes((4, len(body))) + body

    assert limit_module(tables(before), PAGE, 10) == tables(after)


def test_what_is_over_its_limit_from_the_start_is_refused() -> None:
    problem = failure(limit_module, memory(b"\x00\x11"), 16 * PAGE, 10)
    text = "it needs 1.1 MiB of memory from the start, over its limit of 1 MiB; raise memory_limit"
    assert (problem.kind, str(problem)) == ("out-of-memory", text)
    assert failure(limit_module, HEAD + b"\x04\x04\x01\x70\x00\x0b", PAGE, 10).kind == "over-limit"


@pytest.mark.parametrize(
    "wasm",
    [
        b"",
        b"\0asm",
        b"(module)",
        b"\0asm\x0d\0\x01\0",  # a component
        memory(b"\x04\x01"),  # a memory of 64 bits
        memory(b"\x00\xff\xff\xff\xff\xff\x01"),
        HEAD + b"\x05\x04\x01\x00\x01\x00",  # something after the memory
        HEAD + b"\x05\x7f\x01",
        HEAD + b"\x04\x09\x01\x40\x00\x70\x00\x01\xd2\x00\x0b",  # a table with a first value
    ],
)
def test_a_module_whose_limits_cannot_be_read_is_refused(wasm: bytes) -> None:
    assert failure(limit_module, wasm, PAGE, 10).kind == "invalid-module"


def test_a_module_cut_anywhere_is_refused_or_still_a_list_of_sections() -> None:
    wasm = (MODELS / "trap_model.wasm").read_bytes()
    for length in range(len(wasm)):
        kind = "none"
        try:
            assert limit_module(wasm[:length], 1 << 30, 1000).startswith(HEAD)
        except GuestFailed as problem:
            kind = problem.kind
        assert kind in ("none", "invalid-module")


# --- compile and load ------------------------------------------------------------------------------------------------


@with_wasmer
@pytest.mark.parametrize("wasm", [b"", b"(module)", b"\0asm\x0d\0\x01\0", HEAD + b"\x01\x01\x05", HEAD + b"\x0e\x00"])
def test_what_is_no_module_is_refused_and_text_is_none(wasm: bytes) -> None:
    assert failure(open_engine("wasmer", Settings()).compile, wasm).kind == "invalid-module"


@with_wasmer
def test_code_of_another_format_or_other_limits_or_cut_short_is_stale(tmp_path: Path) -> None:
    engine = open_engine("wasmer", Settings())
    code = engine.compile((MODELS / "json_model.wasm").read_bytes())
    path = tmp_path / "code"
    others = [b"", b"x", code[:40], code[:-1], code + b"x", code.replace(b"wasmer 1.1.0", b"wasmer 1.0.0", 1)]
    for content in others:
        path.write_bytes(content)
        assert failure(engine.load, str(path)).kind == "stale-code"
    assert failure(engine.load, str(tmp_path / "missing")).kind == "stale-code"
    path.write_bytes(code)
    engine.load(str(path))
    assert failure(open_engine("wasmer", Settings(memory_limit=PAGE * 99)).load, str(path)).kind == "stale-code"
    assert failure(open_engine("wasmer", Settings(table_limit=99)).load, str(path)).kind == "stale-code"


@with_wasmer
def test_imports_and_exports_are_described_with_their_types(load: Callable[..., Code]) -> None:
    code = load("""(module
        (import "wasi_snapshot_preview1" "fd_close" (func (param i32) (result i32)))
        (memory (export "memory") 1 5) (table (export "t") 2 funcref) (global (export "g") (mut f64) (f64.const 0))
        (func (export "f") (param i32 i64) (result f32 f64) unreachable) (func (export "n")))""")
    assert [(each.module, each.name, each.kind, each.type) for each in (*code.imports, *code.exports)] == [
        ("wasi_snapshot_preview1", "fd_close", "function", "(i32) -> i32"),
        ("", "memory", "memory", "1 to 5 pages"),
        ("", "t", "table", "2 to 1000000 funcref"),
        ("", "g", "global", "mut f64"),
        ("", "f", "function", "(i32, i64) -> (f32, f64)"),
        ("", "n", "function", "() -> ()"),
    ]


@with_wasmer
def test_an_import_that_nobody_has_is_named(load: Callable[..., Code]) -> None:
    problem = failure(load('(module (import "env" "fetch" (func)))').instantiate, None)
    assert (problem.kind, str(problem)) == ("unsupported-import", "it imports `fetch` of `env`, which there is not")
    assert failure(load("wasi_cmd").instantiate, None).kind == "unsupported-import"


@with_wasmer
def test_a_start_function_that_traps_fails_the_instance(load: Callable[..., Code]) -> None:
    problem = failure(load("(module (func $begin unreachable) (start $begin))").instantiate, None)
    assert (problem.kind, problem.details["trap"]) == ("trap", "unreachable")


@with_wasmer
def test_it_cannot_be_interrupted_and_says_so() -> None:
    engine = open_engine("wasmer", Settings())
    assert not engine.can_interrupt
    with pytest.raises(RuntimeError, match="cannot be interrupted"):
        engine.interrupt()


# --- calls -----------------------------------------------------------------------------------------------------------

NUMBERS = """(module
    (func (export "i32") (param i32) (result i32) local.get 0)
    (func (export "i64") (param i64) (result i64) local.get 0)
    (func (export "f32") (param f32) (result f32) local.get 0)
    (func (export "f64") (param f64) (result f64) local.get 0)
    (func (export "four") (param i32 i64 f32 f64) (result f64 f32 i64 i32)
        local.get 3 local.get 2 local.get 1 local.get 0)
    (func (export "v128") (param v128)) (func (export "gives") (result funcref) ref.null func)
    (func (export "__class__") (result i32) i32.const 7) (memory (export "memory") 1))"""


@with_wasmer
@pytest.mark.parametrize(
    ("name", "given", "back"),
    [
        ("i32", -1, -1),
        ("i32", 2**31 - 1, 2**31 - 1),
        ("i32", 2**31, -(2**31)),
        ("i32", 2**32 - 1, -1),
        ("i32", 3.0, 3),
        ("i64", -(2**63), -(2**63)),
        ("i64", 2**63, -(2**63)),
        ("i64", 2**64 - 1, -1),
        ("f32", 1.5, 1.5),
        ("f64", 2, 2.0),
    ],
)
def test_integers_are_taken_signed_or_unsigned_and_come_back_signed(
    load: Callable[..., Code], name: str, given: float, back: float
) -> None:
    assert call(load(NUMBERS).instantiate(None), name, given) == back


@with_wasmer
@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("i32", (2**32,)),
        ("i32", (-(2**31) - 1,)),
        ("i32", (1.5,)),
        ("i32", (float("nan"),)),
        ("i32", ("1",)),
        ("i32", ()),
        ("i32", (1, 2)),
        ("i64", (2**64,)),
        ("f64", ("1",)),
        ("f64", (10**400,)),
        ("v128", (1,)),
        ("gives", ()),
    ],
)
def test_what_does_not_fit_a_signature_is_refused(load: Callable[..., Code], name: str, given: tuple[Any, ...]) -> None:
    instance = load(NUMBERS).instantiate(None)
    assert failure(call, instance, name, *given).kind == "wrong-signature"
    assert call(instance, "i32", 4) == 4


@with_wasmer
def test_exports_are_found_by_name_and_pythons_own_attributes_are_none(load: Callable[..., Code]) -> None:
    instance = load(NUMBERS).instantiate(None)
    assert call(instance, "four", 1, 2, 3.0, 4.0) == (4.0, 3.0, 2, 1)
    assert call(instance, "__class__") == 7
    assert instance.function("__init__") is None
    assert instance.function("memory") is None
    function = instance.function("four")
    assert function is instance.function("four")
    assert function is not None
    assert (function.params, function.results) == (("i32", "i64", "f32", "f64"), ("f64", "f32", "i64", "i32"))


@with_wasmer
def test_a_request_goes_through_memory_and_its_answer_comes_back(load: Callable[..., Code]) -> None:
    instance = load("json_model").instantiate(None)
    for request in (b'{"xs": [1, 2, 4.5]}', b"[" + b"1," * 500_000 + b"1]"):
        address = call(instance, "alloc", len(request))
        instance.write(address, request)
        packed = call(instance, "execute", address, len(request))
        answer = instance.read(packed >> 32 & 0xFFFF_FFFF, packed & 0xFFFF_FFFF)
        assert f'"bytes":{len(request)}.'.encode() in answer
        call(instance, "reset")
    assert instance.memory_size() > 1_000_000


@with_wasmer
@pytest.mark.parametrize(("address", "length"), [(-1, 2), (PAGE - 1, 2), (0, PAGE + 1), (2**31, 1)])
def test_memory_is_neither_read_nor_written_outside_of_its_bounds(
    load: Callable[..., Code], address: int, length: int
) -> None:
    instance = load(NUMBERS).instantiate(None)
    assert failure(instance.read, address, length).kind == "bad-answer"
    assert failure(instance.read, 5, -1).kind == "bad-answer"
    assert failure(instance.write, address, b"x" * length).kind == "bad-answer"
    assert instance.read(PAGE - 2, 2) == b"\0\0"


@with_wasmer
def test_memory_that_is_not_exported_has_no_size(load: Callable[..., Code]) -> None:
    instance = load("(module (memory 1))").instantiate(None)
    assert instance.memory_size() == 0
    assert failure(instance.read, 0, 1).kind == "bad-answer"


@with_wasmer
def test_a_closed_instance_gives_its_address_space_back(load: Callable[..., Code], tmp_path: Path) -> None:
    code = load("wasi_cmd")
    with open(os.devnull, "r+b") as null:
        wasi = Wasi(["model"], {}, null.fileno(), null.fileno(), null.fileno())
        for count in range(20):
            instance = code.instantiate(wasi)
            assert call(instance, "_start") is None
            instance.close()
            if count == 2:
                before = _address_space()
    assert _address_space() < before + (4 << 30)  # less than one memory has


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


# --- traps and limits ------------------------------------------------------------------------------------------------


@with_wasmer
@pytest.mark.parametrize(
    ("name", "arguments", "trap"),
    [
        ("t_unreachable", (), "unreachable"),
        ("t_oob", (), "out-of-bounds-memory"),
        ("t_oob_past", (), "out-of-bounds-memory"),
        ("t_div0", (1,), "integer-divide-by-zero"),
        ("t_ovf", (), "integer-overflow"),
        ("t_indirect", (), "out-of-bounds-table"),
        ("t_sig", (), "bad-signature"),
    ],
)
def test_each_kind_of_trap_is_told_with_its_backtrace(
    load: Callable[..., Code], name: str, arguments: tuple[int, ...], trap: str
) -> None:
    code = load("trap_model")
    instance = code.instantiate(None)
    problem = failure(call, instance, name, *arguments)
    assert (problem.kind, problem.details["trap"]) == ("trap", trap)
    assert problem.details["memory"] == instance.memory_size()
    assert len(problem.details["backtrace"]) == 1
    assert call(code.instantiate(None), "ok") == 42


@with_wasmer
def test_the_rarer_traps_are_told_too_and_frames_have_names(load: Callable[..., Code]) -> None:
    instance = load("""(module (table 2 funcref)
        (func (export "null") i32.const 0 call_indirect)
        (func $inner (result i32) f32.const nan i32.trunc_f32_s)
        (func $outer (export "nan") (result i32) call $inner))""")
    running = instance.instantiate(None)
    assert failure(call, running, "null").details["trap"] == "indirect-call-to-null"
    problem = failure(call, running, "nan")
    assert problem.details["trap"] == "bad-conversion-to-integer"
    assert [each.split()[0] for each in problem.details["backtrace"]] == ["inner", "outer"]


@with_wasmer
def test_a_stack_that_overflows_is_a_failure_each_time_and_no_crash(
    prepare: Callable[..., Callable[[], Code]],
) -> None:
    load = prepare("trap_model")

    def overflow() -> str:
        instance = load().instantiate(None)
        problems = [failure(call, instance, "t_stack") for _ in range(3)]
        return " ".join(f"{each.kind} {len(each.details['backtrace'])}" for each in problems)

    assert in_child(overflow) == " ".join(["stack-overflow 50"] * 3)


@with_wasmer
def test_a_guest_has_the_stack_of_its_limit_and_not_much_more(prepare: Callable[..., Callable[[], Code]]) -> None:
    source = """(module (func $down (export "down") (param i32) (result i32)
        (if (result i32) (local.get 0)
            (then (i32.add (i32.const 1) (call $down (i32.sub (local.get 0) (i32.const 1))))) (else (i32.const 0)))))"""

    def deepest(stack_limit: int) -> int:
        load = prepare(source, stack_limit=stack_limit)

        def reaches(instance: Instance, depth: int) -> bool:
            try:
                call(instance, "down", depth)
            except GuestFailed as problem:
                if problem.kind != "stack-overflow":
                    raise
                return False
            return True

        def search() -> str:
            instance = load().instantiate(None)
            least, most = 0, 1_000_000
            while most - least > 1:
                middle = (least + most) // 2
                least, most = (middle, most) if reaches(instance, middle) else (least, middle)
            return str(least)

        return int(in_child(search))

    small, large = deepest(64 << 10), deepest(1 << 20)
    frame = 16  # bytes, the least that a call takes
    status = Path("/proc/self/status").read_text()
    grown = int(status.split("VmStk:")[1].split()[0]) << 10  # what this process's stack has become stays its child's
    assert small < ((1 << 20) + grown) // frame
    assert large - small > (900 << 10) // (4 * frame)


@with_wasmer
def test_a_stack_that_ends_inside_a_function_of_ours_ends_the_process_with_a_word(
    prepare: Callable[..., Callable[[], Code]], capfd: pytest.CaptureFixture[str]
) -> None:
    load = prepare(WASI)

    def overflow(name: str) -> str:
        with open(os.devnull, "r+b") as null:
            return failure(call, load().instantiate(Wasi(["m"], {}, *[null.fileno()] * 3)), name).kind

    assert in_child(lambda: overflow("deep")) == "stack-overflow"
    assert in_child(lambda: overflow("deep_and_speaking"), exit_code=DAMAGED) == ""
    assert capfd.readouterr().err.startswith("spark: 'deep_and_speaking' used up its stack in a call of its host;")


@with_wasmer
def test_memory_grows_to_its_limit_and_a_page_beyond_is_refused(load: Callable[..., Code]) -> None:
    instance = load("mem_model", memory_limit=16 << 20).instantiate(None)
    assert call(instance, "touch", 16) == 256
    assert call(instance, "touch", 17) == -1
    assert instance.memory_size() == 16 << 20
    assert failure(lambda: load("mem_model", memory_limit=PAGE)).kind == "out-of-memory"


@with_wasmer
def test_a_table_grows_to_its_limit_and_no_further(load: Callable[..., Code]) -> None:
    source = """(module (table 2 funcref)
        (func (export "grow") (param i32) (result i32) ref.null func local.get 0 table.grow 0))"""
    instance = load(source, table_limit=100).instantiate(None)
    assert [call(instance, "grow", count) for count in (98, 1)] == [2, -1]


@with_wasmer
def test_a_trap_after_memory_was_refused_is_called_out_of_memory(load: Callable[..., Code]) -> None:
    source = """(module (memory (export "memory") 1) (func (export "hoard")
        (loop $more (br_if $more (i32.ne (memory.grow (i32.const 1)) (i32.const -1)))) unreachable))"""
    problem = failure(call, load(source, memory_limit=4 << 20).instantiate(None), "hoard")
    assert (problem.kind, problem.details["memory"]) == ("out-of-memory", 4 << 20)


@with_wasmer
def test_what_the_host_takes_for_a_guest_is_bounded_by_the_process_limit(
    prepare: Callable[..., Callable[[], Code]],
) -> None:
    load = prepare("json_model", memory_limit=1 << 20)

    def hoard() -> str:
        load()
        try:
            return str(len(bytearray(1 << 30)))
        except MemoryError:
            return "refused"

    assert in_child(hoard) == "refused"


# --- WASI ------------------------------------------------------------------------------------------------------------


class Run:
    """One run of a WASI command, in files."""

    def __init__(self, code: Code, request: bytes = b"", *args: str, env: dict[str, str] | None = None) -> None:
        self.exit_code: int | None = None
        self.result: Any = None
        with tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            stdin.write(request)
            stdin.flush()  # its place is at the end now
            instance = code.instantiate(Wasi(["model", *args], env or {}, stdin.fileno(), out.fileno(), err.fileno()))
            try:
                self.result = call(instance, "_start")
            except GuestFailed as problem:
                self.exit_code = problem.details["exit_code"]
            finally:
                instance.close()
            self.stdout, self.stderr = (os.pread(file.fileno(), 1 << 20, 0) for file in (out, err))


@with_wasmer
def test_a_command_reads_json_and_writes_json_and_nothing_reaches_our_own_streams(
    load: Callable[..., Code], capfd: pytest.CaptureFixture[str]
) -> None:
    code = load("wasi_cmd")
    for numbers in ("1,2,3", ",".join("1" * 40_000), "4"):
        request = b'{"xs": [%s]}' % numbers.encode()
        run = Run(code, request)
        count = numbers.count(",") + 1
        total = sum(map(int, numbers.split(",")))
        assert run.stdout == b'{"n":%d,"sum":%s,"bytes":%d}\n' % (count, f"{total:.6g}".encode(), len(request))
        assert (run.exit_code, run.stderr) == (None, b"")
    assert capfd.readouterr() == ("", "")


@with_wasmer
def test_exit_code_and_stderr_of_a_command_are_kept_apart_from_its_answer(
    load: Callable[..., Code], capfd: pytest.CaptureFixture[str]
) -> None:
    run = Run(load("wasi_cmd"), b"[7]", "fail")
    assert (run.exit_code, run.stdout, run.stderr) == (3, b'{"n":1,"sum":7,"bytes":3}\n', b"model failed\n")
    assert capfd.readouterr() == ("", "")


WASI = """(module
    (import "wasi_snapshot_preview1" "fd_read" (func $read (param i32 i32 i32 i32) (result i32)))
    (import "wasi_snapshot_preview1" "fd_write" (func $write (param i32 i32 i32 i32) (result i32)))
    (import "wasi_snapshot_preview1" "fd_pwrite" (func $pwrite (param i32 i32 i32 i64 i32) (result i32)))
    (import "wasi_snapshot_preview1" "proc_raise" (func $raise (param i32) (result i32)))
    (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
    (import "wasi_snapshot_preview1" "environ_sizes_get" (func $environ (param i32 i32) (result i32)))
    (import "wasi_snapshot_preview1" "path_open"
        (func $open (param i32 i32 i32 i32 i32 i64 i64 i32 i32) (result i32)))
    (memory (export "memory") 1)
    (data (i32.const 0) "\\40\\00\\00\\00\\02\\00\\00\\00")  ;; two bytes at 64
    (data (i32.const 8) "\\f0\\ff\\00\\00\\ff\\00\\00\\00")  ;; beyond the end
    (data (i32.const 200) "etc/passwd")
    (func (export "_start")
        (drop (call $read (i32.const 0) (i32.const 0) (i32.const 1) (i32.const 32)))
        (drop (call $write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 32))))
    (func (export "read") (param i32 i32 i32 i32) (result i32)
        (call $read (local.get 0) (local.get 1) (local.get 2) (local.get 3)))
    (func (export "write") (param i32 i32 i32 i32) (result i32)
        (call $write (local.get 0) (local.get 1) (local.get 2) (local.get 3)))
    (func (export "pwrite") (param i32) (result i32)
        (call $pwrite (local.get 0) (i32.const 0) (i32.const 1) (i64.const 0) (i32.const 32)))
    (func (export "raise") (result i32) (call $raise (i32.const 0)))
    (func (export "exit") (param i32) (call $exit (local.get 0)))
    (func $deep (export "deep") (result i32) (i32.add (i32.const 1) (call $deep)))
    (func $speak (export "deep_and_speaking") (result i32)
        (drop (call $write (i32.const 1) (i32.const 0) (i32.const 0) (i32.const 32)))
        (i32.add (i32.const 1) (call $speak)))
    (func (export "variables") (result i32)
        (drop (call $environ (i32.const 40) (i32.const 44))) (i32.load (i32.const 40)))
    (func (export "open") (param i32) (result i32) (call $open (local.get 0) (i32.const 1) (i32.const 200)
        (i32.const 10) (i32.const 0) (i64.const -1) (i64.const -1) (i32.const 0) (i32.const 48))))"""


@with_wasmer
def test_what_one_run_leaves_unread_is_not_read_by_the_next(load: Callable[..., Code]) -> None:
    code = load(WASI)
    assert [Run(code, text).stdout for text in (b"abcdef", b"123456")] == [b"ab", b"12"]


@pytest.fixture
def guest(load: Callable[..., Code]) -> Iterator[Instance]:
    """The module above, whose output goes nowhere."""
    with open(os.devnull, "r+b") as null:
        instance = load(WASI).instantiate(Wasi(["m"], {"A": "1", "B": "2"}, *[null.fileno()] * 3))
        yield instance
        instance.close()


@with_wasmer
@pytest.mark.parametrize(
    ("name", "arguments", "error"),
    [
        ("read", (0, 0, 1, 32), 0),
        ("write", (1, 0, 1, 32), 0),
        ("write", (2, 0, 0, 32), 0),
        ("read", (1, 0, 1, 32), 8),
        ("write", (0, 0, 1, 32), 8),
        ("write", (3, 0, 1, 32), 8),
        ("write", (-1, 0, 1, 32), 8),
        ("write", (1, 8, 1, 32), 21),
        ("write", (1, -8, 1, 32), 21),
        ("write", (1, 0, 1, -2), 21),
        ("write", (1, 65000, 1024, 32), 21),
        ("write", (1, 0, -1, 32), 28),
        ("write", (1, 0, 1025, 32), 28),
        ("pwrite", (1,), 70),
        ("pwrite", (9,), 8),
        ("raise", (), 52),
    ],
)
def test_a_guest_that_asks_for_nonsense_gets_an_error_number(
    guest: Instance, name: str, arguments: tuple[int, ...], error: int
) -> None:
    assert call(guest, name, *arguments) == error


@with_wasmer
def test_a_full_disk_is_the_guests_error(load: Callable[..., Code]) -> None:
    with open("/dev/full", "wb") as full, open(os.devnull, "rb") as null:
        instance = load(WASI).instantiate(Wasi(["m"], {}, null.fileno(), full.fileno(), full.fileno()))
        assert call(instance, "write", 1, 0, 1, 32) == 51
        instance.close()


@with_wasmer
def test_a_guest_sees_the_variables_it_is_given_and_no_files(guest: Instance) -> None:
    assert call(guest, "variables") == 2
    assert all(call(guest, "open", descriptor) != 0 for descriptor in range(10))


@with_wasmer
def test_exit_is_told_whatever_its_code(guest: Instance) -> None:
    for code in (0, 1, 255, 2**32 - 1):
        problem = failure(call, guest, "exit", code)
        assert (problem.kind, problem.details["exit_code"]) == ("exit", code)


@with_wasmer
def test_what_wasi_cannot_pass_is_refused(load: Callable[..., Code]) -> None:
    code = load(WASI)
    for args, env in ((["a\0b"], {}), (["\udcff"], {}), (["m"], {"A=B": "1"})):
        assert failure(code.instantiate, Wasi(args, env, 0, 1, 2)).kind == "wrong-signature"


@with_wasmer
def test_an_interrupt_while_a_guest_waits_for_input_stays_one(load: Callable[..., Code]) -> None:
    read, write = os.pipe()
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        instance = load(WASI).instantiate(Wasi(["m"], {}, read, write, write))
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(KeyboardInterrupt):
            call(instance, "read", 0, 0, 1, 32)
        instance.close()
    finally:
        signal.signal(signal.SIGALRM, before)
        os.close(read)
        os.close(write)
