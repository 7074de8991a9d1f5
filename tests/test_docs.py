"""Every example in README and docs runs: Python both ways, commands as they stand."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from harness import SECONDS, spark

TOP = Path(__file__).parent.parent
PAGES = [TOP / "README.md", *sorted((TOP / "docs").glob("*.md"))]
MODEL = TOP / "tests" / "models" / "json_model.wasm"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.M | re.S)


def examples(language: str) -> list[tuple[str, str]]:
    """Return every fenced block of a language, with a name for it; README's two commands are CI's business."""
    found = []
    for page in PAGES:
        blocks = [text for name, text in BLOCK.findall(page.read_text()) if name == language]
        skipped = 2 if page.name == "README.md" and language == "sh" else 0
        found += [(f"{page.name}-{number}", text) for number, text in enumerate(blocks)][skipped:]
    return found


def _parameters(language: str) -> list[object]:
    return [pytest.param(text, id=name) for name, text in examples(language)]


@pytest.mark.parametrize("source", _parameters("python"))
def test_python_example_runs_under_the_runtime_and_without_it(source: str, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(source)
    run = spark("run", str(script), "--exit", "--no-watch", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    plain = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert plain.returncode == 0, plain.stderr
    assert plain.stdout == run.stdout


@pytest.mark.parametrize("source", _parameters("py"))
def test_program_example_runs(source: str, tmp_path: Path) -> None:
    shutil.copy(MODEL, tmp_path / "pricing.wasm")
    (tmp_path / "program.py").write_text(source)
    done = subprocess.run(
        [sys.executable, "program.py"], cwd=tmp_path, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert not done.stderr


@pytest.mark.parametrize("commands", _parameters("sh"))
def test_command_example_runs(commands: str, tmp_path: Path) -> None:
    shutil.copy(MODEL, tmp_path / "pricing.wasm")
    here = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["sh", "-e", "-c", commands],
        cwd=tmp_path,
        env={**os.environ, "PATH": here},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=2 * SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_readme_begins_with_two_commands_of_one_line_each() -> None:
    commands = [text.strip() for name, text in BLOCK.findall((TOP / "README.md").read_text()) if name == "sh"]
    assert len(commands) >= 2
    for command in commands[:2]:
        assert "\n" not in command
        assert command.startswith("python3 -m venv .venv && ")
