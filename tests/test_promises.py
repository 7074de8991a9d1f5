"""What is promised of models on replicas when things go wrong, each promise by its number in the list of them.

P1 a crash fails its own call only; P2 every call ends once, and in time; P3 killing who idles harms nothing; P4 nothing
runs twice unasked; P5, P6 odd deaths, and in the middle of bytes; P7 who is frozen is found; P8 cancel frees the
replica; P10 limits are never early; P14 nothing is left behind; P15 who cannot start is not forced; P17 the queue is
bounded; P18 out of memory is told; P19 busy models are not unloaded; P27 a hostile file eats nothing; P28 a broken
module breaks nothing; P29 no code from data.
"""

import ast
import contextlib
import gc
import logging
import os
import random
import re
import resource
import signal
import threading
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest
from harness import children, spark
from models_help import (
    FUSSY,
    JSON,
    MEMORY,
    REACTOR,
    SPIN,
    TRAP,
    WORK,
    is_alive,
    module,
    parent_of,
    program,
    replica_pids,
    run_program,
    serving,
    states,
    until,
    wait_computing,
    wait_in_service,
)

import spark_runtime
import spark_workers
from spark_runtime import Model, Spark
from spark_runtime.errors import (
    AnswerInvalid,
    ExecuteCancelled,
    ExecuteError,
    ExecuteTimeout,
    ModelExited,
    ModelOutOfMemory,
    ModelUnusable,
    QueueFull,
    ReplicaDied,
    SparkClosed,
    SparkError,
)
from spark_runtime.pool.loop import PoolLoop
from spark_workers.system import children as all_children

ENDLESS = "%"  # what fussy.wasm never answers
SLACK = 8.0  # the promise is a second; on a machine with other work tests wait longer before they call it broken

PACKED = """
    (i64.or (i64.shl (i64.extend_i32_u (local.get $at)) (i64.const 32)) (i64.extend_i32_u (local.get $size)))"""

SLOW_ECHO = f"""(module
  (memory (export "memory") 2)
  (func (export "alloc") (param i32) (result i32) (i32.const 1024))
  (func (export "execute") (param $at i32) (param $size i32) (result i64)
    (local $left i32)
    (local.set $left (i32.const TURNS))
    (loop $again (br_if $again (local.tee $left (i32.sub (local.get $left) (i32.const 1)))))
    {PACKED}))"""

WITNESS = f"""(module
  (import "wasi_snapshot_preview1" "fd_write" (func $write (param i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 2)
  (func (export "_initialize"))
  (func (export "alloc") (param i32) (result i32) (i32.const 1024))
  (func (export "execute") (param $at i32) (param $size i32) (result i64)
    (i32.store (i32.const 0) (local.get $at))
    (i32.store (i32.const 4) (local.get $size))
    (drop (call $write (i32.const 2) (i32.const 0) (i32.const 1) (i32.const 8)))
    {PACKED}))"""

CONSTANT = """(module
  (memory (export "memory") PAGES)
  (data (i32.const 0) "\\ff\\fe")
  (func (export "alloc") (param i32) (result i32) (i32.const 1024))
  (func (export "execute") (param i32 i32) (result i64) (i64.const ANSWER)))"""

EXIT = """(module
  (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
  (memory (export "memory") 2)
  (func (export "_initialize"))
  (func (export "alloc") (param i32) (result i32) (i32.const 1024))
  (func (export "execute") (param i32 i32) (result i64) (call $exit (i32.const CODE)) (i64.const 0)))"""

FLOOD = """(module
  (import "wasi_snapshot_preview1" "fd_write" (func $write (param i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 2)
  (data (i32.const 16) "{}")
  (func (export "_start")
    (local $left i32)
    (i32.store (i32.const 0) (i32.const 16))
    (i32.store (i32.const 4) (i32.const 2))
    (drop (call $write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 8)))
    (i32.store (i32.const 0) (i32.const 1024))
    (i32.store (i32.const 4) (i32.const 65536))
    (local.set $left (i32.const TIMES))
    (loop $again
      (drop (call $write (i32.const FD) (i32.const 0) (i32.const 1) (i32.const 8)))
      (br_if $again (local.tee $left (i32.sub (local.get $left) (i32.const 1)))))))"""


def outcome(call: "Future[Any]") -> str:
    """In what a call ended: ok, cancelled, time-out, or the name of its error."""
    try:
        call.result(0)
    except ExecuteCancelled:
        return "cancelled"
    except ExecuteTimeout:
        return "time-out"
    except (ReplicaDied, ModelUnusable, SparkClosed) as problem:
        return type(problem).__name__
    return "ok"


