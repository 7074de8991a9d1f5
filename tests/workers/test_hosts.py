"""Hosts: how requests reach each kind of model, what is freed, what is printed, and the compile worker's entry."""

import gc
import importlib.util
import json
import os
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("wasmtime") is None:
    pytest.skip("wasmtime is not installed in this interpreter", allow_module_level=True)

from guests_help import ROOT, Workshop, failure, from_text, model, run_python, use_way

from spark_workers.channel import Channel
from spark_workers.engines.seam import Settings
from spark_workers.hosts.failures import KINDS
from spark_workers.hosts.host import open_host
from spark_workers.messages import Compile, Compiled, Refused


@pytest.fixture(params=("raw", "public"))
def workshop(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    use_way(monkeypatch, request.param)
    return Workshop(tmp_path)


def plain(execute: str, more: str = "", alloc: str = "i32.const 1024", pages: int = 1) -> str:
    """A plain module; *execute* sees $ptr and $len and leaves an i64."""
    return f"""(module (memory (export "memory") {pages}) {more}
      (func (export "alloc") (param $n i32) (result i32) {alloc})
      (func (export "execute") (param $ptr i32) (param $len i32) (result i64) {execute}))"""


def packed(place: str, length: str) -> str:
    return f"(i64.or (i64.shl (i64.extend_i32_u {place}) (i64.const 32)) (i64.extend_i32_u {length}))"


ECHO = packed("(local.get $ptr)", "(local.get $len)")
WASI = "wasi_snapshot_preview1"
FD_WRITE = f'(import "{WASI}" "fd_write" (func $fd_write (param i32 i32 i32 i32) (result i32)))'


def say(text: str, descriptor: int, at: int = 64) -> tuple[str, str]:
    """Return data and instructions that write *text*, a JSON-free ASCII string, to standard output or error."""
    data = f'(data (i32.const {at}) "{text}")'
    code = f"""(i32.store (i32.const 8) (i32.const {at})) (i32.store (i32.const 12) (i32.const {len(text)}))
      (drop (call $fd_write (i32.const {descriptor}) (i32.const 8) (i32.const 1) (i32.const 16)))"""
    return data, code


# --- plain -----------------------------------------------------------------------------------------------------------


def test_a_plain_model_answers_bytes_with_bytes(workshop: Workshop) -> None:
    host = workshop.host(model("json_model"))
    answer = json.loads(host.run(b'{"xs": [1, 2, 3]}'))
    assert (answer["n"], answer["sum"], answer["bytes"]) == (3, 6, 17)
    assert host.take_printed() == ""


@pytest.mark.parametrize("size", [0, 1, 1024, 70_000, 5_000_000])
def test_requests_of_every_size_come_back_whole(workshop: Workshop, size: int) -> None:
    host = workshop.host(model("json_model"), entry="echo")
    request = os.urandom(size)
    for _ in range(3):
        assert host.run(request) == request


def test_reset_is_called_after_each_answer(workshop: Workshop) -> None:
    host = workshop.host(model("json_model"), entry="echo", memory_limit=4 << 20)
    for _ in range(50):  # 5 MB in and 5 MB out through 4 MiB of memory
        assert len(host.run(b"x" * 100_000)) == 100_000


FREEING = """(global $count (mut i32) (i32.const 0)) (global $sum (mut i32) (i32.const 0))
  (func (export "count") (result i32) global.get $count) (func (export "sum") (result i32) global.get $sum)
  (func (export "{name}") (param $p i32){length}
    (global.set $count (i32.add (global.get $count) (i32.const 1)))
    (global.set $sum (i32.add (global.get $sum) {value})))"""


@pytest.mark.parametrize("name", ["free", "dealloc"])
def test_both_buffers_are_given_back_by_pointer(workshop: Workshop, name: str) -> None:
    more = FREEING.format(name=name, length="", value="(local.get $p)")
    host = workshop.host(plain(packed("(i32.const 4096)", "(local.get $len)"), more))
    host.run(b"12345")
    assert host.call("count", []) == [2]
    assert host.call("sum", []) == [4096 + 1024]


def test_both_buffers_are_given_back_by_pointer_and_length(workshop: Workshop) -> None:
    more = FREEING.format(name="dealloc", length=" (param $n i32)", value="(i32.mul (local.get $p) (local.get $n))")
    host = workshop.host(plain(packed("(i32.const 4096)", "(i32.const 3)"), more))
    host.run(b"12345")
    assert host.call("sum", []) == [4096 * 3 + 1024 * 5]
    host.run(b"")  # was given room for one byte, because room for none may be no room
    assert host.call("sum", []) == [4096 * 6 + 1024 * 6]


def test_an_answer_within_the_request_is_freed_once_and_an_empty_one_not_at_all(workshop: Workshop) -> None:
    more = FREEING.format(name="free", length="", value="(local.get $p)")
    inside = workshop.host(plain(packed("(i32.add (local.get $ptr) (i32.const 2))", "(i32.const 2)"), more))
    assert inside.run(b"12345") == b"34"
    assert inside.call("count", []) == [1]
    empty = workshop.host(plain(packed("(i32.const 4096)", "(i32.const 0)"), more))
    assert empty.run(b"12345") == b""
    assert empty.call("count", []) == [1]


def test_a_releaser_of_another_type_is_left_alone(workshop: Workshop) -> None:
    more = '(func (export "free") (param f64) unreachable) (func (export "reset") (param i32) unreachable)'
    assert workshop.host(plain(ECHO, more)).run(b"ok") == b"ok"


def test_malloc_serves_as_alloc(workshop: Workshop) -> None:
    text = plain(ECHO).replace('"alloc"', '"malloc"')
    assert workshop.host(text).run(b"ok") == b"ok"


def test_an_answer_in_memory_that_grew_during_the_call_is_read(workshop: Workshop) -> None:
    execute = f"""(drop (memory.grow (i32.const 20)))
      (i32.store (i32.const 1000000) (i32.const 0x216b6f21)) {packed("(i32.const 1000000)", "(i32.const 4)")}"""
    assert workshop.host(plain(execute)).run(b"") == b"!ok!"


@pytest.mark.parametrize(
    ("place", "length"), [("65536", "1"), ("65530", "7"), ("0", "65537"), ("-1", "-1"), ("0", "-1"), ("-4", "4")]
)
def test_an_answer_outside_of_memory_is_bad(workshop: Workshop, place: str, length: str) -> None:
    host = workshop.host(plain(packed(f"(i32.const {place})", f"(i32.const {length})")))
    problem = failure(host.run, b"{}")
    assert problem.kind == "bad-answer"
    assert "do not lie in the model's memory of 64 KiB" in str(problem)


def test_no_room_for_a_request_is_out_of_memory_with_the_sizes(workshop: Workshop) -> None:
    host = workshop.host(model("json_model"), entry="echo", memory_limit=1 << 20)
    problem = failure(host.run, b"x" * 2_000_000)
    assert problem.kind == "out-of-memory"
    assert "`alloc` has no room for a request of 1.9 MiB" in str(problem)
    assert "limit of 1 MiB" in str(problem)
    # There is room for this request, and none for its answer.
    assert failure(host.run, b"x" * 600_000).kind == "out-of-memory"
    assert host.run(b"small") == b"small"


def test_after_a_failure_the_next_call_finds_a_fresh_instance(workshop: Workshop) -> None:
    more = '(global $calls (mut i32) (i32.const 0)) (func (export "calls") (result i32) global.get $calls)'
    execute = f"""(global.set $calls (i32.add (global.get $calls) (i32.const 1)))
      (if (i32.eq (i32.load8_u (local.get $ptr)) (i32.const 33)) (then unreachable)) {ECHO}"""
    host = workshop.host(plain(execute, more))
    host.run(b"a")
    host.run(b"b")
    assert host.call("calls", []) == [2]
    assert failure(host.run, b"!").details["trap"] == "unreachable"
    assert host.call("calls", []) == [0]
    assert host.run(b"c") == b"c"
    assert host.call("calls", []) == [1]


def test_a_refused_call_leaves_the_instance_as_it_was(workshop: Workshop) -> None:
    more = '(global $n (mut i32) (i32.const 0)) (func (export "set") (param i32) (global.set $n (local.get 0)))'
    more += '(func (export "get") (result i32) global.get $n)'
    host = workshop.host(plain(ECHO, more))
    assert host.call("set", [7]) == []
    assert failure(host.call, "set", []).kind == "wrong-signature"
    assert failure(host.call, "nothing", []).kind == "missing-export"
    assert host.call("get", []) == [7]
    assert host.run(b"x") == b"x"


def test_fresh_instances_forget_everything(workshop: Workshop) -> None:
    more = '(global $n (mut i32) (i32.const 0)) (func (export "get") (result i32) global.get $n)'
    host = workshop.host(plain(f"(global.set $n (i32.const 5)) {ECHO}", more), fresh=True)
    assert host.run(b"x") == b"x"
    assert host.call("get", []) == [0]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (plain(ECHO).replace('"execute"', '"run"'), "exports no function `execute`"),
        (plain(ECHO).replace('"alloc"', '"allocate"'), "no `alloc` or `malloc` (i32) -> i32"),
        (plain(ECHO).replace('(export "memory")', ""), "does not export its memory"),
        (
            '(module (memory (export "memory") 1) (func (export "alloc") (param i32) (result i32) i32.const 8)'
            ' (func (export "execute") (param i32 i32) (result i32) i32.const 0))',
            "its `execute` is (i32, i32) -> i32; one that takes requests is (i32, i32) -> i64",
        ),
    ],
)
def test_a_module_that_takes_no_requests_says_why_and_its_functions_can_be_called(
    workshop: Workshop, text: str, said: str
) -> None:
    report = workshop.prepare(text)[1]
    assert report["kind"] == "functions"
    assert said in report["runs"]
    host = workshop.host(text)
    problem = failure(host.run, b"{}")
    assert problem.kind == "no-entry"
    assert said in str(problem)
    names = [each["name"] for each in report["exports"] if each["type"] == "(i32) -> i32"]
    assert all(host.call(name, [1]) for name in names)
    # Whoever says that it is a plain model all the same is told at load.
    assert said in str(failure(workshop.host, text, "plain"))


