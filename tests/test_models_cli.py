"""`spark models`: what is said of a model and of what is kept, to people, to pipes and to programs."""

from __future__ import annotations

import errno
import json
import os
import pty
import subprocess
from pathlib import Path
from typing import Any

import pytest
from harness import SECONDS, SPARK, spark

from spark_cli import models
from spark_cli.words import size_text, visible
from spark_runtime.models.prepared import ModelCache, ModelFile, Prepared

MODELS = Path(__file__).parent / "models"
WASM = b"\0asm\x01\0\0\0"
HOSTILE = "\x1b]0;owned\x07\x1b[31m[bold]\r\n\u202ename\t"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPARKRT_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _compile(module: int, code: int) -> dict[str, Any]:
    os.write(code, bytes(5000))
    return {"kind": "plain"}


def keep(tmp_path: Path, name: str, content: bytes = b"") -> Prepared:
    """Put a model into the cache."""
    path = tmp_path / name
    path.write_bytes(WASM + content)
    return ModelCache().prepare(ModelFile.read(path), "wasmtime 50.0.1 x", {}, _compile)


def on_a_terminal(*words: str, cwd: Path, answer: bytes = b"") -> tuple[int, str]:
    """Run the command with a terminal; return its exit code and what was shown."""
    ours, theirs = pty.openpty()
    try:
        process = subprocess.Popen(
            [*SPARK, *words],
            cwd=cwd,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "200"},
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
        )
        os.close(theirs)
        os.write(ours, answer)
        shown = b""
        while part := _read(ours):
            shown += part
        return process.wait(SECONDS), shown.decode()
    finally:
        os.close(ours)


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 4096)
    except OSError as problem:
        if problem.errno != errno.EIO:  # how Linux says that the other side of a terminal is gone
            raise
        return b""


# --- inspect ---------------------------------------------------------------------------------------------------------


