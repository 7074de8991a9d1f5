"""Prepared models: what comes out of the cache is right to the last bit, or it is compiled again."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import SECONDS

from spark_runtime.errors import (
    BadRequestError,
    EngineMissing,
    ModelNotFound,
    ModelUnusable,
    ProtocolViolated,
    StoreError,
)
from spark_runtime.models import identity
from spark_runtime.models.cache_folder import CacheFolder, default_folder
from spark_runtime.models.identity import engine_identity, entry_key
from spark_runtime.models.prepared import ModelCache, ModelFile, Prepared
from spark_runtime.models.scratch import Scratch

WASM = b"\0asm\x01\0\0\0"
ENGINE = "wasmtime 50.0.1 of a test"
SETTINGS = {"entry": "execute", "epochs": False, "memory_limit": 1 << 20}
REPORT = {"kind": "plain", "exports": [["", "execute", "function", "(i32, i32) -> i64"]]}
FILES_OF_AN_ENTRY = 2


def code_of(module: bytes) -> bytes:
    """Return what our compiler makes of a module: it tells the module everywhere and is longer than one read."""
    return hashlib.sha256(module).digest() * (3 << 15)


class Compiler:
    """Stands where a compile worker does, and counts."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, module: int, code: int) -> dict[str, Any]:
        self.count += 1
        content = os.pread(module, os.fstat(module).st_size, 0)
        assert os.write(code, code_of(content)) == len(code_of(content))
        return dict(REPORT)


class Desk:
    """A cache in a folder, a compiler, and what was said to the user."""

    def __init__(self, folder: Path, limit: int = 1 << 30) -> None:
        self.folder = folder
        self.compiler = Compiler()
        self.warnings: list[str] = []
        self.cache = ModelCache(folder, limit_bytes=limit, warn=self.warnings.append)

    def prepare(self, model: ModelFile, **settings: Any) -> Prepared:
        return self.cache.prepare(model, ENGINE, {**SETTINGS, **settings}, self.compiler)

    def check(self, model: ModelFile) -> bool:
        """Prepare, see that the code is right, and tell whether it was compiled for that."""
        before = self.compiler.count
        prepared = self.prepare(model)
        assert Path(prepared.code).read_bytes() == code_of(model.data)
        assert prepared.report == REPORT
        assert prepared.from_cache == (self.compiler.count == before)
        return not prepared.from_cache


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path / "cache")


@pytest.fixture
def model(tmp_path: Path) -> ModelFile:
    return make_model(tmp_path)


def make_model(folder: Path, content: bytes = b"a model") -> ModelFile:
    path = folder / f"{hashlib.sha256(content).hexdigest()[:8]}.wasm"
    path.write_bytes(WASM + content)
    return ModelFile.read(path)


def entry_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix in (".entry", ".code"))


def another(desk: Desk) -> Desk:
    """The same folder, as a process sees it that starts now."""
    return Desk(desk.folder)


CHILD = f"""
import hashlib, os, sys
from pathlib import Path
from spark_runtime.models.cache_folder import CacheFolder
from spark_runtime.models.prepared import ModelCache, ModelFile
from spark_runtime.models.scratch import Scratch

ENGINE, SETTINGS, REPORT = {ENGINE!r}, {SETTINGS!r}, {REPORT!r}
folder, module = Path(sys.argv[1]), sys.argv[2]

def say(text):
    os.write(1, text.encode() + b"\\n")

def compiling(source, code):
    say("compiling")
    os.write(code, hashlib.sha256(os.pread(source, 1 << 20, 0)).digest() * (3 << 15))
    return REPORT

def prepare(compiling=compiling, **rest):
    return cache.prepare(ModelFile.read(module), ENGINE, SETTINGS, compiling, **rest)

cache = ModelCache(folder, warn=say)
"""


