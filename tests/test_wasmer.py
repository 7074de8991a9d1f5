"""wasmer's replicas run under another interpreter: finding it, starting workers in it, and what is said without it."""

from __future__ import annotations

import contextlib
import functools
import glob
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest
from harness import spark, wait_gone

import spark_workers
from spark_runtime import Model, Spark
from spark_runtime.errors import EngineMissing, ExecuteTimeout, ModelExited, ModelStackOverflow
from spark_runtime.models import interpreter as interpreters
from spark_runtime.models.interpreter import Interpreter, find_interpreter, nursery_command
from spark_workers.channel import Channel
from spark_workers.messages import (
    Answered,
    Compile,
    Compiled,
    Exited,
    Failed,
    Fork,
    Forked,
    Host,
    Hosted,
    Message,
    NurseryReady,
    Preload,
    Printed,
    Refused,
    Work,
)

MODELS = Path(__file__).parent / "models"
COMPILING = "spark_workers.replicas.compiling:start"
REPLICA = "spark_workers.replicas.worker:start"
INSTALL = "-m pip install msgpack wasmer==1.1.0 wasmer_compiler_cranelift==1.1.0"


@pytest.fixture(autouse=True)
def _nothing_found_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpreters, "_found", {})


@pytest.fixture
def wasmer_python() -> Interpreter:
    """An interpreter with wasmer. One that is named in the environment must be usable; others may be missing."""
    found = look_for_one()
    if isinstance(found, str):
        pytest.skip(f"set SPARKRT_WASMER_PYTHON to a CPython 3.10 with wasmer: {found}")
    return found


@functools.cache
def look_for_one() -> Interpreter | str:
    """Return an interpreter with wasmer, or what the last one lacks."""
    named = os.environ.get("SPARKRT_WASMER_PYTHON")
    if named:
        return find_interpreter(named, "wasmer")
    why = ""
    for candidate in ("python3.10", *sorted(glob.glob(os.path.expanduser("~/.pyenv/versions/3.10.*/bin/python")))):
        try:
            return find_interpreter(candidate, "wasmer")
        except EngineMissing as problem:
            why = str(problem)
    return why


# --- finding one -----------------------------------------------------------------------------------------------------

IDENTITY = {
    "python": "3.10.13",
    "implementation": "CPython",
    "machine": "x86_64",
    "executable": "/opt/python3.10",
    "msgpack": "1.0.8",
    "wasmer": "1.1.0",
    "compiler": "cranelift 1.1.0",
    "problem": "",
}


@pytest.fixture
def fake(tmp_path: Path) -> Callable[[str], str]:
    """Write a script in the place of an interpreter; return its path."""

    def write(body: str) -> str:
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)
        return str(path)

    return write


def says(**changes: Any) -> str:
    """What makes a fake interpreter describe itself."""
    return f"printf '%s\\n' '{json.dumps(IDENTITY | changes)}'"


def refusal(python: str | None, engine: str = "wasmer") -> str:
    """Return why an interpreter is not taken; always one sentence that ends with what needs nothing."""
    with pytest.raises(EngineMissing) as caught:
        find_interpreter(python, engine)
    text = str(caught.value)
    assert "\n" not in text
    if engine == "wasmer":
        assert text.endswith("; the default engine, wasmtime, needs nothing")
        assert INSTALL in text
    return text


def test_an_interpreter_is_known_by_what_its_machine_code_depends_on(fake: Callable[[str], str]) -> None:
    found = find_interpreter(fake(says()), "wasmer")
    assert (found.path, found.version, found.note) == ("/opt/python3.10", "3.10.13", "")
    others = [{"wasmer": "1.2.0"}, {"compiler": "cranelift 1.2.0"}, {"machine": "aarch64"}]
    identities = {found.identity}
    for changes in others:
        interpreters._found.clear()
        identities.add(find_interpreter(fake(says(**changes)), "wasmer").identity)
    assert len(identities) == 4


def test_limits_are_part_of_what_wasmers_code_is_known_by(fake: Callable[[str], str]) -> None:
    found = find_interpreter(fake(says()), "wasmer")
    models = [Model("m", "m.wasm", **limits) for limits in ({}, {"memory_limit": 1 << 20}, {"table_limit": 5})]
    assert len({found.identity_for(model.settings()) for model in models}) == 3


def test_an_interpreter_is_asked_once(fake: Callable[[str], str], tmp_path: Path) -> None:
    python = fake(f"echo asked >> {tmp_path}/log; {says()}")
    assert find_interpreter(python, "wasmer") is find_interpreter(python, "wasmer")
    assert (tmp_path / "log").read_text() == "asked\n"