def inspected(tmp_path: Path, *words: str) -> dict[str, Any]:
    done = spark("models", "inspect", *words, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def test_inspecting_a_plain_model_tells_all_of_it(folder: Path, tmp_path: Path) -> None:
    path = MODELS / "json_model.wasm"
    document = inspected(tmp_path, str(path))
    assert document["path"] == str(path)
    assert document["size"] == path.stat().st_size
    assert document["kind"] == "plain"
    assert document["imports"] == []
    execute = next(each for each in document["exports"] if each["name"] == "execute")
    assert (execute["kind"], execute["type"]) == ("function", "(i32, i32) -> i64")
    assert document["cache"]["was_cached"] is False
    assert document["cache"]["code_size"] > 0
    assert inspected(tmp_path, str(path))["cache"]["was_cached"] is True


@pytest.mark.parametrize(("name", "kind"), [("wasi_cmd", "command"), ("wasi_reactor", "reactor")])
def test_inspecting_a_wasi_model_tells_its_kind_and_its_imports(
    folder: Path, tmp_path: Path, name: str, kind: str
) -> None:
    document = inspected(tmp_path, str(MODELS / f"{name}.wasm"))
    assert document["kind"] == kind
    assert {each["module"] for each in document["imports"]} == {"wasi_snapshot_preview1"}
    assert document["memories"][0]["min"] >= 1
    assert document["runs"]


def test_inspecting_for_people_is_plain_in_a_pipe(folder: Path, tmp_path: Path) -> None:
    done = spark("models", "inspect", str(MODELS / "wasi_cmd.wasm"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    assert "kind    command" in done.stdout
    assert "wasi_snapshot_preview1.fd_write\tfunction\t(i32, i32, i32, i32) -> i32" in done.stdout
    assert "_start\tfunction\t() -> ()" in done.stdout


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"PK\x03\x04", "the package cannot be used"),
        (WASM + b"\x01\xff\xff", "model 'bad'"),
        (None, "there is no file"),
    ],
)
def test_what_cannot_be_inspected_is_one_sentence(
    folder: Path, tmp_path: Path, content: bytes | None, words: str
) -> None:
    if content is not None:
        (tmp_path / "bad.wasm").write_bytes(content)
    done = spark("models", "inspect", "bad.wasm", "--json", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_names_in_a_module_cannot_steer_a_terminal(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepared = keep(tmp_path, "a.wasm")
    hostile = {"module": HOSTILE, "name": HOSTILE, "kind": "function", "type": "()"}
    prepared.report.update(
        entry="execute", runs=HOSTILE, memories=[], has_names=False, imports=[hostile], exports=[hostile]
    )
    models._write_model(models.describe(ModelFile.read(tmp_path / "a.wasm"), prepared))
    shown = capsys.readouterr().out
    assert "owned" in shown
    assert not {char for char in shown if not char.isprintable()} - {"\n", "\t"}
    assert shown.count("\t") == 4, "columns are told apart by tabs, and a name has none"


# --- the cache -------------------------------------------------------------------------------------------------------


def test_an_empty_cache_is_listed_as_that(folder: Path, tmp_path: Path) -> None:
    done = spark("models", "cache", "list", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"{folder}: 0 models, 0 B\n")
    assert not folder.exists()


def test_what_is_kept_is_listed_the_last_used_first(folder: Path, tmp_path: Path) -> None:
    for age, name in enumerate(("old.wasm", "new.wasm")):
        key = keep(tmp_path, name, name.encode()).key
        os.utime(folder / f"{key}.entry", (1000 + age, 1000 + age))
    done = spark("models", "cache", "list", "--json", cwd=tmp_path)
    document = json.loads(done.stdout)
    assert [each["name"] for each in document["entries"]] == ["new.wasm", "old.wasm"]
    assert document["folder"] == str(folder)
    assert document["bytes"] == sum(each["size"] for each in document["entries"])
    assert document["entries"][0]["path"] == str(tmp_path / "new.wasm")
    plain = spark("models", "cache", "list", cwd=tmp_path).stdout.splitlines()
    assert [line.split("\t")[0] for line in plain[:2]] == ["new.wasm", "old.wasm"]


def test_a_file_name_cannot_steer_a_terminal(folder: Path, tmp_path: Path) -> None:
    keep(tmp_path, HOSTILE)
    code, shown = on_a_terminal("models", "cache", "list", cwd=tmp_path)
    assert code == 0
    assert visible(HOSTILE) in shown
    assert "\x1b]" not in shown
    assert "\u202e" not in shown


def test_clearing_removes_what_is_kept(folder: Path, tmp_path: Path) -> None:
    keep(tmp_path, "a.wasm", b"a")
    keep(tmp_path, "b.wasm", b"b")
    done = spark("models", "cache", "clear", "--yes", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("removed 2 models, ")
    assert [path.name for path in folder.iterdir()] == ["secret"]


def test_clearing_leaves_what_is_in_use_and_says_so(folder: Path, tmp_path: Path) -> None:
    kept = keep(tmp_path, "a.wasm")
    done = spark("models", "cache", "clear", "--yes", cwd=tmp_path)
    assert done.stdout.startswith("removed 0 models")
    assert "1 in use" in done.stdout
    assert Path(kept.code).exists()


def test_clearing_without_yes_asks_and_without_a_terminal_refuses(folder: Path, tmp_path: Path) -> None:
    keep(tmp_path, "a.wasm")
    done = spark("models", "cache", "clear", cwd=tmp_path)
    assert done.returncode == 2
    assert "add --yes" in done.stderr
    code, shown = on_a_terminal("models", "cache", "clear", cwd=tmp_path, answer=b"n\n")
    assert code == 130
    assert f"Remove 1 compiled model from {folder}?" in shown
    assert len(ModelCache().entries()) == 1
    code, shown = on_a_terminal("models", "cache", "clear", cwd=tmp_path, answer=b"y\n")
    assert code == 0
    assert "removed 1 model, " in shown


def test_a_cache_folder_of_others_is_one_sentence(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "thesis.txt").touch()
    shared.chmod(0o777)
    done = spark("models", "cache", "list", cwd=tmp_path, SPARKRT_CACHE_DIR=str(shared))
    assert done.returncode == 2
    assert "other users may write in" in done.stderr
    assert "Traceback" not in done.stderr


def test_sizes_are_told_in_units_for_people() -> None:
    assert [size_text(size) for size in (0, 999, 1000, 1_300_000, 2 << 30)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "1.3 MB",
        "2.1 GB",
    ]