def test_a_missing_function_is_answered_with_the_closest_first(workshop: Workshop) -> None:
    host = workshop.host(model("trap_model"))
    problem = failure(host.call, "t_div", [])
    assert problem.kind == "missing-export"
    assert str(problem).startswith("it exports no function `t_div`; it exports `t_div0`, ")
    assert "`memory` is a memory, not a function" in str(failure(host.call, "memory", []))


def test_a_list_of_a_thousand_exports_is_cut(workshop: Workshop) -> None:
    host = workshop.host("(module " + "".join(f'(func (export "f{i}"))' for i in range(3000)) + ")")
    problem = failure(host.call, "g", [])
    assert "and 2980 more" in str(problem)
    assert len(str(problem)) < 1000


# --- reactors --------------------------------------------------------------------------------------------------------


def test_a_reactor_of_wasi_libc_answers(workshop: Workshop) -> None:
    assert workshop.prepare(model("wasi_reactor"))[1]["kind"] == "reactor"
    host = workshop.host(model("wasi_reactor"))
    for _ in range(100):
        assert json.loads(host.run(b"[0, 0]")) == {"n": 2, "sum": 2}


def test_initialize_runs_once_for_each_instance(workshop: Workshop) -> None:
    more = """(global $n (mut i32) (i32.const 0)) (func (export "get") (result i32) global.get $n)
      (func (export "_initialize") (global.set $n (i32.add (global.get $n) (i32.const 1))))
      (func (export "die") unreachable)"""
    assert workshop.prepare(plain(ECHO, more))[1]["kind"] == "reactor"
    host = workshop.host(plain(ECHO, more))
    host.run(b"x")
    assert host.call("get", []) == [1]
    assert failure(host.call, "die", []).kind == "trap"
    assert host.call("get", []) == [1]


