"""State on disk: what is written comes back or is refused, whatever is killed, cut, flipped, filled or locked."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import inspect
import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spark_runtime.supervise import snapshot_file
from spark_runtime.supervise.snapshot_file import CHUNK, END, MAGIC, PRELUDE, VERSION, write_snapshot
from spark_runtime.supervise.store import (
    RunFolder,
    SnapshotDamaged,
    SnapshotParts,
    StateFolder,
    StoreBusy,
    StoredSnapshot,
    StoreError,
)
from spark_workers import failpoints


def content(n: int) -> list[bytes]:
    """Return what generation *n* holds. It tells *n* everywhere, so that a mixture of two generations shows."""
    word = n.to_bytes(8, "little")
    return [word * 3, b"", word * 512, word * (CHUNK // 8 + 77)]


CHUNKS_OF_CONTENT = 4

CHILD = f"""
import os, sys
from pathlib import Path
from spark_runtime.supervise.snapshot_file import CHUNK
from spark_runtime.supervise.store import StateFolder, StoreError, StoreBusy

{inspect.getsource(content)}
"""

WRITE_FIVE = """
with StateFolder.open(Path(sys.argv[1])) as folder:
    run = folder.new_run("r")
    for n in range(1, 6):
        run.write({"n": n}, content(n))
"""

WRITE_ON_AND_ON = """
with StateFolder.open(Path(sys.argv[1])) as folder:
    run = folder.resume()
    with run.newest() as newest:
        n = newest.generation
    while True:
        n += 1
        written = run.write({"n": n}, content(n))
        assert written == n
        run.mark(step=n)
        os.write(1, b"%d\\n" % n)
"""

HOLD = """
folder = StateFolder.open(Path(sys.argv[1]))
folder.announce("first")
os.write(1, b"held\\n")
sys.stdin.read()
"""

TRY = """
try:
    StateFolder.open(Path(sys.argv[1])).close()
except StoreBusy as busy:
    print("busy", busy.pid, busy.run_id)
else:
    print("free")
"""


def start(code: str, script: Path, fail: str = "") -> subprocess.Popen[bytes]:
    """Start *code* in another process, with failpoints *fail*."""
    command = [sys.executable, "-P", "-c", CHILD + code, str(script)]
    environment = os.environ | {"SPARKRT_FAIL": fail}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)


def run_to_end(code: str, script: Path, fail: str = "") -> tuple[int, bytes]:
    child = start(code, script, fail)
    output, _ = child.communicate()
    return child.returncode, output


def kill(child: subprocess.Popen[bytes]) -> bytes:
    """Kill -9, and return what it had written."""
    child.kill()
    output, _ = child.communicate()
    return output


def read_all(snapshot: StoredSnapshot) -> list[bytes]:
    parts = [bytearray(length) for length in snapshot.part_lengths()]
    for index, part in enumerate(parts):
        snapshot.read_into(index, memoryview(part))
    return [bytes(part) for part in parts]


def newest_of(run: RunFolder) -> tuple[int, object, list[bytes]]:
    with run.newest() as snapshot:
        return snapshot.generation, snapshot.meta, read_all(snapshot)


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def ticking() -> Callable[[], datetime]:
    """Return a clock that goes on by a second each time it is read."""
    moments = iter(datetime(2030, 1, 1, tzinfo=UTC) + timedelta(seconds=n) for n in range(10_000))
    return lambda: next(moments)


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "train [1].py"
    path.write_text("def torch(): ...\n")
    return path


@pytest.fixture
def folder(script: Path) -> Iterator[StateFolder]:
    with StateFolder.open(script, now=ticking()) as folder:
        yield folder


@pytest.fixture
def run(folder: StateFolder) -> RunFolder:
    return folder.new_run("r")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk of its own."""
    if os.geteuid() or sys.platform != "linux":
        pytest.skip("mounting a small disk takes root on Linux")
    mounted = tmp_path / "disk"
    mounted.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", mounted], stderr=subprocess.DEVNULL
    ).returncode:
        pytest.skip("this machine does not let us mount a tmpfs")
    yield mounted
    subprocess.run(["umount", "-l", mounted], check=True)


# -- what is written comes back


