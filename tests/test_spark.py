"""The Python face: `Spark` with real replicas."""

import asyncio
import concurrent.futures
import gc
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from models_help import (
    JSON,
    MEMORY,
    REACTOR,
    SPIN,
    TRAP,
    WASI,
    WORK,
    is_alive,
    replica_pids,
    states,
    until,
    wait_computing,
)

from spark_runtime import Model, Spark
from spark_runtime.errors import (
    AnswerInvalid,
    BadRequestError,
    ExecuteCancelled,
    ExecuteTimeout,
    FunctionMissing,
    ModelExited,
    ModelNotFound,
    ModelStackOverflow,
    ModelTrapped,
    ModelUnusable,
    QueueFull,
    ReplicaDied,
    SparkClosed,
    SparkError,
    WrongSignature,
)


@pytest.fixture
def spark() -> Iterator[Spark]:
    models = [
        Model("json", JSON),
        Model("echo", JSON, entry="echo"),
        Model("spin", SPIN),
        Model("trap", TRAP),
        Model("wasi", WASI),
        Model("reactor", REACTOR),
    ]
    with Spark(models, timeout=30) as spark:
        yield spark
        spark.close()  # what still runs is not waited for


# --- answers ---


def test_a_plain_model_answers_json_with_json(spark: Spark) -> None:
    assert spark.execute({"xs": [1, 2, 3]}, "json") == {"n": 3.0, "sum": 6.0, "mean": 2.0, "bytes": 14.0}


def test_bytes_are_passed_on_and_come_back_as_they_are(spark: Spark) -> None:
    assert spark.execute(b"\x00\xff not JSON", "echo") == b"\x00\xff not JSON"


@pytest.mark.parametrize("value", [None, True, 0, -1.5, "", "ü€😀\x00", [], {}, [[{"a": [None]}]], 2**70, "\ud800"])
def test_every_json_value_survives_the_way_there_and_back(spark: Spark, value: Any) -> None:
    assert spark.execute(value, "echo") == value


def test_a_wasi_command_reads_standard_input_and_writes_standard_output(spark: Spark) -> None:
    assert spark.execute({"xs": [1, 2]}, "wasi") == {"n": 2, "sum": 3, "bytes": 12}


def test_a_wasi_reactor_answers(spark: Spark) -> None:
    assert spark.execute({"xs": [0, 0]}, "reactor") == {"n": 2, "sum": 2}


def test_exports_are_called_with_numbers(spark: Spark) -> None:
    assert spark.call("json", "add", 1.5, 2) == 3.5
    assert spark.call("json", "nop") is None
    assert spark.call("trap", "ok") == 42


def test_a_wasi_command_gets_its_arguments() -> None:
    with Spark([Model("pi", WORK, args=["mc", "1000"])]) as spark:
        assert abs(spark.execute({}, "pi")["pi"] - 3.14) < 0.2


def test_the_only_model_need_not_be_named() -> None:
    with Spark([Model("json", JSON)]) as spark:
        assert spark.execute({"xs": [5]})["sum"] == 5


def test_two_models_may_be_made_of_one_file() -> None:
    with Spark([Model("a", JSON), Model("b", JSON, entry="echo")]) as spark:
        assert spark.execute({"xs": [5]}, "a")["sum"] == 5
        assert spark.execute("x", "b") == "x"


def test_large_requests_and_answers_come_whole(spark: Spark) -> None:
    data = os.urandom(1 << 20) * 20
    assert spark.execute(data, "echo") == data


def test_a_fresh_instance_for_every_call_remembers_nothing() -> None:
    with Spark([Model("a", SPIN, fresh=True), Model("b", SPIN)]) as spark:
        assert [spark.call("a", "spin_bounded", 5) for _ in range(2)] == [5, 5]
        assert [spark.call("b", "spin_bounded", 5) for _ in range(2)] == [5, 10]


# --- many calls ---


def test_map_keeps_the_order() -> None:
    with Spark([Model("echo", JSON, entry="echo", replicas=2)]) as spark:
        assert list(spark.map("echo", range(3000))) == list(range(3000))


def test_unordered_map_gives_every_answer_once() -> None:
    with Spark([Model("echo", JSON, entry="echo", replicas=2)]) as spark:
        assert sorted(spark.map("echo", range(3000), ordered=False)) == list(range(3000))


