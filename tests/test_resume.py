"""State that outlives every process: `--resume`, the lock on a script's folder, and disks that fail."""

import os
import random
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
from harness import SPARK, RunProcess, descendants, lives, running, spark, wait_gone, write

# Keeps a promise over several values and breaks it in the middle of each step.
WHOLE = """
    import time
    import numpy as np

    def torch():
        state = spark.persist("state", lambda: {"n": 0})
        rising = spark.persist("rising", lambda: np.zeros(60_000))
        falling = spark.persist("falling", lambda: np.zeros((200, 200), dtype=np.int64))
        seen = spark.persist("seen", list)
        spark.expose(state=state)
        n = state["n"]
        assert (rising == n).all() and (falling == -n).all() and seen == list(range(n)), "torn"
        print("whole at", n)
        while True:
            spark.checkpoint()
            state["n"] += 1
            rising += 1
            time.sleep(0.002)
            falling -= 1
            seen.append(state["n"] - 1)
"""
WITH_TORCH = """
    import time
    import torch as pt

    def torch():
        model = spark.persist("model", lambda: pt.nn.Linear(100, 100))
        adam = spark.persist("adam", lambda: pt.optim.Adam(model.parameters()))
        state = spark.persist("state", lambda: {"n": 0, "sum": float(model.weight.detach().double().sum())})
        spark.expose(state=state)
        assert float(model.weight.detach().double().sum()) == state["sum"], "torn"
        assert adam.param_groups[0]["params"][0] is model.weight, "two copies"
        steps = [int(each["step"]) for each in adam.state.values()]
        assert steps in ([], [state["n"]] * 2), (steps, state["n"])
        print("whole at", state["n"])
        while True:
            spark.checkpoint()
            loss = (model(pt.ones(1, 100)) ** 2).mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
            time.sleep(0.005)
            state["n"] += 1
            state["sum"] = float(model.weight.detach().double().sum())
"""


def kill_everything(run: RunProcess) -> None:
    """Kill -9 the supervisor, the nurseries, the workers: the oldest first."""
    family = [run.process.pid, *descendants(run.process.pid)]
    for pid in family:
        if lives(pid):
            os.kill(pid, signal.SIGKILL)
    run.process.wait()
    wait_gone(family)


def wait_stored(tmp_path: Path, count: int = 1, seconds: float = 10.0, script: str = "train.py") -> list[Path]:
    """Wait until so many snapshots lie on the disk."""
    limit = time.monotonic() + seconds
    while True:
        # A name that begins with a point is a file that is still being written.
        found = sorted((tmp_path / ".spark" / script / "runs").glob("*/[0-9]*.snapshot"))
        if len(found) >= count:
            return found
        assert time.monotonic() < limit, "no snapshot reached the disk"
        time.sleep(0.01)


def run_and_kill(tmp_path: Path, source: str, *options: str, stored: int = 1) -> tuple[int, str]:
    """Run until a snapshot is stored, kill everything; return where it began and the run's id."""
    with running(write(tmp_path / "train.py", source), *options) as run:
        began = int(run.next_line("whole at"))
        run.wait_for("snapshot")
        wait_stored(tmp_path, stored)
        kill_everything(run)
        return began, str(run.events[0]["run"])


# --- resume ---


@pytest.mark.parametrize("source", [WHOLE, WITH_TORCH], ids=["numpy", "torch"])
def test_after_the_death_of_everything_resume_goes_on(tmp_path: Path, source: str) -> None:
    if source is WITH_TORCH:
        pytest.importorskip("torch")
    with running(write(tmp_path / "train.py", source)) as run:
        assert run.next_line("whole at") == "0"
        snapshot = run.wait_for("snapshot")
        wait_stored(tmp_path)
        kill_everything(run)
    with running(tmp_path / "train.py", "--resume") as run:
        assert int(run.next_line("whole at")) == snapshot["checkpoints"] - 1
        now = run.status()["values"]["state"]["n"]
        run.wait_for("values", values=lambda shown: shown.get("state", {}).get("n", 0) > now)
        assert run.stop() == 0
        assert run.all_events("error") == []


