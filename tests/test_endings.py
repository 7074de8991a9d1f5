"""How runs end, with which exit code, and what `spark ctl` and the control socket do to them."""

import contextlib
import json
import os
import pty
import select
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from harness import SPARK, RunProcess, lives, running, spark, write

LOOP = """
    import os, time

    def torch():
        state = spark.persist("state", lambda: {"n": 0})
        spark.expose(state=state)
        print("begin", state["n"])
        try:
            while True:
                spark.checkpoint()
                state["n"] += 1
                time.sleep(0.003)
        finally:
            print("finally", state["n"])
"""
CALLS = """
    import time

    @spark.expose
    def train(epochs=1):
        return {"epochs": epochs}

    @spark.expose
    def slow(seconds):
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            spark.checkpoint()
            time.sleep(0.01)
        return "slept"

    @spark.expose
    def bad():
        raise ValueError("no good")

    def torch():
        print("begin")
"""


def last_state(run: RunProcess) -> str:
    return str(run.all_events("state")[-1]["state"])


# --- torch() returns ---


@pytest.mark.parametrize("options", [(), ("--exit",), ("--no-watch",), ("--watch",)])
@pytest.mark.parametrize("body", ["pass", "spark.expose(x=1)", "spark.persist('x', int)", "return 5"])
def test_a_return_with_no_function_exposed_is_done(tmp_path: Path, options: tuple[str, ...], body: str) -> None:
    with running(write(tmp_path / "a.py", f"def torch():\n    {body}\n"), *options) as run:
        assert run.wait_end() == 0
        assert last_state(run) == "done"
        assert run.all_events("error") == []


def test_a_done_run_always_ends(tmp_path: Path) -> None:
    # Its last snapshot is still on its way to the disk when it is done.
    script = write(tmp_path / "a.py", "def torch():\n    spark.persist('x', lambda: bytearray(3_000_000))\n")
    for _ in range(8):
        with running(script, SPARKRT_FAIL="store.before_fsync:sleep") as run:
            assert run.wait_end(10) == 0
            assert run.stderr == ""


def test_a_done_run_always_ends_though_the_disk_is_slow_at_the_end(tmp_path: Path) -> None:
    script = write(tmp_path / "a.py", "def torch():\n    spark.persist('x', lambda: bytearray(3_000_000))\n")
    for place in ("store.after_rename", "store.before_prune", "store.before_rename", "store.mid_part"):
        with running(script, SPARKRT_FAIL=f"{place}:sleep") as run:
            assert run.wait_end(10) == 0
            assert run.stderr == ""


def test_a_return_with_a_function_exposed_waits_for_calls(tmp_path: Path) -> None:
    with running(write(tmp_path / "a.py", CALLS)) as run:
        run.wait_for("state", state="idle")
        assert json.loads(run.ctl("call", "train", '{"epochs": 3}').stdout) == {"epochs": 3}
        assert json.loads(run.ctl("call", "train", "[4]").stdout) == {"epochs": 4}
        assert json.loads(run.ctl("call", "train").stdout) == {"epochs": 1}
        assert run.status()["state"] == "idle"
        assert run.stop() == 0


def test_exit_ends_an_idle_run(tmp_path: Path) -> None:
    with running(write(tmp_path / "a.py", CALLS), "--exit") as run:
        assert run.wait_end() == 0


def test_a_planned_call_gives_its_result_and_exit_code_0(tmp_path: Path) -> None:
    with running(write(tmp_path / "a.py", CALLS), "--call", 'train={"epochs":5}', "--exit") as run:
        assert run.wait_end() == 0
        assert run.all_events("job")[-1]["result"] == {"epochs": 5}


def test_a_planned_call_during_a_loop_is_served_at_a_checkpoint(tmp_path: Path) -> None:
    source = LOOP + "\n    @spark.expose\n    def peek():\n        return spark.persisted['state']['n'] >= 0\n"
    with running(write(tmp_path / "a.py", source), "--call", "peek", "--exit") as run:
        assert run.wait_end() == 0
        assert run.all_events("job")[-1]["result"] is True
        assert "finally" in run.printed()