def test_an_initialization_that_fails_is_told_at_load_with_what_it_said(workshop: Workshop) -> None:
    data, code = say("no luck", 2)
    text = plain(ECHO, f'{data} (func (export "_initialize") {code} unreachable)').replace(
        "(module", f"(module {FD_WRITE}"
    )
    problem = failure(workshop.host, text)
    assert (problem.kind, problem.details["stderr"]) == ("trap", "no luck")


def test_start_stands_in_for_initialize_where_the_user_says_reactor(workshop: Workshop) -> None:
    exit_ = f'(import "{WASI}" "proc_exit" (func $exit (param i32)))'
    more = """(global $n (mut i32) (i32.const 0)) (func (export "get") (result i32) global.get $n)
      (func (export "_start") (global.set $n (i32.const 3)) (call $exit (i32.const 0)))"""
    text = plain(ECHO, more).replace("(module", f"(module {exit_}")
    assert workshop.prepare(text)[1]["kind"] == "command"
    host = workshop.host(text, "reactor")
    assert host.run(b"x") == b"x"
    assert host.call("get", []) == [3]


def printing(out: str, err: str, after: str = ECHO) -> str:
    first, second = say(out, 1, 64), say(err, 2, 64 + len(out))
    return plain(first[1] + second[1] + after, first[0] + second[0]).replace("(module", f"(module {FD_WRITE}")


