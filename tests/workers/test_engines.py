"""The wasmtime engine, by both of its ways: what modules may do, and what they are told when they fail."""

import ctypes
import importlib.util
import threading
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("wasmtime") is None:
    pytest.skip("wasmtime is not installed in this interpreter", allow_module_level=True)

from guests_help import Workshop, failure, from_text, model, run_python, use_way, wasmtime

from spark_workers.engines import wasmtime_found
from spark_workers.engines.outline import OutlineUnreadable, read_outline, signature_of
from spark_workers.engines.seam import Instance, Settings, open_engine
from spark_workers.engines.stack import stack_bytes
from spark_workers.engines.wasmtime_found import Installed

WAYS = ("raw", "public")
ECHO = '(module (func (export "f") (param {0}) (result {0}) local.get 0))'


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    use_way(monkeypatch, request.param)
    return str(request.param)


@pytest.fixture
def workshop(tmp_path: Path, way: str) -> Workshop:
    return Workshop(tmp_path)


def called(instance: Instance, name: str, *arguments: Any) -> Any:
    function = instance.function(name)
    assert function is not None
    return function(*arguments)


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "given", "expected"),
    [
        ("i32", -1, -1),
        ("i32", 2**32 - 1, -1),
        ("i32", -(2**31), -(2**31)),
        ("i32", 5.0, 5),
        ("i64", 2**64 - 1, -1),
        ("i64", -(2**63), -(2**63)),
        ("i64", 2**63 - 1, 2**63 - 1),
        ("f32", 1.5, 1.5),
        ("f32", 2**25, float(2**25)),
        ("f32", 1e300, float("inf")),
        ("f64", 3, 3.0),
        ("f64", 1e308, 1e308),
    ],
)
def test_numbers_go_in_whole_and_integers_come_back_signed(
    workshop: Workshop, kind: str, given: float, expected: float
) -> None:
    _, code = workshop.code(ECHO.format(kind))
    answer = called(code.instantiate(None), "f", given)
    assert answer == expected
    assert type(answer) is type(expected)


@pytest.mark.parametrize(
    ("kind", "given", "said"),
    [
        ("i32", 2**32, "from -2147483648 to 4294967295, not 4294967296"),
        ("i32", -(2**31) - 1, "from -2147483648"),
        ("i64", 2**64, "from -9223372036854775808"),
        ("i32", 1.5, "a whole number, not 1.5"),
        ("i32", float("nan"), "a whole number, not nan"),
        ("i32", True, "not True"),
        ("i64", "1", "not '1'"),
        ("f64", None, "not None"),
        ("f64", 10**400, "too large"),
        ("i64", 10**4000, "not a number of 13288 bits"),
    ],
)
def test_numbers_that_a_type_does_not_take_are_refused(workshop: Workshop, kind: str, given: Any, said: str) -> None:
    _, code = workshop.code(ECHO.format(kind))
    instance = code.instantiate(None)
    problem = failure(called, instance, "f", given)
    assert problem.kind == "wrong-signature"
    assert f"argument 1 of `f` is {kind}" in str(problem)
    assert said in str(problem)
    assert called(instance, "f", 7) == 7  # nothing has happened to the instance


def test_several_results_come_back_in_order(workshop: Workshop) -> None:
    text = """(module (func (export "all") (param i32 i64 f32 f64) (result f64 f32 i64 i32)
        local.get 3 local.get 2 local.get 1 local.get 0) (func (export "none")))"""
    instance = workshop.code(text)[1].instantiate(None)
    assert called(instance, "all", -1, -(2**40), 0.5, 1e100) == (1e100, 0.5, -(2**40), -1)
    assert called(instance, "none") is None


def test_a_wrong_number_of_arguments_is_refused_with_the_types(workshop: Workshop) -> None:
    instance = workshop.code(model("json_model"))[1].instantiate(None)
    problem = failure(called, instance, "add", 1)
    assert (problem.kind, str(problem)) == (
        "wrong-signature",
        "the function `add` takes 2 arguments (f64, f64), and 1 was given",
    )