def kill_at_random(tmp_path: Path, rounds: int) -> None:
    chance = random.Random(20261121)
    furthest, options = 0, ("--resume",)
    run_and_kill(tmp_path, WHOLE)
    for _ in range(rounds):
        with running(tmp_path / "train.py", *options) as run:
            began = int(run.next_line("whole at"))
            assert began >= furthest, "it went back behind a stored snapshot"
            time.sleep(chance.uniform(0, 1.4))  # about when the first snapshot is taken and written
            kill_everything(run)
            # Killed with it, the run may have stored more than it could say; what it said is a lower bound only.
            furthest = began
    with running(tmp_path / "train.py", "--resume") as run:
        assert int(run.next_line("whole at")) >= furthest
        assert run.stop() == 0


def test_five_kills_at_random_moments_never_tear_the_state(tmp_path: Path) -> None:
    kill_at_random(tmp_path, 5)


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_forty_kills_at_random_moments_never_tear_the_state(tmp_path: Path) -> None:
    kill_at_random(tmp_path, 40)


@pytest.mark.parametrize(
    "place",
    ["store.after_header", "store.before_fsync", "store.mid_part", "store.before_rename", "store.after_rename"],
)
def test_a_supervisor_killed_while_it_writes_leaves_a_whole_snapshot(tmp_path: Path, place: str) -> None:
    began, _ = run_and_kill(tmp_path, WHOLE)
    with running(tmp_path / "train.py", "--resume", SPARKRT_FAIL=f"{place}:kill") as run:
        first = int(run.next_line("whole at"))
        assert first > began
        run.process.wait(10)  # killed by itself while it writes the next
        assert run.process.returncode == -signal.SIGKILL
    with running(tmp_path / "train.py", "--resume") as run:
        assert int(run.next_line("whole at")) >= first
        assert run.stop() == 0


def test_a_stopped_run_resumes_at_its_last_step(tmp_path: Path) -> None:
    with running(write(tmp_path / "train.py", WHOLE)) as run:
        run.wait_for("values", values=lambda shown: shown.get("state", {}).get("n", 0) > 20)
        assert run.stop() == 0
        reached = run.all_events("snapshot")[-1]["checkpoints"]
        assert reached > 20
    with running(tmp_path / "train.py", "--resume") as run:
        assert int(run.next_line("whole at")) >= reached - 1


def test_a_damaged_newest_snapshot_gives_way_to_the_one_before(tmp_path: Path) -> None:
    run_and_kill(tmp_path, WHOLE)
    with running(tmp_path / "train.py", "--resume") as run:
        run.next_line("whole at")
        run.wait_for("values", values=lambda shown: bool(shown.get("state")))
        assert run.stop() == 0
    stored = wait_stored(tmp_path)
    newest = max(stored, key=lambda path: path.stat().st_mtime)
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 0xFF
    newest.write_bytes(content)
    with running(tmp_path / "train.py", "--resume") as run:
        assert int(run.next_line("whole at")) > 0
        notes = " ".join(each["text"] for each in run.all_events("note"))
        assert "damaged" in notes or "snapshot" in notes, notes


def test_a_fresh_run_begins_anew_and_keeps_the_unfinished_state(tmp_path: Path) -> None:
    _, first = run_and_kill(tmp_path, WHOLE)
    with running(tmp_path / "train.py") as run:
        assert run.next_line("whole at") == "0"
        second = run.events[0]["run"]
        assert second != first
        assert run.stop() == 0
    with running(tmp_path / "train.py", "--resume", "--from", first) as run:
        assert int(run.next_line("whole at")) > 0
        kill_everything(run)
    listed = {path.name for path in (tmp_path / ".spark" / "train.py" / "runs").iterdir()}
    assert {first, second} <= listed


def test_resume_takes_the_newest_run(tmp_path: Path) -> None:
    _, _first = run_and_kill(tmp_path, WHOLE)
    source = WHOLE.replace('{"n": 0}', '{"n": 0, "second": True}').replace('print("whole', 'print(state); print("whole')
    run_and_kill(tmp_path, source, stored=2)
    with running(tmp_path / "train.py", "--resume") as run:
        run.next_line("whole at")
        assert "'second': True" in run.printed()


def test_a_done_run_is_followed_by_a_fresh_one(tmp_path: Path) -> None:
    source = """
        def torch():
            state = spark.persist("state", lambda: {"n": 0})
            print("begin", state["n"])
            state["n"] += 1
            spark.checkpoint()
    """
    for _ in range(3):
        with running(write(tmp_path / "train.py", source)) as run:
            assert run.next_line("begin") == "0"
            assert run.wait_end() == 0


