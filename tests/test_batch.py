"""Batches end to end: every input row has exactly one output row, whatever happens to whoever writes it."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import random
import resource
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import SECONDS, SPARK, spark

from spark_runtime import Model, Spark
from spark_runtime.batch.batch import Batch, BatchOptions, Progress, maker_of
from spark_runtime.batch.inputs import format_of, open_source
from spark_runtime.batch.outputs import open_output
from spark_runtime.batch.pace import LEAD_SECONDS, MOST, Pace
from spark_runtime.batch.stop import Stop
from spark_runtime.errors import BatchError

MODELS = Path(__file__).parent / "models"
FUSSY = MODELS / "fussy.wasm"  # answers with the request; see its source for the signs
ADDING = MODELS / "json_model.wasm"

Rows = list[dict[str, Any]]


@pytest.fixture(scope="module", autouse=True)
def _compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Give these tests a cache of their own."""
    before = os.environ.get("SPARKRT_CACHE_DIR")
    os.environ["SPARKRT_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["SPARKRT_CACHE_DIR"]
    else:
        os.environ["SPARKRT_CACHE_DIR"] = before


@pytest.fixture(scope="module")
def replicas(_compiled: None) -> Iterator[Spark]:
    """Two replicas of the fussy model, for batches that run in this process."""
    with Spark([Model("fussy", FUSSY, replicas=2)]) as spark:
        yield spark


def run_here(replicas: Spark, source: Path, output: Path, **options: Any) -> Progress:
    """Run a batch in this process."""
    stop = Stop()
    with contextlib.ExitStack() as stack:
        stack.callback(stop.close)
        found = open_source(str(source), format_of(str(source), None, ""), stop)
        stack.callback(found.close)
        maker = maker_of(Model("fussy", FUSSY, args=options.pop("args", ())))
        target = open_output(str(output), format_of(str(output), None, ""), maker)
        stack.callback(target.close)
        batch = Batch(BatchOptions("fussy", 2, **options), maker, found, target, stop)
        batch.run(lambda: contextlib.nullcontext(replicas))
    return batch.progress


def batch(cwd: Path, *words: str, model: Path = FUSSY, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``spark batch`` to its end."""
    done = spark("batch", str(model), *words, cwd=cwd, timeout=50, **environment)
    if done.returncode != -signal.SIGKILL:
        assert "Traceback" not in done.stderr, done.stderr
    return done


@contextlib.contextmanager
def started(cwd: Path, *words: str, **rest: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Start ``spark batch``; it is gone after the block."""
    process = subprocess.Popen(
        [*SPARK, "batch", str(FUSSY), *words],
        cwd=cwd,
        stdin=rest.pop("stdin", subprocess.DEVNULL),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        **rest,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        if process.stdin is not None:
            process.stdin.close()
            process.stdin = None
        process.communicate()


def write_rows(path: Path, values: list[Any]) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def read_rows(path: Path) -> Rows:
    """Return the rows of an output, whatever its format, with output and error as data."""
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
    if path.suffix == ".csv":
        with open(path, newline="") as file:
            found: Rows = [dict(row) for row in csv.DictReader(file)]
    else:
        found = pytest.importorskip("pyarrow.parquet").read_table(path).to_pylist()
    return [
        {"row": int(row["row"]), "key": row["key"]}
        | {name: json.loads(row[name]) for name in ("output", "error") if row[name]}
        for row in found
    ]


def wait_until(is_so: Callable[[], bool]) -> None:
    limit = time.monotonic() + SECONDS
    while not is_so():
        assert time.monotonic() < limit, "waited in vain"
        time.sleep(0.005)


def count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


# --- rows in, rows out ---


@pytest.mark.parametrize("target", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("source", ["jsonl", "csv", "parquet"])
def test_every_format_goes_into_every_other(source: str, target: str, tmp_path: Path, replicas: Spark) -> None:
    rows = [{"n": 1, "t": 'a "b", c\nd'}, {"n": 2, "t": "!"}, {"n": None, "t": "é\u2028"}, {"n": 4, "t": "~"}]
    path = tmp_path / f"in.{source}"
    if source == "jsonl":
        write_rows(path, rows)
    elif source == "csv":
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["n", "t"])
            writer.writeheader()
            writer.writerows(rows)
    else:
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), path)
    output = tmp_path / f"out.{target}"
    progress = run_here(replicas, path, output)
    assert (progress.rows, progress.failed, progress.state) == (4, 2, "done")
    found = read_rows(output)
    assert [each["row"] for each in found] == [0, 1, 2, 3]
    assert [each.get("output") for each in found] == [rows[0], None, rows[2], None]
    assert [each.get("error", {}).get("error") for each in found] == [None, "ModelTrapped", None, "AnswerInvalid"]
    assert sorted(os.listdir(tmp_path)) == sorted({path.name, output.name})
    before = output.read_bytes()
    assert run_here(replicas, path, output).state == "finished"
    assert output.read_bytes() == before


def test_the_command_writes_rows_and_says_how_it_went(tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", [{"xs": [1, 2, n]} for n in range(50)])
    done = batch(tmp_path, "in.jsonl", "-o", "out.jsonl", "--replicas", "2", model=ADDING)
    assert (done.returncode, done.stdout) == (0, "")
    rows = read_rows(tmp_path / "out.jsonl")
    assert [(row["row"], row["output"]["sum"]) for row in rows] == [(n, 3 + n) for n in range(50)]
    assert done.stderr.startswith("spark: out.jsonl: 50 rows in ")
    assert len(done.stderr.splitlines()) == 1


def test_an_answer_comes_out_in_its_own_digits(tmp_path: Path, replicas: Spark) -> None:
    odd = b'{"a": 1.10, "a":[1e2 ,123456789012345678901234567890],"u":"\\ud800\\u0000\xc3\xa9"}'
    (tmp_path / "in.jsonl").write_bytes(odd + b"\n")
    run_here(replicas, tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    (line,) = (tmp_path / "out.jsonl").read_bytes().splitlines()
    assert line.partition(b'"output": ')[2] == odd + b"}"


@pytest.mark.parametrize("unordered", [False, True])
def test_slow_rows_keep_their_place_or_not(unordered: bool, tmp_path: Path, replicas: Spark) -> None:
    values = ["#9" if n == 3 else n for n in range(200)]
    run_here(replicas, write_rows(tmp_path / "in.jsonl", values), tmp_path / "out.jsonl", ordered=not unordered)
    rows = read_rows(tmp_path / "out.jsonl")
    assert sorted((row["row"], row["output"]) for row in rows) == list(enumerate(values))
    assert ([row["row"] for row in rows] == list(range(200))) is not unordered


def test_bad_rows_between_good_ones_keep_their_place(tmp_path: Path, replicas: Spark) -> None:
    lines = [b"{", b"1", b"NaN", b"", b'"!"', b"2", b"\xff", b"[" * 5000, b'"\\ud800"', b"9" * 5000, b"x" * 300_000]
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines * 30))
    progress = run_here(replicas, tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    assert (progress.rows, progress.failed) == (300, 180)
    found = (tmp_path / "out.jsonl").read_bytes().splitlines()
    assert len(found) == 300
    errors = [json.loads(line)["error"]["error"] if b'"error": ' in line[:70] else "" for line in found[:10]]
    bad = "RowUnusable"
    assert errors == [bad, "", bad, "ModelTrapped", "", bad, bad, "", "", bad]
    assert json.loads(found[0])["error"]["line"] == 1
    assert found[8].endswith(b'"output": ' + b"9" * 5000 + b"}")


def test_an_input_of_nothing_but_bad_rows_is_done_without_the_model(tmp_path: Path, replicas: Spark) -> None:
    (tmp_path / "in.jsonl").write_bytes(b"{\n" * 5000)
    progress = run_here(replicas, tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    assert (progress.rows, progress.failed) == (5000, 5000)
    assert [row["row"] for row in read_rows(tmp_path / "out.jsonl")] == list(range(5000))


def test_an_empty_input_gives_an_empty_output(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("\n\n")
    for _ in range(2):
        assert batch(tmp_path, "in.jsonl", "-o", "out.jsonl").returncode == 0
        assert (tmp_path / "out.jsonl").read_bytes() == b""


def test_rows_of_a_megabyte_are_few_at_a_time(tmp_path: Path, replicas: Spark) -> None:
    values = [str(n) * (1 << 20) for n in range(10)] * 8
    run_here(replicas, write_rows(tmp_path / "in.jsonl", values), tmp_path / "out.jsonl")
    assert [row["output"] for row in read_rows(tmp_path / "out.jsonl")] == values


def test_a_wasi_command_gets_its_arguments(tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", [1, 2])
    words = ("in.jsonl", "-o", "out.jsonl", "--arg", "mc", "--arg", "1000")
    assert batch(tmp_path, *words, model=MODELS / "wasi_work.wasm").returncode == 0
    first, second = read_rows(tmp_path / "out.jsonl")
    assert 3 < first["output"]["pi"] == second["output"]["pi"] < 3.3


# --- failing rows and exit codes ---


@pytest.mark.parametrize(
    ("fail_on", "code"), [("any", 3), ("none", 0), ("20%", 3), ("20.5%", 0), ("100%", 0), ("1%", 3)]
)
def test_failing_rows_are_rows_and_the_exit_code_is_a_choice(fail_on: str, code: int, tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", [1, "!", 3, "~", 5, 6, 7, 8, 9, 10])
    done = batch(tmp_path, "in.jsonl", "-o", "out.jsonl", "--fail-on", fail_on)
    assert done.returncode == code
    assert "10 rows" in done.stderr
    assert ", 2 failed" in done.stderr
    errors = {row["row"]: row["error"] for row in read_rows(tmp_path / "out.jsonl") if "error" in row}
    assert set(errors) == {1, 3}
    assert errors[1]["error"] == "ModelTrapped"
    assert (errors[1]["model"], errors[1]["replica"]) == ("fussy", 1)
    assert "the answer is not JSON" in errors[3]["message"]


def test_a_row_that_takes_too_long_is_an_error_row(tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", [1, "%", 3, 4])
    done = batch(tmp_path, "in.jsonl", "-o", "out.jsonl", "--timeout", "1", "--replicas", "2")
    assert done.returncode == 3
    rows = read_rows(tmp_path / "out.jsonl")
    assert [row.get("output") for row in rows] == [1, None, 3, 4]
    assert rows[1]["error"]["error"] == "ExecuteTimeout"


def test_a_model_that_cannot_be_loaded_ends_the_batch_and_writes_nothing(tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", [1])
    (tmp_path / "bad.wasm").write_bytes(b"\0asm\x01\0\0\0\xff")
    done = batch(tmp_path, "in.jsonl", "-o", "out.jsonl", model=tmp_path / "bad.wasm")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out.jsonl").exists()
    done = batch(tmp_path, "in.jsonl", "-o", "out.jsonl", model=tmp_path / "missing.wasm")
    assert (done.returncode, "missing.wasm" in done.stderr) == (2, True)
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("missing.jsonl", "-o", "o.jsonl"), "cannot read missing.jsonl: No such file or directory; give the path"),
        ((".", "-o", "o.jsonl"), "its name does not say what format it has; name it .jsonl, .csv or .parquet, or add"),
        ((".", "-o", "o.jsonl", "--input-format", "csv"), "is a folder; give the path of a file with rows"),
        (("in.jsonl", "-o", "o.txt"), "add --output-format"),
        (("in.jsonl", "-o", "nowhere/o.jsonl"), "cannot write nowhere/o.jsonl: No such file or directory; give"),
        (("in.jsonl", "-o", "in.jsonl"), "in.jsonl is the input; choose another name for the output"),
        (("in.jsonl", "-o", "-", "--output-format", "parquet"), "Parquet cannot be written to a pipe"),
        (("-", "-o", "o.jsonl", "--input-format", "parquet"), "Parquet cannot be read from a pipe"),
        (("in.jsonl", "-o", "o.jsonl", "--fail-on", "150%"), "'150%' is not any, none, or a share such as 5%"),
        (("in.jsonl", "-o", "o.jsonl", "--memory-limit", "lots"), "'lots' is not a size such as"),
        (("in.jsonl", "-o", "o.jsonl", "--memory-limit", "1K"), "memory_limit is 1000, not between"),
        (("in.jsonl",), "Missing option '-o'"),
    ],
)
def test_mistakes_are_one_sentence_and_write_nothing(words: tuple[str, ...], complaint: str, tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", [1])
    done = batch(tmp_path, *words)
    assert done.returncode == 2
    assert complaint in done.stderr
    assert os.listdir(tmp_path) == ["in.jsonl"]


def test_limit_takes_the_first_rows_and_a_later_run_the_others(tmp_path: Path, replicas: Spark) -> None:
    source, output = write_rows(tmp_path / "in.jsonl", list(range(100))), tmp_path / "out.jsonl"
    for limit, rows, state in ((10, 10, "done"), (10, 10, "finished"), (5, 10, "finished"), (30, 30, "done")):
        assert run_here(replicas, source, output, limit=limit).state == state
        assert count_lines(output) == rows
    assert run_here(replicas, source, output).rows == 70
    assert [row["output"] for row in read_rows(output)] == list(range(100))


def test_a_dry_run_runs_one_row_and_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{\n{"a": 1}\n2\n')
    done = batch(tmp_path, "in.jsonl", "-o", "out.jsonl", "--dry-run")
    assert done.returncode == 3
    assert "3 rows looked at, 1 of them unusable; nothing is written" in done.stderr
    assert "line 1, column 2 is not JSON" in done.stderr
    row = json.loads(done.stdout)
    assert (row["row"], row["output"]) == (1, {"a": 1})
    assert os.listdir(tmp_path) == ["in.jsonl"]


# --- going on ---


def test_a_finished_output_is_said_to_be_so_and_stays_as_it_is(tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", [1, "!", 3])
    assert batch(tmp_path, "in.jsonl", "-o", "out.jsonl").returncode == 3
    before = (tmp_path / "out.jsonl").stat()
    done = batch(tmp_path, "in.jsonl", "-o", "out.jsonl")
    assert (done.returncode, done.stderr) == (0, "spark: out.jsonl is finished already: 3 rows, 1 failed\n")
    assert (tmp_path / "out.jsonl").stat().st_mtime_ns == before.st_mtime_ns


MOMENTS = [
    *[f"batch.row@{turn}" for turn in (1, 2, 3, 50, 257, 700)],
    *[f"batch.append@{turn}" for turn in (1, 2, 2, 3, 2, 1, 2, 3, 2, 2)],
    *[f"batch.row@{turn}" for turn in (10, 300, 999)],
    "batch.sync@1",
]


@pytest.mark.parametrize(
    ("form", "moments", "unordered"),
    [("jsonl", MOMENTS, False), ("jsonl", MOMENTS, True), ("csv", MOMENTS[3:9], False)],
)
def test_killed_at_any_moment_the_same_command_goes_on(
    form: str, moments: list[str], unordered: bool, tmp_path: Path
) -> None:
    count = 12_000 if form == "jsonl" else 4000
    output = tmp_path / f"out.{form}"
    write_rows(tmp_path / "in.jsonl", [{"n": n, "pad": "x" * 1000} for n in range(count)])
    words = ["in.jsonl", "-o", output.name, "--replicas", "2", *(["--unordered"] if unordered else [])]
    most = 0
    for moment in moments:
        done = batch(tmp_path, *words, SPARKRT_FAIL=f"{moment}:kill")
        assert done.returncode == -signal.SIGKILL, moment
        assert count_lines(output) >= most, f"{moment} lost rows"
        most = count_lines(output)
    done = batch(tmp_path, *words)
    assert done.returncode == 0
    rows = read_rows(output)
    assert sorted((row["row"], row["output"]["n"]) for row in rows) == [(n, n) for n in range(count)]
    if not unordered:
        assert [row["row"] for row in rows] == list(range(count))


def test_killed_from_outside_at_random_moments_it_goes_on(tmp_path: Path) -> None:
    values = [{"n": n, "t": "#1" if n % 20 == 0 else ""} for n in range(600)]
    output = tmp_path / "out.jsonl"
    write_rows(tmp_path / "in.jsonl", values)
    for _ in range(4):
        before = count_lines(output)
        with started(tmp_path, "in.jsonl", "-o", "out.jsonl", "--replicas", "2", "--unordered") as process:
            wait_until(lambda: count_lines(output) > before or process.poll() is not None)  # noqa: B023
            time.sleep(random.random() * 0.1)
    assert batch(tmp_path, "in.jsonl", "-o", "out.jsonl", "--unordered").returncode == 0
    assert sorted((row["row"], row["output"]["n"]) for row in read_rows(output)) == [(n, n) for n in range(600)]


@pytest.mark.parametrize("moment", ["batch.append@2", "batch.before_rename", "batch.after_rename"])
def test_a_parquet_output_is_whole_or_not_there(moment: str, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    write_rows(tmp_path / "in.jsonl", [{"n": n, "pad": "x" * 1000} for n in range(2000)])
    done = batch(tmp_path, "in.jsonl", "-o", "out.parquet", SPARKRT_FAIL=f"{moment}:kill")
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "out.parquet").exists() is (moment == "batch.after_rename")
    assert batch(tmp_path, "in.jsonl", "-o", "out.parquet").returncode == 0
    rows = read_rows(tmp_path / "out.parquet")
    assert [(row["row"], row["output"]["n"]) for row in rows] == [(n, n) for n in range(2000)]
    assert not list(tmp_path.glob("*.partial"))
    assert sorted(path.name for path in tmp_path.glob("[!.]*")) == ["in.jsonl", "out.parquet"]
    assert [path.name for path in tmp_path.glob(".out*")] == []


def test_a_parquet_output_can_be_gone_on_with(tmp_path: Path, replicas: Spark) -> None:
    pytest.importorskip("pyarrow")
    source, output = write_rows(tmp_path / "in.jsonl", ["!", *range(99)]), tmp_path / "out.parquet"
    assert run_here(replicas, source, output, limit=40).rows == 40
    (tmp_path / "out.parquet.partial").write_bytes(b'{"row": 0, "ke')  # left by a kill
    assert run_here(replicas, source, output).rows == 60
    rows = read_rows(output)
    assert [row.get("output") for row in rows] == [None, *range(99)]
    assert rows[0]["error"]["error"] == "ModelTrapped"
    assert run_here(replicas, source, output, restart=True, limit=3).rows == 3
    assert len(read_rows(output)) == 3
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "out.parquet"]


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_an_output_cut_at_any_byte_becomes_the_same_again(form: str, tmp_path: Path, replicas: Spark) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / f"out.{form}"
    source.write_text('1\n{"a":\n{"a": "x,\\ny"}\n')
    run_here(replicas, source, output)
    whole = output.read_bytes()
    for size in range(len(whole)):
        output.write_bytes(whole[:size])
        progress = run_here(replicas, source, output)
        assert progress.before + progress.rows == 3
        assert output.read_bytes() == whole, size


def test_zeros_after_a_power_failure_are_cut_off(tmp_path: Path, replicas: Spark) -> None:
    source, output = write_rows(tmp_path / "in.jsonl", list(range(100))), tmp_path / "out.jsonl"
    run_here(replicas, source, output)
    whole = output.read_bytes()
    middle = len(whole) // 2
    for torn in (whole + bytes(5), whole[:middle] + bytes(4096), whole[:middle] + bytes(99) + whole[middle + 99 :]):
        output.write_bytes(torn)
        run_here(replicas, source, output)
        assert output.read_bytes() == whole


@pytest.mark.parametrize("unordered", [False, True])
@pytest.mark.parametrize(
    ("edit", "complaint"),
    [
        (lambda lines: [*lines[:7], "77", *lines[8:]], "row 7 was another one then"),
        (lambda lines: lines[1:], "row 0 was another one then"),
        (lambda lines: [*lines[:30], "x", *lines[30:]], "row 30 was another one then"),
        (lambda lines: lines[:20], "it has 20 rows now, and row 49 is done"),
        (lambda lines: [], "it has 0 rows now, and row 49 is done"),
    ],
)
def test_an_edited_input_is_noticed(
    edit: Callable[[list[str]], list[str]], complaint: str, unordered: bool, tmp_path: Path, replicas: Spark
) -> None:
    source, output = write_rows(tmp_path / "in.jsonl", list(range(100))), tmp_path / "out.jsonl"
    run_here(replicas, source, output, limit=50)
    lines = output.read_bytes().splitlines(keepends=True)
    if unordered:
        random.Random(3).shuffle(lines)
    output.write_bytes(b"".join(lines))
    source.write_text("".join(f"{line}\n" for line in edit(source.read_text().splitlines())))
    with pytest.raises(BatchError, match=f"the input has changed since .*out.jsonl was begun: {complaint}.*--restart"):
        run_here(replicas, source, output, ordered=not unordered)
    assert output.read_bytes() == b"".join(lines)
    assert run_here(replicas, source, output, ordered=not unordered, restart=True).before == 0
    assert len(read_rows(output)) == count_lines(source)


def test_rows_that_came_later_in_the_input_are_only_added(tmp_path: Path, replicas: Spark) -> None:
    source, output = write_rows(tmp_path / "in.jsonl", [1, 2, 3]), tmp_path / "out.jsonl"
    run_here(replicas, source, output)
    write_rows(source, [1, 2, 3, 4])
    assert run_here(replicas, source, output).rows == 1
    assert [row["output"] for row in read_rows(output)] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "content",
    [
        b"hello\n",
        b"hello",
        b"{}\n",
        b'{"row": 0, "key": "x"}\n',
        b"row,key\n1,2\n",
        bytes(5000),
        b"PAR1\x00\x01",
        b"\xff\xfe\n",
        b"7\n",
        b"\n",
        b'{"row":0,"key":"0123456789abcdef-01234567","output":1}\n',
    ],
)
@pytest.mark.parametrize("name", ["out.jsonl", "out.csv", "out.parquet"])
def test_an_output_that_is_not_ours_is_never_touched(name: str, content: bytes, tmp_path: Path) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    for restart in (False, True):
        with pytest.raises(BatchError, match=f"{name} is not the output of a batch .*stays as it is; choose another"):
            run_here(None, write_rows(tmp_path / "in.jsonl", [1]), tmp_path / name, restart=restart)  # type: ignore[arg-type]
    assert (tmp_path / name).read_bytes() == content
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", name]


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_a_line_that_somebody_added_or_changed_is_not_ours(form: str, tmp_path: Path, replicas: Spark) -> None:
    source, output = write_rows(tmp_path / "in.jsonl", list(range(20))), tmp_path / f"out.{form}"
    run_here(replicas, source, output, limit=10)
    whole = output.read_bytes()
    lines = whole.splitlines(keepends=True)
    for changed in (whole + b"note", whole + b"note\n", b"".join([*lines[:4], b"note\n", *lines[5:]])):
        output.write_bytes(changed)
        with pytest.raises(BatchError, match="is not the output of a batch"):
            run_here(replicas, source, output)
        assert output.read_bytes() == changed
    output.write_bytes(whole + lines[-1])
    with pytest.raises(BatchError, match="has row 9 twice"):
        run_here(replicas, source, output, ordered=False)
    output.write_bytes(whole.replace(lines[-1], lines[-1].replace(b"9", b"987654321", 1)))
    with pytest.raises(BatchError, match="has a row 987654321 too early"):
        run_here(replicas, source, output, ordered=False)


def test_an_output_of_csv_is_not_one_of_json_lines(tmp_path: Path, replicas: Spark) -> None:
    source = write_rows(tmp_path / "in.jsonl", [1])
    run_here(replicas, source, tmp_path / "a.csv")
    shutil.copy(tmp_path / "a.csv", tmp_path / "b.jsonl")
    with pytest.raises(BatchError, match="is not the output of a batch"):
        run_here(replicas, source, tmp_path / "b.jsonl")


def test_an_output_of_another_model_is_noticed(tmp_path: Path, replicas: Spark) -> None:
    source, output = write_rows(tmp_path / "in.jsonl", list(range(20))), tmp_path / "out.jsonl"
    run_here(replicas, source, output, limit=10, args=["old"])
    with pytest.raises(BatchError, match=r"rows of another model, or of other settings \(its row 0 .*--restart.*--mix"):
        run_here(replicas, source, output)
    assert run_here(replicas, source, output, mix=True).rows == 10
    keys = [row["key"].split("-") for row in read_rows(output)]
    assert len({maker for _, maker in keys}) == 2
    assert run_here(replicas, source, output, restart=True).rows == 20


def test_an_output_begun_without_order_needs_the_option_again(tmp_path: Path, replicas: Spark) -> None:
    source, output = write_rows(tmp_path / "in.jsonl", list(range(20))), tmp_path / "out.jsonl"
    run_here(replicas, source, output, limit=10)
    lines = output.read_bytes().splitlines(keepends=True)
    output.write_bytes(b"".join(lines[:3] + lines[5:]))  # rows 3 and 4 were out when it was killed
    with pytest.raises(BatchError, match=r"out\.jsonl was begun with --unordered; add it again"):
        run_here(replicas, source, output)
    assert run_here(replicas, source, output, ordered=False).rows == 12
    assert sorted(row["output"] for row in read_rows(output)) == list(range(20))


def test_two_batches_on_one_output_exclude_each_other(tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", [1, "%"])
    with started(tmp_path, "in.jsonl", "-o", "out.jsonl", "--timeout", "0") as first:
        wait_until(lambda: count_lines(tmp_path / "out.jsonl") == 1)
        done = batch(tmp_path, "in.jsonl", "-o", "out.jsonl")
        assert (done.returncode, "another batch is writing out.jsonl; wait" in done.stderr) == (2, True)
        assert first.poll() is None
    done = batch(tmp_path, "in.jsonl", "-o", "out.jsonl", "--timeout", "0.5")  # a dead one's lock blocks nobody
    assert done.returncode == 3
    assert count_lines(tmp_path / "out.jsonl") == 2


# --- full disks ---


@pytest.mark.parametrize("moment", ["batch.append@3", "batch.sync@1"])
def test_a_full_disk_ends_the_batch_with_whole_rows_and_it_goes_on(moment: str, tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", [{"n": n, "pad": "x" * 1000} for n in range(3000)])
    done = batch(tmp_path, "in.jsonl", "-o", "out.jsonl", SPARKRT_FAIL=f"{moment}:enospc")
    assert done.returncode == 1
    assert "cannot write out.jsonl any further: No space left on device" in done.stderr
    assert "make room and run the same command again" in done.stderr
    rows = read_rows(tmp_path / "out.jsonl")
    assert [row["row"] for row in rows] == list(range(len(rows)))
    assert batch(tmp_path, "in.jsonl", "-o", "out.jsonl").returncode == 0
    assert [row["output"]["n"] for row in read_rows(tmp_path / "out.jsonl")] == list(range(3000))


def test_a_write_that_stops_in_the_middle_of_a_row_leaves_no_half_of_it(tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", [{"n": n, "pad": "x" * 1000} for n in range(1000)])
    assert batch(tmp_path, "in.jsonl", "-o", "warm.jsonl", "--limit", "1").returncode == 0  # the code is in the cache
    limit = 500_000
    with started(
        tmp_path, "in.jsonl", "-o", "out.jsonl",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    ) as process:  # fmt: skip
        _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 1
    assert b"cannot write out.jsonl any further: File too large" in errors
    content = (tmp_path / "out.jsonl").read_bytes()
    assert content.endswith(b"}\n")
    assert limit - 2000 < len(content) <= limit
    assert batch(tmp_path, "in.jsonl", "-o", "out.jsonl").returncode == 0
    assert [row["output"]["n"] for row in read_rows(tmp_path / "out.jsonl")] == list(range(1000))


# --- signals ---


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("unordered", [False, True])
def test_a_signal_finishes_what_runs_and_says_how_to_go_on(
    number: signal.Signals, unordered: bool, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    write_rows(tmp_path / "in.jsonl", ["#1"] * 500)
    words = ["in.jsonl", "-o", "out.jsonl", "--replicas", "2", *(["--unordered"] if unordered else [])]
    with started(tmp_path, *words) as process:
        wait_until(lambda: count_lines(output) > 5)
        os.killpg(process.pid, number)  # as a terminal does: every process of ours gets it
        _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 130
    rows = read_rows(output)
    assert 5 < len(rows) < 500
    where = "with those that are missing" if unordered else f"at row {len(rows)}"
    last = errors.decode().splitlines()[-1]
    assert last == f"spark: stopped; out.jsonl has {len(rows)} rows, and the same command goes on {where}"
    assert sorted(row["row"] for row in rows) == list(range(len(rows)))
    assert batch(tmp_path, *words, "--limit", str(len(rows) + 5)).returncode == 0
    assert count_lines(output) == len(rows) + 5


def test_a_second_signal_ends_at_once_with_whole_rows(tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", [1, 2, 3, "%", "%"])
    with started(tmp_path, "in.jsonl", "-o", "out.jsonl", "--timeout", "0") as process:
        wait_until(lambda: count_lines(tmp_path / "out.jsonl") == 3)
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        assert b"Ctrl-C again ends at once" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 130
    assert b"stopped; out.jsonl has 3 rows, and the same command goes on at row 3" in errors
    assert b"Traceback" not in errors
    assert [row["output"] for row in read_rows(tmp_path / "out.jsonl")] == [1, 2, 3]


# --- pipes ---


def test_rows_stream_from_stdin_to_stdout_as_they_come(tmp_path: Path) -> None:
    with started(tmp_path, "-", "-o", "-", stdin=subprocess.PIPE, bufsize=0) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for number in range(3):
            process.stdin.write(b'{"n": %d}\n' % number)
            assert select.select([process.stdout], [], [], SECONDS)[0], "no answer before the next row"
            row = json.loads(process.stdout.readline())
            assert (row["row"], row["output"]) == (number, {"n": number})
        process.stdin.close()
        assert process.wait(SECONDS) == 0
        assert process.stdout.read() == b""


def test_a_signal_reaches_a_batch_that_waits_for_a_row(tmp_path: Path) -> None:
    with started(tmp_path, "-", "-o", "-", stdin=subprocess.PIPE, bufsize=0) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"1\n2")
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=SECONDS)
    assert (process.returncode, output) == (130, b"")
    assert errors.endswith(b"spark: stopped after 1 row\n")


def test_formats_of_pipes_can_be_told(tmp_path: Path) -> None:
    done = subprocess.run(
        [*SPARK, "batch", str(FUSSY), "-", "-o", "-", "--input-format", "csv", "--output-format", "csv"],
        cwd=tmp_path, input="a,b\n1,x\n", capture_output=True, text=True, timeout=SECONDS, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    header, row = csv.reader(done.stdout.splitlines())
    assert header == ["row", "key", "output", "error"]
    assert json.loads(row[2]) == {"a": 1, "b": "x"}


def test_a_reader_that_has_seen_enough_ends_the_batch_quietly(tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", list(range(50_000)))
    command = f"{' '.join(SPARK)} batch {FUSSY} in.jsonl -o - 2>errors | head -n 1"
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, timeout=SECONDS, check=True)
    assert json.loads(done.stdout)["row"] == 0
    assert (tmp_path / "errors").read_text() == ""


def test_an_output_that_is_no_file_is_a_stream(tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", [1, 2])
    done = batch(tmp_path, "in.jsonl", "-o", "/dev/null", "--output-format", "jsonl")
    assert done.returncode == 0, done.stderr


# --- what is shown ---


def test_a_terminal_sees_a_bar_and_then_the_summary(tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", ["#9"] * 3)
    ours, theirs = os.openpty()
    try:
        process = subprocess.Popen(
            [*SPARK, "batch", str(FUSSY), "in.jsonl", "-o", "out.jsonl"],
            cwd=tmp_path, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=theirs,
            env={**os.environ, "TERM": "xterm"},
        )  # fmt: skip
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # how the other end of a terminal is seen to be gone
            while block := os.read(ours, 65536):
                shown += block
        assert process.wait(SECONDS) == 0
    finally:
        os.close(ours)
    assert b"of 3 rows" in shown
    assert b"spark: out.jsonl: 3 rows in " in shown
    assert b"Traceback" not in shown


# --- memory and pace ---


def peak_megabytes(tmp_path: Path, rows: int) -> float:
    """Return the most memory that any process of a batch of so many rows ever had."""
    source = tmp_path / f"{rows}.jsonl"
    with open(source, "w") as file:
        file.writelines(f'{{"xs": [1, 2, {n}]}}\n' for n in range(rows))
    pid = os.spawnv(
        os.P_NOWAIT,
        sys.executable,
        [*SPARK, "batch", str(ADDING), str(source), "-o", str(tmp_path / f"{rows}.out.jsonl"), "--replicas", "2"],
    )
    _, status, usage = os.wait4(pid, 0)
    assert status == 0
    assert count_lines(tmp_path / f"{rows}.out.jsonl") == rows
    return usage.ru_maxrss / 1024


def test_memory_stays_as_it_is_however_many_rows_there_are(tmp_path: Path) -> None:
    assert peak_megabytes(tmp_path, 100_000) - peak_megabytes(tmp_path, 10_000) < 16


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_memory_stays_as_it_is_for_a_million_rows(tmp_path: Path) -> None:
    assert peak_megabytes(tmp_path, 1_000_000) - peak_megabytes(tmp_path, 10_000) < 16


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def segment(pace: Pace, clock: Clock, seconds_a_row: float) -> int:
    """Play a segment whose rows take so long; return how many rows it had."""
    rows = 0
    while not pace.is_over():
        pace.given()
        clock.now += seconds_a_row
        pace.answered()
        rows += 1
    pace.end()
    return rows


@pytest.mark.parametrize(
    ("seconds_a_row", "window"), [(1e-5, MOST), (0.01, int(LEAD_SECONDS / 0.01)), (0.5, 4), (1.0, 2), (60.0, 2)]
)
def test_as_many_rows_are_out_as_the_model_answers_in_a_moment(seconds_a_row: float, window: int) -> None:
    clock = Clock()
    pace = Pace(2, clock)
    for _ in range(6):
        assert segment(pace, clock, seconds_a_row) >= 16
    assert pace.window == pytest.approx(window, rel=0.1)


def test_a_model_that_becomes_slow_has_fewer_rows_out() -> None:
    clock = Clock()
    pace = Pace(2, clock)
    for _ in range(5):
        segment(pace, clock, 1e-5)
    segment(pace, clock, 1.0)
    assert pace.window == 2
