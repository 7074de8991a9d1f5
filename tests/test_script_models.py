"""Models inside a script: what `spark.execute` and its kin do, and what becomes of calls when something ends."""

import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import RunProcess, children, descendants, running, spark, wait_gone, write

from spark_runtime.config import Model, parse_size
from spark_runtime.errors import BadRequestError, SparkError
from spark_runtime.models.configured import configured_models
from spark_workers import errors
from spark_workers.scripts.models import LOOK_SECONDS

MODELS = Path(__file__).parent / "models"
JSON = MODELS / "json_model.wasm"
DOCS = Path(__file__).parent.parent / "docs"

HEAD = """
import asyncio, concurrent.futures, os, signal, sys, threading, time
from spark_runtime import SparkStopError, SparkUsageError
from spark_runtime.errors import *

"""


def script(folder: Path, source: str) -> Path:
    """Write a script that has everything imported."""
    return write(folder / "train.py", HEAD + textwrap.dedent(source))


def options(*names: str) -> list[str]:
    """Options that give the run these models."""
    return [word for name in names for word in ("--model", str(MODELS / f"{name}.wasm"))]


def printed_by(tmp_path: Path, source: str, *names: str) -> list[str]:
    """Run a script to its good end; return the lines it printed."""
    done = spark("run", script(tmp_path, source).name, "--exit", "--no-watch", *options(*names), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def replicas(run: RunProcess, worker: int) -> list[int]:
    """The processes of models: what nurseries have beside the script's worker."""
    return [pid for pid in run.workers() if pid != worker]


def wait_computing(pid: int) -> None:
    """Wait until a process has used the processor for a while from now on."""

    def used() -> int:
        return sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]))

    before = used()
    while used() < before + 5:
        time.sleep(0.005)


# --- answers ---


def test_a_script_gets_answers_from_models(tmp_path: Path) -> None:
    lines = printed_by(
        tmp_path,
        """
        def torch():
            print(spark.execute({"xs": [1, 2, 3]}, "json_model")["sum"])
            print(spark.execute(b'"as it is"', "fussy"))
            print(spark.submit([1, None, "ä"], "fussy").result())
            print(spark.call("json_model", "add", 1.5, 2), spark.call("json_model", "nop"))
        """,
        "json_model",
        "fussy",
    )
    assert lines == ["6.0", "b'\"as it is\"'", "[1, None, 'ä']", "3.5 None"]


def test_the_only_model_need_not_be_named(tmp_path: Path) -> None:
    source = """
        def torch():
            print(spark.execute({"xs": [1]})["n"])
    """
    assert printed_by(tmp_path, source, "json_model") == ["1.0"]


def test_calls_run_while_the_script_goes_on(tmp_path: Path) -> None:
    lines = printed_by(
        tmp_path,
        """
        def torch():
            calls = [spark.submit(number) for number in range(200)]
            spark.checkpoint()
            assert {call.result() for call in concurrent.futures.as_completed(calls)} == set(range(200))
            print(all(call.done() for call in calls), calls[0].cancel())
        """,
        "fussy",
    )
    assert lines == ["True False"]


def test_threads_of_a_script_call_models_side_by_side(tmp_path: Path) -> None:
    lines = printed_by(
        tmp_path,
        """
        def torch():
            with concurrent.futures.ThreadPoolExecutor(8) as threads:
                print(sum(threads.map(spark.execute, range(100))))
        """,
        "fussy",
    )
    assert lines == ["4950"]


def test_asynchronous_scripts_await_answers(tmp_path: Path) -> None:
    lines = printed_by(
        tmp_path,
        """
        async def torch():
            print(await asyncio.gather(*(spark.aexecute(number, "fussy") for number in range(5))))
            try:
                await spark.aexecute("!", "fussy")
            except ModelTrapped as problem:
                print(problem.details["trap"])
            task = asyncio.ensure_future(spark.aexecute("%", "fussy", timeout=600))
            await asyncio.sleep(0.05)
            task.cancel()
            try:
                await task
            except asyncio.CancelledError:
                print(await spark.aexecute("free again", "fussy"))
        """,
        "fussy",
    )
    assert lines == ["[0, 1, 2, 3, 4]", "unreachable", "free again"]