@pytest.mark.parametrize("options", [("--resume",), ("--resume", "--from", "nobody")])
def test_nothing_to_resume_is_a_sentence_and_2(tmp_path: Path, options: tuple[str, ...]) -> None:
    write(tmp_path / "train.py", WHOLE)
    done = spark("run", "train.py", *options, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.strip()
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("name", ["../../other", "", "/etc", ".."])
def test_a_run_that_is_no_name_is_refused(tmp_path: Path, name: str) -> None:
    run_and_kill(tmp_path, WHOLE)
    done = spark("run", "train.py", "--resume", "--from", name, cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_reset_drops_the_state_and_keeps_it_aside(tmp_path: Path) -> None:
    with running(write(tmp_path / "train.py", WHOLE)) as run:
        assert run.next_line("whole at") == "0"
        run.wait_for("snapshot")
        wait_stored(tmp_path)
        run.ctl("reset")
        assert run.next_line("whole at") == "0"
        aside = tmp_path / ".spark" / "train.py" / "aside"
        limit = time.monotonic() + 5
        while not list(aside.glob("*.snapshot")):
            assert time.monotonic() < limit, "nothing was kept aside"
            time.sleep(0.01)
        kill_everything(run)
    with running(tmp_path / "train.py", "--resume") as run:
        assert int(run.next_line("whole at")) < 200
        assert run.stop() == 0


def test_a_crash_right_after_a_reset_does_not_bring_the_old_state_back(tmp_path: Path) -> None:
    source = WHOLE.replace("import time\n", "import os, time\n").replace(
        'print("whole', 'print("pid", os.getpid())\n        print("whole'
    )
    with running(write(tmp_path / "train.py", source)) as run:
        assert run.next_line("whole at") == "0"
        run.next_line("pid")
        run.wait_for("snapshot")
        run.ctl("reset")
        assert run.next_line("whole at") == "0"
        os.kill(int(run.next_line("pid")), signal.SIGKILL)
        assert run.next_line("whole at") == "0"


# --- one run at a time ---


def test_a_second_run_is_told_who_holds_the_script(tmp_path: Path) -> None:
    with running(write(tmp_path / "train.py", WHOLE)) as run:
        run.next_line("whole at")
        for options in ((), ("--resume",)):
            done = spark("run", "train.py", *options, cwd=tmp_path)
            assert done.returncode == 2
            assert str(run.process.pid) in done.stderr
            assert run.events[0]["run"] in done.stderr
            assert "Traceback" not in done.stderr
        now = run.status()["values"]["state"]["n"]
        run.wait_for("values", values=lambda shown: shown.get("state", {}).get("n", 0) > now)


def test_the_lock_of_a_killed_run_is_free_at_once(tmp_path: Path) -> None:
    with running(write(tmp_path / "train.py", WHOLE)) as run:
        run.next_line("whole at")
        run.wait_for("snapshot")
        wait_stored(tmp_path)
        run.process.kill()  # its nursery and worker may still be about to notice
        run.process.wait()
        with running(tmp_path / "train.py", "--resume") as second:
            assert int(second.next_line("whole at")) > 0
            assert second.stop() == 0


def test_two_scripts_in_one_folder_do_not_exclude_each_other(tmp_path: Path) -> None:
    with running(write(tmp_path / "train.py", WHOLE)) as run, running(write(tmp_path / "other.py", WHOLE)) as other:
        run.next_line("whole at")
        other.next_line("whole at")
        assert run.stop() == 0
        assert other.stop() == 0


def test_of_many_runs_started_at_once_one_wins(tmp_path: Path) -> None:
    write(tmp_path / "train.py", WHOLE)
    started = [
        subprocess.Popen(
            [*SPARK, "run", "train.py", "--json"],
            cwd=tmp_path, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
        for _ in range(4)
    ]  # fmt: skip
    try:
        limit = time.monotonic() + 10
        while sum(each.poll() is None for each in started) > 1:
            assert time.monotonic() < limit
            time.sleep(0.02)
        assert sorted(each.returncode for each in started if each.returncode is not None) == [2, 2, 2]
        wait_stored(tmp_path)
        (winner,) = [each for each in started if each.poll() is None]
        winner.send_signal(signal.SIGINT)
        assert winner.wait(10) == 0
    finally:
        for each in started:
            each.kill()
            each.wait()


# --- disks that fail ---


@pytest.mark.parametrize("trouble", ["a file", "a folder for others", "a device without room"])
def test_without_a_place_for_state_the_run_goes_on_in_memory(tmp_path: Path, trouble: str) -> None:
    script = write(tmp_path / "train.py", WHOLE)
    environment = {}
    if trouble == "a file":
        (tmp_path / ".spark").write_text("mine")
    elif trouble == "a folder for others":
        if os.getuid():
            pytest.skip("only root can give a folder away")
        (tmp_path / ".spark").mkdir()
        os.chown(tmp_path / ".spark", 12345, 12345)
    else:
        environment["SPARKRT_FAIL"] = "store.before_fsync:enospc"
    with running(script, **environment) as run:
        assert run.next_line("whole at") == "0"
        run.wait_for("snapshot")
        run.save(WHOLE.replace("whole at", "again whole at"))
        assert int(run.next_line("again whole at")) > 0
        assert run.stop() == 0
        warnings = [each for each in run.all_events("note") if each["level"] == "warning"]
        assert len(warnings) == 1, warnings
        assert run.all_events("error") == []
    if trouble == "a file":
        assert (tmp_path / ".spark").read_text() == "mine"


def test_a_full_disk_leaves_the_older_snapshot_whole(tmp_path: Path) -> None:
    run_and_kill(tmp_path, WHOLE)
    stored = {path: path.read_bytes() for path in wait_stored(tmp_path)}
    for place in ("store.after_header", "store.mid_part", "store.before_fsync", "store.before_rename"):
        with running(tmp_path / "train.py", "--resume", SPARKRT_FAIL=f"{place}:enospc") as run:
            at = int(run.next_line("whole at"))
            assert at > 0
            run.wait_for("values", values=lambda shown: bool(shown.get("state")))
            assert run.stop() == 0
            warnings = [each for each in run.all_events("note") if each["level"] == "warning"]
            assert len(warnings) == 1, (place, warnings)
            assert "space" in warnings[0]["text"]
        for path, content in stored.items():
            assert path.read_bytes() == content
        assert not list((tmp_path / ".spark").rglob(".writing-*"))
    with running(tmp_path / "train.py", "--resume") as run:
        assert int(run.next_line("whole at")) == at
        assert run.stop() == 0


def test_a_full_disk_that_gets_room_again_is_written_again(tmp_path: Path) -> None:
    with running(write(tmp_path / "train.py", WHOLE), SPARKRT_FAIL="store.before_fsync@1:enospc") as run:
        run.next_line("whole at")
        run.wait_for("note", level="warning")
        assert run.stop() == 0
        reached = run.all_events("snapshot")[-1]["checkpoints"]
    with running(tmp_path / "train.py", "--resume") as run:
        assert int(run.next_line("whole at")) >= reached - 1
        assert run.stop() == 0


def test_state_that_is_removed_during_the_run_does_not_end_it(tmp_path: Path) -> None:
    with running(write(tmp_path / "train.py", WHOLE)) as run:
        run.next_line("whole at")
        run.wait_for("snapshot")
        wait_stored(tmp_path)
        limit = time.monotonic() + 5
        while (tmp_path / ".spark").exists():  # a file may be written while it is removed
            shutil.rmtree(tmp_path / ".spark", ignore_errors=True)
            assert time.monotonic() < limit
        run.save(WHOLE.replace("whole at", "again whole at"))
        assert int(run.next_line("again whole at")) > 0
        assert run.stop() == 0
        assert "Traceback" not in run.stderr


def test_the_state_folder_is_hidden_from_git_and_private(tmp_path: Path) -> None:
    run_and_kill(tmp_path, WHOLE)
    assert (tmp_path / ".spark" / ".gitignore").read_text() == "*\n"
    for path in [tmp_path / ".spark", *(tmp_path / ".spark").rglob("*")]:
        if path.is_dir() or path.suffix == ".snapshot":
            assert path.stat().st_mode & 0o077 == 0, path


def test_a_socket_in_place_of_the_state_folder_is_no_crash(tmp_path: Path) -> None:
    script = write(tmp_path / "train.py", "def torch():\n    print('ran')\n")
    with socket.socket(socket.AF_UNIX) as odd:
        os.chdir(tmp_path)
        odd.bind(".spark")
        done = spark("run", script.name, cwd=tmp_path)
    assert done.returncode == 0
    assert done.stdout == "ran\n"
    assert "Traceback" not in done.stderr