def outcomes(calls: "list[Future[Any]]", seconds: float = 30.0) -> Counter[str]:
    """Wait for all, and count how they ended."""
    _, late = wait(calls, seconds)
    assert not late, f"{len(late)} of {len(calls)} calls have no end"
    return Counter(map(outcome, calls))


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    """Send a signal to a process that may have ended meanwhile."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def the_nursery() -> int:
    """The one process that we have started."""
    found: list[int] = []

    def is_alone() -> bool:
        found[:] = children(os.getpid())
        return len(found) == 1

    until(is_alone)
    return found[0]


def echo_slowly(folder: Path, turns: int = 1_000_000) -> Path:
    """A model that takes about half a microsecond a thousand turns, and answers what it was asked."""
    return module(folder, f"slow{turns}", SLOW_ECHO.replace("TURNS", str(turns)))


@pytest.fixture
def chance(request: pytest.FixtureRequest) -> random.Random:
    """Chance that is the same in every run of a test."""
    return random.Random(request.node.name)


# --- P1: a crashed worker fails only its own request ------------------------------------------------------------------


def test_one_killed_replica_of_four_fails_one_call_of_a_thousand() -> None:
    with Spark([Model("fussy", FUSSY, replicas=4)], timeout=60) as spark:
        spark.load()
        wait_in_service(spark, 4)
        stuck = spark.submit(ENDLESS)
        pid = wait_computing(spark)
        others = [spark.submit(number) for number in range(999)]
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(ReplicaDied, match=r"model 'fussy', replica \d: .*SIGKILL"):
            stuck.result(20)
        assert [each.result(20) for each in others] == list(range(999))
        assert list(spark.map("fussy", range(1000))) == list(range(1000))
        assert pid not in wait_in_service(spark, 4)


def kill_now_and_then(folder: Path, chance: random.Random, rounds: int) -> None:
    with Spark([Model("slow", echo_slowly(folder, 400_000), replicas=4)], timeout=60) as spark:
        spark.load()
        wait_in_service(spark, 4)
        for _ in range(rounds):
            calls = [spark.submit(number) for number in range(1000)]
            time.sleep(chance.uniform(0, 0.02))  # no outcome hangs on it: a moment is as good as another
            victims = chance.sample(sorted(serving(spark)), k=1)
            for pid in victims:
                kill(pid)
            ended = outcomes(list(calls))
            assert ended["ReplicaDied"] <= len(victims)
            assert ended["ok"] + ended["ReplicaDied"] == 1000
            right = [number for number, call in enumerate(calls) if call.exception() is None]
            assert [calls[number].result() for number in right] == right


def test_a_kill_at_any_moment_fails_one_call_at_most(tmp_path: Path, chance: random.Random) -> None:
    kill_now_and_then(tmp_path, chance, 5)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_hundred_kills_at_any_moment_fail_one_call_each_at_most(tmp_path: Path, chance: random.Random) -> None:
    kill_now_and_then(tmp_path, chance, 100)


# --- P2: every request ends in exactly one way, by deadline + 1 s -----------------------------------------------------

FAULTS = ("kill", "exit", "error", "stop", "sleep")
MOMENTS = ("replica.load", "replica.begin", "replica.answer", "compile.begin", "compile.write")


def every_call_ends_once(folder: Path, monkeypatch: pytest.MonkeyPatch, points: str) -> Counter[str]:
    monkeypatch.setenv("SPARKRT_FAIL", points)
    ends: list[int] = []
    with Spark([Model("fussy", FUSSY, replicas=2)], timeout=3, cache_dir=folder) as spark:
        calls = [spark.submit(number) for number in range(12)]
        calls += [spark.submit(ENDLESS, timeout=1), spark.submit("waits", timeout=0.5), spark.submit("cancelled")]
        for number, call in enumerate(calls):
            call.add_done_callback(lambda _, number=number: ends.append(number))
        calls[-1].cancel()
        ended = outcomes(list(calls), 3 + SLACK)
        assert sorted(ends) == list(range(len(calls)))
        for number in range(12):
            assert calls[number].exception() is not None or calls[number].result() == number
        assert calls[-1].cancelled()
        until(lambda: (spark.statistics().waiting, spark.statistics().running) == (0, 0))
        spark.close()
    assert sorted(ends) == list(range(len(calls)))
    return ended


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("moment", MOMENTS)
def test_every_call_ends_once_and_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, fault: str
) -> None:
    every_call_ends_once(tmp_path, monkeypatch, f"{moment}:{fault}")


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("moment", ["replica.begin@3", "replica.answer@2", "replica.answer@5"])
def test_every_call_ends_once_when_some_were_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, fault: str
) -> None:
    ended = every_call_ends_once(tmp_path, monkeypatch, f"{moment}:{fault}")
    assert ended["ok"] > 0


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("first", ["replica.begin@2", "replica.answer@3"])
@pytest.mark.parametrize("second", ["replica.begin@4", "replica.answer@6", "replica.load@2"])
def test_two_faults_at_once_leave_every_call_with_one_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str, second: str
) -> None:
    for one in FAULTS:
        for other in FAULTS:
            every_call_ends_once(tmp_path, monkeypatch, f"{first}:{one},{second}:{other}")


def test_a_program_without_descriptors_gets_errors_and_goes_on_when_it_has_some() -> None:
    done = run_program("""
        import resource
        with Spark([Model("json", JSON, entry="echo"), Model("fussy", FUSSY)], timeout=2) as spark:
            assert spark.execute(1, "json") == 1
            spark.execute(1, "fussy")  # compiled, whoever ran before
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        with Spark([Model("json", JSON, entry="echo"), Model("fussy", FUSSY)], timeout=2) as spark:
            assert spark.execute(1, "json") == 1
            used = max(map(int, os.listdir("/proc/self/fd")))
            resource.setrlimit(resource.RLIMIT_NOFILE, (used + 1, hard))
            try:
                spark.execute(1, "fussy")
            except Exception as problem:
                kind = type(problem).__name__
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            assert spark.execute(2, "json") == 2
            def works():
                try:
                    return spark.execute(3, "fussy") == 3
                except Exception:
                    return False
            until(works, 20)
            print(kind)
            spark.close()
    """)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in ("ExecuteTimeout", "ModelUnusable", "SparkError"), done.stderr


def test_a_callback_that_wants_to_exit_keeps_nobody_elses_answer_back(caplog: pytest.LogCaptureFixture) -> None:
    def leave(call: "Future[Any]") -> None:
        raise SystemExit(1)

    with Spark([Model("fussy", FUSSY)], timeout=20) as spark:
        calls = [spark.submit(number) for number in range(200)]
        for call in calls[::10]:
            call.add_done_callback(leave)
        assert [call.result(20) for call in calls] == list(range(200))
    assert any("callback" in record.message for record in caplog.records)


def test_posts_from_many_threads_all_wake_the_loop() -> None:
    loop = PoolLoop()
    loop.start()

    def post(count: int) -> None:
        for _ in range(count):
            ran = threading.Event()
            loop.post(ran.set)
            assert ran.wait(10), "a callback that was posted never ran"

    try:
        with ThreadPoolExecutor(4) as threads:
            for each in [threads.submit(post, 5000) for _ in range(4)]:
                each.result(50)
    finally:
        loop.close()


def test_a_loop_that_has_ended_writes_to_nobodys_file() -> None:
    before = set(os.listdir("/proc/self/fd"))
    loop = PoolLoop()
    loop.start()
    loop.close()
    read_end, write_end = os.pipe()  # with the numbers that the loop's own had
    others = [os.dup(write_end) for _ in range(8)]
    try:
        loop.post(lambda: None)
        os.set_blocking(read_end, False)
        with pytest.raises(BlockingIOError):
            os.read(read_end, 1)
    finally:
        for each in (read_end, write_end, *others):
            os.close(each)
    assert set(os.listdir("/proc/self/fd")) == before


# --- P3: killing an idle worker harms nothing -------------------------------------------------------------------------


def kill_who_idles(rounds: int) -> None:
    with Spark([Model("fussy", FUSSY, replicas=4)], timeout=30) as spark:
        spark.load()
        for number in range(rounds):
            for pid in wait_in_service(spark, 4)[: 1 + number % 4]:
                kill(pid)
            calls = [spark.submit([number, each]) for each in range(number % 7)]
            assert [call.result(20) for call in calls] == [[number, each] for each in range(number % 7)]
        assert spark.statistics().failures == 0


def test_killing_who_idles_harms_nothing() -> None:
    kill_who_idles(15)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_killing_who_idles_a_hundred_times_harms_nothing() -> None:
    kill_who_idles(100)


def test_killing_the_spare_harms_nothing() -> None:
    with Spark([Model("fussy", FUSSY)], timeout=30) as spark:
        call = spark.submit(ENDLESS)
        wait_computing(spark)
        call.cancel()  # from now on there is a spare

        def spares() -> list[int]:
            replicas = spark.statistics().models[0].replicas
            return [each.pid for each in replicas if each.state == "spare" and each.pid is not None]

        killed: set[int] = set()
        for number in range(10):
            until(lambda: bool(set(spares()) - killed))
            killed.update(spares())
            for pid in killed:
                kill(pid)
            assert spark.execute(number) == number
        assert spark.statistics().failures == 0


def test_killing_the_nursery_while_nobody_calls_harms_nothing() -> None:
    with Spark([Model("fussy", FUSSY, replicas=2)], timeout=30) as spark:
        spark.load()
        for number in range(5):
            pids = wait_in_service(spark, 2)
            kill(the_nursery())
            assert spark.execute(number) == number  # perhaps by one that does not know yet that it has to end
            until(lambda pids=pids: not set(pids) & set(serving(spark)))
        assert spark.statistics().failures == 0


# --- P4: never run twice unless asked ---------------------------------------------------------------------------------


def test_no_call_runs_twice_whatever_dies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SPARKRT_FAIL", "replica.answer@20:kill")  # after the guest's own words are on their way
    caplog.set_level(logging.INFO, "spark_runtime")
    with Spark([Model("witness", module(tmp_path, "witness", WITNESS), replicas=2)], timeout=30) as spark:
        calls = [spark.submit(f"<{number}>") for number in range(300)]
        ended = outcomes(list(calls))
    runs = Counter(re.findall(r"<\d+>", "".join(record.getMessage() for record in caplog.records)))
    assert set(runs) == {f"<{number}>" for number in range(300)}
    assert set(runs.values()) == {1}
    assert ended["ReplicaDied"] >= 300 // 20 - 2
    assert ended["ok"] == 300 - ended["ReplicaDied"]


@pytest.mark.parametrize(("retries", "runs"), [(0, 1), (1, 2)])
def test_a_call_that_ends_its_process_runs_as_often_as_was_asked(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], retries: int, runs: int
) -> None:
    monkeypatch.setenv("SPARKRT_FAIL", "replica.begin:error")  # each run leaves its mark on standard error
    with Spark([Model("fussy", FUSSY, retries=retries)], timeout=30) as spark:
        with pytest.raises(ReplicaDied, match="ended while it was at this call"):
            spark.execute("poison")
        wait_in_service(spark, 1)
    assert capfd.readouterr().err.count("FailpointHit: replica.begin") == runs


def test_a_retried_call_takes_others_along_only_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARKRT_FAIL", "replica.begin@30:kill")
    with Spark([Model("fussy", FUSSY, replicas=2, retries=1)], timeout=30) as spark:
        calls = [spark.submit(number) for number in range(500)]
        assert [call.result(30) for call in calls] == list(range(500))


# --- P5: odd deaths, odd answers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["SIGKILL", "SIGSEGV", "SIGABRT", "SIGBUS", "SIGFPE", "SIGILL", "SIGTERM", "SIGHUP"])
def test_death_by_any_signal_is_local_and_named(how: str) -> None:
    with Spark([Model("fussy", FUSSY), Model("json", JSON)], timeout=30) as spark:
        spark.execute({"xs": []}, "json")
        bystander = replica_pids(spark)
        stuck = spark.submit(ENDLESS, "fussy")
        pid = wait_computing(spark)
        behind = [spark.submit(number, "fussy") for number in range(20)]
        while is_alive(pid):  # engines of WASM take the first SIGSEGV, SIGFPE or SIGILL for a fault of the guest's
            kill(pid, signal.Signals[how])
        with pytest.raises(ReplicaDied, match=how):
            stuck.result(20)
        assert [call.result(20) for call in behind] == list(range(20))
        assert set(bystander) <= set(serving(spark))


@pytest.mark.parametrize("moment", ["replica.begin", "replica.answer"])
def test_a_process_that_just_ends_is_told_with_its_exit_code(monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    monkeypatch.setenv("SPARKRT_FAIL", f"{moment}@2:exit")
    with Spark([Model("fussy", FUSSY)], timeout=30) as spark:
        assert spark.execute(1) == 1
        with pytest.raises(ReplicaDied, match="exit code 1"):
            spark.execute(2)
        assert spark.execute(3) == 3


GIB = 1 << 30
ODD = {
    "a pointer outside": (CONSTANT, {"PAGES": "2", "ANSWER": str((0xFFFFFFF0 << 32 | 16) - (1 << 64))}, AnswerInvalid),
    "a length beyond the end": (CONSTANT, {"PAGES": "2", "ANSWER": "0x00000010ffffffff"}, AnswerInvalid),
    "too long an answer": (CONSTANT, {"PAGES": "1100", "ANSWER": str(70 << 20)}, AnswerInvalid),
    "not UTF-8": (CONSTANT, {"PAGES": "2", "ANSWER": "2"}, AnswerInvalid),
    "nothing": (CONSTANT, {"PAGES": "2", "ANSWER": "0"}, AnswerInvalid),
    "zeros": (CONSTANT, {"PAGES": "2", "ANSWER": "0x0000001000000010"}, AnswerInvalid),
    "exit with 0": (EXIT, {"CODE": "0"}, ExecuteError),
    "exit with 7": (EXIT, {"CODE": "7"}, ModelExited),
    "exit with -1": (EXIT, {"CODE": "-1"}, ExecuteError),
    "128 MiB of output": (FLOOD, {"FD": "1", "TIMES": "2000"}, AnswerInvalid),
    "2 GiB of output": (FLOOD, {"FD": "1", "TIMES": "32768"}, AnswerInvalid),
    "2 GiB of errors": (FLOOD, {"FD": "2", "TIMES": "32768"}, AnswerInvalid),
}


@pytest.mark.parametrize("what", ODD)
def test_an_odd_answer_is_one_error_and_the_replica_goes_on(tmp_path: Path, what: str) -> None:
    text, values, error = ODD[what]
    for name, value in values.items():
        text = text.replace(name, value)
    models = [Model("odd", module(tmp_path, "odd", text)), Model("json", JSON, entry="echo")]
    with Spark(models, timeout=40) as spark:
        spark.load("odd")
        pids = wait_in_service(spark, 1)
        for _ in range(2):
            with pytest.raises(error, match="model 'odd', replica 1") as caught:
                spark.execute({"a": 1}, "odd")
            assert not isinstance(caught.value, ReplicaDied | ExecuteTimeout)
            assert len(str(caught.value)) < 2000
        assert list(serving(spark)) == pids
        assert spark.execute([2], "json") == [2]


def test_a_flood_of_errors_beside_an_answer_harms_nothing(tmp_path: Path) -> None:
    flood = module(tmp_path, "flood", FLOOD.replace("FD", "2").replace("TIMES", "2000"))
    with Spark([Model("flood", flood)], timeout=40) as spark:
        assert [spark.execute(None) for _ in range(3)] == [{}, {}, {}]


def test_a_flood_without_end_is_stopped_by_its_time_limit(tmp_path: Path) -> None:
    flood = module(tmp_path, "flood", FLOOD.replace("FD", "2").replace("TIMES", "0"))
    with Spark([Model("flood", flood), Model("json", JSON, entry="echo")], timeout=2) as spark:
        spark.execute(1, "json")
        with pytest.raises((ExecuteTimeout, AnswerInvalid)):
            spark.execute(None, "flood")
        assert spark.execute(2, "json") == 2


def test_what_a_guest_says_cannot_steer_the_terminal_that_shows_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "spark_runtime")
    with Spark([Model("witness", module(tmp_path, "witness", WITNESS))], timeout=30) as spark:
        spark.execute(b"\x1b[31mred\x9b\x07")
    said = [record.getMessage() for record in caplog.records if "red" in record.getMessage()]
    assert said
    assert "\x1b" not in said[0]
    assert "\x07" not in said[0]


# --- P6: death in the middle of a large request or answer -------------------------------------------------------------

LARGE = bytes(range(256)) * (60 << 12)  # 60 MiB


def die_in_the_middle(chance: random.Random, rounds: int) -> None:
    models = [Model("echo", JSON, entry="echo", replicas=2)]
    with Spark(models, timeout=50) as spark:
        spark.load()
        for number in range(rounds):
            wait_in_service(spark, 2)
            large = spark.submit(LARGE)
            small = [spark.submit(each) for each in range(50)]
            time.sleep(chance.uniform(0, 0.3))  # no outcome hangs on it: a moment is as good as another
            victim = chance.choice(sorted(serving(spark)) or [0])
            if victim:
                kill(victim)
            ended = outcomes([large, *small], 40)
            assert ended["ReplicaDied"] <= 1
            assert ended["ok"] + ended["ReplicaDied"] == 51
            assert large.exception() is not None or large.result() == LARGE
            assert all(call.exception() is not None or call.result() == each for each, call in enumerate(small))
            assert spark.execute(number) == number


def test_death_in_the_middle_of_a_large_message_is_local(chance: random.Random) -> None:
    die_in_the_middle(chance, 6)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_death_in_the_middle_of_a_large_message_is_local_whenever_it_comes(chance: random.Random) -> None:
    die_in_the_middle(chance, 160)


@pytest.mark.parametrize("moment", ["replica.begin@2", "replica.answer@2"])
def test_death_right_after_a_large_request_or_right_before_its_answer(
    monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    monkeypatch.setenv("SPARKRT_FAIL", f"{moment}:kill")
    with Spark([Model("echo", JSON, entry="echo")], timeout=50) as spark:
        assert spark.execute(1) == 1
        with pytest.raises(ReplicaDied):
            spark.execute(LARGE)
        assert spark.execute(LARGE) == LARGE


def test_cancelling_in_the_middle_of_a_large_message_frees_the_replica(chance: random.Random) -> None:
    with Spark([Model("echo", JSON, entry="echo")], timeout=50) as spark:
        for number in range(8):
            large = spark.submit(LARGE)
            time.sleep(chance.uniform(0, 0.2))  # no outcome hangs on it: a moment is as good as another
            large.cancel()
            assert outcome_is(large, LARGE)
            assert spark.execute(number) == number


def outcome_is(call: "Future[Any]", answer: Any) -> bool:
    """Tell whether a call is cancelled, or done with this answer."""
    return call.cancelled() or call.result(20) == answer


# --- P7: a frozen worker is found without the caller's help -----------------------------------------------------------


def test_a_replica_that_is_stopped_while_it_idles_is_replaced() -> None:
    with Spark([Model("fussy", FUSSY, replicas=2)], timeout=30) as spark:
        spark.load()
        frozen = wait_in_service(spark, 2)[0]
        os.kill(frozen, signal.SIGSTOP)
        until(lambda: frozen not in serving(spark))
        assert frozen not in wait_in_service(spark, 2)
        assert not is_alive(frozen)


def test_a_replica_that_is_stopped_at_a_call_fails_that_call_only() -> None:
    with Spark([Model("fussy", FUSSY, replicas=2)], timeout=None) as spark:
        stuck = spark.submit(ENDLESS)
        os.kill(wait_computing(spark), signal.SIGSTOP)
        with pytest.raises(ReplicaDied, match="stopped by a signal"):
            stuck.result(20)
        assert list(spark.map("fussy", range(100))) == list(range(100))


def test_a_replica_that_is_stopped_and_goes_on_keeps_its_call() -> None:
    with Spark([Model("fussy", FUSSY)], timeout=50) as spark:
        call = spark.submit("#3")
        pid = wait_computing(spark)
        os.kill(pid, signal.SIGSTOP)
        os.kill(pid, signal.SIGCONT)
        assert call.result(45) == "#3"
        assert list(serving(spark)) == [pid]


def test_a_slow_healthy_replica_is_left_alone() -> None:
    with Spark([Model("work", WORK, args=["sleep", "3"], kind="command")], timeout=None) as spark:
        spark.load()
        pids = wait_in_service(spark, 1)
        assert spark.execute(b"") == b"slept\n"
        assert list(serving(spark)) == pids


def test_a_nursery_that_is_stopped_delays_and_harms_nothing() -> None:
    with Spark([Model("fussy", FUSSY)], timeout=30) as spark:
        call = spark.submit(ENDLESS)
        pid = wait_computing(spark)
        os.kill(parent_of(pid), signal.SIGSTOP)
        call.cancel()
        assert spark.execute(2) == 2
        until(lambda: not is_alive(pid))


def test_a_compile_worker_that_is_stopped_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARKRT_FAIL", "compile.begin:stop")
    with Spark([Model("fussy", FUSSY)], timeout=None, cache_dir=tmp_path) as spark:
        with pytest.raises(ModelUnusable, match="model 'fussy'"):
            spark.submit(1).result(20)
        spark.close()


# --- P8: cancel really frees the replica ------------------------------------------------------------------------------


@pytest.mark.parametrize("interrupt", ["kill", "epoch"])
def test_two_hundred_cancels_in_a_row_leave_every_replica_in_service(interrupt: str) -> None:
    with Spark([Model("fussy", FUSSY, replicas=2, interrupt=interrupt)], timeout=50) as spark:
        spark.load()
        wait_in_service(spark, 2)
        for number in range(200):
            call = spark.submit(ENDLESS)
            until(call.running)
            assert call.cancel()
            if number % 20 == 0:
                assert spark.execute(number) == number
        wait_in_service(spark, 2)
        assert list(spark.map("fussy", range(100))) == list(range(100))


@pytest.mark.parametrize("interrupt", ["kill", "epoch"])
def test_a_call_sent_ahead_is_stopped_whenever_the_cancel_comes(interrupt: str, chance: random.Random) -> None:
    with Spark([Model("spin", SPIN, interrupt=interrupt)], timeout=50) as spark:
        for _ in range(50):
            spark.call("spin", "spin_bounded", 1)  # the model is known to be quick, so calls are sent ahead
        for _ in range(150):
            quick = spark.submit_call("spin", "spin_bounded", 1)
            stuck = spark.submit_call("spin", "spin")
            moment = time.perf_counter() + chance.uniform(0, 0.0004)
            while time.perf_counter() < moment:
                pass  # nobody reads answers meanwhile: the replica may be further than we know
            assert stuck.cancel()
            assert isinstance(quick.result(20), int)
            assert isinstance(spark.submit_call("spin", "spin_bounded", 1).result(20), int)


def test_what_an_epoch_does_not_stop_is_killed() -> None:
    model = Model("work", WORK, args=["sleep", "1000"], kind="command", interrupt="epoch")
    with Spark([model], timeout=None) as spark:
        spark.load()
        seen = set(wait_in_service(spark, 1))
        for number in range(20):
            call = spark.submit(b"")
            until(lambda: "busy" in serving(spark).values())
            time.sleep(0.02 * number)  # it may not have begun yet, and is not killed then
            assert call.cancel()
            seen.update(wait_in_service(spark, 1))
            if len(seen) > 1:
                break
        assert len(seen) > 1


def test_cancels_from_eight_threads_while_answers_arrive(tmp_path: Path, chance: random.Random) -> None:
    seeds = [chance.random() for _ in range(8)]
    with Spark([Model("slow", echo_slowly(tmp_path, 300_000), replicas=3)], timeout=50) as spark:

        def storm(seed: float) -> int:
            own = random.Random(seed)
            calls = [spark.submit([seed, number]) for number in range(100)]
            for number in own.sample(range(100), 60):
                calls[number].cancel()
                if own.random() < 0.2:
                    spark.execute(number)
            ended = outcomes(list(calls), 45)
            assert ended["ok"] + ended["cancelled"] == 100
            assert all(call.cancelled() or call.result() == [seed, number] for number, call in enumerate(calls))
            return ended["cancelled"]

        with ThreadPoolExecutor(8) as threads:
            assert sum(threads.map(storm, seeds)) > 0
        wait_in_service(spark, 3)
        assert list(spark.map("slow", range(100))) == list(range(100))


def test_one_call_cancelled_by_many_threads_ends_once() -> None:
    with Spark([Model("fussy", FUSSY)], timeout=50) as spark, ThreadPoolExecutor(8) as threads:
        for number in range(20):
            call = spark.submit(ENDLESS)
            ends: list[int] = []
            call.add_done_callback(lambda _, ends=ends: ends.append(1))
            barrier = threading.Barrier(8)

            def cancel(call: "Future[Any]" = call, barrier: threading.Barrier = barrier) -> None:
                barrier.wait(10)
                call.cancel()

            for each in [threads.submit(cancel) for _ in range(8)]:
                each.result(20)
            assert call.cancelled()
            assert ends == [1]
            assert spark.execute(number) == number


# --- P10: limits ------------------------------------------------------------------------------------------------------


def test_twenty_limits_at_once_all_hold_and_none_early() -> None:
    ended: dict[int, float] = {}
    with Spark([Model("fussy", FUSSY, replicas=2)], timeout=None) as spark:
        spark.load()
        wait_in_service(spark, 2)
        limits = [0.05 + 0.05 * (number * 7 % 20) for number in range(20)]
        calls = []
        for number, limit in enumerate(limits):
            begun = time.monotonic()
            calls.append(spark.submit(ENDLESS, timeout=limit))
            calls[-1].add_done_callback(
                lambda _, number=number, begun=begun: ended.__setitem__(number, time.monotonic() - begun)
            )
        assert outcomes(list(calls), 2 + SLACK) == {"time-out": 20}
        early = {number: seconds for number, seconds in ended.items() if seconds < limits[number]}
        assert not early
        wait_in_service(spark, 2)
        assert spark.execute(1) == 1


def test_a_limit_that_comes_with_the_answer_ends_the_call_once(tmp_path: Path, chance: random.Random) -> None:
    with Spark([Model("slow", echo_slowly(tmp_path, 4_000_000), replicas=2)], timeout=50) as spark:
        spark.load()
        wait_in_service(spark, 2)
        begun = time.monotonic()
        spark.execute(0)
        usual = time.monotonic() - begun
        calls = []
        for number in range(100):
            calls.append(spark.submit(number, timeout=usual * chance.uniform(0.7, 1.3)))
            wait([calls[-1]], 20)
        ended = outcomes(list(calls))
        assert ended["ok"] + ended["time-out"] == 100
        assert all(outcome(call) == "time-out" or call.result() == number for number, call in enumerate(calls))
        wait_in_service(spark, 2)


# --- P14: nothing is left behind --------------------------------------------------------------------------------------


def left_behind(spark: Spark) -> tuple[int, int, int]:
    """Our descriptors and threads, and the zombies below us."""
    gc.collect()
    ours = all_children(os.getpid())
    zombies = [pid for parent in [os.getpid(), *ours] for pid in all_children(parent) if not is_alive(pid)]
    return len(os.listdir("/proc/self/fd")), threading.active_count(), len(zombies)


def crash(rounds: int) -> None:
    with Spark([Model("fussy", FUSSY, replicas=2)], timeout=50) as spark:
        spark.load()
        wait_in_service(spark, 2)
        before = left_behind(spark)
        for number in range(rounds):
            call = spark.submit(ENDLESS)
            until(lambda: "busy" in serving(spark).values())
            pid = next(pid for pid, state in serving(spark).items() if state == "busy")
            kill(pid)
            call.cancel()  # it may have died, or been given back before it began
            assert spark.execute(number) == number
        wait_in_service(spark, 2)
        nursery = the_nursery()
        until(lambda: len(children(nursery)) <= 3)  # two that serve, one that stands by
        until(lambda: left_behind(spark)[1:] == (before[1], 0))
        until(lambda: left_behind(spark)[0] <= before[0] + 6)  # those of the one that stands by


def test_sixty_crashes_leave_no_descriptor_thread_or_zombie() -> None:
    crash(60)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_thousand_crashes_leave_no_descriptor_thread_or_zombie() -> None:
    crash(1000)


def test_lost_nurseries_leave_no_zombie_and_no_warning() -> None:
    with Spark([Model("fussy", FUSSY)], timeout=50) as spark:
        spark.execute(0)
        before = left_behind(spark)
        for number in range(8):
            pids = wait_in_service(spark, 1)
            kill(the_nursery())
            assert spark.execute(number) == number
            until(lambda pids=pids: not set(pids) & set(serving(spark)))
        until(lambda: left_behind(spark) == before)


def test_sparks_opened_and_closed_quickly_leave_nothing(tmp_path: Path, chance: random.Random) -> None:
    with Spark([Model("fussy", FUSSY)]) as spark:
        spark.execute(1)
    del spark
    gc.collect()
    before = len(os.listdir("/proc/self/fd")), threading.active_count()
    calls: list[Future[Any]] = []
    for number in range(50):
        # With a cache of its own, every third is closed while its model is compiled, or read, or started.
        cache = tmp_path / str(number) if number % 3 == 0 else None
        spark = Spark([Model("fussy", FUSSY, replicas=2)], cache_dir=cache)
        if number % 5:
            calls += [spark.submit(each) for each in range(number % 4)]
        if number % 2:
            time.sleep(chance.uniform(0, 0.1))  # no outcome hangs on it: a moment is as good as another
        spark.close()
    ended = outcomes(calls)
    assert ended["ok"] + ended["SparkClosed"] == len(calls)
    del spark, calls  # a Spark that somebody knows keeps the lock on its machine code
    gc.collect()
    until(lambda: (len(os.listdir("/proc/self/fd")), threading.active_count()) == before)
    until(lambda: not all_children(os.getpid()))


def test_closing_with_a_thousand_calls_in_flight_ends_each_once() -> None:
    ends: list[int] = []
    spark = Spark([Model("fussy", FUSSY, replicas=2), Model("json", JSON, entry="echo")], timeout=None)
    spark.load()
    wait_in_service(spark, 3)
    calls = [spark.submit(number, ("fussy", "json")[number % 2]) for number in range(998)]
    calls += [spark.submit(ENDLESS, "fussy") for _ in range(2)]
    for number, call in enumerate(calls):
        call.add_done_callback(lambda _, number=number: ends.append(number))
    pids = replica_pids(spark)
    spark.close()
    ended = outcomes(list(calls), 0)
    assert ended["ok"] + ended["SparkClosed"] == 1000
    assert sorted(ends) == list(range(1000))
    until(lambda: not any(map(is_alive, pids)))
    with pytest.raises(SparkClosed):
        spark.submit(1, "json")


def test_closing_while_others_submit_and_cancel_ends_every_call() -> None:
    spark = Spark([Model("fussy", FUSSY, replicas=2)], timeout=None)
    spark.execute(0)
    calls: list[Future[Any]] = []

    def submit() -> None:
        with contextlib.suppress(SparkClosed):
            while True:
                call = spark.submit(len(calls))
                calls.append(call)
                if len(calls) % 3 == 0:
                    call.cancel()
                wait([call], 5 if len(calls) % 5 == 0 else 0)

    with ThreadPoolExecutor(4) as threads:
        submitting = [threads.submit(submit) for _ in range(4)]
        until(lambda: len(calls) > 200)
        spark.close()
        for each in submitting:
            each.result(30)
    ended = outcomes(calls)
    assert ended["ok"] + ended["SparkClosed"] + ended["cancelled"] == len(calls)


def test_a_callback_may_close_the_spark() -> None:
    spark = Spark([Model("fussy", FUSSY)], timeout=30)
    closed = threading.Event()

    def close(call: "Future[Any]") -> None:
        spark.close()
        closed.set()

    first = spark.submit(1)
    others = [spark.submit(number) for number in range(50)]
    pids = replica_pids(spark)
    first.add_done_callback(close)
    assert closed.wait(30)
    ended = outcomes(list(others))
    assert ended["ok"] + ended["SparkClosed"] == 50
    until(lambda: not any(map(is_alive, pids)))
    until(lambda: not any(thread.name == "spark-pool" for thread in threading.enumerate()))


def test_a_spark_in_a_circle_is_closed_wherever_the_collector_finds_it() -> None:
    done = run_program("""
        import gc
        class Holder:
            pass
        def once():
            holder = Holder()
            holder.spark = Spark([Model("fussy", FUSSY, replicas=2)], timeout=None)
            holder.me = holder
            calls = [holder.spark.submit(number) for number in range(300)]
            calls[50].result(20)
            return calls[-1]
        gc.set_threshold(3)
        for _ in range(30):
            last = once()
            try:
                last.result(20)
            except Exception as problem:
                assert type(problem).__name__ == "SparkClosed", problem
        gc.collect()
        print("done")
    """)
    assert done.stdout == "done\n", done.stderr


# --- P15: a worker that cannot start ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("fault", "cause"), [("exit", "exit code 1"), ("kill", "SIGKILL"), ("error", "exit code 1")])
def test_a_model_whose_processes_cannot_start_is_told_with_the_cause(
    monkeypatch: pytest.MonkeyPatch, fault: str, cause: str
) -> None:
    monkeypatch.setenv("SPARKRT_FAIL", f"replica.load:{fault}")
    with Spark([Model("fussy", FUSSY, replicas=3), Model("json", JSON)], timeout=30) as spark:
        calls = [spark.submit(number, "fussy") for number in range(20)]
        assert outcomes(list(calls)) == {"ModelUnusable": 20}
        with pytest.raises(ModelUnusable, match=f"model 'fussy': its process ends before it can take a call.*{cause}"):
            calls[0].result()


def test_a_model_whose_processes_cannot_start_is_not_tried_all_the_time() -> None:
    done = run_program(
        """
        with Spark([Model("fussy", FUSSY)], timeout=5) as spark:
            limit = time.monotonic() + 5
            while time.monotonic() < limit:
                try:
                    spark.execute(1)
                except Exception as problem:
                    assert type(problem).__name__ == "ModelUnusable", problem
        """,
        SPARKRT_FAIL="replica.load:error",
    )
    assert done.returncode == 0, done.stderr
    starts = done.stderr.count("FailpointHit: replica.load")
    assert 1 <= starts <= 6, f"{starts} starts in five seconds, and six in a minute are promised"


def test_a_nursery_that_cannot_start_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "msgpack.py").write_text("raise ImportError('broken on purpose')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with Spark([Model("fussy", FUSSY)], timeout=20) as spark:
        with pytest.raises(SparkError, match="spark doctor") as caught:
            spark.execute(1)
        assert not isinstance(caught.value, ExecuteTimeout)


# --- P17: the queue is bounded ----------------------------------------------------------------------------------------


def test_a_hundred_thousand_submits_do_not_fill_the_memory() -> None:
    done = run_program("""
        from spark_runtime.errors import QueueFull
        def resident():
            with open("/proc/self/statm") as file:
                return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        with Spark([Model("fussy", FUSSY)], timeout=None) as spark:
            spark.execute(0)
            stuck = spark.submit("%")
            accepted, refused = [], 0
            for number in range(100_000):
                if number == 12_000:
                    before = resident()
                try:
                    accepted.append(spark.submit(number))
                except QueueFull:
                    refused += 1
            grown = resident() - before
            stuck.cancel()
            assert [each.result(40) for each in accepted] == list(range(len(accepted)))
            print(len(accepted), refused, grown)
    """)
    assert done.returncode == 0, done.stderr
    accepted, refused, grown = map(int, done.stdout.split())
    assert 10_000 <= accepted < 10_100
    assert accepted + refused == 100_000
    assert grown < 16 << 20


def test_a_hundred_thousand_calls_that_were_cancelled_leave_no_memory() -> None:
    done = run_program("""
        def resident():
            with open("/proc/self/statm") as file:
                return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        with Spark([Model("fussy", FUSSY)], timeout=60) as spark:
            spark.execute(0)
            stuck = spark.submit("%")
            for number in range(100_000):
                if number == 20_000:
                    before = resident()
                assert spark.submit(number).cancel()
            print(resident() - before)
            spark.close()
    """)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 16 << 20


def test_the_bound_is_for_all_models_together() -> None:
    models = [Model(f"m{number}", FUSSY) for number in range(5)]
    with Spark(models, max_waiting=20, timeout=30) as spark:
        stuck = [spark.submit(ENDLESS, model.name) for model in models]
        until(lambda: states(spark) == ["busy"] * 5)
        accepted = [spark.submit(number, models[number % 5].name) for number in range(20)]
        for model in models:
            with pytest.raises(QueueFull, match="20"):
                spark.submit(20, model.name)
        for call in stuck:
            call.cancel()
        assert [call.result(20) for call in accepted] == list(range(20))


def test_map_holds_a_window_of_a_hundred_thousand_rows() -> None:
    done = run_program("""
        def resident():
            with open("/proc/self/statm") as file:
                return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        with Spark([Model("json", JSON, entry="echo", replicas=2)], timeout=60) as spark:
            answers = spark.map("json", ("x" * 200 + str(number) for number in range(100_000)))
            for _ in range(20_000):
                next(answers)
            before = resident()
            assert sum(1 for _ in answers) == 80_000
            print(resident() - before)
    """)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 16 << 20


# --- P18: out of memory -----------------------------------------------------------------------------------------------


def test_a_guest_that_is_out_of_memory_is_told_and_others_go_on() -> None:
    models = [Model("small", JSON, entry="echo", memory_limit=2 << 20), Model("json", JSON, entry="echo")]
    with Spark(models, timeout=30) as spark:
        spark.execute(1, "json")
        for _ in range(3):
            with pytest.raises(ModelOutOfMemory, match="limit of 2 MiB"):
                spark.execute("x" * (5 << 20), "small")
            assert spark.execute(2, "small") == 2
        assert spark.execute(3, "json") == 3


def test_a_process_that_is_out_of_memory_is_told_and_others_go_on() -> None:
    models = [Model("poor", JSON, entry="echo"), Model("json", JSON, entry="echo")]
    with Spark(models, timeout=30) as spark:
        assert spark.execute(1, "poor") == 1
        nursery = the_nursery()
        usual = resource.prlimit(nursery, resource.RLIMIT_DATA)
        for pid in [nursery, *serving(spark)]:  # from now on every process is poor
            resource.prlimit(pid, resource.RLIMIT_DATA, (48 << 20, usual[1]))
        call = spark.submit(LARGE, "poor")
        assert spark.execute(2, "json") == 2
        with pytest.raises((ReplicaDied, ModelOutOfMemory), match=r"model 'poor', replica 1.*memory"):
            call.result(20)
        assert spark.execute(3, "poor") == 3


def test_memory_that_a_guest_took_is_bounded_by_its_limit() -> None:
    with Spark([Model("memory", MEMORY, memory_limit=64 << 20)], timeout=30) as spark:
        assert spark.call("memory", "touch", 2000) == -1
        assert spark.call("memory", "touch", 50) > 0
        told = spark.statistics().models[0].replicas[0].memory_bytes
        assert told is not None
        assert 50 << 20 < told < 100 << 20


# --- P19: busy models stay, and memory comes back ---------------------------------------------------------------------


def use_at_random(folder: Path, chance: random.Random, rounds: int) -> None:
    models = [Model(f"m{number}", echo_slowly(folder, 200_000), replicas=1 + number % 2) for number in range(6)]
    seeds = [chance.random() for _ in range(3)]
    with Spark(models, max_models=2, timeout=50, on_note=lambda note: None) as spark:

        def use(seed: float) -> None:
            own = random.Random(seed)
            for number in range(rounds):
                name = f"m{own.randrange(6)}"
                calls = [spark.submit([seed, number, each], name) for each in range(own.randrange(1, 4))]
                assert [call.result(30) for call in calls] == [[seed, number, each] for each in range(len(calls))]

        with ThreadPoolExecutor(3) as threads:
            for each in [threads.submit(use, seed) for seed in seeds]:
                each.result(rounds + 50)
        told = spark.statistics()
        assert told.failures == 0
        assert told.evictions > rounds / 10
        until(lambda: len(spark.statistics().models) <= 2)
        nursery = the_nursery()
        until(lambda: len(children(nursery)) <= 4)


def test_a_busy_model_is_never_unloaded_in_random_use(tmp_path: Path, chance: random.Random) -> None:
    use_at_random(tmp_path, chance, 60)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_busy_model_is_never_unloaded_in_long_random_use(tmp_path: Path, chance: random.Random) -> None:
    use_at_random(tmp_path, chance, 3000)


def test_the_memory_of_an_unloaded_model_comes_back() -> None:
    models = [Model("memory", MEMORY), Model("json", JSON)]
    with Spark(models, max_models=1, timeout=30) as spark:
        assert spark.call("memory", "touch", 200) > 0
        pids = replica_pids(spark)
        assert (spark.statistics().models[0].replicas[0].memory_bytes or 0) > 200 << 20
        spark.execute({"xs": []}, "json")
        until(lambda: not any(map(is_alive, pids)))


# --- P27: a hostile file ----------------------------------------------------------------------------------------------


def test_a_model_that_is_no_regular_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.wasm")
    (tmp_path / "folder.wasm").mkdir()
    # In a program of its own: who opens a FIFO that nobody writes to is stuck for good.
    done = run_program(f"""
        from spark_runtime.errors import ModelUnusable
        for path in ({str(tmp_path / "fifo.wasm")!r}, {str(tmp_path / "folder.wasm")!r}, "/dev/zero", "/dev/null"):
            with Spark([Model("odd", path)], timeout=10) as spark:
                try:
                    spark.execute({{}})
                except ModelUnusable as problem:
                    assert path in str(problem), problem
                    print("refused")
    """)
    assert (done.stdout, done.stderr) == ("refused\n" * 4, ""), done.stderr


def test_a_huge_model_file_is_refused_without_reading_it(tmp_path: Path) -> None:
    path = tmp_path / "huge.wasm"
    with path.open("wb") as file:
        file.write(b"\0asm\1\0\0\0")
        file.truncate(64 * GIB)
    with Spark([Model("huge", path), Model("json", JSON, entry="echo")], timeout=20) as spark:
        with pytest.raises(ModelUnusable, match=r"huge\.wasm"):
            spark.execute({}, "huge")
        assert spark.execute(1, "json") == 1


@pytest.mark.parametrize(
    "text",
    [
        '(module (memory (export "memory") 65536))',
        '(module (memory (export "memory") 1) (table 100000000 funcref))',
        "(module (memory 1) (func $f (loop (br 0))) (start $f))",
        "(module (memory 1) (func $f call $f) (start $f))",
        "(module (memory 1) (func $f unreachable) (start $f))",
    ],
    ids=["4 GiB of memory", "a huge table", "an endless start", "a start without bottom", "a start that traps"],
)
def test_a_module_that_cannot_even_begin_is_told(tmp_path: Path, text: str) -> None:
    models = [Model("bad", module(tmp_path, "bad", text), memory_limit=64 << 20), Model("json", JSON, entry="echo")]
    with Spark(models, timeout=3) as spark:
        with pytest.raises((ModelUnusable, ExecuteTimeout), match="model 'bad'"):
            spark.execute({}, "bad")
        assert spark.execute(1, "json") == 1
        spark.close()


# --- P28: a malformed module ------------------------------------------------------------------------------------------


def mutated(source: bytes, chance: random.Random) -> bytes:
    """Return *source* with some bits flipped, or cut, or with a piece of itself in another place."""
    data = bytearray(source)
    for _ in range(chance.choice((1, 1, 2, 8))):
        place = chance.randrange(8, len(data))
        how = chance.randrange(4)
        if how < 2:
            data[place] ^= 1 << chance.randrange(8)
        elif how == 2:
            del data[place : place + chance.choice((1, 2, 100, len(data)))]
        else:
            data[place:place] = data[chance.randrange(len(data)) :][: chance.choice((1, 4, 300))]
        if len(data) < 9:
            break
    return bytes(data)


MUTANTS_END = {
    *("ok", "ModelUnusable", "ModelTrapped", "ModelOutOfMemory", "ModelStackOverflow", "AnswerInvalid"),
    *("FunctionMissing", "WrongSignature", "ModelExited", "ExecuteTimeout"),
}


def try_mutations(folder: Path, chance: random.Random, count: int) -> Counter[str]:
    sources = [path.read_bytes() for path in (JSON, FUSSY, TRAP, SPIN, MEMORY)] * 4 + [REACTOR.read_bytes()]
    ended: Counter[str] = Counter()
    models = []
    for number in range(count):
        path = folder / f"{number}.wasm"
        path.write_bytes(mutated(chance.choice(sources), chance))
        models.append(Model(path.stem, path, memory_limit=16 << 20))
    good = Model("good", JSON, entry="echo", keep=True)
    with Spark([*models, good], timeout=4, max_models=8, cache_dir=folder / "cache") as spark:
        spark.execute(0, "good")
        pids = replica_pids(spark)

        def attempt(model: Model) -> str:
            try:
                spark.execute({"xs": [1, 2]}, model.name)
            except SparkError as problem:
                is_one_sentence = model.name in str(problem) and "Traceback" not in str(problem)
                return type(problem).__name__ if is_one_sentence else str(problem)
            return "ok"

        with ThreadPoolExecutor(5) as threads:
            ended.update(threads.map(attempt, models))
        assert spark.execute(1, "good") == 1
        assert set(pids) <= set(serving(spark))
        spark.close()
    assert set(ended) <= MUTANTS_END, ended
    return ended


def test_mutated_modules_run_or_are_unusable_and_harm_nothing(tmp_path: Path, chance: random.Random) -> None:
    ended = try_mutations(tmp_path, chance, 100)
    assert ended["ModelUnusable"] > 20


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_three_hundred_mutated_modules_harm_nothing(tmp_path: Path, chance: random.Random) -> None:
    try_mutations(tmp_path, chance, 300)


# --- P29: no code from data -------------------------------------------------------------------------------------------

CODE_FROM_DATA = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "runpy", "jsonpickle"}
RUNNERS = {"eval", "exec"}
#: As `dataclasses` does: methods of our own message types, of the names of their fields in our own source.
ALLOWED = {("messages.py", "exec")}


def test_the_supervisor_side_makes_no_code_of_data() -> None:
    found = []
    folders = [Path(package.__path__[0]) for package in (spark_runtime, spark_workers)]
    files = [path for folder in folders for path in sorted(folder.rglob("*.py"))]
    checked = [path for path in files if "scripts" not in path.parts]
    assert len(checked) > 60
    for path in checked:
        for node in ast.walk(ast.parse(path.read_text())):
            names = set()
            if isinstance(node, ast.Import):
                names = {each.name.partition(".")[0] for each in node.names} & CODE_FROM_DATA
            elif isinstance(node, ast.ImportFrom):
                names = {(node.module or "").partition(".")[0]} & CODE_FROM_DATA
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                names = {node.func.id} & RUNNERS
            elif isinstance(node, ast.Attribute):
                names = {node.attr} & {"allow_pickle", "recv_pyobj"}
            elif isinstance(node, ast.keyword):
                names = {node.arg or ""} & {"allow_pickle"}
            places = [f"{path}:{node.lineno}: {name}" for name in names]  # type: ignore[attr-defined]
            found += [each for each, name in zip(places, names, strict=True) if (path.name, name) not in ALLOWED]
    assert not found


# --- hostile names ----------------------------------------------------------------------------------------------------

HOSTILE = "\x1b]0;owned\x07\x1b[31mred\u202e\x9b31m"


def assert_tame(text: str) -> None:
    """Make sure that nothing in *text* could steer a terminal."""
    assert not [each for each in text if not each.isprintable() and each != "\n"], ascii(text)


def hostile_module(folder: Path) -> Path:
    name = "".join(f"\\{byte:02x}" for byte in HOSTILE.encode())
    text = f"""(module
        (memory (export "memory") 1)
        (func $"{name}" (export "{name}") unreachable)
        (func (export "trap") call $"{name}"))"""
    return module(folder, "hostile", text)


@pytest.mark.parametrize(
    "words",
    [
        ["--function", "missing"],
        ["--function", "trap"],
        ["--function", HOSTILE],
        ["--function", HOSTILE + "x"],
        ["--input", "{}"],
        ["--entry", HOSTILE, "--input", "{}"],
        ["--input", HOSTILE],
        ["--input", "@" + HOSTILE],
        ["--function", "trap", HOSTILE],
    ],
)
def test_hostile_names_are_escaped_on_the_terminal(tmp_path: Path, words: list[str]) -> None:
    done = spark("exec", str(hostile_module(tmp_path)), *words, cwd=tmp_path)
    assert done.returncode in (1, 2)
    assert done.stderr.startswith("spark: ")
    assert "Traceback" not in done.stderr
    assert_tame(done.stderr)
    assert done.stdout == ""


@pytest.mark.parametrize("content", [None, b"", b"not a module", b"\0asm\1\0\0\0\xff\xff"])
def test_a_hostile_file_name_is_escaped_on_the_terminal(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / f"{HOSTILE}.wasm"
    if content is not None:
        path.write_bytes(content)
    done = spark("exec", str(path), cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert_tame(done.stderr)


def test_a_file_name_that_is_no_text_is_told_all_the_same(tmp_path: Path) -> None:
    done = spark("exec", os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe.wasm"), cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert_tame(done.stderr)


# --- the user's program: forks, signals, its end ----------------------------------------------------------------------


def test_forks_of_the_program_under_load_harm_nothing() -> None:
    done = run_program("""
        import threading
        from spark_runtime.errors import SparkClosed
        spark = Spark([Model("json", JSON, entry="echo", replicas=2)], timeout=40)
        spark.execute(0)
        wrong, is_over = [], threading.Event()
        def load():
            number = 0
            while not is_over.is_set():
                number += 1
                if spark.execute(number) != number:
                    wrong.append(number)
        threads = [threading.Thread(target=load) for _ in range(3)]
        for thread in threads:
            thread.start()
        for turn in range(20):
            call = spark.submit("mine")
            pid = os.fork()
            if pid == 0:
                try:
                    spark.execute("in a fork")
                except SparkClosed:
                    call.cancel()
                    spark.close()
                    if turn % 2:
                        sys.exit(7)  # with everything that is done at exit
                    os._exit(7)
                os._exit(1)
            _, status = os.waitpid(pid, 0)
            assert os.waitstatus_to_exitcode(status) == 7, status
            assert call.result(20) == "mine"
        is_over.set()
        for thread in threads:
            thread.join()
        assert not wrong
        assert spark.statistics().failures == 0
        spark.close()
        print("done")
    """)
    assert (done.stdout, done.stderr) == ("done\n", ""), done.stderr


def test_a_fork_that_lives_on_keeps_nothing_alive() -> None:
    done = run_program("""
        import signal
        spark = Spark([Model("json", JSON, entry="echo", replicas=2)], timeout=40)
        spark.execute(0)
        pids = wait_in_service(spark, 2)
        fork = os.fork()
        if fork == 0:
            signal.pause()
            os._exit(0)
        os.kill(pids[0], signal.SIGKILL)
        until(lambda: pids[0] not in serving(spark))
        wait_in_service(spark, 2)
        assert spark.execute(1) == 1
        left = replica_pids(spark)
        spark.close()
        until(lambda: not any(map(is_alive, left)))
        os.kill(fork, signal.SIGKILL)
        os.waitpid(fork, 0)
        print("done")
    """)
    assert (done.stdout, done.stderr) == ("done\n", ""), done.stderr


def test_ctrl_c_interrupts_who_waits_and_no_replica() -> None:
    with program("""
        with Spark([Model("fussy", FUSSY, replicas=2)], timeout=None) as spark:
            spark.load()
            pids = wait_in_service(spark, 2)
            call = spark.submit("%")
            for turn in range(3):
                try:
                    print("waits", flush=True)
                    call.result(30)
                except KeyboardInterrupt:
                    pass
            assert call.running()
            assert list(serving(spark)) == pids
            assert spark.execute(1) == 1
            call.cancel()
            assert spark.execute(2) == 2
            print("done")
    """) as process:
        assert process.stdout is not None
        for _ in range(3):
            assert process.stdout.readline() == "waits\n"
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of the group
        out, err = process.communicate(timeout=40)
    assert (out, err) == ("done\n", "")


def test_ctrl_c_ends_a_program_that_waits_and_leaves_nothing() -> None:
    with program("""
        with Spark([Model("fussy", FUSSY, replicas=2)], timeout=None) as spark:
            spark.load()
            wait_in_service(spark, 2)
            call = spark.submit("%")
            print(*replica_pids(spark), flush=True)
            call.result(30)
    """) as process:
        assert process.stdout is not None
        pids = list(map(int, process.stdout.readline().split()))
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=40)
    assert process.returncode == -signal.SIGINT
    assert err.splitlines()[-1] == "KeyboardInterrupt"
    until(lambda: not any(map(is_alive, pids)))


def test_ctrl_c_in_the_middle_of_a_submit_leaves_no_other_call_without_an_end() -> None:
    done = run_program("""
        import signal
        from spark_runtime.errors import ExecuteTimeout, ReplicaDied
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        with Spark([Model("json", JSON, entry="echo", replicas=2)], timeout=2) as spark:
            spark.execute(0)
            number = interrupts = 0
            limit = time.monotonic() + 6
            while time.monotonic() < limit:
                calls = []
                try:
                    signal.setitimer(signal.ITIMER_REAL, 0.0002 + (number % 97) * 1e-6)
                    while True:
                        calls.append((number, spark.submit(number)))
                        number += 1
                except KeyboardInterrupt:
                    interrupts += 1
                for each, call in calls:
                    try:
                        assert call.result(15) == each, (interrupts, each)
                    except (ReplicaDied, ExecuteTimeout):
                        pass  # the replica that was being sent to is replaced, with what it had begun
            assert interrupts > 20
            wait_in_service(spark, 2)
            assert spark.execute("at last") == "at last"
            spark.close()
        print("done")
    """)
    assert (done.stdout, done.stderr) == ("done\n", ""), done.stderr


def test_a_daemon_thread_may_call_until_the_very_end() -> None:
    done = run_program("""
        import threading
        from spark_runtime.errors import SparkClosed
        spark = Spark([Model("json", JSON, entry="echo", replicas=2)], timeout=40)
        answers = []
        def work():
            try:
                while True:
                    answers.append(spark.execute(len(answers)))
            except SparkClosed:
                pass
        for _ in range(3):
            threading.Thread(target=work, daemon=True).start()
        until(lambda: len(answers) > 50)
        print(*replica_pids(spark))
    """)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    until(lambda: not any(is_alive(int(pid)) for pid in done.stdout.split()))


def test_a_spark_that_only_a_daemon_thread_knows_ends_with_the_program() -> None:
    done = run_program("""
        import threading
        ready = threading.Event()
        def work():
            spark = Spark([Model("fussy", FUSSY)], timeout=None)
            spark.execute(1)
            print(*replica_pids(spark), flush=True)
            call = spark.submit("%")
            ready.set()
            try:
                call.result()
            except Exception:
                pass
        threading.Thread(target=work, daemon=True).start()
        ready.wait(30)
    """)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    until(lambda: not any(is_alive(int(pid)) for pid in done.stdout.split()))


CLEAN = """
    import asyncio
    async def main():
        async with Spark([Model("json", JSON, entry="echo")], timeout=40) as spark:
            assert await asyncio.gather(*(spark.aexecute(number) for number in range(50))) == list(range(50))
    asyncio.run(main(), debug=False)  # which would tell of every step that takes long on a busy machine
    with Spark([Model("fussy", FUSSY, replicas=2), Model("json", JSON)], max_models=1, timeout=40) as spark:
        assert spark.execute({"xs": [1]}, "json")["n"] == 1
        assert list(spark.map("fussy", range(500))) == list(range(500))
        call = spark.submit("%", "fussy")
        wait_computing(spark)
        call.cancel()
        try:
            spark.execute("!", "fussy")
        except Exception as problem:
            assert type(problem).__name__ == "ModelTrapped"
        assert spark.reload("fussy") is False
        os.kill(wait_in_service(spark, 2)[0], 9)
        assert spark.execute(1, "fussy") == 1
    left = Spark([Model("fussy", FUSSY)])
    left.execute(1)
    left.submit("%")
    print("done")