def test_callbacks_may_wait_pass_checkpoints_and_fail(tmp_path: Path) -> None:
    script(
        tmp_path,
        """
        def again(call):
            spark.checkpoint()
            print(call.result(), spark.execute("in a callback"))

        def torch():
            failed, ended = threading.Event(), threading.Event()
            call = spark.submit("first")
            call.add_done_callback(again)
            call.add_done_callback(lambda call: 1 / 0)
            call.add_done_callback(lambda call: ended.set())
            print(ended.wait(30))
        """,
    )
    done = spark("run", "train.py", "--exit", "--no-watch", *options("fussy"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["first in a callback", "True"]
    assert "ZeroDivisionError: division by zero" in done.stderr
    assert "spark_workers" not in done.stderr


# --- errors ---


def test_a_script_catches_the_errors_that_a_program_catches(tmp_path: Path) -> None:
    lines = printed_by(
        tmp_path,
        """
        def told(kind, act, *arguments, **named):
            try:
                act(*arguments, **named)
            except kind as problem:
                print(type(problem).__name__, getattr(problem, "model", ""), getattr(problem, "replica", ""))
                print("   ", problem)
            else:
                print("no", kind.__name__)

        def torch():
            told(ModelTrapped, spark.execute, "!", "fussy")
            told(AnswerInvalid, spark.execute, "~", "fussy")
            told(AnswerInvalid, spark.submit("~", "fussy").result)
            told(FunctionMissing, spark.call, "fussy", "nothing")
            told(WrongSignature, spark.call, "fussy", "execute", 1)
            told(ModelStackOverflow, spark.call, "trap_model", "t_stack")
            told(ExecuteTimeout, spark.execute, "%", "fussy", timeout=0.05)
            told(TimeoutError, spark.execute, "%", "fussy", timeout=0.05)
            told(ModelNotFound, spark.execute, 1, "nothing")
            told(BadRequestError, spark.execute, 1)
            told(ValueError, spark.execute, {1, 2}, "fussy")
            told(BadRequestError, spark.execute, 1, "fussy", timeout=-1)
            told(BadRequestError, spark.execute, 1, "\\udc80")
            told(BadRequestError, spark.execute, 1, "")
            told(BadRequestError, spark.call, "fussy", "execute", "1")
            told(BadRequestError, spark.call, "fussy", "", 1)
        """,
        "fussy",
        "trap_model",
    )
    assert lines[0::2] == [
        "ModelTrapped fussy 1",
        "AnswerInvalid fussy 1",
        "AnswerInvalid fussy 1",
        "FunctionMissing fussy 1",
        "WrongSignature fussy 1",
        "ModelStackOverflow trap_model 1",
        "ExecuteTimeout fussy 1",
        "ExecuteTimeout fussy 1",
        "ModelNotFound  ",
        *["BadRequestError  "] * 7,
    ]
    assert "there is no model 'nothing'; there are 'fussy', 'trap_model'" in lines[17]
    assert "which model is to be called?" in lines[19]
    assert "timeout is -1, not a number of seconds above 0" in lines[23]


def test_a_cancelled_call_frees_its_replica(tmp_path: Path) -> None:
    lines = printed_by(
        tmp_path,
        """
        def torch():
            running, waiting = spark.submit("%", timeout=600), spark.submit("behind it")
            time.sleep(0.1)
            print(running.cancel(), running.cancelled(), running.done())
            try:
                running.result()
            except concurrent.futures.CancelledError as problem:
                print(isinstance(problem, ExecuteCancelled), problem)
            print(waiting.result())
        """,
        "fussy",
    )
    assert lines == ["True True True", "True the call was cancelled", "behind it"]


def test_too_many_calls_are_refused_and_those_that_were_taken_are_answered(tmp_path: Path) -> None:
    lines = printed_by(
        tmp_path,
        """
        def torch():
            first = spark.submit("%", timeout=600)
            calls = [spark.submit(0, timeout=600) for _ in range(10_100)]
            refused = sum(isinstance(call.exception(), QueueFull) for call in calls[-50:])
            first.cancel()
            answered = sum(call.exception() is None for call in calls)
            print(refused, 10_000 <= answered <= 10_050)
        """,
        "fussy",
    )
    assert lines == ["50 True"]


def test_a_model_that_cannot_be_used_says_why(tmp_path: Path) -> None:
    (tmp_path / "broken.wasm").write_text("(module)")
    script(
        tmp_path,
        """
        def torch():
            try:
                spark.execute({})
            except ModelUnusable as problem:
                print(problem.kind, problem)
        """,
    )
    done = spark("run", "train.py", "--exit", "--no-watch", "--model", "broken.wasm", cwd=tmp_path)
    assert done.stdout.startswith("invalid-module ")
    assert "WebAssembly text; translate it with wat2wasm" in done.stdout


def test_an_uncaught_error_shows_only_the_scripts_own_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "train.py", "def torch():\n    spark.execute('!')\n")
    done = spark("run", str(path), "--exit", "--no-watch", *options("fussy"), cwd=tmp_path)
    assert done.returncode == 1
    assert "ModelTrapped: model 'fussy', replica 1" in done.stderr
    assert re.findall(r'File "(.*?)"', done.stderr) == [str(path)]


@pytest.mark.parametrize(
    "problem",
    [
        errors.SparkError("told"),
        errors.QueueFull("told"),
        errors.ModelNotFound("told"),
        errors.ModelUnusable("told", "over-limit", {"seconds": 3}),
        errors.ReplicaDied("told", "m", 2, {"how": "killed by SIGKILL"}),
        errors.ExecuteTimeout("told", "m"),
        errors.ModelTrapped("told", "m", 1, {"trap": "unreachable", "backtrace": ["a", "b"]}),
    ],
    ids=lambda problem: type(problem).__name__,
)
def test_errors_come_back_as_they_were_told(problem: SparkError) -> None:
    again = errors.from_dict(problem.to_dict())
    assert type(again) is type(problem)
    assert vars(again) == vars(problem)
    assert str(again) == str(problem)


def test_an_error_of_another_version_comes_back_as_a_failed_call() -> None:
    again = errors.from_dict({"error": "NotYetInvented", "message": "told", "model": "m", "replica": "x"})
    assert type(again) is errors.ExecuteError
    assert str(again) == "told"


# --- where there are no models ---


def test_a_run_without_models_says_how_to_give_it_some(tmp_path: Path) -> None:
    source = """
        def torch():
            try:
                spark.execute({}, "pricing")
            except ModelNotFound as problem:
                print(problem)
    """
    (line,) = printed_by(tmp_path, source)
    assert "--model NAME=PATH" in line
    assert "[tool.spark.models]" in line


def test_without_the_runtime_a_script_learns_how_to_run(tmp_path: Path) -> None:
    path = write(tmp_path / "train.py", "from spark_runtime import spark\nspark.execute({})\n")
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=20, check=False)
    assert "SparkUsageError" in done.stderr.splitlines()[-1]
    assert "`spark run SCRIPT --model NAME=PATH`" in done.stderr.splitlines()[-1]