@pytest.mark.parametrize("types", ["(param v128)", "(param externref funcref)", "(result v128)", "(param exnref)"])
def test_a_function_of_more_than_numbers_is_refused_and_not_called(workshop: Workshop, types: str) -> None:
    # wasmtime's C interface ends the process when it is asked for the type of such a function.
    instance = workshop.code(f'(module (func (export "f") {types} unreachable))')[1].instantiate(None)
    problem = failure(called, instance, "f", 1)
    assert problem.kind == "wrong-signature"
    assert "only numbers can be passed" in str(problem)


def test_an_export_that_is_not_there_is_none(workshop: Workshop) -> None:
    instance = workshop.code(model("json_model"))[1].instantiate(None)
    assert instance.function("nothing") is None
    assert instance.function("memory") is None
    assert instance.function("\udcff") is None


# --- memory ----------------------------------------------------------------------------------------------------------

GROWING = """(module (memory (export "m") 1)
  (func (export "grow") (param i32) (result i32) local.get 0 memory.grow)
  (func (export "get") (param i32) (result i32) local.get 0 i32.load8_u)
  (func (export "put") (param i32 i32) local.get 0 local.get 1 i32.store8))"""


def test_memory_is_read_and_written_where_it_has_grown(workshop: Workshop) -> None:
    instance = workshop.code(GROWING)[1].instantiate(None)
    assert instance.memory_size() == 65536
    instance.write(65530, b"abcdef")
    assert called(instance, "grow", 10) == 1
    instance.write(65530 + 6, b"ghi")
    assert instance.read(65530, 9) == b"abcdefghi"
    assert called(instance, "get", 65536) == ord("g")
    called(instance, "put", 11 * 65536 - 1, 33)
    assert instance.read(11 * 65536 - 1, 1) == b"!"
    assert instance.memory_size() == 11 * 65536


@pytest.mark.parametrize(("address", "length"), [(65536, 1), (65530, 7), (0, 65537), (2**32 - 1, 2**32 - 1), (-1, 1)])
def test_memory_is_not_read_or_written_outside_of_its_bounds(workshop: Workshop, address: int, length: int) -> None:
    instance = workshop.code(GROWING)[1].instantiate(None)
    problem = failure(instance.read, address, length)
    assert problem.kind == "bad-answer"
    assert "64 KiB" in str(problem)
    assert failure(instance.write, address, b"x" * min(length, 70_000)).kind == "bad-answer"


def test_no_bytes_are_read_and_written_anywhere_within(workshop: Workshop) -> None:
    instance = workshop.code(GROWING)[1].instantiate(None)
    instance.write(65536, b"")
    assert instance.read(65536, 0) == b""


def test_a_module_without_memory_has_none_to_read(workshop: Workshop) -> None:
    instance = workshop.code("(module)")[1].instantiate(None)
    assert instance.memory_size() == 0
    assert failure(instance.read, 0, 1).kind == "bad-answer"


def test_instances_share_nothing(workshop: Workshop) -> None:
    _, code = workshop.code(GROWING)
    first, second = code.instantiate(None), code.instantiate(None)
    first.write(0, b"first")
    second.write(0, b"other")
    assert first.read(0, 5) == b"first"
    second.close()
    assert first.read(0, 5) == b"first"


def test_a_closed_instance_has_no_memory_left_to_read(workshop: Workshop) -> None:
    instance = workshop.code(GROWING)[1].instantiate(None)
    instance.close()
    assert failure(instance.read, 0, 1).kind == "bad-answer"


def test_growing_over_the_limit_answers_minus_one(workshop: Workshop) -> None:
    instance = workshop.code(GROWING, memory_limit=1 << 20)[1].instantiate(None)
    assert called(instance, "grow", 15) == 1
    assert called(instance, "grow", 1) == -1
    assert instance.memory_size() == 1 << 20


def test_a_memory_over_the_limit_from_the_start_is_named(workshop: Workshop) -> None:
    _, code = workshop.code('(module (memory (export "m") 100))', memory_limit=1 << 20)
    problem = failure(code.instantiate, None)
    assert problem.kind == "out-of-memory"
    assert "limit of 1 MiB" in str(problem)