class Child:
    """Another process on the same folder; it lives no longer than the test."""

    def __init__(self, source: str, folder: Path, model: ModelFile, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", CHILD + textwrap.dedent(source), str(folder), str(model.path)],
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def line(self) -> str:
        """Return the next line that it says; empty at its end."""
        return self.process.stdout.readline().decode().strip()  # type: ignore[union-attr]

    def go(self) -> None:
        """Let it go on from where it reads a line."""
        self.process.stdin.write(b"\n")  # type: ignore[union-attr]
        self.process.stdin.flush()  # type: ignore[union-attr]

    def end(self) -> tuple[int, list[str], str]:
        """Wait for it; return its exit code, the rest of its lines and what went wrong."""
        out, err = self.process.communicate(timeout=SECONDS)
        return self.process.returncode, out.decode().splitlines(), err.decode()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=SECONDS)


@pytest.fixture
def child(desk: Desk, model: ModelFile) -> Iterator[Callable[..., Child]]:
    children = []

    def start(source: str, **environment: str) -> Child:
        children.append(Child(source, desk.folder, model, **environment))
        return children[-1]

    yield start
    for each in children:
        each.close()


# --- hits ------------------------------------------------------------------------------------------------------------


def test_the_second_time_nothing_is_compiled(desk: Desk, model: ModelFile) -> None:
    assert desk.check(model)
    assert not desk.check(model)
    assert not another(desk).check(model)
    assert desk.compiler.count == 1
    assert desk.warnings == []


def test_everything_is_for_this_user_alone_whatever_the_umask(desk: Desk, model: ModelFile) -> None:
    previous = os.umask(0)
    try:
        desk.check(model)
    finally:
        os.umask(previous)
    assert stat.S_IMODE(desk.folder.stat().st_mode) == 0o700
    for path in desk.folder.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


def test_nothing_lies_in_the_folder_but_the_secret_and_the_entry(desk: Desk, model: ModelFile) -> None:
    desk.check(model)
    assert sorted(path.suffix for path in desk.folder.iterdir()) == ["", ".code", ".entry"]


def test_a_limit_of_the_instance_makes_no_other_code(desk: Desk, model: ModelFile) -> None:
    first = desk.prepare(model)
    assert desk.prepare(model, memory_limit=1 << 30, stack_limit=1 << 17).code == first.code


@pytest.mark.parametrize(
    ("engine", "settings"),
    [(ENGINE, {"epochs": True}), (ENGINE, {"entry": "other"}), ("wasmtime 51", {})],
)
def test_other_engine_or_settings_make_other_code(engine: str, settings: dict[str, Any], model: ModelFile) -> None:
    assert entry_key(model.sha256, ENGINE, SETTINGS) != entry_key(model.sha256, engine, {**SETTINGS, **settings})


def test_another_processor_makes_other_code(monkeypatch: pytest.MonkeyPatch, model: ModelFile) -> None:
    here = entry_key(model.sha256, ENGINE, SETTINGS)
    monkeypatch.setattr(identity, "processor_identity", lambda: "linux x86_64 sse2")
    assert entry_key(model.sha256, ENGINE, SETTINGS) != here


def test_the_report_says_where_the_model_came_from(desk: Desk, model: ModelFile) -> None:
    desk.check(model)
    (entry,) = desk.cache.entries()
    assert (entry.name, entry.path) == (model.path.name, str(model.path))
    assert entry.engine == "wasmtime 50.0.1"
    assert entry.module_size == model.size
    assert entry.size > len(code_of(model.data))


def test_a_compiler_that_fails_leaves_nothing_and_is_asked_again(desk: Desk, model: ModelFile) -> None:
    def failing(module: int, code: int) -> dict[str, Any]:
        os.write(code, b"half of it")
        raise ModelUnusable("it imports env.nonsense", "unsupported-import")

    for _ in range(2):
        with pytest.raises(ModelUnusable, match="nonsense"):
            desk.cache.prepare(model, ENGINE, SETTINGS, failing)
    assert entry_files(desk.folder) == []
    assert desk.check(model)