def test_models_are_not_called_at_the_top_level(tmp_path: Path) -> None:
    path = write(tmp_path / "train.py", "spark.execute({})\ndef torch(): pass\n")
    done = spark("run", str(path), "--exit", "--no-watch", *options("fussy"), cwd=tmp_path)
    assert done.returncode == 1
    assert "call them inside torch()" in done.stderr


def test_a_fork_of_the_script_has_no_models_and_does_not_take_its_answers(tmp_path: Path) -> None:
    lines = printed_by(
        tmp_path,
        """
        def torch():
            call = spark.submit("#3")
            if (pid := os.fork()) == 0:
                for act in (spark.submit, lambda request: call.result()):
                    try:
                        act(1)
                    except SparkUsageError as problem:
                        os.write(1, f"{problem}\\n".encode())
                os._exit(0)
            os.waitpid(pid, 0)
            print(call.result())
        """,
        "fussy",
    )
    assert "own process" in lines[0]
    assert "the process that asked" in lines[1]
    assert lines[2] == "#3"


# --- stop, reload, pause ---

FOREVER = """
    def torch():
        spark.persist("state", dict)["begun"] = True
        if spark.persist("runs", list):
            print("answered", spark.execute("at once"))
        spark.persisted["runs"].append(1)
        print("waiting")
        sys.stdout.flush()
        spark.execute("%", timeout=600)
    """


def test_stop_does_not_wait_for_a_call_that_never_ends(tmp_path: Path) -> None:
    with running(script(tmp_path, FOREVER), *options("fussy")) as run:
        run.wait_printed("waiting")
        run.ctl("stop")
        run.wait_for("state", state="stopped")
        run.ctl("resume")
        run.wait_printed("answered at once")  # by the only replica there is
        assert run.stop() == 0


