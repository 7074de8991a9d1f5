"""Workers that die, freeze or misbehave: each is named, replaced, and the state is always that of one moment."""

import os
import signal
import time
from pathlib import Path

import pytest
from harness import RunProcess, lives, running, write

# Keeps a promise over four persisted values, breaks it in the middle of each step, and checks it at each start.
WHOLE = """
    import ctypes, os, signal, sys, time
    import numpy as np

    CODE = "first code"

    def torch():
        state = spark.persist("state", lambda: {"n": 0})
        rising = spark.persist("rising", lambda: np.zeros(50_000))
        falling = spark.persist("falling", lambda: np.zeros(50_000, dtype=np.int64))
        seen = spark.persist("seen", list)
        spark.expose(state=state)
        n = state["n"]
        assert (rising == n).all(), "rising is torn"
        assert (falling == -n).all(), "falling is torn"
        assert seen == list(range(n)), "seen is torn"
        print("whole at", n)
        print(CODE)
        print("pid", os.getpid())
        while True:
            spark.checkpoint()
            state["n"] += 1
            rising += 1
            time.sleep(0.002)
            ask_for_death()
            falling -= 1
            seen.append(state["n"] - 1)

    def ask_for_death():
        if os.path.exists("die"):
            os.unlink("die")
            DEATH

"""


def dying_by(death: str) -> str:
    return WHOLE.replace("DEATH", death)


def let_die(run: RunProcess) -> None:
    (run.script.parent / "die").touch()


def assert_went_back_to(run: RunProcess, checkpoints: int) -> None:
    """A new worker began with the state of the snapshot at that checkpoint: checkpoints count from 1, steps from 0."""
    assert int(run.next_line("whole at")) == checkpoints - 1


def assert_goes_on(run: RunProcess) -> None:
    """The script runs: its state moves on."""
    now = run.status()["values"]["state"]["n"]
    run.wait_for("values", values=lambda shown: shown.get("state", {}).get("n", 0) > now)


def assert_script_never_raised(run: RunProcess) -> None:
    for each in run.all_events("error"):
        assert "AssertionError" not in each["text"], each["text"]
        assert "Traceback" not in each["text"], each["text"]


# --- deaths ---


@pytest.mark.parametrize(
    ("death", "name"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL"),
        ("os.kill(os.getpid(), signal.SIGTERM)", "SIGTERM"),
        ("ctypes.string_at(0)", "SIGSEGV"),
        ("os.abort()", "SIGABRT"),
        ("os._exit(3)", "exit code 3"),
        ("os._exit(0)", "exit code 0"),
    ],
)
def test_a_death_is_named_and_the_script_goes_on_from_the_last_snapshot(tmp_path: Path, death: str, name: str) -> None:
    with running(write(tmp_path / "train.py", dying_by(death))) as run:
        assert run.next_line("whole at") == "0"
        first = run.next_line("pid")
        snapshot = run.wait_for("snapshot")
        let_die(run)
        error = run.wait_for("error")
        assert name in error["text"]
        assert_went_back_to(run, snapshot["checkpoints"])
        assert run.next_line("pid") != first
        assert_goes_on(run)
        assert run.stop() == 0
        assert_script_never_raised(run)


def test_a_death_before_the_first_snapshot_begins_again(tmp_path: Path) -> None:
    (tmp_path / "die").touch()
    with running(write(tmp_path / "train.py", dying_by("os._exit(3)"))) as run:
        assert run.next_line("whole at") == "0"
        run.wait_for("error")
        assert run.next_line("whole at") == "0"
        assert_goes_on(run)


def test_a_death_while_paused_stays_paused(tmp_path: Path) -> None:
    with running(write(tmp_path / "train.py", dying_by("pass"))) as run:
        pid = int(run.next_line("pid"))
        run.wait_for("snapshot")
        run.ctl("pause")
        run.wait_for("state", state="paused")
        os.kill(pid, signal.SIGKILL)
        run.wait_for("error")
        run.next_line("pid")
        run.wait_for("state", state="paused")
        run.ctl("resume")
        assert_goes_on(run)


def test_last_words_before_a_sudden_exit_arrive(tmp_path: Path) -> None:
    script = """
        import os, sys

        def torch():
            print("a whole line")
            print("an unfinished one", end="", flush=True)
            print("on stderr", file=sys.stderr)
            os._exit(3)
    """
    with running(write(tmp_path / "train.py", script), "--exit", "--no-watch") as run:
        run.wait_for("error")
        assert run.printed().startswith("a whole line\nan unfinished one")
        assert run.wait_end() == 1
        assert run.stderr.startswith("on stderr\n")