def test_map_takes_no_more_of_its_input_than_a_window() -> None:
    taken = 0

    def rows() -> Iterator[int]:
        nonlocal taken
        for number in range(1_000_000):
            taken += 1
            yield number

    with Spark([Model("echo", JSON, entry="echo")]) as spark:
        answers = spark.map("echo", rows())
        assert next(answers) == 0
        assert taken < 5_000
        answers.close()


def test_map_ends_with_the_first_error(spark: Spark) -> None:
    answers = spark.map("json", [{"xs": [1]}, {"xs": float("nan")}, {"xs": [2]}])
    assert next(answers)["sum"] == 1
    with pytest.raises(BadRequestError, match="JSON"):
        next(answers)


def test_outcomes_tell_which_request_failed(spark: Spark) -> None:
    outcomes = list(spark.outcomes("echo", [1, float("inf"), b"{", 3]))
    assert [each.index for each in outcomes] == [0, 1, 2, 3]
    assert [each.answer for each in outcomes] == [1, None, b"{", 3]
    assert isinstance(outcomes[1].error, BadRequestError)


def test_outcomes_of_a_model_that_cannot_be_loaded_raise(tmp_path: Path) -> None:
    with Spark([Model("missing", tmp_path / "missing.wasm")]) as spark, pytest.raises(ModelNotFound):
        list(spark.outcomes("missing", range(10)))


def test_many_threads_share_one_spark() -> None:
    with Spark([Model("echo", JSON, entry="echo", replicas=2)]) as spark:

        def work(start: int) -> bool:
            return all(spark.execute(number, "echo") == number for number in range(start, start + 200))

        with concurrent.futures.ThreadPoolExecutor(8) as threads:
            assert all(threads.map(work, range(0, 8000, 1000)))


def test_asyncio_tasks_share_one_spark() -> None:
    async def main() -> list[Any]:
        async with Spark([Model("echo", JSON, entry="echo", replicas=2)]) as spark:
            return await asyncio.gather(*(spark.aexecute(number, "echo") for number in range(500)))

    assert asyncio.run(main()) == list(range(500))


def test_amap_streams() -> None:
    async def main() -> list[Any]:
        async with Spark([Model("echo", JSON, entry="echo")]) as spark:
            return [answer async for answer in spark.amap("echo", range(300))]

    assert asyncio.run(main()) == list(range(300))


# --- cancel and time-outs ---


def test_cancelling_a_running_call_stops_its_replica_and_another_takes_its_place(spark: Spark) -> None:
    call = spark.submit_call("spin", "spin")
    until(lambda: "busy" in states(spark))
    pid = replica_pids(spark)[0]
    assert call.running()
    assert call.cancel() is True
    assert call.cancelled()
    with pytest.raises(ExecuteCancelled, match="'spin'"):
        call.result()
    assert spark.call("spin", "spin_bounded", 3) == 3
    until(lambda: not is_alive(pid))


def test_a_cancelled_call_is_a_cancelled_future(spark: Spark) -> None:
    call = spark.submit_call("spin", "spin")
    until(lambda: "busy" in states(spark))
    call.cancel()
    done, _ = concurrent.futures.wait([call], timeout=10)
    assert done == {call}
    with pytest.raises(concurrent.futures.CancelledError):
        call.result()


def test_a_call_that_is_done_cannot_be_cancelled(spark: Spark) -> None:
    call = spark.submit(1, "echo")
    assert call.result() == 1
    assert call.cancel() is False
    assert call.result() == 1


def test_cancelling_a_call_that_waits_leaves_the_running_one_alone() -> None:
    with Spark([Model("work", WORK, args=["sleep", "1"], kind="command")], timeout=30) as spark:
        running = spark.submit(b"", "work")
        waiting = spark.submit(b"", "work")
        until(lambda: "busy" in states(spark))
        assert waiting.cancel()
        assert running.result() == b"slept\n"


def test_cancelling_one_of_two_calls_harms_no_other() -> None:
    with Spark([Model("spin", SPIN, replicas=2)]) as spark:
        stuck = spark.submit_call("spin", "spin")
        others = [spark.submit_call("spin", "spin_bounded", 1000) for _ in range(200)]
        until(lambda: "busy" in states(spark))
        stuck.cancel()
        assert all(isinstance(each.result(), int) for each in others)


def test_a_time_out_counts_from_submit_and_stops_the_work(spark: Spark) -> None:
    assert spark.call("spin", "spin_bounded", 3) == 3
    with pytest.raises(ExecuteTimeout, match="replica 1: no answer in time; its work was stopped") as caught:
        spark.call("spin", "spin", timeout=0.2)
    assert isinstance(caught.value, TimeoutError)
    assert spark.call("spin", "spin_bounded", 3) == 3