def test_the_slower_compiler_is_taken_with_a_note(fake: Callable[[str], str]) -> None:
    found = find_interpreter(fake(says(compiler="singlepass 1.1.0")), "wasmer")
    assert "only the singlepass compiler" in found.note
    assert INSTALL in found.note


def test_what_a_sitecustomize_prints_is_passed_over(fake: Callable[[str], str]) -> None:
    assert find_interpreter(fake(f"echo hello; echo world; {says()}"), "wasmer").version == "3.10.13"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"msgpack": None}, " lacks msgpack; run `"),
        ({"wasmer": None}, " lacks wasmer; run `"),
        ({"compiler": None}, " lacks a compiler for wasmer; run `"),
        (
            {"msgpack": None, "wasmer": None, "compiler": None},
            " lacks msgpack and wasmer and a compiler for wasmer; run `",
        ),
        ({"wasmer": None, "problem": "wasmer: no\n libffi"}, " lacks wasmer (wasmer: no libffi); run `"),
        ({"python": "3.9.18", "wasmer": None}, " is CPython 3.9.18, and workers need 3.10 or newer; run `"),
        ({"python": "3.12.1", "wasmer": None}, " is CPython 3.12.1, and wasmer's wheels end at CPython 3.10; run `"),
    ],
)
def test_what_an_interpreter_lacks_is_said_with_the_command_that_gets_it(
    fake: Callable[[str], str], changes: dict[str, Any], why: str
) -> None:
    python = fake(says(**changes))
    assert refusal(python).startswith(python + why)


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("echo hello", ' is no Python: asked what it is, it said \'hello\';'),
        ("true", " is no Python: asked what it is, it said nothing;"),
        ("printf '\\033[31mred\\nblue'", " is no Python: asked what it is, it said '?[31mred blue';"),
        ("echo '[]'", " is no Python: asked what it is, it said '[]';"),
        ("echo '{\"python\": 3}'", " is no Python: asked what it is, it said '{\"python\": 3}';"),
        ("exec yes", " ends with signal 9 when it is asked what it is;"),
        ("exit 3", " ends with exit code 3 when it is asked what it is;"),
        ("echo 'no 3.10' >&2; echo more >&2; exit 1", " ends with exit code 1 when it is asked what it is (no 3.10);"),
        ("printf 'Traceback:\\nx\\nE: y\\n' >&2; exit 1", " ends with exit code 1 when it is asked what it is (E: y);"),
        ("kill -SEGV $$", " ends with signal 11 when it is asked what it is;"),
    ],
)  # fmt: skip
def test_what_is_no_interpreter_is_said_with_what_it_answered(fake: Callable[[str], str], body: str, why: str) -> None:
    python = fake(body)
    assert refusal(python).startswith(python + why)


@pytest.mark.parametrize("wait", ["exec sleep {}", "sleep {}", "sleep {} & echo", "sleep {} > /dev/null 2>&1"])
def test_an_interpreter_that_hangs_is_given_up_with_all_that_it_started(
    fake: Callable[[str], str], monkeypatch: pytest.MonkeyPatch, wait: str
) -> None:
    monkeypatch.setattr(interpreters, "IDENTIFY_SECONDS", 0.5)
    seconds = f"600.{os.getpid()}"  # ours among all that sleep on this machine
    python = fake(wait.format(seconds))
    assert refusal(python).startswith(f"{python} does not say within 0.5 s which Python it is;")
    wait_gone(processes_with(seconds))