def test_snapshots_of_every_size_come_back_as_they_were_written(run: RunFolder) -> None:
    sizes = [0, 1, 63, 64, 65, 4096, 100_000, CHUNK - 1, CHUNK, CHUNK + 1, 0]
    parts = [random.Random(size).randbytes(size) for size in sizes]
    meta = {"keys": {"model": [0, 17], "é": None}, "step": 12, "deep": {"1": [1.5, b"\xff", True]}, "path": "\udcff"}
    assert run.write(meta, parts) == 1
    with run.newest() as snapshot:
        assert snapshot.meta == meta
        assert snapshot.part_lengths() == tuple(sizes)
        assert read_all(snapshot) == parts


def test_a_snapshot_without_parts_comes_back(run: RunFolder) -> None:
    run.write({}, [])
    assert newest_of(run) == (1, {}, [])


def test_thousands_of_parts_come_back(run: RunFolder) -> None:
    parts = [n.to_bytes(2, "little") * (n % 7) for n in range(5000)]
    run.write({}, parts)
    assert newest_of(run)[2] == parts


def test_buffers_of_any_kind_are_taken_without_a_copy_of_their_own(run: RunFolder) -> None:
    shaped = memoryview(bytes(range(24))).cast("I", (2, 3))
    empty = memoryview(bytearray(8))[:0].cast("B")
    run.write({}, [shaped, bytearray(b"x"), empty])
    assert newest_of(run)[2] == [bytes(range(24)), b"x", b""]


def test_parts_begin_at_multiples_of_64(run: RunFolder) -> None:
    parts = [b"first" * 20, b"second" * 20]
    run.write({"n": 1}, parts)
    content = (run.path / "000001.snapshot").read_bytes()
    assert [content.index(part) % 64 for part in parts] == [0, 0]


def test_a_system_that_writes_in_small_pieces_loses_nothing(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, content, at: pwrite(fd, content[:997], at))
    monkeypatch.setattr(os, "preadv", lambda fd, rooms, at: preadv(fd, [rooms[0][:991]], at))
    parts = [os.urandom(10_000), b"", os.urandom(5)]
    run.write({"n": 1}, parts)
    assert newest_of(run) == (1, {"n": 1}, parts)


def test_a_target_of_the_wrong_length_is_the_callers_mistake(run: RunFolder) -> None:
    run.write({}, [b"abc"])
    with run.newest() as snapshot, pytest.raises(ValueError, match="has 3 bytes and the target 2"):
        snapshot.read_into(0, memoryview(bytearray(2)))


@pytest.mark.parametrize(
    ("meta", "parts"),
    [({"x": object()}, []), ({"x": 1 << 70}, []), ({}, [memoryview(b"abcd")[::2]]), ({}, ["text"])],
    ids=["object", "long int", "gaps", "str"],
)
def test_what_cannot_be_stored_raises_and_leaves_no_file(
    run: RunFolder, meta: dict[str, object], parts: list[bytes]
) -> None:
    with pytest.raises((TypeError, ValueError, OverflowError)):
        run.write(meta, parts)
    assert names(run.path) == ["run.json"]


def test_an_open_snapshot_stays_readable_after_it_is_pruned(run: RunFolder) -> None:
    run.write({}, [b"old"])
    snapshot = run.newest()
    for _ in range(4):
        run.write({}, [b"new"])
    assert not snapshot.path.exists()
    assert read_all(snapshot) == [b"old"]
    snapshot.close()
    snapshot.close()
    with pytest.raises(ValueError, match="is closed"):
        snapshot.verify()


def test_a_snapshot_that_nobody_closes_is_closed_with_its_object(run: RunFolder) -> None:
    run.write({}, [b"x"])
    before = len(os.listdir("/dev/fd"))
    for _ in range(10):
        run.newest()
    assert len(os.listdir("/dev/fd")) == before


@pytest.mark.slow
def test_a_part_beyond_two_gib_comes_back(run: RunFolder) -> None:
    import mmap

    size = (2 << 30) + 12_345
    if shutil.disk_usage(run.path).free < 3 * size:
        pytest.skip("too little room on the disk")
    with mmap.mmap(-1, size) as part:
        part[-5:] = b"last!"
        run.write({}, [b"graph", part])
    with run.newest() as snapshot:
        assert snapshot.part_lengths() == (5, size)
    (run.path / "000001.snapshot").unlink()


# -- generations