def test_a_call_that_never_got_a_replica_times_out_too(spark: Spark) -> None:
    stuck = spark.submit_call("spin", "spin")
    until(lambda: "busy" in states(spark))
    with pytest.raises(ExecuteTimeout, match="no replica was free"):
        spark.call("spin", "spin_bounded", 3, timeout=0.2)
    assert stuck.running()
    stuck.cancel()


def test_a_guest_that_can_be_interrupted_keeps_its_process() -> None:
    with Spark([Model("spin", SPIN, interrupt="epoch")]) as spark:
        assert spark.call("spin", "spin_bounded", 3) == 3
        pid = replica_pids(spark)[0]
        call = spark.submit_call("spin", "spin")
        until(lambda: "busy" in states(spark))
        assert call.cancel()
        assert spark.call("spin", "spin_bounded", 3) in (3, 6)  # 6 where it was stopped before it had begun
        assert replica_pids(spark)[0] == pid


def test_interrupts_never_hit_the_next_call() -> None:
    with Spark([Model("spin", SPIN, interrupt="epoch")], timeout=20) as spark:
        for _ in range(30):
            call = spark.submit_call("spin", "spin_bounded", 200_000)
            following = spark.submit_call("spin", "spin_bounded", 1)
            time.sleep(0.0005)
            call.cancel()
            assert isinstance(following.result(), int)


def test_cancelling_an_asyncio_task_stops_the_work() -> None:
    async def main() -> None:
        async with Spark([Model("spin", SPIN)]) as spark:
            task = asyncio.create_task(spark.acall("spin", "spin"))
            while "busy" not in states(spark):
                await asyncio.sleep(0.005)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await spark.acall("spin", "spin_bounded", 3) == 3

    asyncio.run(main())


def test_a_slow_call_holds_no_others() -> None:
    with Spark([Model("spin", SPIN, replicas=2)], timeout=30) as spark:
        for _ in range(50):
            spark.call("spin", "spin_bounded", 1)  # the model is known to be quick
        slow = spark.submit_call("spin", "spin")
        quick = [spark.submit_call("spin", "spin_bounded", 1) for _ in range(300)]
        assert all(isinstance(each.result(10), int) for each in quick)
        assert slow.running()
        slow.cancel()


# --- failures ---


@pytest.mark.parametrize(
    ("function", "error", "trap"),
    [
        ("t_unreachable", ModelTrapped, "unreachable"),
        ("t_oob", ModelTrapped, "out-of-bounds-memory"),
        ("t_stack", ModelStackOverflow, "stack-overflow"),
        ("t_indirect", ModelTrapped, None),
        ("t_sig", ModelTrapped, None),
    ],
)
def test_a_trap_is_told_by_its_kind_and_the_next_call_works(
    spark: Spark, function: str, error: type[ModelTrapped], trap: str | None
) -> None:
    with pytest.raises(error) as caught:
        spark.call("trap", function)
    assert caught.value.model == "trap"
    assert caught.value.replica == 1
    assert "model 'trap', replica 1" in str(caught.value)
    if trap is not None:
        assert caught.value.details["trap"] == trap
    assert spark.call("trap", "ok") == 42


def test_division_by_zero_is_named(spark: Spark) -> None:
    with pytest.raises(ModelTrapped, match=r"(?i)divi"):
        spark.call("trap", "t_div0", 1)


def test_more_memory_than_the_limit_is_told_with_the_limit() -> None:
    with Spark([Model("memory", MEMORY, memory_limit=64 << 20)]) as spark:
        assert spark.call("memory", "touch", 200) == -1
        assert spark.call("memory", "touch", 10) > 0


def test_an_export_that_is_not_there_is_told_with_those_that_are(spark: Spark) -> None:
    with pytest.raises(FunctionMissing, match="add"):
        spark.call("json", "ad", 1, 2)


@pytest.mark.parametrize("numbers", [(), (1,), (1, 2, 3)])
def test_a_wrong_number_of_arguments_is_told(spark: Spark, numbers: tuple[float, ...]) -> None:
    with pytest.raises(WrongSignature, match="add"):
        spark.call("json", "add", *numbers)


def test_an_answer_that_is_not_json_is_told_with_its_beginning() -> None:
    with Spark([Model("work", WORK, args=["sleep", "0"])]) as work, pytest.raises(AnswerInvalid, match="slept"):
        work.execute({})