def test_reload_does_not_wait_for_a_call_that_never_ends(tmp_path: Path) -> None:
    with running(script(tmp_path, FOREVER), *options("fussy")) as run:
        run.wait_printed("waiting")
        script(tmp_path, FOREVER.replace('"at once"', '"by new code"'))
        run.wait_printed("answered by new code")
        assert run.stop() == 0


def test_asynchronous_calls_do_not_hold_up_a_stop(tmp_path: Path) -> None:
    source = """
    async def torch():
        print("waiting", flush=True)
        await spark.aexecute("%", timeout=600)
    """
    with running(script(tmp_path, source), *options("fussy")) as run:
        run.wait_printed("waiting")
        assert run.stop() == 0


def test_the_result_of_a_submitted_call_does_not_hold_up_a_stop(tmp_path: Path) -> None:
    source = """
    def torch():
        call = spark.submit("%", timeout=600)
        print("waiting", flush=True)
        call.result()
    """
    with running(script(tmp_path, source), *options("fussy")) as run:
        run.wait_printed("waiting")
        assert run.stop() == 0


def test_a_script_that_was_stopped_may_call_models_to_finish_cleanly(tmp_path: Path) -> None:
    source = """
    def torch():
        try:
            print("running", flush=True)
            while True:
                spark.checkpoint()
        except SparkStopError:
            print("last words:", spark.execute("#9"))
    """
    with running(script(tmp_path, source), *options("fussy")) as run:
        run.wait_printed("running")
        assert run.stop() == 0
        assert "last words: #9" in run.printed()


def test_short_calls_are_not_interrupted_in_the_middle_of_a_step(tmp_path: Path) -> None:
    source = """
    from spark_runtime import SparkReloadError

    CODE = 0

    def torch():
        spark.execute("loaded")
        print("code", CODE, flush=True)
        while True:
            spark.checkpoint()
            began = time.monotonic()
            try:
                spark.execute(1)
            except SparkReloadError:
                print("interrupted after", time.monotonic() - began, flush=True)
                raise
    """
    with running(script(tmp_path, source), *options("fussy")) as run:
        run.wait_printed("code 0")
        for code in range(1, 6):
            script(tmp_path, source.replace("CODE = 0", f"CODE = {code}"))
            run.wait_printed(f"code {code}")
        assert run.stop() == 0
        slow = re.findall(r"interrupted after (.*)", run.printed())  # this machine may hold a call for so long
        assert all(float(seconds) >= LOOK_SECONDS for seconds in slow)


def test_a_pause_waits_for_the_answer(tmp_path: Path) -> None:
    source = """
    def torch():
        print("waiting", flush=True)
        print(spark.execute("#9"), "answered", flush=True)
        spark.checkpoint()
        print("resumed", flush=True)
    """
    with running(script(tmp_path, source), *options("fussy")) as run:
        run.wait_printed("waiting")
        run.ctl("pause")
        run.wait_for("state", state="paused")
        run.wait_printed("answered")
        assert "resumed" not in run.printed()
        run.ctl("resume")
        run.wait_printed("resumed")
        assert run.wait_end() == 0


def test_cancelling_a_job_ends_the_call_of_a_model_that_it_waits_for(tmp_path: Path) -> None:
    source = """
    @spark.expose
    def forever():
        print("waiting", flush=True)
        return spark.execute("%", timeout=600)

    def torch():
        pass
    """
    with running(script(tmp_path, source), *options("fussy"), "--call", "forever") as run:
        run.wait_printed("waiting")
        run.ctl("cancel", run.wait_count("job", step="running")["id"])
        assert "cancelled" in run.wait_for("job", step="raised")["error"]
        assert run.stop() == 0


# --- ends that nobody asked for ---


def test_a_replica_that_is_killed_fails_the_call_it_was_at(tmp_path: Path) -> None:
    source = """
    def torch():
        spark.execute(0)
        print("pid", os.getpid(), flush=True)
        try:
            spark.execute("%", timeout=600)
        except ReplicaDied as problem:
            print(problem.model, problem.replica, problem.details["how"])
        print(spark.execute("still there"))
    """
    with running(script(tmp_path, source), *options("fussy")) as run:
        worker = int(run.next_line("pid"))
        (replica,) = replicas(run, worker)
        wait_computing(replica)
        os.kill(replica, signal.SIGKILL)
        assert run.wait_end() == 0
        assert run.printed().splitlines()[1:] == ["fussy 1 killed by SIGKILL", "still there"]