def test_what_a_reactor_prints_is_taken_once(workshop: Workshop) -> None:
    host = workshop.host(printing("hello ", "there"))
    assert host.run(b"x") == b"x"
    assert host.take_printed() == "hello there"
    assert host.take_printed() == ""
    for _ in range(3):
        host.run(b"x")
        assert host.take_printed() == "hello there"


def test_what_a_reactor_prints_without_end_is_cut(workshop: Workshop) -> None:
    host = workshop.host(printing("a" * 700, "b"))
    for _ in range(200):
        host.run(b"x")
    printed = host.take_printed()
    assert len(printed) < 70_000
    assert f"[{200 * 700 - 65536} more bytes were left out]" in printed
    assert printed.endswith("b" * 200)
    host.run(b"x")
    assert host.take_printed() == "a" * 700 + "b"


def test_what_a_reactor_said_before_it_trapped_goes_with_the_failure(workshop: Workshop) -> None:
    host = workshop.host(printing("out", "panicked at line 3", "unreachable"))
    problem = failure(host.run, b"x")
    assert problem.details["stderr"] == "panicked at line 3"
    assert host.take_printed() == "out"
    assert failure(host.run, b"x").details["stderr"] == "panicked at line 3"


def test_what_it_said_can_make_a_trap_an_allocation_that_failed(workshop: Workshop) -> None:
    host = workshop.host(printing("", "memory allocation of 99999999 bytes failed", "unreachable"))
    problem = failure(host.run, b"x")
    assert (problem.kind, problem.details["trap"]) == ("out-of-memory", "unreachable")


def test_a_reactor_that_exits_fails_and_says_with_what(workshop: Workshop) -> None:
    exit_ = f'(import "{WASI}" "proc_exit" (func $exit (param i32)))'
    text = plain("(call $exit (i32.load8_u (local.get $ptr))) unreachable").replace("(module", f"(module {exit_}")
    host = workshop.host(text)
    for code in (0, 7):
        problem = failure(host.run, bytes([code]))
        assert (problem.kind, problem.details["exit_code"], problem.details["stderr"]) == ("exit", code, "")


def test_an_interrupted_reactor_answers_the_next_request(workshop: Workshop) -> None:
    execute = f"""(if (i32.eq (i32.load8_u (local.get $ptr)) (i32.const 33)) (then (loop $l (br $l)))) {ECHO}"""
    host = workshop.host(plain(execute), epochs=True)
    done = threading.Event()

    def stop() -> None:
        while not done.wait(0.001):
            host.interrupt()

    thread = threading.Thread(target=stop)
    thread.start()
    try:
        problem = failure(host.run, b"!")
    finally:
        done.set()
        thread.join()
    assert problem.kind == "interrupted"
    host.interrupt()  # comes too late, and hits nobody
    assert host.run(b"x") == b"x"


# --- commands --------------------------------------------------------------------------------------------------------


def test_a_command_answers_on_standard_output(workshop: Workshop) -> None:
    host = workshop.host(model("wasi_cmd"))
    for count in (3, 1, 2):
        answer = json.loads(host.run(json.dumps({"xs": [1] * count}).encode()))
        assert (answer["n"], answer["sum"]) == (count, count)
    assert host.take_printed() == ""


@pytest.mark.parametrize("size", [0, 100, 70_000, 3_000_000])
def test_a_command_reads_all_of_a_request(workshop: Workshop, size: int) -> None:
    host = workshop.host(model("wasi_cmd"))
    assert json.loads(host.run(b" " * size))["bytes"] == size