def test_tables_are_bounded(workshop: Workshop) -> None:
    text = (
        '(module (table {} funcref) (func (export "g") (param i32) (result i32) ref.null func local.get 0 table.grow))'
    )
    _, code = workshop.code(text.format(3), table_limit=10)
    instance = code.instantiate(None)
    assert called(instance, "g", 7) == 3
    assert called(instance, "g", 1) == -1
    _, code = workshop.code(text.format(11), table_limit=10)
    problem = failure(code.instantiate, None)
    assert (problem.kind, "limit of 10 elements" in str(problem)) == ("over-limit", True)


def test_garbage_collected_objects_are_bounded_as_memory_is(workshop: Workshop) -> None:
    text = """(module (type $a (array (mut i8))) (global $g (mut (ref null $a)) (ref.null $a))
      (func (export "f") (param i32) (global.set $g (array.new_default $a (local.get 0)))))"""
    instance = workshop.code(text, memory_limit=1 << 20)[1].instantiate(None)
    called(instance, "f", 1000)
    assert failure(called, instance, "f", 5_000_000).kind == "out-of-memory"


def test_memories_that_no_limit_holds_are_refused(workshop: Workshop) -> None:
    assert failure(workshop.code, '(module (memory (export "m") 1) (memory 2))').kind == "invalid-module"
    problem = failure(workshop.code, '(module (memory (export "m") 1 2 shared))')
    assert (problem.kind, "without threads" in str(problem)) == ("invalid-module", True)


# --- traps -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "trap"),
    [
        ("t_unreachable", "unreachable"),
        ("t_oob", "out-of-bounds-memory"),
        ("t_oob_past", "out-of-bounds-memory"),
        ("t_div0", "integer-divide-by-zero"),
        ("t_ovf", "integer-overflow"),
        ("t_indirect", "out-of-bounds-table"),
        ("t_sig", "bad-signature"),
    ],
)
def test_each_trap_has_its_name_and_its_place(workshop: Workshop, function: str, trap: str) -> None:
    instance = workshop.code(model("trap_model"))[1].instantiate(None)
    found = instance.function(function)
    assert found is not None
    problem = failure(found, *[1] * len(found.params))
    assert problem.kind == "trap"
    assert problem.details["trap"] == trap
    assert problem.details["memory"] == 131072
    # The module has no names; that of the export is known nevertheless.
    assert problem.details["backtrace"][0].startswith(f"{function} (function ")
    assert str(problem).startswith(f"`{function}` trapped")
    assert "\n" not in str(problem)


def test_a_null_function_pointer_and_a_float_without_integer_are_named(workshop: Workshop) -> None:
    text = """(module (type $t (func)) (table 2 funcref)
      (func (export "null") (call_indirect (type $t) (i32.const 0)))
      (func (export "convert") (param f64) (result i32) (i32.trunc_f64_s (local.get 0))))"""
    _, code = workshop.code(text)
    assert failure(called, code.instantiate(None), "null").details["trap"] == "indirect-call-to-null"
    assert failure(called, code.instantiate(None), "convert", 1e99).details["trap"] == "integer-overflow"
    assert (
        failure(called, code.instantiate(None), "convert", float("nan")).details["trap"] == "bad-conversion-to-integer"
    )


def test_an_exception_that_nothing_catches_is_a_trap(workshop: Workshop) -> None:
    text = '(module (tag $e (param i32)) (func (export "f") (throw $e (i32.const 1))))'
    assert failure(called, workshop.code(text)[1].instantiate(None), "f").details["trap"] == "uncaught-exception"


def test_the_backtrace_names_functions_innermost_first(workshop: Workshop) -> None:
    text = '(module (func $inner unreachable) (func $outer (export "run") call $inner))'
    problem = failure(called, workshop.code(text)[1].instantiate(None), "run")
    assert [line.split(" ")[0] for line in problem.details["backtrace"]] == ["inner", "outer"]
    assert "`run` trapped in `inner`" in str(problem)


def test_a_start_function_that_traps_is_a_failure_to_instantiate(workshop: Workshop) -> None:
    _, code = workshop.code("(module (func $s unreachable) (start $s))")
    problem = failure(code.instantiate, None)
    assert (problem.kind, problem.details["trap"]) == ("trap", "unreachable")