def test_a_command_that_fails_tells_code_and_standard_error() -> None:
    with Spark([Model("wasi", WASI, args=["fail"])]) as spark, pytest.raises(ModelExited) as caught:
        spark.execute({"xs": []})
    assert caught.value.details["exit_code"] == 3
    assert "model failed" in caught.value.details["stderr"]


def test_errors_are_plain_data_too(spark: Spark) -> None:
    with pytest.raises(ModelTrapped) as caught:
        spark.call("trap", "t_unreachable")
    told = caught.value.to_dict()
    assert told["error"] == "ModelTrapped"
    assert told["model"] == "trap"
    assert told["replica"] == 1
    assert told["trap"] == "unreachable"
    assert isinstance(told["backtrace"], list)


@pytest.mark.parametrize(
    ("data", "match"),
    [(b"", "empty"), (b"hello", "not a WASM module"), (b"\0asm\1\0\0\0\xff\xff\xff", "(?i)model 'bad'")],
)
def test_a_file_that_is_no_model_is_told(tmp_path: Path, data: bytes, match: str) -> None:
    (tmp_path / "bad.wasm").write_bytes(data)
    with Spark([Model("bad", tmp_path / "bad.wasm")]) as spark, pytest.raises(ModelUnusable, match=match):
        spark.execute({})


def test_a_model_that_was_broken_works_when_its_file_was_mended(tmp_path: Path) -> None:
    path = tmp_path / "model.wasm"
    with Spark([Model("model", path)]) as spark:
        with pytest.raises(ModelNotFound):
            spark.execute({"xs": []})
        path.write_bytes(JSON.read_bytes())
        spark.reload("model")
        assert spark.execute({"xs": [1]})["n"] == 1


def test_a_module_without_an_entry_says_what_it_has(spark: Spark) -> None:
    with pytest.raises(FunctionMissing, match="spin_bounded"):
        spark.execute({}, "spin")


@pytest.mark.parametrize("request_", [{"a": object()}, {1, 2}, float("nan"), [float("inf")]])
def test_a_request_that_is_not_json_is_refused(spark: Spark, request_: Any) -> None:
    with pytest.raises(BadRequestError, match="JSON"):
        spark.execute(request_, "echo")


def test_a_request_that_contains_itself_is_refused(spark: Spark) -> None:
    knot: list[Any] = []
    knot.append(knot)
    with pytest.raises(BadRequestError):
        spark.execute(knot, "echo")


def test_an_unknown_model_is_told_with_those_that_there_are(spark: Spark) -> None:
    with pytest.raises(ModelNotFound, match="'json'"):
        spark.execute({}, "jsn")
    with pytest.raises(BadRequestError, match="which model"):
        spark.execute({})


@pytest.mark.parametrize(
    "fields",
    [
        {"replicas": 0},
        {"replicas": True},
        {"kind": "javascript"},
        {"engine": "v8"},
        {"memory_limit": 5},
        {"timeout": 0},
        {"args": "text"},
        {"interrupt": "fuel"},
        {"engine": "wasmer", "interrupt": "epoch"},
        {"stack_limit": 1 << 30},
    ],
)
def test_a_model_that_makes_no_sense_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(BadRequestError, match="model 'm'"):
        Model("m", JSON, **fields)


@pytest.mark.parametrize("options", [{"max_models": 0}, {"timeout": -1}, {"max_waiting": 0}])
def test_options_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(BadRequestError):
        Spark([Model("m", JSON)], **options)


def test_two_models_of_one_name_are_refused() -> None:
    with pytest.raises(BadRequestError, match="two models"):
        Spark([Model("m", JSON), Model("m", JSON)])


# --- bounds ---


def test_more_calls_than_may_wait_are_refused() -> None:
    with Spark([Model("spin", SPIN)], max_waiting=10) as spark:
        running = spark.submit_call("spin", "spin")
        until(lambda: "busy" in states(spark))
        waiting = [spark.submit_call("spin", "spin_bounded", 1) for _ in range(10)]
        with pytest.raises(QueueFull, match="10"):
            spark.submit_call("spin", "spin_bounded", 1)
        running.cancel()
        assert all(isinstance(each.result(), int) for each in waiting)


def test_the_least_recently_used_model_makes_room() -> None:
    names = ["a", "b", "c"]
    with Spark([Model(name, JSON) for name in names], max_models=2) as spark:
        for name in names:
            spark.execute({"xs": []}, name)
        statistics = spark.statistics()
        assert [each.name for each in statistics.models] == ["b", "c"]
        assert statistics.evictions == 1


