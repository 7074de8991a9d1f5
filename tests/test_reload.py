"""Saves of every kind, good and bad, while a script runs. The machine must end with the newest code that works."""

import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from harness import SECONDS, RunProcess, running, write

SCRIPT = """
    import time

    NAME = "first"


    def torch():
        state = spark.persist("state", lambda: {"step": 0})
        print("begin", NAME, "at", "zero" if state["step"] == 0 else "more")
        spark.expose(name=NAME, state=state)
        while True:
            spark.checkpoint()
            state["step"] += 1
            time.sleep(0.002)
"""


def named(name: str) -> str:
    return SCRIPT.replace('"first"', f'"{name}"')


def importing(module: str) -> str:
    """The script, with its name taken from another module."""
    source = named("importing").replace("import time", f"import time\n    import {module}", 1)
    return source.replace("NAME,", f"{module}.VALUE,")


@pytest.fixture
def script(tmp_path: Path) -> Path:
    return write(tmp_path / "train.py", SCRIPT)


def test_only_what_changes_the_syntax_tree_reloads(script: Path) -> None:
    with running(script) as run:
        run.wait_printed("begin first at zero")
        run.save(SCRIPT + "\n    # a comment\n\n\n")
        os.utime(script)
        run.save(SCRIPT.replace("import time", "import time  # another"))
        run.save(named("second"))
        run.wait_printed("begin second at more")
        assert len(run.all_events("saved")) == 1
        assert run.stop() == 0


def test_a_syntax_error_leaves_the_old_code_running_until_it_is_mended(script: Path) -> None:
    with running(script) as run:
        run.wait_printed("begin first")
        run.save(SCRIPT.replace("while True:", "while True"))
        error = run.wait_for("error", kind="syntax")
        assert error["file"] == str(script)
        assert error["line"] == 10
        assert "expected ':'" in error["text"]
        assert run.status()["state"] == "running"
        run.save(SCRIPT)
        run.wait_for("mended")
        run.save(named("second"))
        run.wait_printed("begin second at more")
        assert run.stop() == 0