def test_a_memory_error_is_the_scripts_own_error(tmp_path: Path) -> None:
    script = """
        def torch():
            spark.checkpoint()
            bytearray(1 << 60)
    """
    with running(write(tmp_path / "train.py", script)) as run:
        assert run.wait_end() == 1
        (error,) = run.all_events("error")
        assert "MemoryError" in error["text"]
        assert "train.py" in error["text"]
        assert error["line"] == 3
        assert error["kind"] != "worker"


# --- starting again and giving up ---


DIES_SOON = """
    import os, time

    def torch():
        state = spark.persist("state", lambda: {"n": 0})
        print("begin", os.getpid())
        while True:
            spark.checkpoint()
            state["n"] += 1
            if state["n"] == STEP:
                os._exit(3)
            time.sleep(0.002)
"""


def test_a_script_that_always_dies_is_parked_after_at_most_six_starts(tmp_path: Path) -> None:
    began = time.monotonic()
    with running(write(tmp_path / "train.py", DIES_SOON.replace("STEP", "1"))) as run:
        first = run.wait_for("error")
        assert "exit code 3" in first["text"]
        assert time.monotonic() - began < 3
        assert run.wait_end() == 1
        assert 3 <= run.printed().count("begin") <= 6
        assert time.monotonic() - began > 2, "there was no backoff"
        last = run.all_events("error")[-1]
        assert "exit code 3" in last["text"]
        assert run.all_events("state")[-1]["state"] == "error"


def test_dying_at_the_same_later_step_is_no_progress(tmp_path: Path) -> None:
    # How far a worker is known to have come varies by some checkpoints although it dies at the same step each time.
    with running(write(tmp_path / "train.py", DIES_SOON.replace("STEP", "60"))) as run:
        assert run.wait_end() == 1
        assert run.printed().count("begin") <= 6


def test_a_top_level_that_dies_is_parked_with_its_cause(tmp_path: Path) -> None:
    with running(write(tmp_path / "train.py", "import os\nprint('begin')\nos._exit(9)\ndef torch(): pass\n")) as run:
        error = run.wait_for("error")
        assert "exit code 9" in error["text"]
        assert run.wait_end() == 1
        assert 1 <= run.printed().count("begin") <= 6


def test_a_worker_that_cannot_start_is_parked_with_its_cause(tmp_path: Path) -> None:
    script = write(tmp_path / "train.py", "def torch(): pass\n")
    with running(script, SPARKRT_FAIL="worker.start:kill") as run:
        assert "SIGKILL" in run.wait_for("error")["text"]
        assert run.wait_end() == 1
        assert len(run.all_events("error")) <= 8


def kill_with_progress(tmp_path: Path, kills: int) -> None:
    with running(write(tmp_path / "train.py", dying_by("pass"))) as run:
        furthest = -1
        for count in range(1, kills + 1):
            begun = int(run.next_line("whole at"))
            assert begun > furthest, "it began where it had begun before, though a snapshot lay between"
            furthest = begun
            pid = int(run.next_line("pid"))
            run.wait_count("snapshot", count)
            os.kill(pid, signal.SIGKILL)
            run.wait_count("error", count)
        assert_goes_on(run)
        assert_script_never_raised(run)
        assert run.stop() == 0


def test_eight_kills_with_progress_in_between_never_park(tmp_path: Path) -> None:
    kill_with_progress(tmp_path, 8)


@pytest.mark.slow
def test_twenty_kills_with_progress_in_between_never_park(tmp_path: Path) -> None:
    kill_with_progress(tmp_path, 20)


def test_a_parked_script_starts_again_at_once_when_it_is_saved(tmp_path: Path) -> None:
    # The save comes during the longest wait: the new code does not wait for its end.
    with running(write(tmp_path / "train.py", DIES_SOON.replace("STEP", "1"))) as run:
        run.wait_count("error", 5)
        saved = time.monotonic()
        run.save("def torch():\n    print('healed')\n")
        run.next_line("healed")
        assert time.monotonic() - saved < 1.2
        assert run.wait_end() == 0


# --- frozen or only slow ---