def processes_with(word: str) -> list[int]:
    """The processes in whose command this is a word."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if word.encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


def test_an_interpreter_that_is_not_there_is_said_to_be_missing(tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere" / "python"
    assert refusal(str(nowhere)).startswith(f"the interpreter '{nowhere}' for wasmer is not there;")
    assert refusal("python-of-nobody").startswith("the interpreter 'python-of-nobody' for wasmer is not there on PATH;")
    assert refusal(str(tmp_path)).startswith(f"the interpreter '{tmp_path}' for wasmer is no file that can be run;")
    text = tmp_path / "text"
    text.write_text("hello")
    assert refusal(str(text)).startswith(f"the interpreter '{text}' for wasmer is no file that can be run;")
    text.chmod(0o755)
    assert refusal(str(text)).startswith(f"{text} cannot be run: Exec format error;")


def test_without_a_name_python3_10_is_looked_for_on_path(
    fake: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert refusal(None).startswith("wasmer needs CPython 3.10, and there is no python3.10 on PATH; run `python3.10 -m")
    os.rename(fake(says()), tmp_path / "python3.10")
    assert find_interpreter(None, "wasmer").version == "3.10.13"


def test_a_plain_interpreter_is_told_what_to_install(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "plain"], check=True)
    python = str(tmp_path / "plain" / "bin" / "python")
    command = f"`{python} -m pip install msgpack wasmtime`"
    assert refusal(python, "wasmtime") == f"{python} lacks msgpack and wasmtime; run {command}"
    assert "wasmer" in refusal(python)


def test_the_paths_of_our_own_python_are_not_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "json.py").write_text("raise ImportError('of another Python')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PYTHONHOME", str(tmp_path))
    found = find_interpreter(sys.executable, "wasmtime")
    assert found.path == sys.executable
    assert found.identity_for({}) == found.identity


@pytest.mark.parametrize("start", ["exec", ""])
def test_a_script_that_chooses_an_interpreter_is_followed_to_it(
    fake: Callable[[str], str], wasmer_python: Interpreter, start: str
) -> None:
    script = fake(f'{start} {wasmer_python.path} "$@"')
    assert find_interpreter(script, "wasmer") == wasmer_python


# --- the nursery under it --------------------------------------------------------------------------------------------


class Nursery:
    """A nursery started as `nursery_command` says, and its workers."""

    def __init__(self, command: list[str], modules: list[str], **environment: str) -> None:
        ours, theirs = socket.socketpair()
        ours.settimeout(30)
        self.process = subprocess.Popen(
            [*command, "nursery", str(theirs.fileno()), str(os.getpid())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **environment},
        )
        theirs.close()
        self.channel = Channel(ours)
        self.channel.send(Preload(modules))
        ready, _ = self.channel.receive()
        assert isinstance(ready, NurseryReady)
        self.modules = ready.modules
        self.printed = b""  # by the nursery, and by workers that nobody gave another place

    def fork(self, entry: str) -> Worker:
        """Start a worker."""
        return Worker(self, entry)

    def wait_exit(self) -> int:
        """Return the status of the next worker that ends."""
        message, _ = self.channel.receive()
        assert isinstance(message, Exited), message
        return message.status

    def close(self) -> None:
        """End it with all its workers."""
        self.channel.close()
        with self.process:
            self.printed, _ = self.process.communicate(timeout=20)


class Worker:
    """One worker, our end of its channel, and all that it prints."""

    def __init__(self, nursery: Nursery, entry: str) -> None:
        ours, theirs = socket.socketpair()
        ours.settimeout(30)
        bell = os.memfd_create("bell")
        os.ftruncate(bell, 4096)
        self._printed, printed = os.pipe()
        given = [theirs.fileno(), bell, printed, os.dup(printed)]
        nursery.channel.send(Fork(1, entry), given)
        theirs.close()
        for each in given[1:]:
            os.close(each)
        forked, pidfds = nursery.channel.receive()
        assert isinstance(forked, Forked)
        for each in pidfds:
            os.close(each)
        self.pid = forked.pid
        self.channel = Channel(ours)

    def ask(self, message: Message, *descriptors: int) -> Message:
        """Send a message and return the answer."""
        self.channel.send(message, descriptors)
        return self.channel.receive()[0]

    def close(self) -> bytes:
        """Let it end; return what it has printed."""
        self.channel.close()
        with open(self._printed, "rb") as file:
            return file.read()


@pytest.fixture(params=["fork", "spawn"])
def nursery(wasmer_python: Interpreter, request: pytest.FixtureRequest) -> Iterator[Nursery]:
    """A nursery under the interpreter with wasmer, whose workers are forked or spawned."""
    environment = {"SPARKRT_START": "spawn"} if request.param == "spawn" else {}
    found = Nursery(nursery_command(wasmer_python), [REPLICA.partition(":")[0], "wasmer"], **environment)
    try:
        yield found
    finally:
        found.close()
    assert found.printed == b""


def settings(**options: Any) -> dict[str, Any]:
    """What a model's worker is told."""
    return Model("m", "m.wasm", engine="wasmer", **options).settings()


def compiled(nursery: Nursery, model: str, path: Path, **options: Any) -> Path:
    """Compile a model to *path* in a worker."""
    worker = nursery.fork(COMPILING)
    with open(MODELS / f"{model}.wasm", "rb") as module, path.open("wb") as code:
        message = Compile("wasmer", settings(**options), [60, 4 << 30])
        answer = worker.ask(message, module.fileno(), code.fileno())
    assert isinstance(answer, Compiled), answer
    assert nursery.wait_exit() == 0
    assert worker.close() == b""
    return path