"""


def test_nothing_warns_in_development_mode() -> None:
    done = run_program(CLEAN, "-X", "dev", "-W", "error")
    assert (done.stdout, done.stderr) == ("done\n", ""), done.stderr


# --- other ways to start, and to call ---------------------------------------------------------------------------------

SMOKE = """
    from spark_runtime.errors import ReplicaDied
    with Spark([Model("fussy", FUSSY, replicas=2), Model("wasi", WASI)], timeout=40) as spark:
        assert list(spark.map("fussy", range(300))) == list(range(300))
        assert spark.execute({"xs": [1, 2]}, "wasi")["sum"] == 3
        stuck = spark.submit("%", "fussy")
        pid = wait_computing(spark)
        os.kill(pid, 9)
        try:
            stuck.result(20)
        except ReplicaDied:
            print("died")
        stuck = spark.submit("%", "fussy")
        wait_computing(spark)
        stuck.cancel()
        assert spark.execute(4, "fussy") == 4
        pids = replica_pids(spark)
    until(lambda: not any(map(is_alive, pids)))
    print("done")
"""


@pytest.mark.parametrize("start", ["fork", "spawn"])
@pytest.mark.parametrize("way", ["raw", "public"])
def test_models_run_however_processes_start_and_calls_are_made(start: str, way: str) -> None:
    done = run_program(SMOKE, SPARKRT_START=start, SPARKRT_WASMTIME=way)
    assert (done.stdout, done.stderr) == ("died\ndone\n", ""), done.stderr