@pytest.mark.parametrize(
    ("top_level", "said"),
    [
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("raise RuntimeError('at the top')", "RuntimeError: at the top"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        ("import os; os._exit(4)", "ended by itself with exit code 4"),
        ("import os; os.kill(os.getpid(), 11)", "was killed by SIGSEGV"),
    ],
)
def test_code_that_cannot_be_loaded_changes_nothing(script: Path, top_level: str, said: str) -> None:
    with running(script) as run:
        run.wait_printed("begin first")
        run.save(named("broken").replace("import time", f"import time\n    {top_level}", 1))
        assert said in run.wait_for("error", kind="load")["text"]
        run.wait_for("values")
        assert run.status()["state"] == "running"
        assert "begin broken" not in run.printed()
        run.save(named("second"))
        run.wait_printed("begin second at more")
        assert run.stop() == 0


def test_new_code_without_torch_changes_nothing(script: Path) -> None:
    with running(script) as run:
        run.wait_printed("begin first")
        run.save(SCRIPT.replace("def torch", "def other"))
        assert "there is no torch()" in run.wait_for("error", kind="load")["text"]
        assert run.status()["state"] == "running"
        assert run.stop() == 0


def test_a_top_level_that_never_ends_is_given_up(script: Path) -> None:
    with running(script, "--load-timeout", "0.5") as run:
        run.wait_printed("begin first")
        run.save(named("endless").replace("import time", "import time\n    while True: pass", 1))
        assert "took longer than 0.5 s" in run.wait_for("error", kind="load")["text"]
        run.save(named("second"))
        run.wait_printed("begin second at more")
        assert run.stop() == 0


def test_an_error_in_new_torch_keeps_the_values_and_the_next_save_retries(script: Path) -> None:
    broken = named("broken").replace("while True:", "raise ValueError('in torch')\n        while True:")
    with running(script) as run:
        run.wait_printed("begin first")
        run.save(broken)
        assert run.wait_for("error", kind="script")["line"] == 10
        # Without a terminal nobody would save again, so the run ends.
        assert run.wait_end() == 1
    with running(script, "--resume") as run:
        assert run.wait_end() == 1
        assert "begin broken at more" in run.printed()


def test_back_goes_to_the_last_code_that_worked(script: Path) -> None:
    with running(script) as run:
        run.wait_printed("begin first")
        run.save(named("second"))
        run.wait_for("reload")
        run.ctl("pause")
        run.wait_for("state", state="paused")
        run.ctl("back")
        run.wait_for("state", state="starting")
        assert run.stop() == 0


def test_the_latest_of_many_saves_wins(script: Path) -> None:
    with running(script) as run:
        run.wait_printed("begin first")
        for number in range(20):
            run.save(named(f"number-{number}"))
        run.wait_printed("begin number-19 at more")
        assert run.stop() == 0
        begun = [line for line in run.printed().splitlines() if line.startswith("begin")]
        assert begun[-1] == "begin number-19 at more"


def test_a_save_while_paused_is_loaded_and_stays_paused(script: Path) -> None:
    with running(script) as run:
        run.wait_printed("begin first")
        run.ctl("pause")
        run.wait_for("state", state="paused")
        run.save(SCRIPT.replace("while True:", "while True"))
        run.wait_for("error", kind="syntax")
        run.save(named("second"))
        run.wait_for("state", state="paused")
        run.wait_printed("begin second at more")
        step = run.status()["values"]["state"]["step"]
        assert run.status()["values"]["state"]["step"] == step
        run.ctl("resume")
        run.wait_for("values", values=lambda shown: shown.get("state", {}).get("step", 0) > step)
        assert run.stop() == 0


def test_a_script_that_is_deleted_and_put_back_goes_on(script: Path) -> None:
    with running(script) as run:
        run.wait_printed("begin first")
        script.unlink()
        assert "is gone" in run.wait_for("error", kind="syntax")["text"]
        assert run.status()["state"] == "running"
        run.save(named("second"))
        run.wait_printed("begin second at more")
        assert run.stop() == 0


def test_a_half_written_save_is_never_run(script: Path) -> None:
    with running(script) as run:
        run.wait_printed("begin first")
        whole = "\n".join(line[4:] for line in named("second").splitlines())
        half = whole.index("spark.expose")
        with script.open("w") as file:
            file.write(whole[:half].replace("second", "half"))
            file.flush()
            with pytest.raises(AssertionError, match="waited"):
                run.wait_for("saved", seconds=0.2)
            file.seek(0)
            file.write(whole)
        run.wait_printed("begin second at more")
        assert "half" not in run.printed()
        assert run.stop() == 0


def use_helper(run: RunProcess, folder: Path) -> None:
    write(folder / "helper.py", "VALUE = 'old'\n")
    run.save(importing("helper"))
    run.wait_printed("begin old at more")


def test_an_edited_helper_reloads_even_within_the_same_second_and_size(script: Path) -> None:
    with running(script) as run:
        run.wait_printed("begin first")
        use_helper(run, script.parent)
        status = (script.parent / "helper.py").stat()
        run.save("VALUE = 'new'\n", script.parent / "helper.py")
        os.utime(script.parent / "helper.py", ns=(status.st_atime_ns, status.st_mtime_ns))
        run.wait_printed("begin new at more")
        assert run.stop() == 0


def test_a_broken_helper_is_named_and_its_mending_seen(script: Path) -> None:
    with running(script) as run:
        run.wait_printed("begin first")
        use_helper(run, script.parent)
        run.save("VALUE = = 'new'\n", script.parent / "helper.py")
        assert run.wait_for("error", kind="syntax")["file"] == str(script.parent / "helper.py")
        run.save("VALUE = 'newer'\n", script.parent / "helper.py")
        run.wait_printed("begin newer at more")
        assert run.stop() == 0


def test_a_helper_that_was_missing_is_seen_when_it_comes(script: Path) -> None:
    with running(script) as run:
        run.wait_printed("begin first")
        run.save(importing("helper"))
        assert "No module named 'helper'" in run.wait_for("error", kind="load")["text"]
        write(script.parent / "helper.py", "VALUE = 'came'\n")
        run.wait_printed("begin came at more")
        assert run.stop() == 0


def test_a_package_of_helpers_is_watched(script: Path) -> None:
    package = script.parent / "parts"
    package.mkdir()
    write(package / "__init__.py", "from parts.inner import VALUE\n")
    write(package / "inner.py", "VALUE = 'old'\n")
    with running(script) as run:
        run.wait_printed("begin first")
        run.save(importing("parts"))
        run.wait_printed("begin old at more")
        run.save("VALUE = 'new'\n", package / "inner.py")
        run.wait_printed("begin new at more")
        assert run.stop() == 0


def test_an_old_worker_that_spawns_children_gives_them_the_code_that_runs(tmp_path: Path) -> None:
    source = """
        import multiprocessing, os, time

        def work(_):
            return NAME

        NAME = "good"

        def torch():
            while not os.path.exists("go"):
                time.sleep(0.01)
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                print("child says", pool.map(work, [1]))
    """
    script = write(tmp_path / "train.py", source)
    with running(script) as run:
        run.wait_for("state", state="running")
        run.save("this = = broken")
        run.wait_for("error", kind="syntax")
        (tmp_path / "go").touch()
        assert run.wait_end() == 0
        assert "child says ['good']" in run.printed()


def test_no_watch_reloads_only_when_asked(script: Path) -> None:
    with running(script, "--no-watch") as run:
        run.wait_printed("begin first")
        run.save(named("second"))
        run.ctl("reload")
        run.wait_for("reload")
        assert not run.all_events("saved")
        assert run.stop() == 0


def test_polling_sees_saves(script: Path) -> None:
    with running(script, "--poll") as run:
        run.wait_printed("begin first")
        run.save(named("second"))
        run.wait_printed("begin second at more")
        assert run.stop() == 0


def test_a_moved_folder_of_bytecode_is_never_made(script: Path) -> None:
    with running(script) as run:
        run.wait_printed("begin first")
        use_helper(run, script.parent)
        assert run.stop() == 0
    assert not (script.parent / "__pycache__").exists()
    shutil.rmtree(script.parent / ".spark")


def test_without_room_for_the_state_the_old_code_goes_on(script: Path) -> None:
    with running(script, SPARKRT_FAIL="state.segment@2:enospc") as run:
        run.wait_for("snapshot")  # the first; the second is the reload's
        run.save(named("second"))
        run.wait_for("state", state="reloading")
        run.wait_for("note", level="warning", text=lambda text: "no room for a snapshot" in text)
        run.wait_for("state", state="running")
        assert "begin second" not in run.printed()
        run.save(named("third"))
        run.wait_printed("begin third at more")
        assert run.stop() == 0


def test_a_crash_while_broken_code_is_loaded_goes_on_with_the_old_code(script: Path) -> None:
    slow = "import os, time\n    while not os.path.exists('go'): time.sleep(0.01)\n    raise ValueError('broken')"
    with running(script) as run:
        run.wait_for("snapshot")
        (worker,) = run.workers()
        run.save(named("broken").replace("import time", slow, 1))
        run.wait_for("saved")
        os.kill(worker, signal.SIGKILL)
        run.wait_for("error", kind="worker")
        (script.parent / "go").touch()
        run.wait_for("error", kind="load")
        run.wait_for("note", text="going on with the code from before")
        run.wait_for("state", state="running")
        assert run.stop() == 0
        assert run.printed().splitlines()[-1] == "begin first at more"


def test_code_that_raises_before_its_first_checkpoint_is_not_taken_for_good(script: Path) -> None:
    with running(script) as run:
        run.wait_printed("begin first")
        run.save(named("broken").replace("print(", "raise ValueError('first line'); print("))
        run.wait_for("error", kind="script")
        assert run.wait_end() == 1
        assert not run.all_events("reload")


def test_a_nursery_that_is_killed_at_once_is_replaced(script: Path) -> None:
    with running(script) as run:
        limit = time.monotonic() + SECONDS
        while not (nurseries := run.nurseries()):
            assert time.monotonic() < limit
        os.kill(nurseries[0], signal.SIGKILL)
        run.wait_printed("begin first")
        assert run.stop() == 0


def test_calls_that_were_never_served_make_the_exit_code_1(script: Path) -> None:
    write(script, "def torch():\n    spark.checkpoint()\n")
    with running(script, "--exit", "--call", "missing") as run:
        assert run.wait_end() == 1


def test_numbers_that_cannot_be_sent_are_refused(script: Path) -> None:
    write(script, SCRIPT.replace("spark.checkpoint()", "spark.checkpoint(); spark.control('n', 1)"))
    with running(script) as run:
        run.wait_for("exposed", controls=lambda shown: "n" in shown)
        for words in (("step", "1" + "0" * 30), ("set", "n", "1" + "0" * 30), ("call", "f", "[1" + "0" * 30 + "]")):
            refused = run.ctl(*words, check=False)
            assert refused.returncode != 0
            assert "Traceback" not in refused.stderr
        assert run.status()["state"] == "running"
        assert run.stop() == 0