@contextlib.contextmanager
def replica(nursery: Nursery, kind: str, code: Path, **options: Any) -> Iterator[Callable[..., list[Message]]]:
    """Start a replica; give the function that has it run calls and returns what it says to each."""
    worker = nursery.fork(REPLICA)
    tokens, write = os.pipe()
    hosted = worker.ask(Host("wasmer", kind, str(code), settings(**options)), tokens)
    assert isinstance(hosted, Hosted), hosted

    def run(*calls: tuple[str, bytes]) -> list[Message]:
        worker.channel.send(Work([[number, *call] for number, call in enumerate(calls, 1)], False))
        said: list[Message] = []
        while sum(not isinstance(each, Printed) for each in said) < len(calls):
            said.append(worker.channel.receive()[0])
        return said

    try:
        yield run
    finally:
        os.close(tokens)
        os.close(write)
        assert worker.close() == b""
        assert nursery.wait_exit() == 0


def test_a_model_is_compiled_in_one_worker_and_run_in_another(nursery: Nursery, tmp_path: Path) -> None:
    code = compiled(nursery, "json_model", tmp_path / "code")
    with replica(nursery, "plain", code) as run:
        said = run(("", b'{"xs": [1, 2]}'), ("add", msgpack.packb([1, 2.5])), ("", b'{"xs": []}'))
    answers = [each.answer for each in said if isinstance(each, Answered)]
    assert [json.loads(answers[0])["sum"], msgpack.unpackb(answers[1]), json.loads(answers[2])["n"]] == [3, [3.5], 0]


def test_failures_are_told_and_the_replica_goes_on(nursery: Nursery, tmp_path: Path) -> None:
    code = compiled(nursery, "trap_model", tmp_path / "code")
    nothing = msgpack.packb([])
    calls = [("t_stack", nothing), ("t_div0", msgpack.packb([1])), ("nowhere", nothing), ("ok", msgpack.packb(["1"]))]
    with replica(nursery, "functions", code) as run:
        said = run(*calls, ("ok", nothing))
    kinds = [each.kind for each in said if isinstance(each, Failed)]
    assert kinds == ["stack-overflow", "trap", "missing-export", "wrong-signature"]
    assert isinstance(said[-1], Answered)


def test_what_a_guest_prints_comes_as_an_answer_or_is_told_and_never_reaches_the_workers_streams(
    nursery: Nursery, tmp_path: Path
) -> None:
    code = compiled(nursery, "wasi_cmd", tmp_path / "code")
    with replica(nursery, "command", code) as run:
        first, second = run(("", b"[1, 2]"), ("", b"[3]"))
    assert isinstance(first, Answered)
    assert isinstance(second, Answered)
    assert json.loads(first.answer) == {"n": 2, "sum": 3, "bytes": 6}
    assert json.loads(second.answer) == {"n": 1, "sum": 3, "bytes": 3}
    with replica(nursery, "command", code, args=["fail"]) as run:
        printed, failed = run(("", b"[1]"))
    assert isinstance(printed, Printed)
    assert isinstance(failed, Failed)
    assert printed.text == '{"n":1,"sum":1,"bytes":3}\n'
    assert (failed.kind, failed.details["exit_code"], failed.details["stderr"]) == ("exit", 3, "model failed\n")


def test_code_that_does_not_fit_is_refused_as_stale(nursery: Nursery, tmp_path: Path) -> None:
    code = compiled(nursery, "json_model", tmp_path / "code")
    whole = code.read_bytes()
    for content, limit in ((whole[:-100], 2 << 30), (b"", 2 << 30), (whole, 1 << 30)):
        code.write_bytes(content)
        worker = nursery.fork(REPLICA)
        tokens, write = os.pipe()
        answer = worker.ask(Host("wasmer", "plain", str(code), settings(memory_limit=limit)), tokens)
        assert isinstance(answer, Refused)
        assert answer.kind == "stale-code"
        assert nursery.wait_exit() == 0
        assert worker.close() == b""
        os.close(tokens)
        os.close(write)


def test_a_replica_that_spins_is_killed_and_its_end_is_told(nursery: Nursery, tmp_path: Path) -> None:
    code = compiled(nursery, "spin_model", tmp_path / "code")
    worker = nursery.fork(REPLICA)
    tokens, write = os.pipe()
    assert isinstance(worker.ask(Host("wasmer", "functions", str(code), settings()), tokens), Hosted)
    worker.channel.send(Work([[1, "spin", msgpack.packb([])]], False))
    os.kill(worker.pid, signal.SIGKILL)
    assert nursery.wait_exit() == -signal.SIGKILL
    assert worker.close() == b""
    os.close(tokens)
    os.close(write)