def test_code_that_its_engine_refuses_is_compiled_again(desk: Desk, model: ModelFile) -> None:
    desk.cache.discard(desk.prepare(model))
    assert desk.cache.entries() == []
    assert desk.check(model)
    assert len(entry_files(desk.folder)) == FILES_OF_AN_ENTRY


def test_a_file_that_changes_while_it_is_compiled_does_not_spoil_the_entry(desk: Desk, model: ModelFile) -> None:
    model.path.write_bytes(WASM + b"something else")
    assert desk.check(model)
    assert not desk.check(model)
    assert desk.check(ModelFile.read(model.path))


# --- doubts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".code", ".entry"])
def test_a_flipped_bit_is_found_wherever_it_is(desk: Desk, model: ModelFile, suffix: str) -> None:
    chance = random.Random(suffix)
    desk.check(model)
    for round_ in range(40):
        (path,) = (each for each in entry_files(desk.folder) if each.suffix == suffix)
        content = bytearray(path.read_bytes())
        place = round_ if suffix == ".entry" and round_ < 3 else chance.randrange(len(content))
        content[place] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
        assert another(desk).check(model), f"byte {place} of {path.name}"
        assert len(entry_files(desk.folder)) == FILES_OF_AN_ENTRY
    assert not another(desk).check(model)


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def _empty(path: Path) -> None:
    os.truncate(path, 0)


def _lengthen(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\0")


def _open_to_others(path: Path) -> None:
    path.chmod(0o660)


def _make_link(path: Path) -> None:
    elsewhere = path.parent.parent / f"moved{path.suffix}"
    shutil.move(path, elsewhere)
    path.symlink_to(elsewhere)


def _make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _make_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path, 0o600)


def _fill(path: Path) -> None:
    path.write_bytes(b"{" * path.stat().st_size)


@pytest.mark.parametrize("suffix", [".code", ".entry"])
@pytest.mark.parametrize("harm", [Path.unlink, _cut, _empty, _lengthen, _open_to_others, _make_link, _make_pipe, _fill])
def test_whatever_is_done_to_a_part_the_model_is_compiled_again(
    desk: Desk, model: ModelFile, suffix: str, harm: Callable[[Path], None]
) -> None:
    desk.check(model)
    (path,) = (each for each in entry_files(desk.folder) if each.suffix == suffix)
    harm(path)
    assert another(desk).check(model)
    assert not another(desk).check(model)
    assert desk.warnings == []


def test_a_folder_in_place_of_an_entry_costs_a_compilation_each_time_and_one_warning(
    desk: Desk, model: ModelFile
) -> None:
    desk.check(model)
    (path,) = (each for each in entry_files(desk.folder) if each.suffix == ".entry")
    _make_folder(path)
    later = another(desk)
    assert later.check(model)
    assert later.check(model)
    assert len(later.warnings) == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
@pytest.mark.parametrize("suffix", [".code", ".entry"])
def test_a_part_that_belongs_to_another_user_is_not_trusted(desk: Desk, model: ModelFile, suffix: str) -> None:
    desk.check(model)
    (path,) = (each for each in entry_files(desk.folder) if each.suffix == suffix)
    os.chown(path, 1, 1)
    assert another(desk).check(model)


def test_the_parts_of_two_entries_cannot_be_exchanged(desk: Desk, model: ModelFile, tmp_path: Path) -> None:
    other = make_model(tmp_path, b"another model")
    desk.check(model)
    desk.check(other)
    mine, theirs = (desk.folder / f"{desk.prepare(each).key}.entry" for each in (model, other))
    shutil.copy(theirs, mine)
    code = Path(desk.prepare(other).code)
    shutil.copy(code, code.with_name(code.name.replace(theirs.stem, mine.stem)))
    assert another(desk).check(model)