def test_a_busy_or_kept_model_is_never_unloaded() -> None:
    notes: list[str] = []
    models = [Model("kept", JSON, keep=True), Model("spin", SPIN), Model("other", JSON)]
    with Spark(models, max_models=1, on_note=notes.append) as spark:
        spark.execute({"xs": []}, "kept")
        call = spark.submit_call("spin", "spin")
        until(lambda: "busy" in states(spark))
        spark.execute({"xs": []}, "other")
        assert call.running()
        assert [each.name for each in spark.statistics().models][:1] == ["kept"]
        assert len([note for note in notes if "max_models" in note]) == 1
        call.cancel()


def test_an_unloaded_model_gives_its_processes_back() -> None:
    with Spark([Model("a", JSON, replicas=2), Model("b", JSON)], max_models=1) as spark:
        spark.execute({"xs": []}, "a")
        until(lambda: len(replica_pids(spark)) == 2)
        pids = replica_pids(spark)
        spark.execute({"xs": []}, "b")
        until(lambda: not any(map(is_alive, pids)))
        assert spark.execute({"xs": [1]}, "a")["n"] == 1


def test_statistics_count_calls_and_do_not_change() -> None:
    with Spark([Model("json", JSON, replicas=2)]) as spark:
        spark.load()
        until(lambda: states(spark) == ["idle", "idle"])
        for _ in range(10):
            spark.execute({"xs": []})
        before = spark.statistics()
        assert before.calls == 10
        assert sum(each.calls for each in before.models[0].replicas) == 10
        assert all(each.p50 is not None and each.p50 > 0 for each in before.models[0].replicas)
        assert all(each.memory_bytes for each in before.models[0].replicas)
        spark.execute({"xs": []})
        assert before.calls == 10
        assert before.to_dict()["models"][0]["name"] == "json"


# --- closing ---


def test_leaving_with_waits_for_what_runs() -> None:
    with Spark([Model("work", WORK, args=["sleep", "1"])]) as spark:
        call = spark.submit(b"")
    assert call.result() == b"slept\n"


def test_an_exception_in_with_stops_what_runs() -> None:
    class Mine(Exception):
        pass

    calls = []

    def leave() -> None:
        with Spark([Model("spin", SPIN)]) as spark:
            calls.append(spark.submit_call("spin", "spin"))
            raise Mine

    with pytest.raises(Mine):
        leave()
    with pytest.raises(SparkClosed):
        calls[0].result(10)


def test_a_closed_spark_takes_no_calls() -> None:
    spark = Spark([Model("json", JSON)])
    spark.close()
    spark.close()
    with pytest.raises(SparkClosed):
        spark.execute({})


def test_closing_leaves_no_process_thread_or_descriptor() -> None:
    def once() -> None:
        with Spark([Model("json", JSON, replicas=2)]) as spark:
            spark.execute({"xs": []})

    once()
    gc.collect()
    before = (set(os.listdir("/proc/self/fd")), threading.active_count())
    for _ in range(3):
        once()
    gc.collect()
    assert (set(os.listdir("/proc/self/fd")), threading.active_count()) == before


def test_a_forgotten_spark_closes_itself() -> None:
    spark = Spark([Model("json", JSON)])
    spark.execute({"xs": []})
    pids = replica_pids(spark)
    assert all(map(is_alive, pids))
    del spark
    gc.collect()
    until(lambda: not any(map(is_alive, pids)))


def test_a_program_that_ends_without_closing_leaves_nothing(tmp_path: Path) -> None:
    program = f"""
from spark_runtime import Model, Spark
spark = Spark([Model("json", {str(JSON)!r}, replicas=2), Model("spin", {str(SPIN)!r})])
spark.execute({{"xs": []}}, "json")
spark.submit_call("spin", "spin")
print(*[each.pid for model in spark.statistics().models for each in model.replicas if each.pid])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True)
    assert done.stderr == ""
    until(lambda: not any(is_alive(int(pid)) for pid in done.stdout.split()))


def test_a_program_that_is_killed_leaves_nothing() -> None:
    program = f"""
import sys, time
from spark_runtime import Model, Spark
spark = Spark([Model("json", {str(JSON)!r}, replicas=2)])
spark.execute({{"xs": []}}, "json")
print(*[each.pid for model in spark.statistics().models for each in model.replicas if each.pid], flush=True)
time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pids = [int(pid) for pid in process.stdout.readline().split()]
    assert pids
    process.kill()
    process.wait()
    process.stdout.close()
    until(lambda: not any(map(is_alive, pids)))