def test_a_worker_that_is_killed_leaves_no_call_behind(tmp_path: Path) -> None:
    source = """
    def torch():
        runs = spark.persist("runs", list)
        spark.checkpoint()
        if os.path.exists("again"):
            print(spark.execute("free again"))
            return
        open("again", "w").close()
        calls = [spark.submit("%", timeout=600) for _ in range(100)]
        print("pid", os.getpid(), flush=True)
        calls[0].result()
    """
    with running(script(tmp_path, source), *options("fussy")) as run:
        os.kill(int(run.next_line("pid")), signal.SIGKILL)
        run.wait_printed("free again")  # by the only replica there is
        assert run.wait_end() == 0


def test_processes_of_models_are_no_orphans_of_the_script(tmp_path: Path) -> None:
    source = """
    def torch():
        print("answer", spark.execute(0), flush=True)
        print("pid", os.getpid(), flush=True)
        while True:
            spark.checkpoint()
            time.sleep(0.002)
    """
    with running(script(tmp_path, source), *options("fussy")) as run:
        worker = int(run.next_line("pid"))
        before = replicas(run, worker)
        (nursery,) = [each for each in run.nurseries() if worker in children(each)]
        os.kill(nursery, signal.SIGKILL)  # what it leaves behind falls to the supervisor, which ends it
        worker = int(run.next_line("pid"))
        assert run.next_line("answer") == run.next_line("answer") == "0"
        assert before
        assert set(before) <= set(replicas(run, worker))
        assert run.stop() == 0


@pytest.mark.parametrize("end", [RunProcess.stop, RunProcess.close], ids=["asked", "killed"])
def test_a_run_leaves_no_process_of_a_model(tmp_path: Path, end: Callable[[RunProcess], object]) -> None:
    source = """
    def torch():
        calls = [spark.submit("%", "fussy", timeout=600) for _ in range(2)]
        print(spark.execute({"xs": [1]}, "json_model")["n"], flush=True)
        calls[0].result()
    """
    write(tmp_path / "pyproject.toml", f"[tool.spark.models.fussy]\npath = '{MODELS}/fussy.wasm'\nreplicas = 2\n")
    with running(script(tmp_path, source), *options("json_model")) as run:
        run.wait_printed("1.0")
        family = descendants(run.process.pid)
        assert len(family) >= 6  # two nurseries, the script, three replicas
        end(run)
        wait_gone(family)


@pytest.mark.parametrize(
    "lie",
    [
        'Execute(7, "", "", b"1", 0.0)',  # twice
        'Execute(8, "", "", b"1", float("nan"))',
        'Execute(8, "", "", b"1", -1.0)',
        'Execute(8, "", "execute", b"\\xc1", 0.0)',
        'Execute(8, "", "execute", b"\\x01", 0.0)',
        'Executed(8, "", 1, b"1")',
    ],
)
def test_a_worker_that_lies_about_calls_is_ended(tmp_path: Path, lie: str) -> None:
    source = f"""
    from spark_workers.messages import Execute, Executed

    def torch():
        if not os.path.exists("again"):
            open("again", "w").close()
            spark.session._send(Execute(7, "", "", b'"%"', 600.0))
            spark.session._send({lie})
            while True:
                spark.checkpoint()
        print(spark.execute("free again"))
    """
    with running(script(tmp_path, source), *options("fussy")) as run:
        assert "it broke the protocol with Execute" in run.wait_for("error", kind="worker")["text"]
        run.wait_printed("free again")
        assert run.wait_end() == 0


def test_odd_but_harmless_words_of_a_worker_are_passed_over(tmp_path: Path) -> None:
    lines = printed_by(
        tmp_path,
        """
        from spark_workers.messages import Execute, StopExecute

        def torch():
            spark.session._send(StopExecute(99))
            spark.session._send(Execute(2**63, "", "", b'"%"', 1e300))
            spark.session._send(StopExecute(2**63))
            spark.session._send(Execute(77, "", "", b'"nobody waits"', 0.0))
            print(spark.execute("an answer", timeout=10**400))
        """,
        "fussy",
    )
    assert lines == ["an answer"]


# --- new code of a model ---