def test_a_command_that_fails_leaves_its_code_and_its_last_words(workshop: Workshop) -> None:
    host = workshop.host(model("wasi_cmd"), args=["fail"])
    problem = failure(host.run, b"[1]")
    assert (problem.kind, problem.details["exit_code"], problem.details["stderr"]) == ("exit", 3, "model failed\n")
    assert json.loads(host.take_printed())["n"] == 1  # what would have been its answer
    assert host.take_printed() == ""


def test_a_command_that_exits_with_zero_has_succeeded(workshop: Workshop) -> None:
    out, err = say("answer", 1), say("aside", 2, 80)
    exit_ = f'(import "{WASI}" "proc_exit" (func $exit (param i32)))'
    text = f"""(module {FD_WRITE} {exit_} (memory (export "memory") 1) {out[0]} {err[0]}
      (func (export "_start") {out[1]} {err[1]} (call $exit (i32.const 0))))"""
    host = workshop.host(text)
    assert host.run(b"") == b"answer"
    assert host.take_printed() == "aside"
    assert host.take_printed() == ""


@pytest.mark.parametrize(
    ("args", "kind", "trap"),
    [
        (["trap"], "trap", "unreachable"),
        (["deep"], "stack-overflow", "out-of-bounds-memory"),
        (["mem", "100"], "exit", ""),
    ],
)
def test_a_command_fails_in_its_own_way_each_time(workshop: Workshop, args: list[str], kind: str, trap: str) -> None:
    host = workshop.host(model("wasi_work"), args=args, memory_limit=64 << 20)
    for _ in range(2):
        problem = failure(host.run, b"")
        assert (problem.kind, problem.details.get("trap", "")) == (kind, trap)
        assert problem.details["stderr"] == ""


def test_a_command_gets_its_arguments_and_only_its_own_environment(workshop: Workshop) -> None:
    # Prints the block of arguments, then that of the environment, as they lie in memory.
    sizes = "(param i32 i32) (result i32)"
    text = f"""(module {FD_WRITE}
      (import "{WASI}" "args_sizes_get" (func $as {sizes})) (import "{WASI}" "args_get" (func $ag {sizes}))
      (import "{WASI}" "environ_sizes_get" (func $es {sizes})) (import "{WASI}" "environ_get" (func $eg {sizes}))
      (memory (export "memory") 1)
      (func $out (param i32) (i32.store (i32.const 8) (i32.const 4096)) (i32.store (i32.const 12) (local.get 0))
        (drop (call $fd_write (i32.const 1) (i32.const 8) (i32.const 1) (i32.const 16))))
      (func (export "_start")
        (drop (call $as (i32.const 0) (i32.const 4))) (drop (call $ag (i32.const 2048) (i32.const 4096)))
        (call $out (i32.load (i32.const 4)))
        (drop (call $es (i32.const 0) (i32.const 4))) (drop (call $eg (i32.const 2048) (i32.const 4096)))
        (call $out (i32.load (i32.const 4)))))"""
    host = workshop.host(text, args=["-x", "ünïcode", ""], env={"NAME": "välue", "EMPTY": ""})
    assert host.run(b"").decode() == "model\0-x\0ünïcode\0\0NAME=välue\0EMPTY=\0"
    assert workshop.host(text).run(b"") == b"model\0"


def test_a_guest_has_no_files_and_no_network_but_clocks_and_random_numbers(workshop: Workshop) -> None:
    text = f"""(module
      (import "{WASI}" "fd_prestat_get" (func $prestat (param i32 i32) (result i32)))
      (import "{WASI}" "path_open" (func $open (param i32 i32 i32 i32 i32 i64 i64 i32 i32) (result i32)))
      (import "{WASI}" "sock_accept" (func $accept (param i32 i32 i32) (result i32)))
      (import "{WASI}" "random_get" (func $random (param i32 i32) (result i32)))
      (import "{WASI}" "clock_time_get" (func $clock (param i32 i64 i32) (result i32)))
      (memory (export "memory") 1) (data (i32.const 100) "/etc/passwd")
      (func (export "prestat") (param i32) (result i32) (call $prestat (local.get 0) (i32.const 0)))
      (func (export "open") (param i32) (result i32) (call $open (local.get 0) (i32.const 0) (i32.const 100)
        (i32.const 11) (i32.const 0) (i64.const 2) (i64.const 0) (i32.const 0) (i32.const 0)))
      (func (export "accept") (param i32) (result i32) (call $accept (local.get 0) (i32.const 0) (i32.const 0)))
      (func (export "random") (result i32) (call $random (i32.const 0) (i32.const 8)))
      (func (export "clock") (result i32) (call $clock (i32.const 0) (i64.const 1) (i32.const 0)))
      (func (export "seen") (result i64) (i64.load (i32.const 0))))"""
    host = workshop.host(text)
    for descriptor in range(8):
        assert host.call("prestat", [descriptor]) == [8]  # EBADF
        assert host.call("open", [descriptor]) != [0]
        assert host.call("accept", [descriptor]) != [0]
    assert host.call("random", []) == [0]
    first = host.call("seen", [])
    assert host.call("random", []) == [0]
    assert host.call("seen", []) != first
    assert host.call("clock", []) == [0]
    assert abs(host.call("seen", [])[0] / 1e9 - time.time()) < 60