@pytest.mark.parametrize("call", ["bad", "nobody", "slow=[1,2,3]"])
def test_a_planned_call_that_fails_ends_in_1(tmp_path: Path, call: str) -> None:
    with running(write(tmp_path / "a.py", CALLS), "--call", call, "--call", "train", "--exit") as run:
        assert run.wait_end() == 1
        steps = {job["name"]: job for job in run.all_events("job")}
        assert steps[call.partition("=")[0]]["step"] == "raised"
        assert steps["train"]["step"] == "returned"


def test_a_result_that_is_not_json_is_described_or_refused(tmp_path: Path) -> None:
    source = "@spark.expose\ndef odd():\n    return {1: object(), 'x': {2, 3}, 'n': float('nan')}\ndef torch(): pass\n"
    with running(write(tmp_path / "a.py", source), "--call", "odd", "--exit") as run:
        run.wait_end()
        assert run.all_events("job")[-1]["step"] in ("returned", "raised")
        assert "Traceback" not in run.stderr


# --- it raises, or leaves ---


def test_a_raise_shows_the_scripts_own_traceback_and_ends_in_1(tmp_path: Path) -> None:
    source = "def torch():\n    inner()\n\ndef inner():\n    raise ValueError('the reason')\n"
    with running(write(tmp_path / "a.py", source)) as run:
        assert run.wait_end() == 1
        (error,) = run.all_events("error")
        assert error["text"].rstrip().endswith("ValueError: the reason")
        assert error["file"] == str(tmp_path / "a.py")
        assert error["line"] == 5
        assert "inner" in error["text"]
        assert "spark_workers" not in error["text"]
        assert "spark_runtime" not in error["text"]
        assert last_state(run) == "error"


@pytest.mark.parametrize("source", ["def torch(:\n", "import nowhere_at_all\ndef torch(): pass\n", "x = 1\n", "1/0\n"])
def test_a_script_that_cannot_be_loaded_ends_in_1_or_2_with_the_reason(tmp_path: Path, source: str) -> None:
    with running(write(tmp_path / "a.py", source)) as run:
        assert run.wait_end() in (1, 2)
        said = run.stderr + "".join(each["text"] for each in run.all_events("error"))
        assert "a.py" in said
        assert "spark_runtime/" not in said


def test_a_missing_script_is_one_sentence_and_2(tmp_path: Path) -> None:
    done = spark("run", "missing.py", cwd=tmp_path)
    assert done.returncode == 2
    assert "missing.py" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("leave", "code"),
    [
        ("sys.exit(7)", 7),
        ("sys.exit()", 0),
        ("sys.exit(0)", 0),
        ("sys.exit('a sentence')", 1),
        ("raise SystemExit(7)", 7),
        ("sys.exit(True)", 1),
        ("raise KeyboardInterrupt", 130),
        ("raise Exception", 1),
    ],
)
def test_the_scripts_own_exit_code_is_the_commands(tmp_path: Path, leave: str, code: int) -> None:
    with running(write(tmp_path / "a.py", f"import sys\ndef torch():\n    {leave}\n")) as run:
        assert run.wait_end() == code
        if "sentence" in leave:
            assert "a sentence\n" in run.stderr or any("a sentence" in e["text"] for e in run.all_events("error"))


def test_the_text_of_sys_exit_is_on_stderr(tmp_path: Path) -> None:
    write(tmp_path / "a.py", "import sys\ndef torch():\n    sys.exit('a sentence')\n")
    done = spark("run", "a.py", cwd=tmp_path)
    assert done.returncode == 1
    assert "a sentence" in done.stderr
    assert "Traceback" not in done.stderr


