"""``spark exec``, as people type it."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from harness import SECONDS, SPARK

MODELS = Path(__file__).parent / "models"
JSON = str(MODELS / "json_model.wasm")
TRAP = str(MODELS / "trap_model.wasm")
WASI = str(MODELS / "wasi_cmd.wasm")
WORK = str(MODELS / "wasi_work.wasm")


def spark(*words: str, cwd: Path | None = None, stdin: str = "") -> "subprocess.CompletedProcess[str]":
    """Run the command to its end."""
    return subprocess.run(
        [*SPARK, *words], cwd=cwd, input=stdin, capture_output=True, text=True, timeout=SECONDS, check=False
    )


def test_the_answer_is_on_stdout_and_nothing_else_is() -> None:
    done = spark("exec", JSON, "--input", '{"xs": [1, 2, 3]}')
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == {"n": 3.0, "sum": 6.0, "mean": 2.0, "bytes": 14.0}
    assert done.stdout.count("\n") == 1


def test_input_comes_from_a_file_or_from_standard_input(tmp_path: Path) -> None:
    path = tmp_path / "request.json"
    path.write_text('{"xs": [4]}')
    assert json.loads(spark("exec", JSON, "--input", f"@{path}").stdout)["sum"] == 4
    assert json.loads(spark("exec", JSON, "--input", "-", stdin='{"xs": [5]}').stdout)["sum"] == 5


def test_raw_passes_bytes_on_as_they_are() -> None:
    done = spark("exec", JSON, "--entry", "echo", "--raw", "--input", "not JSON")
    assert (done.returncode, done.stdout) == (0, "not JSON")


def test_an_export_is_called_with_numbers() -> None:
    assert spark("exec", JSON, "--function", "add", "1", "2.5").stdout == "3.5\n"
    assert spark("exec", JSON, "--function", "add", "--", "-1", "0x10").stdout == "15.0\n"
    assert spark("exec", JSON, "--function", "nop").stdout == "null\n"


def test_a_wasi_command_gets_arguments_and_variables() -> None:
    done = spark("exec", WASI, "--arg", "fail", "--input", '{"xs": [1]}')
    assert done.returncode == 1
    assert "exit code 3" in done.stderr
    assert "model failed" in done.stderr
    assert done.stdout == ""


def test_a_trap_is_told_in_a_sentence_with_the_guests_backtrace() -> None:
    done = spark("exec", TRAP, "--function", "t_oob")
    assert done.returncode == 1
    assert done.stdout == ""
    first, *rest = done.stderr.splitlines()
    assert first.startswith("spark: model 'trap_model', replica 1: ")
    assert "t_oob" in rest[0]
    assert "Traceback" not in done.stderr


def test_a_time_out_ends_an_endless_model() -> None:
    done = spark("exec", str(MODELS / "spin_model.wasm"), "--function", "spin", "--timeout", "0.5")
    assert done.returncode == 1
    assert "no answer in time" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["missing.wasm"], "there is no file missing.wasm"),
        (["."], "folder"),
        ([JSON, "--input", "{bad"], "not JSON"),
        ([JSON, "--input", ""], "empty"),
        ([JSON, "--input", "@missing.json"], "missing.json cannot be read"),
        ([JSON, "--input", "[" * 100_000], "nested too deep"),
        ([JSON, "1"], "--function"),
        ([JSON, "--function", "add", "one"], "'one' is not a number"),
        ([JSON, "--function", "add", "--input", "{}"], "--function takes numbers"),
        ([JSON, "--memory-limit", "much"], "not a size"),
        ([JSON, "--env", "novalue"], "NAME=VALUE"),
        ([JSON, "--kind", "zip"], "zip"),
        ([JSON, "--watch", "--input", "-"], "--watch"),
        ([__file__], "not a WASM module"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(arguments: list[str], told: str, tmp_path: Path) -> None:
    done = spark("exec", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_ctrl_c_ends_it_with_130_and_no_traceback() -> None:
    command = [*SPARK, "exec", WORK, "--arg", "spin"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        until_busy(process.pid)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130
    assert (out, err.strip()) == ("", "")


def until_busy(pid: int) -> None:
    """Wait until a descendant of *pid* computes: the replica that is at its call."""
    from spark_workers import system

    limit = time.monotonic() + 20
    while time.monotonic() < limit:
        for child in system.descendants(pid):
            try:
                fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[11]) > os.sysconf("SC_CLK_TCK") // 5 and fields[0] == "R":
                return
        time.sleep(0.01)
    raise AssertionError("no replica computes")


def test_watch_runs_again_when_the_model_or_the_input_changes(tmp_path: Path) -> None:
    model, request = tmp_path / "model.wasm", tmp_path / "request.json"
    model.write_bytes(Path(JSON).read_bytes())
    request.write_text('{"xs": [1]}')
    command = [*SPARK, "exec", str(model), "--watch", "--input", f"@{request}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        assert json.loads(process.stdout.readline())["sum"] == 1
        request.write_text('{"xs": [2]}')
        assert json.loads(process.stdout.readline())["sum"] == 2
        model.write_bytes(b"\0asm\1\0\0\0broken")
        assert "; the old code goes on" in process.stderr.readline()
        model.write_bytes(Path(WASI).read_bytes())
        assert json.loads(process.stdout.readline()) == {"n": 1, "sum": 2, "bytes": 10}
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
    finally:
        process.kill()
        process.communicate()