@pytest.mark.parametrize("secret", [None, b"", b"x" * 31, b"x" * 32, b"x" * 33])
def test_another_secret_makes_every_entry_doubtful(desk: Desk, model: ModelFile, secret: bytes | None) -> None:
    desk.check(model)
    path = desk.folder / "secret"
    path.unlink() if secret is None else path.write_bytes(secret)
    assert another(desk).check(model)
    assert not another(desk).check(model)
    assert len(path.read_bytes()) == 32


def test_a_secret_that_others_can_read_is_made_anew(desk: Desk, model: ModelFile) -> None:
    desk.check(model)
    before = (desk.folder / "secret").read_bytes()
    (desk.folder / "secret").chmod(0o644)
    assert another(desk).check(model)
    assert (desk.folder / "secret").read_bytes() != before


def test_a_digest_without_the_secret_is_worth_nothing(desk: Desk, model: ModelFile) -> None:
    desk.check(model)
    (path,) = (each for each in entry_files(desk.folder) if each.suffix == ".entry")
    body = path.read_bytes().partition(b"\n")[2]
    forged = b"evil machine code"
    digest = hashlib.sha256(body + forged).hexdigest()
    path.write_bytes(digest.encode() + b"\n" + body)
    code = desk.folder / f"{path.stem}-{digest[:16]}.code"
    code.write_bytes(forged)
    code.chmod(0o600)
    assert another(desk).check(model)
    assert not code.exists()


# --- other processes -------------------------------------------------------------------------------------------------


def test_two_processes_at_once_compile_once(child: Callable[..., Child], desk: Desk) -> None:
    def_slow = """
        def slow(source, code):
            report = compiling(source, code)
            sys.stdin.readline()
            return report
    """
    first = child(def_slow + "\n        say(str(prepare(slow).from_cache))\n")
    assert first.line() == "compiling"
    second = child("say('begun'); prepared = prepare(); say(str(prepared.from_cache)); say(str(len(prepared.report)))")
    assert second.line() == "begun"
    first.go()
    assert first.end() == (0, ["False"], "")
    assert second.end() == (0, ["True", str(len(REPORT))], "")
    assert len(entry_files(desk.folder)) == FILES_OF_AN_ENTRY


def test_many_processes_that_start_at_once_share_one_secret_and_one_entry(child: Callable[..., Child]) -> None:
    children = [
        child("sys.stdin.readline(); print(hashlib.sha256(Path(prepare().code).read_bytes()).hexdigest())")
        for _ in range(6)
    ]
    for each in children:
        each.go()
    ends = [each.end() for each in children]
    lines = [line for _, lines, _ in ends for line in lines]
    assert [code for code, _, _ in ends] == [0] * 6, ends
    assert lines.count("compiling") == 1
    assert len({line for line in lines if line != "compiling"}) == 1


def test_a_dead_compiler_is_not_waited_for(child: Callable[..., Child], desk: Desk, model: ModelFile) -> None:
    stuck = child("prepare(lambda source, code: (say('compiling'), sys.stdin.read()))")
    assert stuck.line() == "compiling"
    stuck.close()
    assert desk.check(model)
    assert not list(desk.folder.glob("*.lock"))


def test_a_slow_compiler_is_waited_for_no_longer_than_asked(
    child: Callable[..., Child], desk: Desk, model: ModelFile
) -> None:
    stuck = child("prepare(lambda source, code: (say('compiling'), sys.stdin.read()))")
    assert stuck.line() == "compiling"
    prepared = desk.cache.prepare(model, ENGINE, SETTINGS, desk.compiler, wait_seconds=0.1)
    assert not prepared.from_cache
    assert not desk.check(model)


def test_threads_that_want_the_same_compile_once(desk: Desk, model: ModelFile) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: desk.prepare(model), range(8)))
    assert desk.compiler.count == 1
    assert len({each.code for each in found}) == 1


PLACES = ["cache.secret", "cache.write", "cache.write@2", "cache.write@3", "cache.rename", "cache.sidecar"]