def test_functions_of_a_command_can_be_called_without_starting_it(workshop: Workshop) -> None:
    text = """(module (memory (export "memory") 1) (func (export "_start") unreachable)
      (func (export "double") (param i32) (result i32) (i32.mul (local.get 0) (i32.const 2))))"""
    host = workshop.host(text)
    assert host.call("double", [21]) == [42]
    assert failure(host.call, "triple", [1]).kind == "missing-export"
    assert failure(host.run, b"").kind == "trap"


def test_a_module_without_start_is_no_command(workshop: Workshop) -> None:
    problem = failure(workshop.host, model("json_model"), "command")
    assert problem.kind == "no-entry"
    assert "`_start`" in str(problem)


FULL = """
import os, resource
from pathlib import Path
from spark_workers.hosts import command, files
files.OUTPUT_LIMIT = command.OUTPUT_LIMIT = 1 << 20
from spark_workers.hosts.failures import GuestFailed
from spark_workers.hosts.host import open_host
from spark_workers.engines.seam import Settings
for name in ("endless", "reactor"):
    host = open_host("wasmtime", "auto", os.environ[name], Settings())
    for _ in range(2):
        try:
            print(len(host.run(b"x")), len(host.take_printed()))
        except GuestFailed as problem:
            print(problem.kind, problem)
"""


def test_a_guest_that_prints_without_end_fills_no_disk_and_no_memory(tmp_path: Path) -> None:
    data, code = say("a" * 1000, 1)
    # Goes on until a write writes nothing, or fails, which leaves the count at 0 after it was set to 0.
    loop = f"(loop $l (i32.store (i32.const 16) (i32.const 0)) {code} (br_if $l (i32.load (i32.const 16))))"
    endless = f'(module {FD_WRITE} (memory (export "memory") 1) {data} (func (export "_start") {loop}))'
    reactor = plain(loop + ECHO, data).replace("(module", f"(module {FD_WRITE}")
    workshop = Workshop(tmp_path)
    paths = {"endless": workshop.prepare(endless)[0], "reactor": workshop.prepare(reactor)[0]}
    done = run_python(FULL, **paths)
    lines = done.stdout.splitlines()
    assert lines[:2] == ["bad-answer it wrote more than the 1 MiB that a command may write"] * 2, done.stderr
    assert [line.split(" ")[0] for line in lines[2:]] == ["1", "1"], done.stderr


def test_hosts_leave_no_descriptors_behind(workshop: Workshop) -> None:
    def open_descriptors() -> int:
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("descriptors are counted in /proc")
    path, _ = workshop.prepare(model("wasi_cmd"))
    open_host("wasmtime", "auto", path, Settings()).run(b"")  # what the engine opens once and keeps
    before = open_descriptors()
    for _ in range(20):
        open_host("wasmtime", "auto", path, Settings()).run(b"[1]")
    assert open_descriptors() <= before


# --- looking ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind", "entry"),
    [
        ("json_model", "plain", "execute"),
        ("wasi_reactor", "reactor", "execute"),
        ("wasi_cmd", "command", "_start"),
        ("cpu_model", "functions", ""),
    ],
)
def test_the_kind_of_a_model_is_found_by_looking(workshop: Workshop, name: str, kind: str, entry: str) -> None:
    wasm = model(name)
    _, report = workshop.prepare(wasm)
    assert (report["kind"], report["entry"], report["size"]) == (kind, entry, len(wasm))
    assert report["runs"]
    assert json.loads(json.dumps(report)) == report
    assert report["left_out"] == 0