def test_a_rebuilt_model_answers_the_running_script(tmp_path: Path) -> None:
    shutil.copy(MODELS / "spin_model.wasm", tmp_path / "model.wasm")
    source = """
    def torch():
        while True:
            spark.checkpoint()
            try:
                print("sum", spark.call("model", "add", 1, 2), flush=True)
                return
            except FunctionMissing:
                print("not yet", flush=True)
            time.sleep(0.01)
    """
    with running(script(tmp_path, source), "--model", "model.wasm") as run:
        run.wait_printed("not yet")
        shutil.copy(JSON, tmp_path / "new.wasm")
        os.replace(tmp_path / "new.wasm", tmp_path / "model.wasm")
        run.wait_for("note", text=lambda text: "model 'model': new code" in text)
        run.wait_printed("sum 3")
        assert run.wait_end() == 0


# --- naming models ---

ASKING = """
    def torch():
        print(spark.execute({"xs": [1, 2]}, "pricing"))
"""


def test_a_project_names_its_models(tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    (tmp_path / "models").mkdir()
    shutil.copy(JSON, tmp_path / "models" / "pricing.wasm")
    write(tmp_path / "pyproject.toml", '[tool.spark.models]\npricing = "models/pricing.wasm"\n')
    write(tmp_path / "scripts" / "train.py", ASKING)
    done = spark("run", "scripts/train.py", "--exit", "--no-watch", cwd=tmp_path)
    assert done.stdout.startswith("{'n': 2.0"), done.stderr


def test_the_command_line_wins_over_the_project(tmp_path: Path) -> None:
    write(tmp_path / "pyproject.toml", '[tool.spark.models]\npricing = "missing.wasm"\nother = "missing.wasm"\n')
    write(tmp_path / "train.py", ASKING)
    done = spark("run", "train.py", "--exit", "--no-watch", "--model", f"pricing={JSON}", cwd=tmp_path)
    assert done.stdout.startswith("{'n': 2.0"), done.stderr


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["=x.wasm"], "'=x.wasm' is not NAME=PATH, or PATH"),
        (["pricing="], "'pricing=' is not NAME=PATH, or PATH"),
        (["pricing=missing.wasm"], "there is no file 'missing.wasm' for the model 'pricing'"),
        (["a=b/missing.wasm"], "there is no file 'b/missing.wasm' for the model 'a'"),
        (["./a=b.wasm"], "there is no file './a=b.wasm' for the model 'a=b'"),
        ([str(JSON), f"json_model={JSON}"], "two models have the name 'json_model'"),
    ],
)
def test_a_model_that_cannot_be_meant_is_one_sentence(tmp_path: Path, given: list[str], sentence: str) -> None:
    write(tmp_path / "train.py", "def torch(): pass\n")
    words = [word for each in given for word in ("--model", each)]
    done = spark("run", "train.py", *words, cwd=tmp_path)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


def test_a_table_may_say_everything_about_a_model(tmp_path: Path) -> None:
    write(
        tmp_path / "pyproject.toml",
        """
        [tool.spark.models.a]
        path = "a.wasm"
        replicas = 3
        keep = true
        kind = "command"
        args = ["-v"]
        env = { MODE = "fast" }
        memory_limit = "256MiB"
        stack_limit = 65536
        table_limit = 10
        interrupt = "epoch"
        fresh = true
        retries = 1
        watch = false
        timeout = 2.5
        entry = "go"

        [tool.spark.models."b c"]
        path = "/models/b.wasm"
        engine = "wasmer"
        python = "python3.10"

        [tool.spark.models.d]
        path = "d.wasm"
        python = "venv/bin/python"
        """,
    )
    folder = tmp_path / "deep" / "below"
    folder.mkdir(parents=True)
    a = Model(
        "a",
        tmp_path / "a.wasm",
        replicas=3,
        keep=True,
        kind="command",
        args=["-v"],
        env={"MODE": "fast"},
        memory_limit=256 << 20,
        stack_limit=65536,
        table_limit=10,
        interrupt="epoch",
        fresh=True,
        retries=1,
        timeout=2.5,
        entry="go",
    )
    b = Model("b c", Path("/models/b.wasm"), engine="wasmer", python="python3.10", watch=True)
    d = Model("d", tmp_path / "d.wasm", python=str(tmp_path / "venv/bin/python"), watch=True)
    assert configured_models(folder / "train.py", watch=True) == {"a": a, "b c": b, "d": d}


def test_only_the_nearest_project_counts(tmp_path: Path) -> None:
    write(tmp_path / "pyproject.toml", '[tool.spark.models]\npricing = "a.wasm"\n')
    (tmp_path / "inner").mkdir()
    write(tmp_path / "inner" / "pyproject.toml", '[project]\nname = "inner"\n')
    assert configured_models(tmp_path / "inner" / "train.py", watch=True) == {}