def test_a_stopped_worker_is_found_and_replaced_within_two_seconds(tmp_path: Path) -> None:
    with running(write(tmp_path / "train.py", dying_by("pass"))) as run:
        pid = int(run.next_line("pid"))
        run.next_line("whole at")
        snapshot = run.wait_for("snapshot")
        began = time.monotonic()
        os.kill(pid, signal.SIGSTOP)
        run.wait_for("error", seconds=3)
        assert time.monotonic() - began < 2.3
        assert_went_back_to(run, snapshot["checkpoints"])
        assert not lives(pid)
        assert_goes_on(run)


def test_a_stopped_and_soon_continued_worker_goes_on_and_shows_its_values(tmp_path: Path) -> None:
    # A moment's stop may fall into the showing of values: that must not silence them for long.
    with running(write(tmp_path / "train.py", dying_by("pass"))) as run:
        pid = int(run.next_line("pid"))
        for _ in range(10):
            run.wait_for("values", seconds=3)
            os.kill(pid, signal.SIGSTOP)
            time.sleep(0.1)
            os.kill(pid, signal.SIGCONT)
        run.wait_for("values", seconds=3)
        assert run.all_events("error") == []


def test_a_script_that_holds_the_gil_is_slow_and_not_killed(tmp_path: Path) -> None:
    script = """
        import ctypes, os
        python = ctypes.PyDLL(None)  # keeps the GIL during the call

        def torch():
            spark.checkpoint()
            print("pid", os.getpid())
            spark.checkpoint()
            for _ in range(7):
                python.usleep(500_000)
            print("still", os.getpid())
    """
    with running(write(tmp_path / "train.py", script)) as run:
        pid = run.next_line("pid")
        assert run.next_line("still") == pid
        assert run.wait_end() == 0
        assert run.all_events("error") == []


@pytest.mark.slow
def test_a_pause_that_finds_no_checkpoint_says_where_the_code_is(tmp_path: Path) -> None:
    script = """
        import os, time

        def torch():
            spark.checkpoint()
            print("pid", os.getpid())
            waits_for_ever()

        def waits_for_ever():
            while True:
                time.sleep(0.01)
    """
    with running(write(tmp_path / "train.py", script)) as run:
        pid = int(run.next_line("pid"))
        run.ctl("pause")
        began = time.monotonic()
        note = run.wait_for("note", text=lambda text: "train.py" in text, seconds=20)
        assert 8 < time.monotonic() - began < 14
        assert "train.py:10" in note["text"] or "train.py:11" in note["text"] or "waits_for_ever" in note["text"]
        assert lives(pid)
        run.ctl("restart")
        run.wait_for("state", state="paused")  # what was asked holds for the new worker too
        run.ctl("resume")
        assert int(run.next_line("pid")) != pid


@pytest.mark.slow
def test_a_pause_during_native_code_says_so_and_kills_nobody(tmp_path: Path) -> None:
    script = """
        import ctypes, os
        python = ctypes.PyDLL(None)

        def torch():
            spark.checkpoint()
            print("pid", os.getpid(), flush=True)
            python.usleep(16_000_000)
            spark.checkpoint()
            print("still", os.getpid())
    """
    with running(write(tmp_path / "train.py", script)) as run:
        pid = run.next_line("pid")
        run.ctl("pause")
        run.wait_for("note", text=lambda text: "no checkpoint" in text, seconds=16)
        run.wait_for("state", state="paused", seconds=20)
        run.ctl("resume")
        assert run.next_line("still") == pid


# --- in the middle of a snapshot ---


@pytest.mark.parametrize("place", ["worker.before_snapshot", "worker.mid_snapshot", "worker.before_commit"])
def test_a_death_during_a_snapshot_leaves_the_one_before(tmp_path: Path, place: str) -> None:
    source = dying_by("pass")
    # The first snapshot of a worker is the early one, the second is the one for the reload; `mid` is passed three
    # times in each, for the stream and two arrays.
    turn = 5 if place == "worker.mid_snapshot" else 2
    with running(write(tmp_path / "train.py", source), SPARKRT_FAIL=f"{place}@{turn}:kill") as run:
        run.next_line("whole at")
        snapshot = run.wait_for("snapshot")
        run.save(source.replace("first code", "second code"))
        error = run.wait_for("error")
        assert "SIGKILL" in error["text"]
        assert_went_back_to(run, snapshot["checkpoints"])
        run.next_line("second code")
        assert_goes_on(run)
        assert_script_never_raised(run)