def test_the_newest_three_generations_are_kept(run: RunFolder) -> None:
    assert [run.write({"n": n}, content(n)) for n in range(1, 6)] == [1, 2, 3, 4, 5]
    assert names(run.path) == ["000003.snapshot", "000004.snapshot", "000005.snapshot", "run.json"]
    assert newest_of(run) == (5, {"n": 5}, content(5))


def test_generations_sort_as_numbers_beyond_six_digits(run: RunFolder) -> None:
    run.write({}, [])
    (run.path / "000001.snapshot").rename(run.path / "999999.snapshot")
    assert run.write({"n": 2}, []) == 1_000_000
    assert newest_of(run)[0] == 1_000_000


def test_a_damaged_generation_is_skipped_with_its_reason(run: RunFolder) -> None:
    for n in (1, 2, 3):
        run.write({"n": n}, content(n))
    with open(run.path / "000003.snapshot", "r+b") as file:
        file.seek(-20, os.SEEK_END)
        file.write(b"!")
    os.truncate(run.path / "000002.snapshot", 100)
    assert newest_of(run) == (1, {"n": 1}, content(1))
    assert [(damage.path.name, damage.where) for damage in run.damaged] == [
        ("000003.snapshot", "part 3"),
        ("000002.snapshot", "header"),
    ]
    assert run.write({"n": 4}, content(4)) == 4


def test_when_no_generation_is_whole_the_message_tells_of_each(run: RunFolder) -> None:
    with pytest.raises(StoreError, match="run r has no whole snapshot: it has none yet"):
        run.newest()
    run.write({}, [])
    os.truncate(run.path / "000001.snapshot", 3)
    with pytest.raises(StoreError, match=r"000001\.snapshot cannot be used, file: it has only 3 bytes"):
        run.newest()


# -- nothing in a file is trusted

SMALL = SnapshotParts({"n": 7}, [b"graph" * 9, b"", b"buffer" * 11])


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    path = tmp_path_factory.mktemp("small") / "000001.snapshot"
    write_snapshot(path, SMALL)
    return path, path.read_bytes()


def read_back(path: Path, content: bytes | bytearray) -> str:
    """Return how reading *content* ends; it must be refused or give exactly what was written."""
    path.write_bytes(content)
    try:
        with StoredSnapshot.open(path, 1) as snapshot:
            assert (snapshot.meta, read_all(snapshot)) == (SMALL.meta, list(SMALL.parts))
    except SnapshotDamaged as damage:
        return str(damage)
    return "whole"


def test_every_truncation_is_refused(small: tuple[Path, bytes]) -> None:
    path, whole = small
    assert read_back(path, whole) == "whole"
    for length in range(len(whole)):
        assert "cannot be used" in read_back(path, whole[:length])
    assert "in place of" in read_back(path, whole + b"x")


def test_every_flipped_bit_is_refused_or_does_no_harm(small: tuple[Path, bytes]) -> None:
    path, whole = small
    harmless = 0
    for bit in range(len(whole) * 8):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        harmless += read_back(path, flipped) == "whole"
    assert harmless < 8 * 3 * 64  # in the padding only: after the header and after each part