def test_a_file_that_does_not_mention_spark_may_have_any_fault(tmp_path: Path) -> None:
    write(tmp_path / "pyproject.toml", "<<<<<<< HEAD\n")
    assert configured_models(tmp_path / "train.py", watch=True) == {}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("[tool.spark.models\n", "is not TOML, so its [tool.spark.models] cannot be read"),
        ("[tool]\nspark = 3\n", "[tool.spark] is 3, not a table"),
        ("[tool.spark]\nmodels = ['a.wasm']\n", "[tool.spark.models] is ['a.wasm'], not a table"),
        ("[tool.spark.models]\na = 3\n", "[tool.spark.models.a] is 3, not the path of a model or a table"),
        ("[tool.spark.models]\na = ''\n", "[tool.spark.models.a] path is '', not a text"),
        ("[tool.spark.models.a]\nreplicas = 3\n", "[tool.spark.models.a] has no path; give it that"),
        ("[tool.spark.models.a]\npath = 'x'\nreplica = 3\n", "[tool.spark.models.a] has a field 'replica', and"),
        ("[tool.spark.models.a]\npath = 'x'\nname = 'b'\n", "[tool.spark.models.a] has a field 'name', and"),
        ("[tool.spark.models.a]\npath = 'x'\nreplicas = '3'\n", "replicas is '3', not a whole number"),
        ("[tool.spark.models.a]\npath = 'x'\nreplicas = true\n", "replicas is True, not a whole number"),
        ("[tool.spark.models.a]\npath = 'x'\nreplicas = 0\n", "model 'a': replicas is 0, not between 1 and 1024"),
        ("[tool.spark.models.a]\npath = 'x'\nkind = 'odd'\n", "model 'a': kind is 'odd', not one of auto, plain"),
        ("[tool.spark.models.a]\npath = 'x'\nkeep = 1\n", "keep is 1, not true or false"),
        ("[tool.spark.models.a]\npath = 'x'\ntimeout = '1s'\n", "timeout is '1s', not a number"),
        ("[tool.spark.models.a]\npath = 'x'\ntimeout = nan\n", "timeout is nan, not a number of seconds above 0"),
        ("[tool.spark.models.a]\npath = 'x'\nargs = '-v'\n", "args is '-v', not a list of texts"),
        ("[tool.spark.models.a]\npath = 'x'\nenv = { A = 1 }\n", "env is {'A': 1}, not a table of texts"),
        ("[tool.spark.models.a]\npath = 'x'\nmemory_limit = 'big'\n", "memory_limit is 'big', not a size such as"),
        ("[tool.spark.models.a]\npath = 'x'\nmemory_limit = 1.5\n", "memory_limit is 1.5, not a number of bytes"),
        ('[tool.spark.models."a\\nb"]\n', '[tool.spark.models."a\\nb"] has no path'),
        ("[tool.spark.models]\n'' = 'x'\n", "a model needs a name"),
    ],
)
def test_a_table_that_makes_no_sense_is_one_sentence(tmp_path: Path, content: str, sentence: str) -> None:
    path = tmp_path / "pyproject.toml"
    path.write_text(content)
    with pytest.raises(BadRequestError) as caught:
        configured_models(tmp_path / "train.py", watch=True)
    told = str(caught.value)
    assert told.startswith(str(path))
    assert sentence in told
    assert "\n" not in told


def test_a_bad_table_ends_the_command_with_its_sentence(tmp_path: Path) -> None:
    write(tmp_path / "pyproject.toml", "[tool.spark.models]\npricing = 3\n")
    write(tmp_path / "train.py", "def torch(): pass\n")
    done = spark("run", "train.py", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("spark: ")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "size"), [("1", 1), ("2k", 2000), ("256MiB", 256 << 20), ("1 GB", 10**9), (" 2gi ", 2 << 30)]
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


# --- the page about it ---


def test_the_example_of_the_page_runs(tmp_path: Path) -> None:
    (source,) = re.findall(r"^```python3\n(.*?)^```", (DOCS / "scripts.md").read_text(), re.M | re.S)
    shutil.copy(JSON, tmp_path / "pricing.wasm")
    (tmp_path / "train.py").write_text(source)
    done = spark("run", "train.py", "--exit", "--no-watch", "--model", "pricing.wasm", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout
