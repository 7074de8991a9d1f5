"""What a user sees who makes a mistake: one sentence, the right exit code, never a traceback of ours."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from harness import SECONDS, spark, write

GOOD = """
    def torch():
        print("ran")
"""


def refused(tmp_path: Path, *words: str, code: int = 2) -> str:
    """Run ``spark run`` with these words; return its complaint after checking that it is one sentence."""
    done = spark("run", *words, "--exit", "--no-watch", cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    return done.stderr


def test_a_script_that_is_missing_is_named(tmp_path: Path) -> None:
    assert "missing.py: No such file or directory; give the path" in refused(tmp_path, "missing.py")


def test_a_folder_is_no_script(tmp_path: Path) -> None:
    assert "is a folder; give the path of a Python file in it" in refused(tmp_path, ".")


def test_a_device_is_no_script(tmp_path: Path) -> None:
    assert "is not a regular file" in refused(tmp_path, "/dev/null")


def test_a_script_without_torch_is_told_what_to_define(tmp_path: Path) -> None:
    write(tmp_path / "train.py", "x = 1")
    complaint = refused(tmp_path, "train.py")
    assert "train.py:1: there is no torch(): define `def torch():`" in complaint


@pytest.mark.parametrize("name", ["torch.py", "random.py", "json.py"])
def test_a_script_that_would_hide_a_module_is_refused_with_the_reason(tmp_path: Path, name: str) -> None:
    write(tmp_path / name, GOOD)
    complaint = refused(tmp_path, name)
    assert "hides" in complaint
    assert "rename it" in complaint


@pytest.mark.parametrize("name", ["torch/x.txt", "torch.py", "logging.py", "types/__init__.py"])
def test_a_neighbour_that_hides_a_module_is_refused_with_the_reason(tmp_path: Path, name: str) -> None:
    write(tmp_path / "train.py", GOOD)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    complaint = refused(tmp_path, "train.py")
    assert f"{tmp_path / name.partition('/')[0]} hides" in complaint


def test_a_folder_that_hides_nothing_is_no_trouble(tmp_path: Path) -> None:
    write(tmp_path / "train.py", GOOD)
    (tmp_path / "code").mkdir()
    assert spark("run", "train.py", "--no-watch", cwd=tmp_path).stdout == "ran\n"


def test_a_script_that_is_not_utf8_names_line_and_byte(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_bytes(b"# fine\nname = '\xe9t\xe9'\ndef torch(): pass\n")
    assert "train.py:2: byte 0xe9 is not UTF-8; save the file as UTF-8" in refused(tmp_path, "train.py")


def test_a_script_that_names_its_encoding_runs(tmp_path: Path) -> None:
    source = "# -*- coding: latin-1 -*-\ndef torch():\n    print(len('\xe9t\xe9'))\n"
    (tmp_path / "train.py").write_bytes(source.encode("latin-1"))
    assert spark("run", "train.py", "--no-watch", cwd=tmp_path).stdout == "3\n"


def test_a_script_that_others_may_write_gets_one_warning(tmp_path: Path) -> None:
    script = write(tmp_path / "train.py", GOOD)
    script.chmod(0o666)
    done = spark("run", "train.py", "--no-watch", cwd=tmp_path)
    assert done.returncode == 0
    assert done.stderr.count("warning") == 1
    assert "can be written by every user" in done.stderr


def test_an_unreadable_encoding_name_is_the_scripts_error(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_bytes(b"# -*- coding: nonsense -*-\n# \xe9\ndef torch(): pass\n")
    done = spark("run", "train.py", "--no-watch", cwd=tmp_path)
    assert done.returncode == 1
    assert "nonsense" in done.stderr


def test_a_syntax_error_at_the_start_is_shown_as_python_shows_it(tmp_path: Path) -> None:
    write(tmp_path / "train.py", "def torch():\n    return 1 +\n")
    done = spark("run", "train.py", "--no-watch", cwd=tmp_path)
    assert done.returncode == 1
    assert 'train.py", line 2' in done.stderr
    assert "SyntaxError" in done.stderr
    assert "spark_workers" not in done.stderr


def test_a_failing_import_of_the_scripts_own_shows_its_traceback(tmp_path: Path) -> None:
    write(tmp_path / "helper.py", "def broken():\n    raise ValueError('from the helper')\nbroken()\n")
    write(tmp_path / "train.py", "import helper\ndef torch(): pass\n")
    done = spark("run", "train.py", "--no-watch", cwd=tmp_path)
    assert done.returncode == 1
    assert "ValueError: from the helper" in done.stderr
    assert 'helper.py", line 2, in broken' in done.stderr
    assert "spark_workers" not in done.stderr


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("--call", "1x=2"), "does not begin with a function's name"),
        (("--call", "f={"), "the arguments of f are not JSON"),
        (("--from", "abc"), "--from RUN goes with --resume"),
        (("--load-timeout", "0"), "--load-timeout"),
        (("--nonsense",), "--nonsense"),
    ],
)
def test_wrong_options_are_named(tmp_path: Path, words: tuple[str, ...], complaint: str) -> None:
    write(tmp_path / "train.py", GOOD)
    assert complaint in refused(tmp_path, "train.py", *words)


def test_an_unknown_command_is_refused(tmp_path: Path) -> None:
    done = spark("fly", cwd=tmp_path)
    assert done.returncode == 2
    assert "No such command 'fly'" in done.stderr


def test_ctl_without_a_run_says_how_to_start_one(tmp_path: Path) -> None:
    done = spark("ctl", "status", cwd=tmp_path, SPARKRT_RUNTIME_DIR=str(tmp_path))
    assert done.returncode == 2
    assert "nothing runs; start something with `spark run script.py`" in done.stderr


def test_init_writes_a_script_that_runs_both_ways_and_writes_over_nothing(tmp_path: Path) -> None:
    assert spark("init", "mine", cwd=tmp_path).returncode == 0
    assert spark("run", "mine.py", "--exit", "--no-watch", cwd=tmp_path).returncode == 0
    plain = subprocess.run([sys.executable, "mine.py"], cwd=tmp_path, timeout=SECONDS, check=False)
    assert plain.returncode == 0
    again = spark("init", "mine.py", cwd=tmp_path)
    assert again.returncode == 2
    assert "mine.py is there already" in again.stderr


def test_init_refuses_a_name_that_could_not_run(tmp_path: Path) -> None:
    done = spark("init", "torch.py", cwd=tmp_path)
    assert done.returncode == 2
    assert not (tmp_path / "torch.py").exists()


def test_help_is_quick_because_it_imports_little(tmp_path: Path) -> None:
    code = (
        "import sys; sys.argv = ['spark', '--help']\n"
        "from spark_cli.main import main\n"
        "try: main()\n"
        "except SystemExit: print(sorted({m.partition('.')[0] for m in sys.modules} & set(sys.argv[2:] or HEAVY)))"
    ).replace("HEAVY", "{'watchfiles', 'rich', 'asyncio', 'msgpack', 'anyio', 'numpy', 'torch'}")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=SECONDS, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    for name in ("run", "ctl", "init"):
        assert name in done.stdout


def test_both_command_names_are_installed() -> None:
    folder = Path(sys.executable).parent
    for name in ("spark", "sparkrt"):
        if not (folder / name).exists():
            pytest.skip("the package is on the path but not installed")
        done = subprocess.run([folder / name, "--version"], capture_output=True, text=True, timeout=SECONDS, check=True)
        assert done.stdout.startswith("spark, version ")


def test_output_passes_unchanged_and_ours_goes_to_stderr(tmp_path: Path) -> None:
    write(
        tmp_path / "train.py",
        """
        import os, sys

        def torch():
            os.write(1, b"bytes \\xff\\n")
            print("to stderr", file=sys.stderr)
            print("no end of line", end="")
    """,
    )
    done = subprocess.run(
        [sys.executable, "-m", "spark_cli", "run", "train.py", "--no-watch"],
        cwd=tmp_path,
        env=dict(os.environ),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.stdout == b"bytes \xff\nno end of line"
    lines = done.stderr.decode().splitlines()
    assert "to stderr" in lines
    assert all(line.startswith("spark: ") for line in lines if line != "to stderr")


def test_a_reader_that_goes_away_does_not_disturb_the_run(tmp_path: Path) -> None:
    write(
        tmp_path / "train.py",
        """
        def torch():
            for i in range(100_000):
                print("a line that nobody reads", i)
            open("finished", "w").close()
    """,
    )
    command = f"{sys.executable} -m spark_cli run train.py --no-watch 2>stderr | head -n 1"
    subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, timeout=SECONDS, check=True)
    assert (tmp_path / "finished").exists()
    assert "Traceback" not in (tmp_path / "stderr").read_text()