@pytest.mark.parametrize("stack", [64 * 1024, 512 * 1024, 1 << 20])
def test_endless_recursion_is_a_stack_overflow_each_time(workshop: Workshop, stack: int) -> None:
    _, code = workshop.code(model("trap_model"), stack_limit=stack)
    for _ in range(3):
        instance = code.instantiate(None)
        problem = failure(called, instance, "t_stack")
        assert problem.kind == "stack-overflow"
        assert len(problem.details["backtrace"]) <= 50
        assert called(instance, "ok") == 42
        instance.close()


def test_a_deeper_stack_carries_deeper_recursion(workshop: Workshop) -> None:
    text = """(module (func $f (export "f") (param i32) (result i32)
      (if (result i32) (i32.eqz (local.get 0)) (then (i32.const 0))
        (else (i32.add (i32.const 1) (call $f (i32.sub (local.get 0) (i32.const 1))))))))"""
    depth = 12_000
    small, large = (workshop.code(text, stack_limit=size)[1].instantiate(None) for size in (64 * 1024, 1 << 20))
    assert failure(called, small, "f", depth).kind == "stack-overflow"
    assert called(large, "f", depth) == depth


def test_running_over_the_stack_inside_memory_is_a_stack_overflow_too(workshop: Workshop) -> None:
    problem = failure(called, workshop.code(model("trap_model"))[1].instantiate(None), "t_cstack")
    assert (problem.kind, problem.details["trap"]) == ("stack-overflow", "out-of-bounds-memory")


def test_a_trap_after_memory_was_used_up_is_out_of_memory(workshop: Workshop) -> None:
    text = """(module (memory (export "m") 1) (func (export "fill")
      (loop $l (br_if $l (i32.ne (memory.grow (i32.const 1)) (i32.const -1)))) unreachable)
      (func (export "divide") (drop (memory.grow (i32.const 15))) (drop (i32.div_u (i32.const 1) (i32.const 0)))))"""
    _, code = workshop.code(text, memory_limit=1 << 20)
    problem = failure(called, code.instantiate(None), "fill")
    assert problem.kind == "out-of-memory"
    assert "1 MiB of memory and a limit of 1 MiB" in str(problem)
    assert problem.details["trap"] == "unreachable"
    # A trap that has nothing to do with memory keeps its name, however full the memory is.
    assert failure(called, code.instantiate(None), "divide").details["trap"] == "integer-divide-by-zero"


def test_a_trap_in_an_allocation_failure_by_name_is_out_of_memory(workshop: Workshop) -> None:
    text = """(module (memory (export "m") 1) (func $alloc::alloc::handle_alloc_error unreachable)
      (func (export "f") call 0))"""
    assert failure(called, workshop.code(text)[1].instantiate(None), "f").kind == "out-of-memory"


# --- interrupts ------------------------------------------------------------------------------------------------------


def test_another_thread_interrupts_a_guest(workshop: Workshop) -> None:
    engine, code = workshop.code(model("spin_model"), epochs=True)
    instance = code.instantiate(None)
    instance.arm()
    done = threading.Event()

    def stop() -> None:
        while not done.wait(0.001):  # runs only because the guest does not hold the GIL
            engine.interrupt()

    thread = threading.Thread(target=stop)
    thread.start()
    try:
        problem = failure(called, instance, "spin")
    finally:
        done.set()
        thread.join()
    assert problem.kind == "interrupted"


def test_an_interrupt_that_comes_late_does_not_hit_the_next_run(workshop: Workshop) -> None:
    engine, code = workshop.code(model("spin_model"), epochs=True)
    instance = code.instantiate(None)
    for _ in range(5):
        engine.interrupt()
        instance.arm()
        called(instance, "spin_bounded", 1000)


def test_an_interrupt_between_two_calls_of_one_run_is_not_lost(workshop: Workshop) -> None:
    engine, code = workshop.code(model("spin_model"), epochs=True)
    instance = code.instantiate(None)
    instance.arm()
    called(instance, "spin_bounded", 1)
    engine.interrupt()
    assert failure(called, instance, "spin").kind == "interrupted"


def test_an_engine_without_epochs_says_that_it_cannot_interrupt(workshop: Workshop) -> None:
    engine, _ = workshop.code("(module)")
    assert not engine.can_interrupt
    with pytest.raises(RuntimeError, match="without epochs"):
        engine.interrupt()


# --- code ------------------------------------------------------------------------------------------------------------


def test_code_made_for_other_settings_is_stale(workshop: Workshop) -> None:
    path, _ = workshop.prepare("(module)", Settings(epochs=True))
    assert failure(open_engine("wasmtime", Settings()).load, path).kind == "stale-code"


@pytest.mark.parametrize("content", [b"", b"short", b"x" * 4096, b"\x7fELF" + b"\0" * 4096 + b"\xff" * 8 + b"SPARKAOT"])
def test_a_file_that_is_no_code_is_stale(workshop: Workshop, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad"
    path.write_bytes(content)
    assert failure(open_engine("wasmtime", Settings()).load, str(path)).kind == "stale-code"
    assert failure(open_engine("wasmtime", Settings()).load, str(tmp_path / "missing")).kind == "stale-code"


def test_code_of_one_way_runs_in_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for way, other in (WAYS, WAYS[::-1]):
        use_way(monkeypatch, way)
        path, _ = Workshop(tmp_path).prepare(model("json_model"))
        use_way(monkeypatch, other)
        assert called(open_engine("wasmtime", Settings()).load(path).instantiate(None), "add", 1, 2) == 3


def test_an_import_that_is_not_wasi_is_named_at_load(workshop: Workshop, tmp_path: Path) -> None:
    # The compile worker refuses it before; an engine that is given it all the same must not crash.
    wasm = from_text('(module (import "env" "puts" (func (param i32))))')
    path = tmp_path / "code"
    path.write_bytes(open_engine("wasmtime", Settings()).compile(wasm))
    problem = failure(open_engine("wasmtime", Settings()).load, str(path))
    assert problem.kind == "unsupported-import"
    assert "puts" in str(problem)


def test_arguments_of_a_model_that_wasi_cannot_carry_are_refused(workshop: Workshop) -> None:
    for text in ("a\0b", "\udc80"):
        host = workshop.host(model("wasi_cmd"), args=[text])
        assert failure(host.run, b"{}").kind == "wrong-signature"


# --- the outline -----------------------------------------------------------------------------------------------------


def test_the_outline_tells_types_as_wasmtime_does_and_more() -> None:
    text = """(module
      (import "wasi_snapshot_preview1" "fd_write" (func (param i32 i32 i32 i32) (result i32)))
      (import "env" "g" (global (mut i64))) (import "env" "t" (table 1 5 externref))
      (import "env" "m" (memory 2 9)) (import "env" "e" (tag (param i32)))
      (type $s (struct (field i32))) (rec (type $a (sub (struct))) (type $b (array (mut i8))))
      (func (export "v") (param v128 (ref null $s)) (result f32 f64) unreachable)
      (global (export "x") (mut f64) (f64.const 1)) (global (export "y") i32 (i32.add (i32.const 1) (i32.const 2)))
      (global (export "z") v128 (v128.const i64x2 1 2)) (global funcref (ref.func 0)) (global funcref (ref.null func))
      (export "m" (memory 0)) (export "t" (table 0)) (export "e" (tag 0)) (export "again" (func 1)))"""
    outline = read_outline(from_text(text))
    assert [(each.module, each.name, each.kind, each.type) for each in outline.imports] == [
        ("wasi_snapshot_preview1", "fd_write", "function", "(i32, i32, i32, i32) -> i32"),
        ("env", "g", "global", "mut i64"),
        ("env", "t", "table", "1 to 5 externref"),
        ("env", "m", "memory", "2 to 9 pages"),
        ("env", "e", "tag", "(i32) -> ()"),
    ]
    assert {each.name: each.type for each in outline.exports} == {
        "v": "(v128, (ref null 0)) -> (f32, f64)",
        "again": "(v128, (ref null 0)) -> (f32, f64)",
        "x": "mut f64",
        "y": "i32",
        "z": "v128",
        "m": "2 to 9 pages",
        "t": "1 to 5 externref",
        "e": "(i32) -> ()",
    }
    assert signature_of(outline.exports[0].type) == (("v128", "(ref null 0)"), ("f32", "f64"))
    assert [(each.minimum, each.maximum, each.is_imported) for each in outline.memories] == [(2, 9, True)]


@pytest.mark.parametrize("name", ["json_model", "wasi_cmd", "wasi_reactor", "trap_model"])
def test_the_outline_of_a_cut_off_module_is_unreadable_or_shorter(name: str) -> None:
    wasm = model(name)
    whole = read_outline(wasm)
    for end in range(0, len(wasm), max(1, len(wasm) // 300)):
        try:
            assert len(read_outline(wasm[:end]).exports) in (0, len(whole.exports))
        except OutlineUnreadable:
            continue


@pytest.mark.parametrize(
    ("text", "params", "results"),
    [
        ("() -> ()", (), ()),
        ("(i32) -> i64", ("i32",), ("i64",)),
        ("((ref null 3)) -> (ref func)", ("(ref null 3)",), ("(ref func)",)),
        ("(i32, f64) -> (i32, f64)", ("i32", "f64"), ("i32", "f64")),
    ],
)
def test_signatures_are_read_from_their_text(text: str, params: tuple[str, ...], results: tuple[str, ...]) -> None:
    assert signature_of(text) == (params, results)


# --- which way -------------------------------------------------------------------------------------------------------

ASK_WAY = """
import sys
from spark_workers.engines import wasmtime_found
{}
from spark_workers.engines import wasmtime_engine
from spark_workers.engines.seam import Settings, open_engine
engine = open_engine("wasmtime", Settings())
print(wasmtime_engine.WAY, type(engine).__name__, "wasmtime" in sys.modules)
"""


def test_the_raw_way_is_taken_without_importing_wasmtime() -> None:
    done = run_python(ASK_WAY.format(""))
    assert (done.stdout, done.stderr) == ("raw RawEngine False\n", "")


def test_the_public_way_is_taken_when_asked_for() -> None:
    done = run_python(ASK_WAY.format(""), SPARKRT_WASMTIME="public")
    assert (done.stdout, done.stderr) == ("public PublicEngine True\n", "")


def test_a_version_that_is_not_known_is_used_through_its_own_package_with_one_line() -> None:
    done = run_python(ASK_WAY.format("wasmtime_found.VERIFIED = ('1.0.',)"))
    assert done.stdout == "public PublicEngine True\n"
    assert done.stderr.count("\n") == 1
    assert "1.0.x is known here" in done.stderr


def test_an_interpreter_without_wasmtime_says_how_to_get_it() -> None:
    script = """
from spark_workers.engines import wasmtime_found
wasmtime_found.find_installed.__code__ = (lambda: None).__code__
from spark_workers.engines.seam import Settings, open_engine
from spark_workers.hosts.failures import GuestFailed
try:
    open_engine("wasmtime", Settings())
except GuestFailed as problem:
    print(problem.kind, problem)
"""
    done = run_python(script)
    assert done.stdout.startswith("engine-missing wasmtime is not installed for ")
    assert "-m pip install wasmtime" in done.stdout


def test_the_installed_version_is_found_and_known() -> None:
    installed = wasmtime_found.find_installed()
    assert installed is not None
    assert installed.why_not_raw() == ""
    assert "no /nowhere" in Installed(installed.version, "/nowhere").why_not_raw()
    assert "unknown version" in Installed("", installed.library).why_not_raw()


def test_structures_and_functions_are_as_the_package_declares_them() -> None:
    import wasmtime._bindings as declared

    from spark_workers.engines import wasmtime_raw as raw

    assert ctypes.sizeof(raw.ExternItem) == ctypes.sizeof(declared.wasmtime_extern_t)
    assert raw.ExternItem.of.offset == declared.wasmtime_extern_t.of.offset
    assert ctypes.sizeof(raw.InstanceItem) == ctypes.sizeof(declared.wasmtime_instance_t)
    assert ctypes.sizeof(declared.wasmtime_val_raw_t) == raw.VALUE_BYTES
    for vector in (declared.wasm_byte_vec_t, declared.wasm_frame_vec_t):
        assert ctypes.sizeof(raw.ByteVector) == ctypes.sizeof(vector)
        assert raw.ByteVector.data.offset == vector.data.offset
    assert len(raw.BOUND) > 40
    for name, function in raw.BOUND.items():
        theirs = getattr(declared, f"_{name}")
        sizes = [ctypes.sizeof(each) for each in theirs.argtypes]
        assert [ctypes.sizeof(each) for each in function.argtypes] == sizes, name
        assert (function.restype is None) == (theirs.restype is None), name
        assert function.restype is None or ctypes.sizeof(function.restype) == ctypes.sizeof(theirs.restype), name
    assert wasmtime.TrapCode.INTERRUPT.value == 10
    assert wasmtime.TrapCode.STACK_OVERFLOW.value == 0


def test_a_guest_gets_no_more_stack_than_the_thread_has() -> None:
    assert stack_bytes(16 * 1024) == 16 * 1024
    assert stack_bytes(1 << 30) == 1 << 20
    script = """
import resource
resource.setrlimit(resource.RLIMIT_STACK, (1 << 20, 2 << 20))
from spark_workers.engines.stack import stack_bytes
print(stack_bytes(1 << 20), resource.getrlimit(resource.RLIMIT_STACK))
"""
    assert run_python(script).stdout == f"{512 * 1024} ({2 << 20}, {2 << 20})\n"


FORK = """
import os
from spark_workers.engines import wasmtime_engine  # what a nursery has preloaded before it forks
from spark_workers.engines.seam import Settings
from spark_workers.hosts.host import open_host
from spark_workers.hosts.failures import GuestFailed
path = os.environ["CODE"]
children = []
for _ in range(4):
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            host = open_host("wasmtime", "auto", path, Settings())
            try:
                host.call("t_div0", [1])
            except GuestFailed as problem:
                assert problem.details["trap"] == "integer-divide-by-zero"
            assert host.call("ok", []) == [42]
            status = 0
        finally:
            os._exit(status)
    children.append(pid)
print([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children])
"""


@pytest.mark.parametrize("chosen", WAYS)
def test_processes_forked_after_the_import_run_and_trap(tmp_path: Path, chosen: str) -> None:
    path, _ = Workshop(tmp_path).prepare(model("trap_model"))
    done = run_python(FORK, CODE=path, SPARKRT_WASMTIME=chosen)
    assert (done.stdout, done.stderr) == ("[0, 0, 0, 0]\n", "")


HOSTILE = """
import os, random, resource
from pathlib import Path
from spark_workers.engines.seam import Settings, open_engine
from spark_workers.hosts.failures import GuestFailed
from spark_workers.replicas.compiling import compile_module

random.seed(7)
settings = Settings()
engine = open_engine("wasmtime", settings)
outcomes = {}


def attempt(wasm):
    try:
        compile_module(engine, wasm, settings)
        outcome = "compiled"
    except GuestFailed as problem:
        outcome = problem.kind
        assert str(problem) and "\\n" not in str(problem), problem
    outcomes[outcome] = outcomes.get(outcome, 0) + 1


folder = Path(os.environ["MODELS"])
for name in ("json_model", "trap_model", "mem_model"):
    wasm = (folder / f"{name}.wasm").read_bytes()
    for end in range(0, len(wasm), max(1, len(wasm) // 60)):
        attempt(wasm[:end])
    for _ in range(100):
        spoiled = bytearray(wasm)
        for _ in range(random.choice((1, 1, 4, 30))):
            spoiled[random.randrange(8, len(spoiled))] = random.randrange(256)
        attempt(bytes(spoiled))
for section in range(14):
    for size in (b"\\xff\\xff\\xff\\xff\\x0f", b"\\xff\\xff\\x03", b"\\x05\\xff\\xff\\xff\\xff\\x0f", b"\\x00", b""):
        attempt(b"\\0asm\\1\\0\\0\\0" + bytes([section]) + size)
for length in range(0, 200, 7):
    attempt(random.randbytes(length))
    attempt(b"\\0asm\\1\\0\\0\\0" + random.randbytes(length))
assert set(outcomes) <= {"compiled", "invalid-module", "unsupported-import"}, outcomes
assert outcomes["invalid-module"] > 300, outcomes
print("survived")
"""


def test_malformed_modules_are_refused_with_a_sentence_and_kill_nothing() -> None:
    done = run_python(HOSTILE)
    assert (done.stdout, done.returncode) == ("survived\n", 0), done.stderr