@pytest.mark.parametrize("place", ["worker.before_snapshot", "worker.mid_snapshot", "worker.before_commit"])
def test_a_death_during_the_first_snapshot_begins_anew(tmp_path: Path, place: str) -> None:
    with running(write(tmp_path / "train.py", dying_by("pass")), SPARKRT_FAIL=f"{place}@1:kill") as run:
        assert run.next_line("whole at") == "0"
        run.wait_for("error")
        assert run.next_line("whole at") == "0"
        assert_script_never_raised(run)


# --- calls ---


def test_a_call_whose_worker_dies_is_repeated_twice_and_then_fails(tmp_path: Path) -> None:
    script = """
        import os

        @spark.expose
        def deadly():
            with open("calls", "a") as file:
                file.write("x")
            os._exit(3)

        @spark.expose
        def harmless():
            return "fine"

        def torch():
            pass
    """
    with running(write(tmp_path / "train.py", script), "--call", "deadly") as run:
        job = run.wait_for("job", name="deadly", step="raised")
        assert (tmp_path / "calls").read_text() == "xxx"
        assert "exit code 3" in job["error"] or "died" in job["error"], job
        assert run.ctl("call", "harmless").stdout.strip() == '"fine"'


def test_a_failed_deadly_call_with_exit_ends_in_1(tmp_path: Path) -> None:
    script = "import os\n@spark.expose\ndef deadly(): os._exit(3)\ndef torch(): pass\n"
    with running(write(tmp_path / "train.py", script), "--call", "deadly", "--exit") as run:
        assert run.wait_end() == 1
        assert run.all_events("job")[-1]["step"] == "raised"


def test_an_interrupted_call_is_made_again_as_the_same_job(tmp_path: Path) -> None:
    script = """
        import os

        @spark.expose
        def add(a, b=1):
            if not os.path.exists("died"):
                open("died", "w").close()
                os._exit(3)
            return a + b

        def torch():
            pass
    """
    with running(write(tmp_path / "train.py", script), "--call", 'add={"a": 1, "b": 2}', "--exit") as run:
        assert run.wait_end() == 0
        jobs = run.all_events("job")
        assert len({job["id"] for job in jobs}) == 1
        assert jobs[-1]["result"] == 3


def test_calls_that_wait_behind_a_deadly_one_are_not_lost(tmp_path: Path) -> None:
    script = """
        import os

        @spark.expose
        def deadly():
            os._exit(3)

        @spark.expose
        def count(n):
            return n

        def torch():
            pass
    """
    calls = [word for n in range(5) for word in ("--call", f"count={n}")]
    with running(write(tmp_path / "train.py", script), "--call", "deadly", *calls, "--exit") as run:
        assert run.wait_end() == 1
        results = [job["result"] for job in run.all_events("job") if job["step"] == "returned"]
        assert results == [0, 1, 2, 3, 4]


# --- grandchildren, the nursery, the channel ---


@pytest.mark.parametrize(
    "grandchild",
    [
        "subprocess.Popen(['sleep', '60'], close_fds=False)",
        "subprocess.Popen(['sleep', '60'], close_fds=False, start_new_session=True)",
        "os.fork() or time.sleep(60)",
    ],
)
def test_a_grandchild_does_not_delay_the_notice_of_a_death(tmp_path: Path, grandchild: str) -> None:
    script = f"""
        import os, subprocess, time

        def torch():
            if os.path.exists("died"):
                print("again")
                return
            open("died", "w").close()
            for fd in range(3, 64):
                try: os.set_inheritable(fd, True)
                except OSError: pass
            {grandchild}
            print("dying", time.monotonic())
            os._exit(3)
    """
    with running(write(tmp_path / "train.py", script)) as run:
        died = float(run.next_line("dying"))
        run.wait_count("error", 1, seconds=5)
        assert time.monotonic() - died < 1.5
        run.next_line("again")
        assert run.wait_end() == 0


def test_the_death_of_the_nursery_ends_in_a_new_one(tmp_path: Path) -> None:
    with running(write(tmp_path / "train.py", dying_by("pass"))) as run:
        run.next_line("whole at")
        run.next_line("pid")
        snapshot = run.wait_for("snapshot")
        killed = run.nurseries()
        for nursery in killed:
            os.kill(nursery, signal.SIGKILL)
        assert_went_back_to(run, snapshot["checkpoints"])
        assert_goes_on(run)
        assert not set(run.nurseries()) & set(killed)
        run.save(dying_by("pass").replace("first code", "second code"))
        run.next_line("second code")
        assert_goes_on(run)
        assert run.stop() == 0
        assert_script_never_raised(run)