@pytest.mark.parametrize("place", PLACES)
def test_a_process_killed_while_it_stores_leaves_nothing_that_is_believed(
    child: Callable[..., Child], desk: Desk, model: ModelFile, place: str
) -> None:
    for _ in range(3):
        code, _, err = child("prepare()", SPARKRT_FAIL=f"{place}:kill").end()
        assert code == -signal.SIGKILL, err
        assert desk.cache.entries() == []
        if place == "cache.secret":
            assert not (desk.folder / "secret").exists()
    assert another(desk).check(model)
    assert not another(desk).check(model)
    left = {path.suffix for path in desk.folder.iterdir()}
    assert left == {"", ".code", ".entry"}, "what the killed left is tidied up"
    assert len(entry_files(desk.folder)) == FILES_OF_AN_ENTRY


KEY = "ab" * 32


def _publish_on_and_on() -> str:
    return f"""
        store = CacheFolder.open(folder)
        first = store.find({KEY!r})
        n = first.about["n"] if first else 0
        while True:
            n += 1
            code = Scratch(n.to_bytes(8, "little") * (1 << 18))
            os.close(store.publish({KEY!r}, {{"n": n}}, code.descriptor).descriptor)
            code.close()
            store.tidy()
            say(str(n))
    """


def _whole(folder: Path) -> int:
    """Return the generation that is stored, after seeing that all of it is of the same one."""
    found = CacheFolder.open(folder).find(KEY)
    if found is None:
        return 0
    try:
        n: int = found.about["n"]
        assert Path(found.code).read_bytes() == n.to_bytes(8, "little") * (1 << 18)
    finally:
        os.close(found.descriptor)
    return n


@pytest.mark.parametrize(
    "place", [f"{place}@{turn}" for place in ("cache.write", "cache.rename", "cache.sidecar") for turn in (2, 5)]
)
def test_an_entry_that_is_replaced_is_the_old_one_or_the_new_one(
    child: Callable[..., Child], desk: Desk, place: str
) -> None:
    before = 0
    for _ in range(4):
        code, lines, err = child(_publish_on_and_on(), SPARKRT_FAIL=f"{place}:kill").end()
        assert code == -signal.SIGKILL, err
        assert _whole(desk.folder) == before + len(lines)
        before += len(lines)


def test_an_entry_is_whole_whenever_its_writer_is_killed(child: Callable[..., Child], desk: Desk) -> None:
    chance = random.Random(7)
    said = 0
    for _ in range(12):
        writer = child(_publish_on_and_on())
        for _ in range(chance.randrange(1, 5)):
            said = int(writer.line())
        writer.process.kill()
        _, rest, _ = writer.end()
        said = int(rest[-1]) if rest else said
        assert _whole(desk.folder) in (said, said + 1)
    CacheFolder.open(desk.folder).tidy()
    assert len(entry_files(desk.folder)) == FILES_OF_AN_ENTRY


def test_two_writers_without_a_lock_between_them_never_mix_their_parts(child: Callable[..., Child], desk: Desk) -> None:
    writers = [child(_publish_on_and_on()) for _ in range(2)]
    for _ in range(10):
        for writer in writers:
            assert int(writer.line())
        _whole(desk.folder)
    for writer in writers:
        writer.close()
    assert _whole(desk.folder)


def test_removing_never_disturbs_who_writes_or_reads(child: Callable[..., Child], desk: Desk) -> None:
    writers = [child(_publish_on_and_on()) for _ in range(2)]
    store = CacheFolder.open(desk.folder)
    for _ in range(60):
        store.clear()
        store.tidy()
        _whole(desk.folder)
    for writer in writers:
        assert writer.line(), "it still writes"
        assert writer.line()
        writer.process.kill()
        assert writer.end()[2] == ""


# --- what is in use --------------------------------------------------------------------------------------------------


