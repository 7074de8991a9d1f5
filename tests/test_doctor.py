"""`spark doctor` in whole and in broken environments: it says why something will not work, and what to do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from harness import SECONDS, SPARK, spark, write

from spark_cli.checks import CHECKS, PROBLEM, Finding, examine
from spark_runtime.errors import StoreError


def doctor(tmp_path: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command with a cache folder of its own."""
    given = {"SPARKRT_CACHE_DIR": str(tmp_path / "cache"), **environment}
    return spark("doctor", *words, cwd=tmp_path, timeout=2 * SECONDS, **given)


def findings(tmp_path: Path, code: int, **environment: str) -> dict[str, dict[str, Any]]:
    """Return every finding by its name, after seeing that the command ended as it should."""
    done = doctor(tmp_path, "--json", **environment)
    assert done.returncode == code, done.stdout + done.stderr
    assert done.stderr == ""
    document = json.loads(done.stdout)
    assert document["ok"] == (code == 0)
    return {each["name"]: each for each in document["checks"]}


def test_a_whole_environment_has_no_problem(tmp_path: Path) -> None:
    found = findings(tmp_path, 0)
    assert list(found) == [name for name, _ in CHECKS]
    assert found["python"]["version"] == ".".join(map(str, sys.version_info[:3]))
    assert found["wasmtime"]["calls"] in ("raw", "public")
    assert found["cache folder"]["path"] == str(tmp_path / "cache")
    assert found["nursery"]["state"] == "ok"
    assert found["watching"]["state"] == "ok"
    assert list((tmp_path / "cache").iterdir()) == []


def test_for_people_there_is_a_line_for_each_check(tmp_path: Path) -> None:
    done = doctor(tmp_path)
    assert done.returncode == 0, done.stdout
    assert "\x1b" not in done.stdout
    lines = [line for line in done.stdout.splitlines() if not line.startswith(" ")]
    assert [line[8:24].strip() for line in lines] == [name for name, _ in CHECKS]


def test_a_missing_engine_is_a_problem_with_the_command_that_installs_it(tmp_path: Path) -> None:
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    write(blocked / "wasmtime.py", "raise ImportError('blocked')")
    wasmtime = findings(tmp_path, 1, PYTHONPATH=str(blocked))["wasmtime"]
    assert wasmtime["state"] == PROBLEM
    assert "wasmtime is not installed" in wasmtime["text"]
    assert "-m pip install wasmtime" in wasmtime["text"]


def test_an_engine_with_a_broken_library_is_a_problem_and_the_rest_is_looked_at(tmp_path: Path) -> None:
    package = tmp_path / "broken" / "wasmtime"
    library = package / f"{sys.platform}-{os.uname().machine}" / "_libwasmtime.so"
    library.parent.mkdir(parents=True)
    library.write_bytes(b"no library")
    (package / "__init__.py").write_text("raise OSError('no library')")
    (package.parent / "wasmtime-50.0.1.dist-info").mkdir()
    found = findings(tmp_path, 1, PYTHONPATH=str(package.parent))
    assert found["wasmtime"]["state"] == PROBLEM
    assert "50.0.1 does not run" in found["wasmtime"]["text"]
    assert "--force-reinstall" in found["wasmtime"]["advice"]
    assert found["processors"]["state"] == "ok"


def test_a_cache_folder_that_cannot_be_made_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    folder = findings(tmp_path, 1, SPARKRT_CACHE_DIR=str(tmp_path / "file" / "cache"))["cache folder"]
    assert folder["state"] == PROBLEM
    assert "Not a directory" in folder["text"]
    assert "SPARKRT_CACHE_DIR" in folder["advice"]


def test_a_cache_folder_that_others_may_write_in_is_a_problem(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "thesis.txt").touch()
    shared.chmod(0o777)
    folder = findings(tmp_path, 1, SPARKRT_CACHE_DIR=str(shared))["cache folder"]
    assert folder["state"] == PROBLEM
    assert "other users may write in" in folder["text"]


def test_a_runtime_folder_that_others_can_enter_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "sparkrt").mkdir()
    (tmp_path / "sparkrt").chmod(0o755)
    folder = findings(tmp_path, 1, SPARKRT_RUNTIME_DIR=str(tmp_path))["runtime folder"]
    assert folder["state"] == PROBLEM
    assert "chmod 700" in folder["text"]


def test_a_nursery_that_does_not_start_is_a_problem(tmp_path: Path) -> None:
    hooks = tmp_path / "hooks"
    hooks.mkdir()
    write(
        hooks / "sitecustomize.py",
        """
        import os, sys
        if "nursery" in sys.orig_argv:
            os.write(2, b"no nursery today\\n")
            os._exit(3)
        """,
    )
    nursery = findings(tmp_path, 1, PYTHONPATH=str(hooks))["nursery"]
    assert nursery["state"] == PROBLEM
    assert "no nursery today" in nursery["text"]


def test_problems_are_counted_at_the_end(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = doctor(tmp_path, SPARKRT_CACHE_DIR=str(tmp_path / "file" / "cache"))
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "1 problem; what to do stands below each"
    assert "Traceback" not in done.stderr


def test_what_merely_is_slower_is_a_note(tmp_path: Path) -> None:
    found = findings(tmp_path, 0, SPARKRT_START="spawn")["start method"]
    assert (found["state"], found["method"]) == ("note", "spawn")


def test_few_open_files_are_a_note(tmp_path: Path) -> None:
    done = subprocess.run(
        ["sh", "-c", 'ulimit -n 256 && exec "$@"', "sh", *SPARK, "doctor", "--json"],
        cwd=tmp_path,
        env={**os.environ, "SPARKRT_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=2 * SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    found = {each["name"]: each for each in json.loads(done.stdout)["checks"]}["open files"]
    assert (found["state"], found["soft"]) == ("note", 256)
    assert "ulimit -n" in found["advice"]


def _fails() -> Finding:
    raise ZeroDivisionError("division by zero")


def _refuses() -> Finding:
    raise StoreError("give it another folder")


@pytest.mark.parametrize(
    ("check", "text"), [(_fails, "ZeroDivisionError: division by zero"), (_refuses, "give it another folder")]
)
def test_a_check_that_raises_is_a_problem_of_its_own(check: Any, text: str) -> None:
    finding = examine(check)
    assert (finding.state, finding.text) == (PROBLEM, text)