def test_a_stopped_nursery_does_not_hold_up_the_run_for_ever(tmp_path: Path) -> None:
    with running(write(tmp_path / "train.py", dying_by("pass"))) as run:
        run.next_line("pid")
        run.wait_for("snapshot")
        stopped = run.nurseries()
        for nursery in stopped:
            os.kill(nursery, signal.SIGSTOP)
        try:
            run.save(dying_by("pass").replace("first code", "second code"))
            run.next_line("second code", seconds=10)
        finally:
            for nursery in stopped:
                if lives(nursery):
                    os.kill(nursery, signal.SIGCONT)


def test_a_flood_on_stdout_loses_nothing_and_keeps_its_order(tmp_path: Path) -> None:
    script = """
        import sys

        def torch():
            for n in range(100_000):
                print(f"{n:099d}")
                if n % 1000 == 0:
                    print(n, file=sys.stderr)
    """
    with running(write(tmp_path / "train.py", script)) as run:
        assert run.wait_end(40) == 0
        assert run.all_events("state")[-1]["state"] == "done"
        printed = run.printed()
        assert len(printed) == 10_000_000
        assert printed.split("\n")[:-1] == [f"{n:099d}" for n in range(100_000)]
        assert run.stderr.split("\n")[:-1] == [str(n) for n in range(0, 100_000, 1000)]


def test_a_flood_before_a_sudden_exit_arrives_whole(tmp_path: Path) -> None:
    script = """
        import os

        def torch():
            for n in range(30_000):
                print(n)
            os._exit(4)
    """
    with running(write(tmp_path / "train.py", script)) as run:
        run.wait_for("error")
        assert run.printed().split("\n")[:30_000] == [str(n) for n in range(30_000)]


@pytest.mark.parametrize(
    "garbage",
    [
        "os.urandom(5000)",
        "bytes(100_000)",
        "b'x'",
        "b'GET / HTTP/1.1\\\\r\\\\n\\\\r\\\\n'",
        "b'\\\\xff' * 70_000",
    ],
)
def test_a_worker_that_writes_garbage_to_its_channel_is_replaced(tmp_path: Path, garbage: str) -> None:
    death = f"""
            for fd in map(int, os.listdir("/proc/self/fd")):
                try:
                    if os.readlink(f"/proc/self/fd/{{fd}}").startswith("socket:"): os.write(fd, {garbage})
                except OSError: pass
    """.strip()
    with running(write(tmp_path / "train.py", dying_by(death))) as run:
        pid = int(run.next_line("pid"))
        run.next_line("whole at")
        snapshot = run.wait_for("snapshot")
        let_die(run)
        run.wait_for("error", seconds=5)
        assert_went_back_to(run, snapshot["checkpoints"])
        assert not lives(pid)
        assert_goes_on(run)
        assert run.stop() == 0
        assert_script_never_raised(run)


def test_a_worker_that_closes_its_channel_is_replaced(tmp_path: Path) -> None:
    death = """
            for fd in map(int, os.listdir("/proc/self/fd")):
                try:
                    if os.readlink(f"/proc/self/fd/{fd}").startswith("socket:"): os.close(fd)
                except OSError: pass
    """.strip()
    with running(write(tmp_path / "train.py", dying_by(death))) as run:
        pid = int(run.next_line("pid"))
        run.wait_for("snapshot")
        let_die(run)
        run.wait_for("error", seconds=5)
        assert int(run.next_line("pid")) != pid
        assert not lives(pid)
        assert_goes_on(run)


def test_a_script_that_closes_every_descriptor_is_replaced(tmp_path: Path) -> None:
    with running(write(tmp_path / "train.py", dying_by("os.closerange(0, 256)"))) as run:
        pid = int(run.next_line("pid"))
        run.wait_for("snapshot")
        let_die(run)
        run.wait_for("error", seconds=5)
        assert int(run.next_line("pid")) != pid
        assert_goes_on(run)


def test_values_are_shown_within_a_second_of_the_start_though_the_machine_is_busy(tmp_path: Path) -> None:
    # The first showing is the dearest: it must not be followed by a long silence.
    with running(write(tmp_path / "train.py", dying_by("pass"))) as run:
        run.next_line("pid")
        began = time.monotonic()
        run.wait_for("values", values=lambda shown: shown.get("state", {}).get("n", 0) > 50)
        assert time.monotonic() - began < 1.5