def test_the_least_recently_used_entries_make_room(desk: Desk, tmp_path: Path) -> None:
    models = [make_model(tmp_path, b"model %d" % n) for n in range(4)]
    for age, each in enumerate(models):
        prepared = desk.prepare(each)
        os.utime(desk.folder / f"{prepared.key}.entry", (1000 + age, 1000 + age))
        size = prepared.size
    del prepared
    used = desk.prepare(models[0])  # a hit makes it the youngest
    del used
    tight = Desk(desk.folder, limit=3 * size + size // 2)
    tight.prepare(make_model(tmp_path, b"one more"))
    assert {entry.name for entry in desk.cache.entries()} == {
        models[0].path.name,
        models[3].path.name,
        make_model(tmp_path, b"one more").path.name,
    }


def test_an_entry_in_use_is_never_removed_to_make_room(desk: Desk, model: ModelFile, tmp_path: Path) -> None:
    tight = Desk(desk.folder, limit=0)
    kept = tight.prepare(model)
    for n in range(3):
        tight.prepare(make_model(tmp_path, b"model %d" % n))
        assert Path(kept.code).read_bytes() == code_of(model.data)
    key = kept.key
    assert key in {entry.key for entry in tight.cache.entries()}
    del kept
    tight.prepare(make_model(tmp_path, b"one more"))
    assert key not in {entry.key for entry in tight.cache.entries()}


def test_an_entry_that_another_process_uses_stays_until_that_process_ends(
    child: Callable[..., Child], desk: Desk, model: ModelFile, tmp_path: Path
) -> None:
    user = child("kept = prepare(); say('ready'); sys.stdin.readline()")
    assert [user.line(), user.line()] == ["compiling", "ready"]
    desk.prepare(make_model(tmp_path, b"another model"))
    assert desk.cache.clear().in_use == 1
    assert not desk.check(model)
    user.close()
    removed = desk.cache.clear()
    assert (removed.entries, removed.in_use) == (1, 0)
    assert removed.size > len(code_of(model.data))
    assert [path.name for path in desk.folder.iterdir()] == ["secret"]


def test_files_of_others_in_the_folder_are_left_alone(desk: Desk, model: ModelFile) -> None:
    desk.check(model)
    for name in ("notes.txt", "my.code", "my.entry", ".writing-letters"):
        (desk.folder / name).write_text("mine")
    desk.cache.clear()
    assert sorted(path.name for path in desk.folder.iterdir()) == [
        ".writing-letters",
        "my.code",
        "my.entry",
        "notes.txt",
        "secret",
    ]


def test_no_descriptor_is_left_open(desk: Desk, model: ModelFile, tmp_path: Path) -> None:
    desk.check(model)
    nowhere = Desk(_impossible(tmp_path))
    nowhere.check(model)
    before = len(os.listdir("/proc/self/fd"))
    for n in range(5):
        desk.check(model)
        desk.check(make_model(tmp_path, b"model %d" % n))
        nowhere.check(model)
    assert len(os.listdir("/proc/self/fd")) == before


# --- without a folder ------------------------------------------------------------------------------------------------


def _impossible(tmp_path: Path) -> Path:
    (tmp_path / "file").touch()
    return tmp_path / "file" / "cache"


def test_without_a_folder_the_model_runs_from_memory_with_one_warning(tmp_path: Path, model: ModelFile) -> None:
    nowhere = Desk(_impossible(tmp_path))
    prepared = nowhere.prepare(model)
    assert nowhere.prepare(model).code == prepared.code
    assert nowhere.compiler.count == 1
    (warning,) = nowhere.warnings
    assert "there is no folder for prepared models" in warning
    seen = subprocess.run(
        [sys.executable, "-c", f"print(len(open({prepared.code!r}, 'rb').read()))"],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=True,
    )
    assert int(seen.stdout) == len(code_of(model.data))


def test_code_in_memory_is_gone_when_nobody_uses_it(tmp_path: Path, model: ModelFile) -> None:
    nowhere = Desk(_impossible(tmp_path))
    code = nowhere.prepare(model).code
    assert not Path(code).exists()
    assert nowhere.check(model)


def test_code_in_memory_cannot_be_changed_any_more(tmp_path: Path, model: ModelFile) -> None:
    prepared = Desk(_impossible(tmp_path)).prepare(model)
    with pytest.raises(OSError, match=os.strerror(errno.EPERM)):
        os.truncate(prepared.code, 0)


@pytest.mark.parametrize("place", ["cache.write", "cache.write@2", "cache.rename", "cache.sidecar"])
def test_a_full_disk_costs_one_warning_and_the_model_runs(
    child: Callable[..., Child], desk: Desk, model: ModelFile, place: str
) -> None:
    code, lines, err = child(
        "kept = prepare(); say(str(prepare().from_cache)); say(str(len(Path(kept.code).read_bytes())))",
        SPARKRT_FAIL=f"{place}:enospc",
    ).end()
    assert (code, err) == (0, "")
    assert lines[0] == "compiling"
    assert "No space left on device" in lines[1]
    assert lines[2:] == ["True", str(len(code_of(model.data)))]
    assert [path.name for path in desk.folder.iterdir()] == ["secret"]


def test_a_folder_open_to_others_is_closed_if_it_is_ours(desk: Desk, model: ModelFile) -> None:
    desk.check(model)
    desk.folder.chmod(0o777)
    assert not another(desk).check(model)
    assert stat.S_IMODE(desk.folder.stat().st_mode) == 0o700


def test_a_folder_with_other_things_that_others_may_write_in_is_refused(tmp_path: Path, model: ModelFile) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "thesis.txt").touch()
    shared.chmod(0o777)
    with pytest.raises(StoreError, match="other users may write in"):
        Desk(shared).prepare(model)
    assert stat.S_IMODE(shared.stat().st_mode) == 0o777


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_another_user_is_refused(tmp_path: Path, model: ModelFile) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir(mode=0o700)
    os.chown(theirs, 1, 1)
    with pytest.raises(StoreError, match="belongs to another user"):
        Desk(theirs).prepare(model)


def test_looking_makes_no_folder(desk: Desk) -> None:
    assert desk.cache.entries() == []
    assert desk.cache.clear().entries == 0
    assert not desk.folder.exists()


def test_the_folder_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("SPARKRT_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_folder() == tmp_path / "home" / ".cache" / "spark-runtime"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert default_folder() == tmp_path / "home" / ".cache" / "spark-runtime"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_folder() == tmp_path / "xdg" / "spark-runtime"
    monkeypatch.setenv("SPARKRT_CACHE_DIR", str(tmp_path / "mine"))
    assert default_folder() == tmp_path / "mine"


def test_a_limit_that_is_no_number_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARKRT_CACHE_BYTES", "2GB")
    with pytest.raises(BadRequestError, match="SPARKRT_CACHE_BYTES is '2GB', not a number of bytes"):
        ModelCache()


# --- the file and the engine -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"\0asm", "was cut off"),
        (b"\0asm\x0d\0\x01\0", "is a WASM component"),
        (b"\0asm\x02\0\0\0", "is WASM of version 2"),
        (b"\x1f\x8b\x08", "compressed with gzip"),
        (b"\x7fELF\x02", "a native library"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
        (b"  (module)", "WebAssembly text"),
        (b'{"a": 1}', "it is JSON"),
        (b"#!/bin/sh\n", "a script"),
        (b"hello", "it is a text"),
        (b"\xff\xfe\x00\x01", "it begins with ff fe 00 01"),
    ],
)
def test_what_is_no_module_is_told_what_it_looks_like(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "model.wasm"
    path.write_bytes(content)
    with pytest.raises(ModelUnusable, match=words) as caught:
        ModelFile.read(path)
    assert str(path) in str(caught.value)
    assert caught.value.kind == "invalid-module"


def test_a_file_that_is_missing_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.wasm", tmp_path / "no" / "missing.wasm", _impossible(tmp_path)):
        with pytest.raises(ModelNotFound, match=str(path)):
            ModelFile.read(path)


def test_only_regular_files_are_read_and_a_pipe_holds_nobody(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(ModelUnusable, match="not a regular file"):
        ModelFile.read(pipe)
    with pytest.raises(ModelUnusable, match="not a regular file"):
        ModelFile.read("/dev/zero")
    with pytest.raises(ModelUnusable, match="is a folder"):
        ModelFile.read(tmp_path)


def test_a_path_that_cannot_be_one_is_refused_in_a_sentence() -> None:
    with pytest.raises(ModelNotFound, match="cannot be the path of a file"):
        ModelFile.read("a\0b")


def test_a_file_over_the_limit_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "large.wasm"
    path.write_bytes(WASM)
    os.truncate(path, (1 << 30) + 1)
    with pytest.raises(ModelUnusable, match="larger than 1 GiB"):
        ModelFile.read(path)


def test_the_identity_of_wasmtime_is_found_without_importing_it() -> None:
    code = """
        import sys
        from spark_runtime.models.prepared import engine_identity
        print(engine_identity("wasmtime"))
        print({"wasmtime", "importlib.metadata", "platform", "rich", "click", "msgpack"} & set(sys.modules))
    """
    done = subprocess.run(
        [sys.executable, "-P", "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=SECONDS, check=True
    )
    said, imported = done.stdout.splitlines()
    assert said.startswith("wasmtime ")
    assert "_libwasmtime" in said
    assert imported == "set()"


def test_a_library_that_was_exchanged_is_another_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "wasmtime"
    library = package / f"{sys.platform}-x86_64" / "_libwasmtime.so"
    library.parent.mkdir(parents=True)
    library.write_bytes(b"one")
    (tmp_path / "wasmtime-50.0.1.dist-info").mkdir()
    monkeypatch.setattr(identity, "engine_package", lambda engine: package)
    first = engine_identity("wasmtime")
    assert first.startswith("wasmtime 50.0.1 ")
    os.utime(library, (1, 1))
    assert engine_identity("wasmtime") != first


def test_an_engine_that_is_missing_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wasmtime", None)
    with pytest.raises(EngineMissing, match="-m pip install wasmtime"):
        engine_identity("wasmtime")


def test_a_report_stored_is_the_report_given_back(desk: Desk, model: ModelFile) -> None:
    report = {"names": ["\0", "\U0001f600", "a\u2028b", "é"], "nested": [[{"a": [None, True, 1.5, -(2**63)]}]]}

    def compiling(module: int, code: int) -> dict[str, Any]:
        os.write(code, b"code")
        return report

    first = desk.cache.prepare(model, ENGINE, SETTINGS, compiling)
    again = desk.cache.prepare(model, ENGINE, SETTINGS, compiling)
    assert first.report == again.report == report
    assert json.dumps(again.report)


def test_a_report_that_is_no_plain_data_is_refused(desk: Desk, model: ModelFile) -> None:
    with pytest.raises(ProtocolViolated, match="not plain data"):
        desk.cache.prepare(model, ENGINE, SETTINGS, lambda module, code: {"names": b"bytes"})


def test_a_compiler_that_writes_nothing_is_refused(desk: Desk, model: ModelFile) -> None:
    with pytest.raises(ProtocolViolated, match="wrote no code"):
        desk.cache.prepare(model, ENGINE, SETTINGS, lambda module, code: REPORT)


def test_scratch_memory_is_where_its_path_says() -> None:
    scratch = Scratch(b"some bytes")
    assert Path(scratch.path).read_bytes() == b"some bytes"
    scratch.close()
    assert not Path(scratch.path).exists()