def test_a_report_names_imports_exports_and_memory(workshop: Workshop) -> None:
    _, report = workshop.prepare(model("json_model"))
    assert report["imports"] == []
    assert {"module": "", "name": "add", "kind": "function", "type": "(f64, f64) -> f64"} in report["exports"]
    assert report["memories"] == [{"min": 2, "max": None, "imported": False}]
    assert report["has_names"] is False
    assert workshop.prepare("(module (func $named))")[1]["has_names"] is True
    _, report = workshop.prepare(model("wasi_cmd"))
    assert {each["module"] for each in report["imports"]} == {WASI}


def test_long_lists_and_names_are_cut_in_a_report(workshop: Workshop) -> None:
    functions = "".join(f'(func (export "{"n" * 3000}{i}"))' for i in range(1500))
    _, report = workshop.prepare(f"(module {functions})")
    assert len(report["exports"]) == 1000
    assert report["left_out"] == 500
    assert all(len(each["name"]) <= 200 for each in report["exports"])


@pytest.mark.parametrize(
    ("module", "name", "hint"),
    [
        ("wasi_unstable", "fd_write", "WASI of 2019"),
        ("wbg", "__wbindgen_throw", "wasm-bindgen"),
        ("./index_bg.js", "__wbg_log", "wasm-bindgen"),
        ("gojs", "runtime.wasmExit", "GOOS=wasip1"),
        ("env", "emscripten_notify_memory_growth", "-sSTANDALONE_WASM"),
        ("env", "abort", "AssemblyScript"),
        ("env", "puts", ""),
        (WASI, "fd_teleport", ""),
    ],
)
def test_an_import_that_no_host_has_is_named_with_a_hint(workshop: Workshop, module: str, name: str, hint: str) -> None:
    problem = failure(workshop.prepare, f'(module (import "{module}" "{name}" (func)) (import "x" "y" (func)))')
    assert problem.kind == "unsupported-import"
    assert f"`{module}.{name}`" in str(problem)
    assert "and 1 other like it" in str(problem)
    assert hint in str(problem)
    assert problem.details["imports"] == [f"{module}.{name}", "x.y"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "the file is empty"),
        (b"\0asm\x0d\0\1\0", "it is a component"),
        (b"  (module)", "WASM as text"),
        (b"\0asm\2\0\0\0", "WASM of version 2"),
        (b"PK\3\4", "no WASM module"),
        (b"\0asm", "no WASM module"),
        (b"\0asm\1\0\0\0\x01\xff", "cannot be compiled"),
    ],
)
def test_what_is_no_module_is_told_what_it_is(workshop: Workshop, content: bytes, said: str) -> None:
    problem = failure(workshop.prepare, content)
    assert problem.kind == "invalid-module"
    assert said in str(problem)


# --- the compile worker ----------------------------------------------------------------------------------------------


@contextmanager
def compile_worker(**environment: str) -> Iterator[tuple[Channel, "subprocess.Popen[bytes]"]]:
    ours, theirs = socket.socketpair()
    nulls = [os.open(os.devnull, os.O_RDWR) for _ in range(3)]
    numbers = (theirs.fileno(), *nulls)
    entry = "spark_workers.replicas.compiling:start"
    process = subprocess.Popen(
        [sys.executable, "-m", "spark_workers", "worker", entry, str(os.getpid()), *map(str, numbers)],
        pass_fds=set(numbers),
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        start_new_session=True,
    )
    theirs.close()
    for null in nulls:
        os.close(null)
    channel = Channel(ours)
    try:
        yield channel, process
    finally:
        channel.close()
        process.kill()
        process.wait()


def send(channel: Channel, wasm: bytes, target: Path, limits: tuple[int, int] = (0, 0), **settings: Any) -> None:
    """Send a module as the supervisor does."""
    source = target.with_suffix(".wasm")
    source.write_bytes(wasm)
    given = Settings(**settings)
    fields = {name: getattr(given, name) for name in Settings.__dataclass_fields__}
    with open(source, "rb") as module, open(target, "wb") as code:
        channel.send(Compile("wasmtime", fields, list(limits)), [module.fileno(), code.fileno()])