def test_plain_output_passes_through(tmp_path: Path) -> None:
    write(tmp_path / "a.py", "import sys\ndef torch():\n    print('out')\n    print('err', file=sys.stderr)\n    1/0\n")
    done = spark("run", "a.py", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stdout == "out\n"
    assert "err\n" in done.stderr
    assert "ZeroDivisionError" in done.stderr


def test_atexit_handlers_run_and_other_threads_are_waited_for(tmp_path: Path) -> None:
    source = """
        import atexit, threading, time

        atexit.register(lambda: print("at exit"))

        def late():
            time.sleep(0.5)
            print("thread ends")

        def torch():
            threading.Thread(target=late).start()
            print("torch ends")
    """
    with running(write(tmp_path / "a.py", source)) as run:
        assert run.wait_end() == 0
        assert run.printed().split("\n")[:-1] == ["torch ends", "thread ends", "at exit"]


@pytest.mark.parametrize("end", ["sys.exit(3)", "1/0"])
def test_atexit_handlers_run_at_other_ends(tmp_path: Path, end: str) -> None:
    source = f"import atexit, sys\ndef torch():\n    atexit.register(print, 'at exit')\n    {end}\n"
    with running(write(tmp_path / "a.py", source)) as run:
        assert run.wait_end() in (1, 3)
        assert run.printed() == "at exit\n"


# --- signals ---


def test_an_interrupt_stops_at_a_checkpoint_and_keeps_the_last_step(tmp_path: Path) -> None:
    with running(write(tmp_path / "a.py", LOOP)) as run:
        run.wait_for("values", values=lambda shown: shown.get("state", {}).get("n", 0) > 5)
        assert run.stop() == 0
        reached = int(run.next_line("finally"))
        assert last_state(run) == "stopped"
        assert run.all_events("error") == []
    with running(write(tmp_path / "a.py", LOOP), "--resume") as run:
        assert int(run.next_line("begin")) == reached
        assert run.stop() == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_is_an_exception_that_except_exception_does_not_catch(tmp_path: Path, number: signal.Signals) -> None:
    source = """
        import time
        from spark_runtime import SparkStopError

        def torch():
            while True:
                try:
                    spark.checkpoint()
                    print("step")
                    time.sleep(0.05)
                except Exception:
                    print("swallowed")
                except SparkStopError:
                    print("stopped")
                    raise
    """
    with running(write(tmp_path / "a.py", source)) as run:
        run.next_line("step")
        run.signal(number)
        assert run.wait_end() == 0
        assert "stopped" in run.printed()
        assert "swallowed" not in run.printed()


def test_sigterm_before_anything_runs_ends_too(tmp_path: Path) -> None:
    with running(write(tmp_path / "a.py", "import time\ntime.sleep(2)\n" + "def torch(): pass\n")) as run:
        run.wait_for("start")
        run.signal(signal.SIGTERM)
        assert run.wait_end(8) == 0


def test_sigterm_while_idle_and_while_paused_ends_in_0(tmp_path: Path) -> None:
    with running(write(tmp_path / "a.py", CALLS)) as run:
        run.wait_for("state", state="idle")
        run.signal(signal.SIGTERM)
        assert run.wait_end() == 0
    with running(write(tmp_path / "b.py", LOOP)) as run:
        run.next_line("begin")
        run.ctl("pause")
        run.wait_for("state", state="paused")
        run.signal(signal.SIGTERM)
        assert run.wait_end() == 0
        assert "finally" in run.printed()


STUBBORN = """
    import time

    def torch():
        begun = False
        while True:
            try:
                if not begun:
                    begun = True
                    print("begin")
                while True:
                    time.sleep(0.01)
            except KeyboardInterrupt:
                print("interrupted")
                if LEAVES:
                    raise
"""


def test_a_second_interrupt_is_a_keyboard_interrupt_and_ends_in_130(tmp_path: Path) -> None:
    with running(write(tmp_path / "a.py", STUBBORN.replace("LEAVES", "True"))) as run:
        run.next_line("begin")
        run.signal(signal.SIGINT)
        run.wait_for("state", state="stopping")
        run.signal(signal.SIGINT)
        assert run.wait_end(8) == 130
        assert "interrupted\n" in run.printed()


def test_a_third_interrupt_kills_and_ends_in_130(tmp_path: Path) -> None:
    with running(write(tmp_path / "a.py", STUBBORN.replace("LEAVES", "False"))) as run:
        run.next_line("begin")
        run.signal(signal.SIGINT)
        run.wait_for("state", state="stopping")
        run.signal(signal.SIGINT)
        run.next_line("interrupted")
        run.signal(signal.SIGINT)
        assert run.wait_end(8) == 130


def test_three_interrupts_at_once_end_in_130(tmp_path: Path) -> None:
    with running(write(tmp_path / "a.py", STUBBORN.replace("LEAVES", "False"))) as run:
        run.next_line("begin")
        for _ in range(3):
            run.signal(signal.SIGINT)
            time.sleep(0.02)  # else the kernel joins them into one
        assert run.wait_end(8) == 130


def test_interrupts_end_a_worker_that_is_stuck_in_native_code(tmp_path: Path) -> None:
    source = """
        import ctypes, signal

        def torch():
            print("begin", flush=True)
            signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals))  # nothing wakes the call below
            ctypes.PyDLL(None).usleep(25_000_000)
    """
    with running(write(tmp_path / "a.py", source)) as run:
        run.next_line("begin")
        for _ in range(3):
            run.signal(signal.SIGINT)
            time.sleep(0.1)
        assert run.wait_end(5) == 130


def test_impatient_interrupts_at_the_very_end_do_not_break_the_end(tmp_path: Path, base: Path) -> None:
    with running(write(tmp_path / "a.py", LOOP), SPARKRT_RUNTIME_DIR=str(base)) as run:
        run.next_line("begin")
        limit = time.monotonic() + 10
        while run.process.poll() is None and time.monotonic() < limit:
            run.signal(signal.SIGINT)
            time.sleep(0.005)
        assert run.wait_end() in (0, 130)
        assert "Traceback" not in run.stderr
    assert list((base / "sparkrt").iterdir()) == []


def test_sighup_reloads(tmp_path: Path) -> None:
    with running(write(tmp_path / "a.py", LOOP)) as run:
        run.wait_for("values", values=lambda shown: shown.get("state", {}).get("n", 0) > 5)
        assert run.next_line("begin") == "0"
        run.signal(signal.SIGHUP)
        assert int(run.next_line("begin")) > 5
        assert run.stop() == 0


def test_a_terminal_lets_an_error_wait_for_a_save(tmp_path: Path) -> None:
    script = write(tmp_path / "a.py", "def torch():\n    1/0\n")
    with terminal(script) as (process, read_until):
        read_until("ZeroDivisionError")
        write(script, "def torch():\n    print('healed')\n")
        read_until("healed")
        assert process.wait(8) == 0


@pytest.mark.parametrize(("keys", "code"), [(b"q", 0), (b"\x03", 0)])
def test_keys_end_a_run_on_a_terminal(tmp_path: Path, keys: bytes, code: int) -> None:
    with terminal(write(tmp_path / "a.py", LOOP)) as (process, read_until):
        read_until("begin 0")
        read_until.send(keys)
        read_until("finally")
        assert process.wait(8) == code


class ReadUntil:
    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.text = ""

    def __call__(self, wanted: str, seconds: float = 10.0) -> None:
        limit = time.monotonic() + seconds
        while wanted not in self.text:
            ready, _, _ = select.select([self._descriptor], [], [], max(0.0, limit - time.monotonic()))
            assert ready, f"{wanted!r} never came: {self.text[-2000:]!r}"
            try:
                self.text += os.read(self._descriptor, 65536).decode(errors="replace")
            except OSError:
                raise AssertionError(f"ended before {wanted!r}: {self.text[-2000:]!r}") from None

    def send(self, keys: bytes) -> None:
        os.write(self._descriptor, keys)


@contextlib.contextmanager
def terminal(script: Path) -> Iterator[tuple["subprocess.Popen[bytes]", ReadUntil]]:
    """The command on a terminal of its own."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        ["setsid", "--ctty", "--wait", *SPARK, "run", str(script)],
        cwd=script.parent, stdin=theirs, stdout=theirs, stderr=theirs,
    )  # fmt: skip
    os.close(theirs)
    reader = ReadUntil(ours)
    try:
        yield process, reader
    finally:
        os.close(ours)  # hangs up
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


# --- spark ctl ---


def test_ctl_pause_resume_step_and_status(tmp_path: Path) -> None:
    with running(write(tmp_path / "a.py", LOOP)) as run:
        run.next_line("begin")
        run.ctl("pause")
        run.wait_for("state", state="paused")
        at = run.status()
        assert at["state"] == "paused"
        assert run.status()["checkpoints"] == at["checkpoints"]
        n = at["values"]["state"]["n"]
        run.ctl("step", "3")
        run.wait_for("state", state="paused")
        assert run.status()["values"]["state"]["n"] == n + 3
        assert run.status()["checkpoints"] == at["checkpoints"] + 3
        run.ctl("step")
        run.wait_for("state", state="paused")
        assert run.status()["values"]["state"]["n"] == n + 4
        run.ctl("resume")
        run.wait_for("state", state="running")
        assert "running" in run.ctl("status").stdout
        assert str(run.script) in run.ctl("status").stdout


def test_ctl_stop_keeps_and_resume_goes_on(tmp_path: Path) -> None:
    with running(write(tmp_path / "a.py", LOOP)) as run:
        run.next_line("begin")
        run.wait_for("values", values=lambda shown: shown.get("state", {}).get("n", 0) > 5)
        run.ctl("stop")
        run.wait_for("state", state="stopped")
        reached = int(run.next_line("finally"))
        assert run.process.poll() is None
        run.ctl("resume")
        assert int(run.next_line("begin")) == reached
        assert run.stop() == 0


def test_ctl_stop_with_exit_ends_in_0(tmp_path: Path) -> None:
    with running(write(tmp_path / "a.py", LOOP), "--exit") as run:
        run.next_line("begin")
        run.ctl("stop")
        assert run.wait_end() == 0


def test_ctl_reload_restart_and_reset(tmp_path: Path) -> None:
    with running(write(tmp_path / "a.py", LOOP)) as run:
        run.next_line("begin")
        run.wait_for("values", values=lambda shown: shown.get("state", {}).get("n", 0) > 5)
        run.ctl("reload")
        reloaded = int(run.next_line("begin"))
        assert reloaded > 5
        run.ctl("restart")
        assert int(run.next_line("begin")) >= reloaded
        run.ctl("reset")
        assert int(run.next_line("begin")) == 0
        assert run.stop() == 0


def test_ctl_back_goes_to_the_code_that_worked(tmp_path: Path) -> None:
    with running(write(tmp_path / "a.py", LOOP)) as run:
        run.next_line("begin")
        run.wait_for("values", values=lambda shown: shown.get("state", {}).get("n", 0) > 5)
        run.save(LOOP.replace("spark.checkpoint()", "1/0"))
        # Without a terminal an error ends the run, so the new code only says that it is there.
        assert run.wait_end() == 1
    good = LOOP.replace('"begin"', '"good begin"')
    with running(write(tmp_path / "a.py", good)) as run:
        run.next_line("good begin")
        run.wait_for("values", values=lambda shown: shown.get("state", {}).get("n", 0) > 5)
        run.save(LOOP.replace('"begin"', '"new begin"').replace("spark.checkpoint()", "pass", 1))
        run.next_line("new begin")
        run.ctl("back")
        assert int(run.next_line("good begin", seconds=8)) > 5


def test_a_runtime_folder_with_a_long_path_that_was_asked_for_is_used_or_refused(tmp_path: Path) -> None:
    long = tmp_path / ("long" * 20)
    long.mkdir(mode=0o700)
    write(tmp_path / "a.py", "def torch():\n    print('it ran')\n")
    done = spark("run", "a.py", cwd=tmp_path, SPARKRT_RUNTIME_DIR=str(long))
    assert (long / "sparkrt").exists() or "SPARKRT_RUNTIME_DIR" in done.stderr


def test_ctl_quit_ends_and_list_lists(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARKRT_RUNTIME_DIR", str(base))
    with running(write(tmp_path / "a.py", LOOP)) as run, running(write(tmp_path / "b.py", LOOP)) as other:
        run.next_line("begin")
        other.next_line("begin")
        listed = spark("ctl", "list", cwd=tmp_path).stdout
        assert str(run.script) in listed
        assert str(other.script) in listed
        two = spark("ctl", "status", cwd=tmp_path)
        assert two.returncode != 0
        assert "--run" in two.stderr
        assert spark("ctl", "--run", "b.py", "quit", cwd=tmp_path).returncode == 0
        assert other.wait_end() == 0
        assert "finally" in other.printed()
        assert str(other.script) not in spark("ctl", "list", cwd=tmp_path).stdout
        run.ctl("quit")
        assert run.wait_end() == 0


def test_ctl_without_a_run_says_so(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARKRT_RUNTIME_DIR", str(base))
    for words in (["status"], ["pause"], ["call", "x"], ["--run", "nobody", "stop"]):
        done = spark("ctl", *words, cwd=tmp_path)
        assert done.returncode != 0
        assert "Traceback" not in done.stderr
        assert done.stderr.strip()


def refused(run: RunProcess, *words: str) -> str:
    done = run.ctl(*words, check=False)
    assert done.returncode != 0, f"{words} was accepted"
    assert done.stderr.strip()
    assert "Traceback" not in done.stderr
    return done.stderr


def test_what_does_not_fit_the_state_is_refused_with_a_sentence(tmp_path: Path) -> None:
    with running(write(tmp_path / "a.py", LOOP)) as run:
        run.next_line("begin")
        run.wait_for("values")
        assert "nobody" in refused(run, "call", "nobody")
        refused(run, "call", "nobody", "{not json")
        refused(run, "set", "nothing", "1")
        refused(run, "step", "0")
        refused(run, "step", "-1")
        run.ctl("stop")
        run.wait_for("state", state="stopped")
        refused(run, "pause")
        assert run.status()["state"] == "stopped"
        run.ctl("resume")
        run.wait_for("state", state="running")


def test_a_long_call_gives_its_job_and_ctl_waits_for_the_result(tmp_path: Path) -> None:
    with running(write(tmp_path / "a.py", CALLS)) as run:
        run.wait_for("state", state="idle")
        done = run.ctl("call", "slow", "1.4")
        assert json.loads(done.stdout) == "slept"
        assert "job-" in done.stderr
        raised = run.ctl("call", "bad", check=False)
        assert raised.returncode == 1
        assert "ValueError: no good" in raised.stderr


# --- the socket itself ---


class Raw:
    """A client that sends bytes."""

    all: ClassVar["list[Raw]"] = []

    def __init__(self, run: RunProcess) -> None:
        start = next(each for each in run.events if each["event"] == "start")
        (path,) = Path(os.environ["SPARKRT_RUNTIME_DIR"]).rglob(f"{start['run']}.sock")
        self.path = path
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(8)
        self.socket.connect(str(path))
        self.file = self.socket.makefile("rb")
        self.all.append(self)

    def close(self) -> None:
        self.file.close()
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def answer(self) -> Any:
        line = self.file.readline()
        assert line, "the connection was closed"
        return json.loads(line)

    def ask(self, **request: Any) -> Any:
        self.send(json.dumps({"jsonrpc": "2.0", "id": "a", **request}).encode() + b"\n")
        return self.answer()


@pytest.fixture(autouse=True)
def _close_clients() -> Iterator[None]:
    yield
    while Raw.all:
        Raw.all.pop().close()


@pytest.fixture
def base() -> Iterator[Path]:
    """A runtime folder with a short path: a socket's path can have 107 characters."""
    with tempfile.TemporaryDirectory(prefix="rt-") as folder:
        yield Path(folder)


@pytest.fixture
def idle(tmp_path: Path) -> Iterator[RunProcess]:
    with running(write(tmp_path / "a.py", CALLS)) as run:
        run.wait_for("state", state="idle")
        yield run
        assert run.status()["state"] in ("idle", "running")
        assert run.stop() == 0
        assert "Traceback" not in run.stderr, run.stderr


def test_odd_requests_have_the_right_errors(idle: RunProcess) -> None:
    raw = Raw(idle)
    for line, code in (
        (b"nonsense", -32700),
        (b'{"jsonrpc": "2.0", "id": 1', -32700),
        (b"\xff\xfe\x00", -32700),
        (b"[" * 100_000, -32700),
        (b"1", -32600),
        (b"{}", -32600),
        (b'{"id": 1, "method": "status"}', -32600),
        (b'{"jsonrpc": "2.0", "id": 1, "method": 5}', -32600),
        (b'{"jsonrpc": "2.0", "id": 1, "method": "explode"}', -32601),
        (b'{"jsonrpc": "2.0", "id": 1, "method": "status", "params": {"x": 1}}', -32602),
        (b'{"jsonrpc": "2.0", "id": 1, "method": "step", "params": {"count": "many"}}', None),
        (b'{"jsonrpc": "2.0", "id": 1, "method": "wait", "params": {"job": ["x"]}}', None),
        (b'{"jsonrpc": "2.0", "id": 1, "method": "cancel", "params": {"job": {}}}', None),
        (b'{"jsonrpc": "2.0", "id": 1, "method": "call", "params": {"name": 5}}', None),
        (b'{"jsonrpc": "2.0", "id": 1, "method": "call", "params": {"name": {}}}', None),
        (b'{"jsonrpc": "2.0", "id": 1, "method": "set", "params": {"control": [], "value": 1}}', None),
        (b'{"jsonrpc": "2.0", "id": 1, "method": "call"}', -32602),
    ):
        raw.send(line + b"\n")
        answer = raw.answer()
        assert "error" in answer, (line[:80], answer)
        if code is not None:
            assert answer["error"]["code"] == code, (line[:80], answer)
        assert "result" not in answer
    assert raw.ask(method="status")["id"] == "a"


@pytest.mark.parametrize("params", ['"5"', "5", "null", "true"])
def test_params_that_are_no_object_or_list_are_refused(idle: RunProcess, params: str) -> None:
    raw = Raw(idle)
    raw.send(b'{"jsonrpc": "2.0", "id": 1, "method": "status", "params": ' + params.encode() + b"}\n")
    assert raw.answer()["error"]["code"] in (-32600, -32602)


def test_a_notification_has_no_answer(idle: RunProcess) -> None:
    raw = Raw(idle)
    raw.send(b'{"jsonrpc": "2.0", "method": "call", "params": {"name": "train"}}\n')
    raw.send(b'{"jsonrpc": "2.0", "method": "pause_nothing"}\n')
    answer = raw.ask(method="status")
    assert answer["id"] == "a"
    assert answer["result"]["state"]


def test_answers_have_the_id_of_their_request(idle: RunProcess) -> None:
    raw = Raw(idle)
    raw.send(b'{"jsonrpc": "2.0", "id": "slow", "method": "call", "params": {"name": "slow", "params": 0.3}}\n')
    raw.send(b'{"jsonrpc": "2.0", "id": "quick", "method": "status"}\n')
    assert raw.answer()["id"] == "quick"
    answer = raw.answer()
    assert answer["id"] == "slow"
    assert answer["result"]["result"] == "slept"


def test_a_burst_of_garbage_and_a_sudden_goodbye_harm_nobody(idle: RunProcess) -> None:
    for garbage in (os.urandom(50_000), b"\n" * 1000, b"\0" * 10_000, b'{"jsonrpc"', b"{}\n" * 500):
        raw = Raw(idle)
        with contextlib.suppress(OSError):
            raw.send(garbage)
        raw.close()
    assert Raw(idle).ask(method="status")["result"]["state"] == "idle"


def test_a_line_of_twenty_megabytes_is_refused_and_harms_nobody(idle: RunProcess) -> None:
    raw = Raw(idle)
    with contextlib.suppress(OSError):
        raw.send(b'"' + b"x" * 20_000_000 + b'"\n')
        raw.file.readline()
    assert Raw(idle).ask(method="status")["result"]["state"] == "idle"


def test_a_large_call_and_a_large_answer_pass(idle: RunProcess) -> None:
    text = "x" * 2_000_000
    assert Raw(idle).ask(method="call", params={"name": "train", "params": [text]})["result"]["result"] == {
        "epochs": text
    }


def test_a_client_that_never_reads_does_not_slow_the_run(tmp_path: Path) -> None:
    chatty = """
        import time

        def torch():
            state = spark.persist("state", lambda: {"n": 0})
            spark.expose(state=state)
            while not state["n"] >= 600:
                spark.checkpoint()
                state["n"] += 1
                print("x" * 20_000)
                time.sleep(0.001)
    """
    with running(write(tmp_path / "a.py", chatty)) as run:
        run.wait_for("start")
        deadline = time.monotonic() + 5
        while True:
            try:
                raw = Raw(run)
                break
            except (OSError, ValueError):
                assert time.monotonic() < deadline
                time.sleep(0.01)
        raw.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.send(b'{"jsonrpc": "2.0", "id": 1, "method": "subscribe"}\n')
        assert run.wait_end(15) == 0
        raw.close()


def test_a_client_that_leaves_in_the_middle_of_a_call_harms_nobody(idle: RunProcess) -> None:
    raw = Raw(idle)
    raw.send(b'{"jsonrpc": "2.0", "id": 1, "method": "call", "params": {"name": "slow", "params": 0.5}}\n')
    idle.wait_for("job", step="running")
    raw.close()
    idle.wait_for("job", step="returned")


# --- the folder of the socket ---


def test_the_runtime_folder_and_socket_are_for_this_user_only(idle: RunProcess) -> None:
    path = Raw(idle).path
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert path.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("trouble", ["open to all", "a link", "a file", "foreign"])
def test_a_runtime_folder_that_others_can_enter_is_refused(tmp_path: Path, base: Path, trouble: str) -> None:
    folder = base / "sparkrt"
    if trouble == "open to all":
        folder.mkdir()
        folder.chmod(0o777)
    elif trouble == "a link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        folder.symlink_to(tmp_path / "elsewhere")
    elif trouble == "a file":
        folder.touch()
    else:
        if os.getuid():
            pytest.skip("only root can give a folder away")
        folder.mkdir(mode=0o700)
        os.chown(folder, 12345, 12345)
    write(tmp_path / "a.py", "def torch():\n    print('it ran')\n")
    done = spark("run", "a.py", cwd=tmp_path, SPARKRT_RUNTIME_DIR=str(base))
    assert done.returncode == 2
    assert "sparkrt" in done.stderr
    assert "Traceback" not in done.stderr
    assert "it ran" not in done.stdout


def test_nothing_is_left_in_the_runtime_folder(tmp_path: Path, base: Path) -> None:
    with running(write(tmp_path / "a.py", LOOP), SPARKRT_RUNTIME_DIR=str(base)) as run:
        run.next_line("begin")
        assert run.stop() == 0
    assert list((base / "sparkrt").iterdir()) == []


def test_what_a_killed_supervisor_left_is_cleared_away(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARKRT_RUNTIME_DIR", str(base))
    with running(write(tmp_path / "a.py", LOOP)) as run:
        run.next_line("begin")
        run.process.kill()
        run.process.wait()
    assert not lives(run.process.pid)
    assert "a.py" not in spark("ctl", "list", cwd=tmp_path).stdout
    assert list((base / "sparkrt").iterdir()) == []