@settings(max_examples=200, deadline=None)
@given(
    patches=st.lists(st.tuples(st.integers(0, 2000), st.binary(min_size=1, max_size=40)), min_size=1, max_size=4),
    cut=st.integers(0, 2000),
)
def test_random_damage_never_gives_wrong_data(
    small: tuple[Path, bytes], patches: list[tuple[int, bytes]], cut: int
) -> None:
    path, whole = small
    content = bytearray(whole)
    for at, patch in patches:
        at %= len(whole)
        content[at : at + len(patch)] = patch
    read_back(path, content[: max(cut, len(content) // 2)])


def forged(header: object, *, version: int = VERSION, magic: bytes = MAGIC, length: int | None = None) -> bytes:
    """Return a file whose header is *header*, with the right digest."""
    packed = header if isinstance(header, bytes) else msgpack.packb(header)
    start = PRELUDE.pack(magic, version, len(packed) if length is None else length) + packed
    return start + hashlib.sha256(start).digest()


def table(*parts: object) -> dict[str, object]:
    return {"meta": {}, "parts": list(parts)}


NONE = hashlib.sha256().digest()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (forged(table(), version=2), "it has format 2 and this spark-runtime knows 1; upgrade spark-runtime"),
        (forged(table(), version=0), "format 0, which never was"),
        (forged(table(), magic=b"PK\3\4...."), "does not begin like a snapshot"),
        (forged(table(), length=1 << 63), "it claims 9223372036854775808 bytes"),
        (forged(b"\xc1"), "it is no msgpack"),
        (forged(b"\xdd\xff\xff\xff\xff"), "it is no msgpack"),
        (forged(b"\x91" * 100_000), "it is no msgpack"),
        (forged([]), "it has not the fields"),
        (forged({"meta": {}, "parts": {}}), "it has not the fields"),
        (forged({"meta": [], "parts": []}), "it has not the fields"),
        (forged(table([0, 1 << 62, NONE])), "the file has"),
        (forged(table([0, -1, NONE])), "entry for part 0 makes no sense"),
        (forged(table([-64, 64, NONE])), "entry for part 0 makes no sense"),
        (forged(table([1 << 40, 1, NONE])), "entry for part 0 makes no sense"),
        (forged(table([0, 100, NONE], [64, 100, NONE])), "entry for part 1 makes no sense"),
        (forged(table([0, 1.5, NONE])), "entry for part 0 makes no sense"),
        (forged(table([0, 0])), "entry for part 0 makes no sense"),
        (forged(table("x")), "entry for part 0 makes no sense"),
        (forged(table()).ljust(128, b"\0") + b"NOSPARKS", "end marker is missing"),
    ],
)
def test_a_forged_header_is_refused_with_a_sentence(tmp_path: Path, content: bytes, sentence: str) -> None:
    path = tmp_path / "000001.snapshot"
    path.write_bytes(content + bytes(len(END)) if sentence == "the file has" else content)
    with pytest.raises(SnapshotDamaged) as caught:
        StoredSnapshot.open(path, 1).close()
    assert sentence in str(caught.value)


def test_a_pipe_or_a_link_under_a_snapshots_name_is_refused(run: RunFolder) -> None:
    run.write({"n": 1}, [])
    os.mkfifo(run.path / "000002.snapshot")
    os.symlink("000001.snapshot", run.path / "000003.snapshot")
    os.mkdir(run.path / "000004.snapshot")
    assert newest_of(run)[0] == 1
    assert len(run.damaged) == 3


def test_a_disk_that_cannot_read_harms_only_the_snapshot_on_it(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    run.write({"n": 1}, [b"x" * 100])
    run.write({"n": 2}, [b"y" * 10_000])
    preadv = os.preadv

    def bad(source: int, rooms: list[memoryview], at: int) -> int:
        if len(rooms[0]) == 10_000:
            raise OSError(errno.EIO, "Input/output error")
        return preadv(source, rooms, at)

    monkeypatch.setattr(os, "preadv", bad)
    assert newest_of(run)[0] == 1
    assert "the disk cannot read it" in str(run.damaged[0])


# -- kill -9


@pytest.mark.parametrize(
    ("place", "survivor"),
    [
        (f"store.mid_part@{CHUNKS_OF_CONTENT * 4 + 1}", 4),
        (f"store.mid_part@{CHUNKS_OF_CONTENT * 4 + 3}", 4),
        ("store.after_header@5", 4),
        ("store.before_fsync@5", 4),
        ("store.before_rename@5", 4),
        ("store.after_rename@5", 5),
        ("store.before_prune@5", 5),
        ("store.before_rename@1", 0),
    ],
)
def test_kill_9_at_every_failpoint_leaves_the_old_or_the_new(script: Path, place: str, survivor: int) -> None:
    code, _ = run_to_end(WRITE_FIVE, script, f"{place}:kill")
    assert code == -signal.SIGKILL
    with StateFolder.open(script) as folder:
        assert [name for name in names(folder.path / "runs" / "r") if name.startswith(".")] == []
        if not survivor:
            with pytest.raises(StoreError, match=r"r \(unfinished, step 0, no snapshot yet\)"):
                folder.resume()
            return
        run = folder.resume()
        assert newest_of(run) == (survivor, {"n": survivor}, content(survivor))
        assert run.damaged == []
        run.write({"n": 0}, content(0))
        assert len(names(run.path)) == 4


def kill_at_random_moments(script: Path, rounds: int) -> None:
    """Kill a writer again and again; what it reported must be there, and whole."""
    with StateFolder.open(script) as folder:
        folder.new_run("r").write({"n": 1}, content(1))
    reached = 1
    chance = random.Random(rounds)
    for _ in range(rounds):
        child = start(WRITE_ON_AND_ON, script)
        time.sleep(chance.uniform(0.02, 0.25))
        reported = [int(line) for line in kill(child).split()]
        reached = max([reached, *reported])
        with StateFolder.open(script) as folder:
            run = folder.resume()
            generation, meta, parts = newest_of(run)
            assert run.damaged == []
        assert reached <= generation <= reached + 1
        assert (meta, parts) == ({"n": generation}, content(generation))
        reached = generation
    assert reached > rounds


def test_kill_9_at_random_moments_never_tears_a_snapshot(script: Path) -> None:
    kill_at_random_moments(script, 30)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_kill_9_at_five_hundred_random_moments_never_tears_a_snapshot(script: Path) -> None:
    kill_at_random_moments(script, 500)


def test_what_killed_processes_left_is_removed_at_open(script: Path) -> None:
    with StateFolder.open(script) as folder:
        run = folder.new_run("r")
        run.write({}, [])
        kept = run.keep_aside("why")
    (run.path / ".writing-000002.snapshot").write_bytes(b"half")
    (kept.parent / ".writing-r-000001.snapshot").write_bytes(b"half")
    (run.path.parent / ".gone-old").mkdir()
    (run.path.parent / ".gone-old" / "000001.snapshot").write_bytes(b"half")
    with StateFolder.open(script) as folder:
        assert names(run.path) == ["000001.snapshot", "run.json"]
        assert names(run.path.parent) == ["r"]
        assert names(kept.parent) == ["r-000001.snapshot", "r-000001.txt"]


# -- full disks


@pytest.mark.parametrize("place", ["mid_part", "after_header", "before_fsync", "before_rename"])
@pytest.mark.parametrize("action", ["enospc", "error"])
def test_a_failing_write_leaves_the_old_and_nothing_else(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, place: str, action: str
) -> None:
    run.write({"n": 1}, content(1))
    with monkeypatch.context() as patch:
        patch.setitem(failpoints._points, f"store.{place}", (0, action))
        with pytest.raises(OSError if action == "enospc" else failpoints.FailpointHit):
            run.write({"n": 2}, content(2))
    assert names(run.path) == ["000001.snapshot", "run.json"]
    assert newest_of(run) == (1, {"n": 1}, content(1))
    assert run.write({"n": 2}, content(2)) == 2


def test_a_disk_that_is_really_full_leaves_the_older_generations(disk: Path) -> None:
    with StateFolder.open(disk / "train.py") as folder:
        run = folder.new_run("r")
        run.write({"n": 1}, [b"1" * 1_000_000])
        run.write({"n": 2}, [b"2" * 1_000_000])
        before = shutil.disk_usage(disk).free
        with pytest.raises(OSError, match="No space left on device") as caught:
            run.write({"n": 3}, [b"3" * 4_000_000])
        assert caught.value.errno == errno.ENOSPC
        assert shutil.disk_usage(disk).free == before
        assert newest_of(run) == (2, {"n": 2}, [b"2" * 1_000_000])
        run.mark(step=3)
        assert run.write({"n": 3}, [b"3"]) == 3


# -- one at a time


def test_a_second_process_is_told_who_holds_the_folder_and_a_dead_one_frees_it(script: Path) -> None:
    child = start(HOLD, script)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == b"held\n"
        with pytest.raises(StoreBusy) as caught:
            StateFolder.open(script)
        busy = caught.value
        assert (busy.script, busy.pid, busy.run_id) == (script, child.pid, "first")
        assert datetime.fromisoformat(busy.since or "") <= datetime.now(UTC)
        assert f"is already running (process {child.pid}, run first, since 2" in str(busy)
    finally:
        kill(child)
    StateFolder.open(script).close()


def test_before_it_announces_a_run_the_holder_is_known_by_its_process(script: Path) -> None:
    with StateFolder.open(script) as folder:
        folder.announce("earlier")
    with StateFolder.open(script), pytest.raises(StoreBusy) as caught:
        StateFolder.open(script)
    assert (caught.value.pid, caught.value.run_id, caught.value.since) == (os.getpid(), None, None)


def test_an_unreadable_announcement_is_no_trouble(script: Path) -> None:
    with StateFolder.open(script) as folder:
        for text in ("", "{", "[]", '{"pid": "x"}'):
            (folder.path / "lock").write_text(text)
            with pytest.raises(StoreBusy, match="in another process") as caught:
                StateFolder.open(script)
            assert caught.value.pid is None


def test_two_scripts_in_one_folder_do_not_exclude_each_other(script: Path) -> None:
    with StateFolder.open(script) as one, StateFolder.open(script.with_name("other.py")) as other:
        assert one.path != other.path


def test_a_child_process_does_not_keep_the_lock(script: Path) -> None:
    folder = StateFolder.open(script)
    child = subprocess.Popen(["sleep", "30"], close_fds=False)
    try:
        folder.close()
        folder.close()
        StateFolder.open(script).close()
        with pytest.raises(StoreError, match="closed"):
            folder.announce("r")
    finally:
        child.kill()
        child.wait()


def no_lock(*_: object) -> None:
    raise OSError(errno.ENOLCK, "No locks available")


def test_without_flock_the_other_kind_of_lock_is_taken(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", no_lock)
    broken_there = """
import fcntl
def no_lock(*_): raise OSError(37, "No locks available")
fcntl.flock = no_lock
"""
    with StateFolder.open(script) as folder:
        folder.announce("r")
        assert folder.warning is None
        assert run_to_end(broken_there + TRY, script) == (0, f"busy {os.getpid()} r\n".encode())
    assert run_to_end(broken_there + TRY, script) == (0, b"free\n")


def test_a_file_system_without_locks_gives_a_warning(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", no_lock)
    monkeypatch.setattr(fcntl, "lockf", no_lock)
    with StateFolder.open(script) as folder:
        assert folder.warning is not None
        assert "has no locks" in folder.warning
        folder.new_run("r").write({}, [])


# -- runs


def make_run(folder: StateFolder, run_id: str, *, snapshots: int = 1, finished: bool = False) -> RunFolder:
    run = folder.new_run(run_id)
    for n in range(snapshots):
        run.write({"run": run_id}, [b"x" * 5000])
        run.mark(step=n + 1)
    if finished:
        run.finish()
    return run


def test_a_fresh_run_keeps_unfinished_runs_and_one_finished_run(folder: StateFolder) -> None:
    for run_id, finished in [("a", False), ("b", True), ("c", True), ("d", False), ("e", True)]:
        make_run(folder, run_id, finished=finished)
    make_run(folder, "empty", snapshots=0)
    folder.new_run("f")
    assert names(folder.path / "runs") == ["a", "d", "e", "empty", "f"]


def test_unfinished_runs_are_listed_newest_first_with_size_and_step(folder: StateFolder) -> None:
    make_run(folder, "a", snapshots=2)
    make_run(folder, "b", finished=True)
    make_run(folder, "c", snapshots=0)
    make_run(folder, "d", snapshots=5)
    newest, oldest = folder.unfinished()
    assert (newest.run_id, newest.step, newest.finished) == ("d", 5, False)
    assert (oldest.run_id, oldest.step, oldest.started[:4]) == ("a", 2, "2030")
    assert 3 * 5000 < newest.size_bytes < 3 * 6000
    assert 2 * 5000 < oldest.size_bytes < 2 * 6000


def test_a_run_whose_snapshots_are_all_torn_is_not_listed(folder: StateFolder) -> None:
    run = make_run(folder, "a")
    os.truncate(run.path / "000001.snapshot", 200)
    assert folder.unfinished() == []


@pytest.mark.parametrize(
    ("runs", "chosen"),
    [
        ([("a", 1, False), ("b", 1, False)], "b"),
        ([("a", 1, False), ("b", 1, True)], "a"),
        ([("a", 1, False), ("b", 0, False)], "a"),
        ([("a", 1, True), ("b", 0, False)], "a"),
        ([("a", 1, True), ("b", 1, True)], "b"),
    ],
)
def test_resume_takes_the_last_run_with_a_snapshot_unfinished_ones_first(
    folder: StateFolder, runs: Sequence[tuple[str, int, bool]], chosen: str
) -> None:
    for run_id, snapshots, finished in runs:
        make_run(folder, run_id, snapshots=snapshots, finished=finished)
    run = folder.resume()
    assert run.run_id == chosen
    assert newest_of(run)[1] == {"run": chosen}
    assert json.loads((run.path / "run.json").read_text())["status"] == "unfinished"


def test_a_resumed_run_goes_on_and_is_the_last_begun(folder: StateFolder) -> None:
    make_run(folder, "a", snapshots=2)
    make_run(folder, "b")
    run = folder.resume("a")
    assert run.write({"run": "a"}, []) == 3
    assert folder.resume().run_id == "a"
    assert folder.unfinished()[0].step == 2


def test_resume_says_what_there_is_when_it_cannot(folder: StateFolder) -> None:
    with pytest.raises(StoreError, match=r"there is no run that can be resumed in .*; stored there: nothing"):
        folder.resume()
    make_run(folder, "a", snapshots=0)
    with pytest.raises(StoreError, match=r"stored there: a \(unfinished, step 0, no snapshot yet\)"):
        folder.resume()
    make_run(folder, "b", finished=True)
    with pytest.raises(StoreError, match=r"no run x that can be resumed in .*: b \(finished, step 1\), a \(unf"):
        folder.resume("x")
    with pytest.raises(StoreError, match="no run a that"):
        folder.resume("a")


def test_resume_asks_for_an_upgrade_when_all_snapshots_are_of_a_newer_format(folder: StateFolder) -> None:
    run = make_run(folder, "a")
    (run.path / "000001.snapshot").write_bytes(forged(table(), version=2))
    with pytest.raises(StoreError, match=r"a \(unfinished, step 1, .* format 2 .*; upgrade spark-runtime"):
        folder.resume()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"status": 3, "step": "x", "run_id": "../../x"}', "\0\xff"])
def test_a_run_whose_record_is_unreadable_is_kept_as_unfinished(folder: StateFolder, text: str) -> None:
    run = make_run(folder, "a", finished=True)
    (run.path / "run.json").write_text(text)
    make_run(folder, "b", finished=True)
    make_run(folder, "c", finished=True)
    (info,) = folder.unfinished()
    assert (info.run_id, info.started[:4], info.step) == ("a", "", 0)
    assert folder.resume().path == run.path


@pytest.mark.parametrize("run_id", ["", ".", "..", "a/b", ".gone-a", "x" * 65, "a\n", "ü"])
def test_a_run_is_not_named_like_a_path(folder: StateFolder, run_id: str) -> None:
    with pytest.raises(StoreError, match="cannot name a run"):
        folder.new_run(run_id)


def test_a_run_is_never_made_over_another(folder: StateFolder, run: RunFolder) -> None:
    with pytest.raises(StoreError, match="already a run r"):
        folder.new_run("r")


def test_the_record_names_run_process_and_step(run: RunFolder) -> None:
    run.mark(step=41)
    record = json.loads((run.path / "run.json").read_text())
    assert record == {
        "run_id": "r",
        "started": "2030-01-01T00:00:00.000000+00:00",
        "resumed": "",
        "status": "unfinished",
        "step": 41,
        "cleared": False,
        "pid": os.getpid(),
    }


# -- set aside


def test_what_is_kept_aside_outlives_pruning_and_its_run(folder: StateFolder) -> None:
    run = make_run(folder, "a")
    kept = run.keep_aside("the new code cannot read key 'model'")
    assert run.keep_aside("again") == kept
    for _ in range(4):
        run.write({}, [])
    run.finish()
    for run_id in ("b", "c"):
        make_run(folder, run_id, finished=True)
    folder.new_run("d")
    assert not run.path.exists()
    with StoredSnapshot.open(kept, 1) as snapshot:
        assert (snapshot.meta, read_all(snapshot)) == ({"run": "a"}, [b"x" * 5000])
    reasons = kept.with_suffix(".txt").read_text().splitlines()
    assert [line.split(" ", 1)[1] for line in reasons] == ["the new code cannot read key 'model'", "again"]


def test_without_hard_links_the_kept_file_is_a_copy(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_link(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_link)
    run.write({"n": 3}, content(3))
    kept = run.keep_aside("why")
    assert kept.stat().st_ino != (run.path / "000001.snapshot").stat().st_ino
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    with StoredSnapshot.open(kept, 1) as snapshot:
        assert read_all(snapshot) == content(3)


def test_there_must_be_something_to_keep_aside(run: RunFolder) -> None:
    with pytest.raises(StoreError, match="no whole snapshot"):
        run.keep_aside("why")
    assert names(run.path.parent.parent / "aside") == []


# -- the folder itself


def test_only_the_owner_may_enter_and_read(script: Path) -> None:
    old = os.umask(0)
    try:
        with StateFolder.open(script) as folder:
            run = folder.new_run("r")
            run.write({}, [b"x"])
            run.keep_aside("why")
            run.finish()
    finally:
        os.umask(old)
    state = script.parent / ".spark"
    modes = {path: stat.S_IMODE(path.lstat().st_mode) for path in [state, *state.rglob("*")]}
    assert len(modes) == 11
    assert all(mode == (0o700 if path.is_dir() else 0o600) for path, mode in modes.items())


def test_a_folder_that_is_open_to_others_is_closed_to_them(script: Path) -> None:
    state = script.parent / ".spark"
    state.mkdir()
    state.chmod(0o755)
    StateFolder.open(script).close()
    assert stat.S_IMODE(state.stat().st_mode) == 0o700


def test_git_sees_nothing_of_it(script: Path) -> None:
    if shutil.which("git") is None:
        pytest.skip("no git on this machine")
    with StateFolder.open(script) as folder:
        folder.new_run("r").write({}, [b"x"])
    git = ["git", "-C", str(script.parent), "-c", "safe.directory=*"]
    subprocess.run([*git, "init", "-q"], check=True)
    status = subprocess.run([*git, "status", "--porcelain", "-uall"], check=True, stdout=subprocess.PIPE, text=True)
    assert status.stdout == '?? "train [1].py"\n'


def test_a_gitignore_that_the_user_changed_stays(script: Path) -> None:
    StateFolder.open(script).close()
    ignore = script.parent / ".spark" / ".gitignore"
    assert ignore.read_text() == "*\n"
    ignore.write_text("# mine\n")
    StateFolder.open(script).close()
    assert ignore.read_text() == "# mine\n"


def test_a_file_or_a_link_in_place_of_the_folder_is_refused(script: Path, tmp_path: Path) -> None:
    state = script.parent / ".spark"
    state.write_text("")
    with pytest.raises(StoreError, match=r"\.spark is a file where a folder is needed; move it away"):
        StateFolder.open(script)
    state.unlink()
    outside = tmp_path / "outside"
    outside.mkdir()
    state.symlink_to(outside)
    with pytest.raises(StoreError, match=r"\.spark is a symbolic link.*; remove the link"):
        StateFolder.open(script)
    assert names(outside) == []
    state.unlink()
    state.mkdir()
    (state / script.name).symlink_to(outside)
    with pytest.raises(StoreError, match="is a symbolic link"):
        StateFolder.open(script)
    assert names(outside) == []


def test_a_folder_of_another_user_is_refused(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    StateFolder.open(script).close()
    us = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: us + 1)
    with pytest.raises(StoreError, match=rf"\.spark belongs to another user \(id {us}\)"):
        StateFolder.open(script)


def test_a_read_only_disk_is_one_sentence(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    with pytest.raises(StoreError, match=r"cannot keep state in .*train\.py: Read-only file system at .*; make that"):
        StateFolder.open(disk / "train.py")


def test_a_read_only_folder_is_one_sentence(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: object, mode: int) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(StoreError, match=r"cannot keep state in .*: Permission denied at .*\.spark; make that folder"):
        StateFolder.open(script)


def test_errors_travel_between_processes() -> None:
    import pickle

    damage = SnapshotDamaged(Path("x"), "part 3", "why")
    busy = StoreBusy(Path("train.py"), 3, "r", None)
    for error in (damage, busy):
        again = pickle.loads(pickle.dumps(error))
        assert (str(again), vars(again)) == (str(error), vars(error))


def test_the_format_is_what_its_description_says(tmp_path: Path) -> None:
    path = tmp_path / "000001.snapshot"
    write_snapshot(path, SnapshotParts({"n": 1}, [b"abc", b"de"]))
    raw = path.read_bytes()
    magic, version, length = PRELUDE.unpack(raw[: PRELUDE.size])
    header = msgpack.unpackb(raw[PRELUDE.size : PRELUDE.size + length])
    after = PRELUDE.size + length
    assert (magic, version) == (MAGIC, 1)
    assert header["parts"] == [[0, 3, hashlib.sha256(b"abc").digest()], [64, 2, hashlib.sha256(b"de").digest()]]
    assert raw[after : after + 32] == hashlib.sha256(raw[:after]).digest()
    assert raw.endswith(b"abc" + bytes(61) + b"de" + b"SPARKEND")
    assert len(raw) == snapshot_file._aligned(after + 32) + 64 + 2 + 8