def test_a_compile_worker_writes_the_code_and_tells_what_it_is(tmp_path: Path) -> None:
    target = tmp_path / "code"
    with compile_worker() as (channel, process):
        send(channel, model("json_model"), target, (30, 1 << 30))
        answer, _ = channel.receive()
        assert isinstance(answer, Compiled), answer
        assert answer.report["kind"] == "plain"
        assert process.wait(20) == 0
    host = open_host("wasmtime", answer.report["kind"], str(target), Settings())
    assert json.loads(host.run(b"[4, 5]"))["sum"] == 9


@pytest.mark.parametrize(
    ("wasm", "kind"),
    [
        (b"", "invalid-module"),
        (b"\0asm\1\0\0\0" + b"\xff" * 100, "invalid-module"),
        (from_text('(module (import "env" "puts" (func)))'), "unsupported-import"),
    ],
)
def test_a_compile_worker_refuses_in_one_sentence(tmp_path: Path, wasm: bytes, kind: str) -> None:
    with compile_worker() as (channel, process):
        send(channel, wasm, tmp_path / "code")
        answer, _ = channel.receive()
        assert isinstance(answer, Refused)
        assert answer.kind == kind
        assert answer.kind in KINDS
        assert "\n" not in answer.message
        assert process.wait(20) == 0
    assert (tmp_path / "code").read_bytes() == b""


def slow_module() -> bytes:
    """A module that takes long to compile: one function of 300,000 additions."""

    def number(value: int) -> bytes:
        parts = []
        while value > 127:
            parts.append(value & 127 | 128)
            value >>= 7
        return bytes([*parts, value])

    def section(kind: int, content: bytes) -> bytes:
        return bytes([kind]) + number(len(content)) + content

    body = b"\0\x41\1" + b"\x41\1\x6a" * 300_000 + b"\x1a\x0b"
    code = b"\1" + number(len(body)) + body
    return b"\0asm\1\0\0\0" + section(1, b"\1\x60\0\0") + section(3, b"\1\0") + section(10, code)


def test_a_compile_that_takes_too_much_time_is_over_the_limit(tmp_path: Path) -> None:
    with compile_worker() as (channel, process):
        send(channel, slow_module(), tmp_path / "code", (1, 0))
        answer, _ = channel.receive()
        assert isinstance(answer, Refused)
        assert (answer.kind, "1 s of processor time" in answer.message) == ("over-limit", True)
        assert process.wait(20) == 0


def test_a_compile_that_takes_too_much_memory_ends_its_own_process_at_worst(tmp_path: Path) -> None:
    with compile_worker() as (channel, process):
        send(channel, slow_module(), tmp_path / "code", (0, 60 << 20))
        try:
            answer, _ = channel.receive()
        except EOFError:
            assert process.wait(20) != 0
        else:
            assert isinstance(answer, Refused)
            assert answer.kind == "over-limit"


@pytest.mark.parametrize("place", ["compile.begin", "compile.write"])
def test_a_compile_worker_can_be_killed_anywhere(tmp_path: Path, place: str) -> None:
    with compile_worker(SPARKRT_FAIL=f"{place}:kill") as (channel, process):
        send(channel, model("json_model"), tmp_path / "code")
        with pytest.raises(EOFError):
            channel.receive()
        assert process.wait(20) == -9


def test_a_disk_that_is_full_is_told_from_a_bad_module(tmp_path: Path) -> None:
    with compile_worker(SPARKRT_FAIL="compile.write:enospc") as (channel, _):
        send(channel, model("json_model"), tmp_path / "code")
        answer, _ = channel.receive()
        assert isinstance(answer, Refused)
        assert (answer.kind, answer.details["errno"]) == ("over-limit", 28)
        assert "No space left on device" in answer.message


def test_a_compile_worker_whose_supervisor_is_gone_ends(tmp_path: Path) -> None:
    with compile_worker() as (channel, process):
        channel.close()
        assert process.wait(20) == 0


def test_the_limit_for_files_is_set_by_hosts_that_have_files(workshop: Workshop) -> None:
    workshop.host(model("wasi_cmd"))
    soft, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    assert soft != resource.RLIM_INFINITY