def test_a_fork_of_the_program_cannot_use_it_and_does_not_harm_it(spark: Spark) -> None:
    assert spark.execute(1, "echo") == 1
    program_end, child_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            spark.execute(2, "echo")
        except SparkClosed:
            os.write(child_end, b"closed")
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    os.close(child_end)
    assert os.read(program_end, 100) == b"closed"
    os.close(program_end)
    assert spark.execute(3, "echo") == 3


def test_callbacks_may_use_the_spark_again(spark: Spark) -> None:
    answers: list[Any] = []
    done = threading.Event()

    def again(call: concurrent.futures.Future[Any]) -> None:
        if len(answers) < 5:
            answers.append(call.result())
            spark.submit(len(answers), "echo").add_done_callback(again)
        else:
            done.set()

    spark.submit(0, "echo").add_done_callback(again)
    assert done.wait(10)
    assert answers == [0, 1, 2, 3, 4]


# --- new code ---


def test_a_rebuilt_model_takes_the_old_ones_place_while_calls_go_on(tmp_path: Path) -> None:
    path = tmp_path / "model.wasm"
    path.write_bytes(SPIN.read_bytes())
    with Spark([Model("model", path, replicas=2)]) as spark:
        assert spark.call("model", "spin_bounded", 1) == 1
        with pytest.raises(FunctionMissing):
            spark.call("model", "add", 1, 2)
        path.write_bytes(JSON.read_bytes())
        assert spark.reload() is True
        assert spark.call("model", "add", 1, 2) == 3
        assert spark.reload() is False


def test_a_broken_rebuild_leaves_the_old_code(tmp_path: Path) -> None:
    path = tmp_path / "model.wasm"
    path.write_bytes(JSON.read_bytes())
    with Spark([Model("model", path)]) as spark:
        assert spark.execute({"xs": [1]})["n"] == 1
        path.write_bytes(JSON.read_bytes()[:1000])
        with pytest.raises(ModelUnusable, match="the old code goes on"):
            spark.reload()
        assert spark.execute({"xs": [1]})["n"] == 1
        path.write_bytes(SPIN.read_bytes())
        assert spark.reload() is True
        assert spark.call("model", "spin_bounded", 2) == 2


def test_a_watched_model_is_replaced_when_it_is_built_anew(tmp_path: Path) -> None:
    path = tmp_path / "model.wasm"
    path.write_bytes(JSON.read_bytes())
    notes: list[str] = []
    with Spark([Model("model", path, watch=True)], on_note=notes.append) as spark:
        assert spark.execute({"xs": [1]})["n"] == 1
        new = tmp_path / "new.wasm"
        new.write_bytes(SPIN.read_bytes())
        new.replace(path)
        until(lambda: any("new code" in note for note in notes))
        assert spark.call("model", "spin_bounded", 2) == 2


# --- deaths ---


def test_a_replica_that_is_killed_fails_the_call_it_was_at_and_no_other() -> None:
    with Spark([Model("spin", SPIN)]) as spark:
        call = spark.submit_call("spin", "spin")
        waiting = spark.submit_call("spin", "spin_bounded", 3)
        os.kill(wait_computing(spark), signal.SIGKILL)
        with pytest.raises(ReplicaDied, match="SIGKILL"):
            call.result(10)
        assert waiting.result(10) == 3


def test_a_call_may_be_tried_again_if_the_model_says_so() -> None:
    with Spark([Model("work", WORK, args=["sleep", "1"], retries=1)]) as spark:
        call = spark.submit(b"")
        until(lambda: "busy" in states(spark))
        os.kill(replica_pids(spark)[0], signal.SIGKILL)
        assert call.result(20) == b"slept\n"


def test_the_nursery_may_die_and_everything_comes_back(spark: Spark) -> None:
    assert spark.execute(1, "echo") == 1
    replica = replica_pids(spark)[0]
    with open(f"/proc/{replica}/stat") as file:
        nursery = int(file.read().rpartition(")")[2].split()[1])
    os.kill(nursery, signal.SIGKILL)
    until(lambda: not is_alive(replica))
    assert spark.execute(2, "echo") == 2


def test_errors_can_be_pickled() -> None:
    error = ReplicaDied("text", "model", 2, {"how": "SIGKILL"})
    copy = pickle.loads(pickle.dumps(error))
    assert isinstance(copy, SparkError)
    assert copy.to_dict() == error.to_dict()
