"""The host of Neuron packages: what replicas need of one, how requests reach it, what it imports, how it fails."""

import gc
import importlib.util
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("wasmtime") is None:
    pytest.skip("wasmtime is not installed in this interpreter", allow_module_level=True)

from guests_help import failure, from_text, use_way
from neuron_help import ECHO, GLUE, PACKAGES, answering, package_from, package_of, text_of

from spark_workers.engines import code_file
from spark_workers.engines.seam import Settings, open_engine
from spark_workers.hosts import neuron_bridge
from spark_workers.hosts.host import Host, open_host
from spark_workers.hosts.neuron_prepare import prepare_package

OWN, XCALL, SMALLEST = "own-model.zip", "own-xcall.zip", "wat-echo.zip"


@pytest.fixture(params=("raw", "public"))
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    use_way(monkeypatch, request.param)
    return str(request.param)


class Shop:
    """Prepares packages in a folder and opens their hosts."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def prepare(self, package: bytes | str, **settings: Any) -> tuple[str, dict[str, Any]]:
        data = (PACKAGES / package).read_bytes() if isinstance(package, str) else package
        code, report = prepare_package(open_engine("wasmtime", Settings(**settings)), data)  # type: ignore[arg-type]
        path = self._folder / f"{len(list(self._folder.iterdir()))}.code"
        path.write_bytes(code)
        return str(path), report

    def host(self, package: bytes | str, dispatch: Callable[[bytes], bytes] | None = None, **settings: Any) -> Host:
        path, _ = self.prepare(package, **settings)
        return open_host("wasmtime", "neuron", path, Settings(**settings), dispatch)


@pytest.fixture
def shop(tmp_path: Path, way: str) -> Shop:
    return Shop(tmp_path)


def ask(host: Host, **inputs: Any) -> dict[str, Any]:
    """Return the outputs for *inputs*."""
    request = {"request_data": {"inputs": inputs}, "request_meta": {}}
    outputs: dict[str, Any] = json.loads(host.run(json.dumps(request).encode()))["response_data"]["outputs"]
    return outputs


# --- what is prepared ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["STUBS", "DRIVER"])
def test_the_bytes_of_the_bridge_are_what_its_text_says(name: str) -> None:
    assert from_text(getattr(neuron_bridge, f"{name}_TEXT")) == getattr(neuron_bridge, name)


def test_the_report_says_what_each_letter_stands_for(shop: Shop) -> None:
    path, report = shop.prepare(OWN)
    assert (report["kind"], report["entry"]) == ("neuron", "node_calc_v3")
    assert {"fd_read", "abort", "emscripten_memcpy_big"} <= {each["meaning"] for each in report["imports"]}
    assert {"construct", "malloc", "memory", "table"} <= {each["meaning"] for each in report["exports"]}
    package = report["package"]
    assert (package["service"], package["compiler_version"]) == ("own_model", "1.22.3")
    assert package["has_static"]
    assert not package["calls_services"]
    assert shop.prepare(XCALL)[1]["package"]["calls_services"]
    assert set(code_file.read_parts(path)) == {"stubs", "driver", "glue", "data"}
    assert b"function" not in code_file.read_parts(path)["glue"]  # names only: no JavaScript reaches a replica


@pytest.mark.parametrize(
    ("module", "said"),
    [
        ("(module)", "does not say which export is `construct`"),
        (text_of(ECHO).replace('"free") (param i32))', '"free") (param i64))'), "`free` is (i64) -> ()"),
        (text_of(ECHO, imports='(import "env" "table" (table 1 funcref))'), "imports the table `env.table`"),
        (text_of(ECHO, imports='(import "env" "abort" (func (param v128)))'), "has more than numbers"),
        (text_of(ECHO).replace('(export "memory")', ""), "exports no memory"),
    ],
)
def test_a_module_that_is_no_neuron_model_is_refused_in_a_sentence(shop: Shop, module: str, said: str) -> None:
    problem = failure(shop.prepare, package_of(from_text(module)))
    assert problem.kind in ("invalid-module", "unsupported-import")
    assert said in str(problem)


@pytest.mark.parametrize(
    ("package", "said"),
    [
        (b"PK\x03\x04rest", "the package cannot be used"),
        (package_of(b"\0asm\1\0\0\0")[:-30], "the package cannot be used"),
        (package_of(b"no module"), "module cannot be read"),
        (package_of(b"\0asm\1\0\0\0\x01\xff\xff"), "module cannot be read"),
        (package_of(b"\0asm\1\0\0\0", glue="'"), "the package cannot be used"),
    ],
)
def test_a_damaged_package_is_refused_in_a_sentence(shop: Shop, package: bytes, said: str) -> None:
    problem = failure(shop.prepare, package)
    assert problem.kind == "invalid-module"
    assert said in str(problem)


def test_prepared_code_without_its_parts_is_stale(shop: Shop, tmp_path: Path) -> None:
    path, _ = shop.prepare(SMALLEST)
    data = Path(path).read_bytes()
    cut = tmp_path / "cut"
    cut.write_bytes(data[:-1])
    assert failure(open_host, "wasmtime", "neuron", str(cut), Settings()).kind == "stale-code"
    plain = tmp_path / "plain"
    plain.write_bytes(open_engine("wasmtime", Settings()).compile(from_text("(module)")))
    assert failure(open_host, "wasmtime", "neuron", str(plain), Settings()).kind == "stale-code"


# --- requests --------------------------------------------------------------------------------------------------------


def test_requests_are_answered_by_one_instance(shop: Shop) -> None:
    host = shop.host(OWN)
    assert ask(host, radius=3, height=5) == {"volume": pytest.approx(141.371669411541), "calls": 1}
    assert ask(host) == {"volume": pytest.approx(615.752160103599), "calls": 2}  # 4, read from the preload archive


def test_requests_of_every_size_fit_in_any_order(shop: Shop) -> None:
    host = shop.host(package_from(ECHO))
    sizes = [1, 4096, 4097, 0, 5_000_000, 3, 6_250_001, 100_000]
    for size in sizes:
        request = os.urandom(size // 2) + bytes(size - size // 2)
        assert host.run(request) == request


def test_a_fresh_instance_for_every_call_where_it_is_asked_for(shop: Shop) -> None:
    host = shop.host(OWN, fresh=True)
    assert [ask(host)["calls"] for _ in range(3)] == [1, 1, 1]


def test_exports_are_called_by_their_names_in_c_or_in_the_module(shop: Shop) -> None:
    host = shop.host(OWN)
    place = host.call("malloc", [64])[0]
    assert place
    assert host.call("free", [place]) == []
    assert host.call("r", [64])  # malloc, in this build
    problem = failure(host.call, "mallok", [1])
    assert problem.kind == "missing-export"
    assert "it exports no function `mallok`; it exports `malloc`" in str(problem)
    assert failure(host.call, "malloc", []).kind == "wrong-signature"


# --- failures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("boom", "trap", "said"),
    [
        (1, "abort", "abort"),
        (2, "out-of-bounds-memory", "outside of its bounds"),
        (3, "unreachable", "unreachable"),
    ],
)
def test_after_a_failure_the_next_call_has_a_new_instance(shop: Shop, boom: int, trap: str, said: str) -> None:
    host = shop.host(OWN)
    assert ask(host)["calls"] == 1
    problem = failure(lambda: ask(host, boom=boom))
    assert (problem.kind, problem.details["trap"]) == ("trap", trap)
    assert said in str(problem)
    assert problem.details["memory"] == 16 << 20
    assert ask(host)["calls"] == 1


def test_backtraces_have_names_in_c_and_no_frames_of_ours(shop: Shop) -> None:
    problem = failure(lambda: ask(shop.host(OWN), boom=3))
    assert len(problem.details["backtrace"]) == 1
    assert problem.details["backtrace"][0].startswith("node_calc_v3 (function ")
    assert str(problem).startswith("`node_calc_v3` trapped: ")


def test_thousands_of_failures_leave_nothing_behind(shop: Shop) -> None:
    host = shop.host(package_from("unreachable"))
    for _ in range(50):
        failure(host.run, b"{}")
    gc.collect()
    with open("/proc/self/statm") as file:
        before = int(file.read().split()[1])
    for _ in range(2000):
        assert failure(host.run, b"{}").kind == "trap"
    gc.collect()
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[1]) - before
    assert pages * 4096 < 16 << 20


def test_a_request_without_room_is_out_of_memory(shop: Shop) -> None:
    host = shop.host(package_from(ECHO), memory_limit=8 << 20)
    problem = failure(host.run, bytes(9 << 20))
    assert problem.kind == "out-of-memory"
    assert "no room for a request of 9 MiB" in str(problem)
    assert "raise memory_limit" in str(problem)
    assert host.run(b"again") == b"again"


GROW = '(import "env" "emscripten_resize_heap" (func $grow (param i32) (result i32)))'


def test_a_guest_that_fails_after_it_was_refused_memory_is_out_of_memory(shop: Shop) -> None:
    wish = "(if (i32.eqz (call $grow (i32.const 67108864))) (then unreachable)) " + ECHO
    assert shop.host(package_from(wish, GROW)).run(b"x") == b"x"
    problem = failure(shop.host(package_from(wish, GROW), memory_limit=8 << 20).run, b"x")
    assert problem.kind == "out-of-memory"
    assert problem.details["memory_limit"] == 8 << 20


def test_an_answer_outside_of_memory_or_none_is_told(shop: Shop) -> None:
    outside = "(call $say (i32.const -8) (i32.const 100) (local.get $length))"
    problem = failure(shop.host(package_from(outside)).run, b"{}")
    assert (problem.kind, "do not lie in" in str(problem)) == ("bad-answer", True)
    problem = failure(shop.host(package_from("(i32.const 0)")).run, b"{}")
    assert (problem.kind, str(problem)) == ("bad-answer", "`node_calc_v3` gave no answer")


def test_what_fails_in_construct_is_told_when_the_model_is_opened(shop: Shop) -> None:
    problem = failure(shop.host, package_from(ECHO, construct="unreachable"))
    assert problem.kind == "trap"
    assert "`construct` trapped" in str(problem)


# --- imports ---------------------------------------------------------------------------------------------------------


def test_an_unknown_import_fails_when_it_is_called_and_names_itself(shop: Shop) -> None:
    imports = '(import "env" "never_heard_of" (func $odd (param i32 f64) (result i64)))'
    calculate = (
        f"(if (i32.eq (local.get $count) (i32.const 1)) (then (drop (call $odd (i32.const 1) (f64.const 2))))) {ECHO}"
    )
    host = shop.host(package_from(calculate, imports))
    assert host.run(b"as long as it is not called") == b"as long as it is not called"
    problem = failure(host.run, b"!")
    assert problem.kind == "trap"
    assert "never_heard_of" in str(problem)
    assert host.run(b"and afterwards") == b"and afterwards"


@pytest.mark.parametrize("result", ["", " (result i32)"])
def test_memory_is_copied_without_a_call_into_python(shop: Shop, result: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from spark_workers.hosts.emscripten.system import System

    asked: list[str] = []
    original = System.function
    monkeypatch.setattr(System, "function", lambda self, name, kind: asked.append(name) or original(self, name, kind))
    imports = f'(import "env" "emscripten_memcpy_big" (func $copy (param i32 i32 i32){result}))'
    drop = "drop" if result else ""
    calculate = f"""(call $copy (i32.const 2048) (local.get $in) (local.get $count)) {drop}
      (call $say (i32.const 2048) (local.get $count) (local.get $length))"""
    assert shop.host(package_from(calculate, imports)).run(b"carried over") == b"carried over"
    assert asked == []


def test_clocks_run(shop: Shop) -> None:
    imports = '(import "env" "emscripten_get_now" (func $now (result f64)))'
    calculate = (
        "(f64.store (i32.const 2048) (call $now)) (call $say (i32.const 2048) (i32.const 8) (local.get $length))"
    )
    host = shop.host(package_from(calculate, imports))
    times = [memoryview(host.run(b"{}")).cast("d")[0] for _ in range(50)]
    assert times == sorted(times)
    assert times[-1] > times[0]


@pytest.mark.parametrize("wide", [True, False])
def test_numbers_of_64_bits_come_whole_or_in_halves(shop: Shop, wide: bool) -> None:
    offset = "i64" if wide else "i32 i32"
    imports = f'(import "env" "fd_seek" (func $seek (param i32 {offset} i32 i32) (result i32)))'
    given = "(i64.const 4)" if wide else "(i32.const 4) (i32.const 0)"
    calculate = f"""(i32.store (i32.const 2048) (call $seek (i32.const 99) {given} (i32.const 0) (i32.const 2056)))
      (call $say (i32.const 2048) (i32.const 4) (local.get $length))"""
    assert shop.host(package_from(calculate, imports)).run(b"{}") == (8).to_bytes(4, "little")  # EBADF, not a trap


WRITE = '(import "env" "fd_write" (func $write (param i32 i32 i32 i32) (result i32)))'
WRITES = """(i32.store (i32.const 2048) (local.get $in)) (i32.store (i32.const 2052) (local.get $count))
  (drop (call $write (i32.const 1) (i32.const 2048) (i32.const 1) (i32.const 2056)))"""


def test_what_a_guest_prints_is_told_beside_its_answer(shop: Shop) -> None:
    host = shop.host(package_from(WRITES + ECHO, WRITE))
    assert host.run(b"hello") == b"hello"
    assert host.take_printed() == "hello"
    assert host.take_printed() == ""


def test_what_a_guest_printed_before_it_failed_is_told_with_the_failure(shop: Shop) -> None:
    host = shop.host(package_from(WRITES + "unreachable", WRITE))
    assert failure(host.run, b"last words").details["stderr"] == "last words"
    assert host.take_printed() == ""


# --- other services --------------------------------------------------------------------------------------------------


def test_a_call_of_another_service_is_answered_where_it_is_made(shop: Shop) -> None:
    asked: list[dict[str, Any]] = []

    def dispatch(request: bytes) -> bytes:
        asked.append(json.loads(request))
        return '{"from": "elsewhere", "ü": 1}'.encode()

    host = shop.host(XCALL, dispatch)
    assert ask(host, radius=2, xcall=1)["down"] == {"from": "elsewhere", "ü": 1}
    assert (asked[0]["folder_name"], asked[0]["service_name"]) == ("F", "own")
    assert json.loads(asked[0]["request_body"])["request_data"]["inputs"] == {"radius": 2, "xcall": 0}
    assert ask(host, radius=2, height=1) == {"volume": pytest.approx(12.566370614359), "calls": 2}


def test_without_an_answer_from_the_other_service_the_call_fails(shop: Shop) -> None:
    problem = failure(lambda: ask(shop.host(XCALL), xcall=1))
    assert problem.kind == "xcall"
    assert "nobody is here to answer" in str(problem)


def test_what_dispatch_raises_reaches_the_caller_and_the_instance_is_replaced(shop: Shop) -> None:
    def dispatch(request: bytes) -> bytes:
        raise EOFError("the supervisor is gone")

    host = shop.host(XCALL, dispatch)
    with pytest.raises(EOFError, match="the supervisor is gone"):
        ask(host, xcall=1)
    assert ask(host)["calls"] == 1


# --- interrupts ------------------------------------------------------------------------------------------------------


def test_a_guest_that_spins_is_interrupted_where_it_was_asked_for(shop: Shop) -> None:
    host = shop.host(
        package_from(f"(if (i32.eq (local.get $count) (i32.const 4)) (then (loop $l (br $l)))) {ECHO}"), epochs=True
    )
    ended = threading.Event()

    def interrupt() -> None:
        while not ended.wait(0.01):
            host.interrupt()

    stopper = threading.Thread(target=interrupt)
    stopper.start()
    try:
        assert failure(host.run, b"spin").kind == "interrupted"
    finally:
        ended.set()
        stopper.join()
    assert host.run(b"after") == b"after"


def test_an_interrupt_before_a_call_does_not_stop_it(shop: Shop) -> None:
    host = shop.host(OWN, epochs=True)
    for _ in range(3):
        host.interrupt()
        assert ask(host)["volume"]


# --- how it is made --------------------------------------------------------------------------------------------------


def test_a_package_with_nothing_but_what_it_must_have_runs(shop: Shop) -> None:
    calculate, data = answering('{"response_data": {"outputs": {}}}')
    host = shop.host(package_from(calculate, more=data))
    assert ask(host) == {}


def test_opening_a_prepared_package_takes_no_compiler_and_no_zip(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = shop.prepare(OWN)
    for module in ("neuron_prepare", "packages.package", "packages.archive"):
        monkeypatch.setitem(__import__("sys").modules, f"spark_workers.{module}", None)
    began = time.perf_counter()
    host = open_host("wasmtime", "neuron", path, Settings())
    assert ask(host)["calls"] == 1
    assert (
        time.perf_counter() - began < 10
    )  # a hang would be what is wrong here; how long it takes is measured elsewhere


def test_the_javascript_of_a_package_is_never_run(shop: Shop, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    glue = f"require('fs').writeFileSync({str(trace)!r}, 'ran'); {GLUE}"
    host = shop.host(package_of(from_text(text_of(ECHO)), glue))
    assert host.run(b"x") == b"x"
    assert not trace.exists()