def test_only_the_worker_package_is_importable_and_nothing_that_lies_beside_it(tmp_path: Path) -> None:
    site = tmp_path / "site-packages"
    package = site / "spark_workers"
    shutil.copytree(Path(spark_workers.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    (site / "poison.py").touch()
    (site / "msgpack.py").write_text("raise ImportError('of another Python')")
    names = ["poison", "channel", "frames", "bootstrap", "spark_workers.frames"]
    found = Nursery([sys.executable, "-E", str(package / "bootstrap.py")], names)
    found.close()
    assert found.printed == b""
    assert [name for name in names if name in found.modules] == ["spark_workers.frames"]


# --- the whole way ---------------------------------------------------------------------------------------------------


def wasmer_model(python: Interpreter, name: str, **options: Any) -> Model:
    """A model of the tests' that wasmer runs."""
    return Model(name, MODELS / f"{name}.wasm", engine="wasmer", python=python.path, **options)


def test_each_kind_of_model_answers_as_it_does_under_wasmtime(wasmer_python: Interpreter) -> None:
    names = ("json_model", "wasi_cmd", "wasi_reactor")
    request = {"xs": [1, 2, 3]}
    with Spark(models=[wasmer_model(wasmer_python, name, replicas=2) for name in names]) as ours:
        answers = [ours.execute(request, name) for name in names]
    with Spark(models=[Model(name, MODELS / f"{name}.wasm") for name in names]) as theirs:
        assert answers == [theirs.execute(request, name) for name in names]


def test_failures_have_their_own_errors_and_the_model_goes_on(wasmer_python: Interpreter) -> None:
    models = [wasmer_model(wasmer_python, "trap_model"), wasmer_model(wasmer_python, "wasi_cmd", args=["fail"])]
    with Spark(models=models) as models_of_ours:
        with pytest.raises(ModelStackOverflow):
            models_of_ours.call("trap_model", "t_stack")
        with pytest.raises(ModelExited, match="exit code 3"):
            models_of_ours.execute([1], "wasi_cmd")
        assert models_of_ours.call("trap_model", "ok") == 42


def test_a_guest_that_never_ends_is_stopped_and_the_next_call_is_answered(wasmer_python: Interpreter) -> None:
    with Spark(models=[wasmer_model(wasmer_python, "spin_model")]) as models_of_ours:
        with pytest.raises(ExecuteTimeout):
            models_of_ours.call("spin_model", "spin", timeout=1.0)
        assert models_of_ours.call("spin_model", "spin_bounded", 3) == 3


def test_two_models_of_one_file_have_each_its_own_limit(wasmer_python: Interpreter) -> None:
    path = MODELS / "mem_model.wasm"
    models = [
        Model(name, path, engine="wasmer", python=wasmer_python.path, memory_limit=size << 20)
        for name, size in (("small", 4), ("large", 64))
    ]
    with Spark(models=models) as models_of_ours:
        for _ in range(2):
            assert models_of_ours.call("small", "touch", 32) == -1
            assert models_of_ours.call("large", "touch", 32) == 512


def test_the_command_prints_the_answer_and_nothing_else(wasmer_python: Interpreter, tmp_path: Path) -> None:
    engine = ["--engine", "wasmer", "--worker-python", wasmer_python.path]
    done = spark("exec", str(MODELS / "wasi_cmd.wasm"), "--input", "[1, 2]", *engine, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == {"n": 2, "sum": 3, "bytes": len("[1,2]")}
    failed = spark("exec", str(MODELS / "wasi_cmd.wasm"), "--input", "[1]", "--arg", "fail", *engine, cwd=tmp_path)
    assert (failed.returncode, failed.stdout) == (1, "")
    assert "model failed" in failed.stderr


def test_without_the_interpreter_a_call_fails_with_what_to_do(fake: Callable[[str], str], tmp_path: Path) -> None:
    python = fake(says(wasmer=None))
    model = Model("m", MODELS / "json_model.wasm", engine="wasmer", python=python)
    with (
        Spark(models=[model]) as models_of_ours,
        pytest.raises(EngineMissing, match=r"lacks wasmer; run `.*pip install"),
    ):
        models_of_ours.execute({}, "m")
    done = spark(
        "exec", str(model.path), "--input", "{}", "--engine", "wasmer", "--worker-python", python, cwd=tmp_path
    )
    assert done.returncode == 2
    assert f"{python} lacks wasmer; run" in done.stderr
    assert "Traceback" not in done.stderr
