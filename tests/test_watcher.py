"""The watcher sees every kind of save once and whole, tells nothing else, and leaves nothing behind.

Saves run in threads or processes beside the loop. No sleep decides: a test waits for the next report, and "nothing was
told" means that the report of a later save is the next one. Where a slow machine could make a pause look like the end
of a save, the patience of the watcher is made long.
"""

import asyncio
import hashlib
import mmap
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from spark_runtime.supervise import watcher as watcher_module
from spark_runtime.supervise.watcher import Look, WatchedFile, Watcher, Writer, look_at

Report = dict[Path, bytes | None]
Save = Callable[[Path, bytes], None]

LIMIT_SECONDS = 50
FOREVER_SECONDS = 300.0


def digest_of(content: bytes | None) -> str | None:
    return None if content is None else hashlib.sha256(content).hexdigest()


def version(number: int) -> bytes:
    """Return a script of which each third compiles. All versions have the same size."""
    return b"value = %06d\n" % number * 60


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, LIMIT_SECONDS))


class Watched:
    """A watcher with what it told."""

    def __init__(self, **options: bool) -> None:
        self.reports: asyncio.Queue[Report] = asyncio.Queue()
        self.troubles: asyncio.Queue[str] = asyncio.Queue()
        self.watcher = Watcher(self.reports.put_nowait, on_degraded=self.troubles.put_nowait, **options)

    def watch(self, paths: Iterable[Path]) -> None:
        self.watcher.watch({path: digest_of(path.read_bytes()) for path in paths})

    async def next(self) -> Report:
        return await asyncio.wait_for(self.reports.get(), LIMIT_SECONDS)


@asynccontextmanager
async def watching(*paths: Path, **options: bool) -> AsyncIterator[Watched]:
    watched = Watched(**options)
    watched.watch(paths)
    try:
        yield watched
    finally:
        await watched.watcher.aclose()
        assert watched.reports.empty()


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "script.py"
    path.write_bytes(version(0))
    return path


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a file be gone, empty or open for writing as long as it takes."""
    monkeypatch.setattr(watcher_module, "STILL_LONG_SECONDS", FOREVER_SECONDS)


def needs_leases(path: Path) -> None:
    if look_at(path).writer is Writer.UNKNOWN:
        pytest.skip("this file system does not say who has a file open")


# --- Ten kinds of save ------------------------------------------------------------------------------------------------


def save_in_place(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def save_by_renaming_over(path: Path, content: bytes) -> None:
    new = path.with_suffix(".new")
    new.write_bytes(content)
    os.replace(new, path)


def save_by_delete_and_create(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


def save_like_vim(path: Path, content: bytes) -> None:
    backup = path.with_name(path.name + "~")
    path.rename(backup)
    path.write_bytes(content)
    backup.unlink()


def save_in_three_parts(path: Path, content: bytes) -> None:
    third = len(content) // 3
    with path.open("wb") as file:
        for start in range(0, len(content), third):
            file.write(content[start : start + third])
            file.flush()
            time.sleep(0.03)


def save_through_a_mapping(path: Path, content: bytes) -> None:
    with path.open("r+b") as file:
        file.truncate(0)
        file.truncate(len(content))
        with mmap.mmap(file.fileno(), len(content)) as mapping:
            mapping[:] = content


def save_by_swapping_a_link(path: Path, content: bytes) -> None:
    real = path.with_name(f"{digest_of(content)}.py")
    real.write_bytes(content)
    link = path.with_suffix(".link")
    link.symlink_to(real.name)
    os.replace(link, path)


def save_with_size_and_mtime_of_before(path: Path, content: bytes) -> None:
    before = path.stat()
    assert before.st_size == len(content)
    new = path.with_suffix(".new")
    new.write_bytes(content)
    os.utime(new, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(new, path)


def save_by_breaking_a_hard_link(path: Path, content: bytes) -> None:
    other, old = path.with_suffix(".other"), path.read_bytes()
    other.hardlink_to(path)
    path.unlink()
    path.write_bytes(content)
    assert other.read_bytes() == old
    other.unlink()


def save_from_another_process(path: Path, content: bytes) -> None:
    subprocess.run(["sh", "-c", 'cat > "$0"', str(path)], input=content, check=True)


KINDS: list[Save] = [
    save_in_place,
    save_by_renaming_over,
    save_by_delete_and_create,
    save_like_vim,
    save_in_three_parts,
    save_through_a_mapping,
    save_by_swapping_a_link,
    save_with_size_and_mtime_of_before,
    save_by_breaking_a_hard_link,
    save_from_another_process,
]


async def save_and_see(path: Path, save: Save, rounds: int) -> None:
    async with watching(path) as watched:
        for number in range(1, rounds + 1):
            await asyncio.to_thread(save, path, version(number))
            assert await watched.next() == {path: version(number)}


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("save", KINDS)
def test_each_of_20_saves_is_seen_once_and_whole(script: Path, save: Save) -> None:
    needs_leases(script)
    run(save_and_see(script, save, 20))


@pytest.mark.slow
@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("save", KINDS)
def test_each_of_100_saves_is_seen_once_and_whole(script: Path, save: Save) -> None:
    needs_leases(script)
    run(save_and_see(script, save, 100))


def test_saves_in_a_burst_are_told_in_order_and_the_last_one_is_told(script: Path) -> None:
    async def test() -> None:
        async with watching(script) as watched:
            burst = asyncio.create_task(
                asyncio.to_thread(lambda: [save_by_renaming_over(script, version(n)) for n in range(1, 301)])
            )
            told = [await watched.next()]
            while told[-1] != {script: version(300)}:
                told.append(await watched.next())
            await burst
            contents = [report[script] or b"" for report in told]
            assert contents == sorted(set(contents))

    run(test())


# --- Links and folders ------------------------------------------------------------------------------------------------


def test_a_swapped_link_of_a_parent_folder_is_a_save(tmp_path: Path) -> None:
    """As Kubernetes does with a ConfigMap: script.py -> ..data/script.py, ..data -> ..1/"""
    script, data = tmp_path / "script.py", tmp_path / "..data"
    script.symlink_to("..data/script.py")

    def swap(number: int) -> None:
        folder = tmp_path / f"..{number}"
        folder.mkdir()
        (folder / "script.py").write_bytes(version(number))
        new = tmp_path / "..new"
        new.symlink_to(folder.name)
        os.replace(new, data)

    async def test() -> None:
        swap(0)
        async with watching(script) as watched:
            for number in range(1, 11):
                swap(number)
                assert await watched.next() == {script: version(number)}

    run(test())


def test_a_write_to_the_file_behind_a_link_is_seen_in_its_own_folder(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    real, script = tmp_path / "real" / "file.py", tmp_path / "script.py"
    real.write_bytes(version(0))
    script.symlink_to(real)

    async def test() -> None:
        async with watching(script) as watched:
            for number in range(1, 11):
                save_by_renaming_over(real, version(number))
                assert await watched.next() == {script: version(number)}

    run(test())


def test_a_folder_that_is_replaced_is_watched_again(tmp_path: Path) -> None:
    folder, new = tmp_path / "project", tmp_path / "new"
    script = folder / "script.py"

    async def test() -> None:
        folder.mkdir()
        script.write_bytes(version(0))
        async with watching(script) as watched:
            for number in range(1, 4):
                new.mkdir()
                (new / "script.py").write_bytes(version(number))
                shutil.rmtree(folder)
                new.rename(folder)
                assert await watched.next() == {script: version(number)}
                script.write_bytes(version(number + 100))
                assert await watched.next() == {script: version(number + 100)}

    run(test())


def test_a_relative_path_comes_back_as_it_was_given(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(script.parent)
    relative = Path("script.py")

    async def test() -> None:
        async with watching(relative) as watched:
            save_by_renaming_over(script, version(1))
            assert await watched.next() == {relative: version(1)}

    run(test())


def test_links_in_a_circle_are_followed_no_further_than_the_kernel_does(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.symlink_to("two")
    two.symlink_to("one")
    assert {place.rsplit("/")[-1] for place in watcher_module._places(one)} >= {"one", "two"}


# --- What is not a save -----------------------------------------------------------------------------------------------


def do_nothing_of_importance(path: Path) -> None:
    path.touch()
    path.chmod(0o600)
    path.write_bytes(path.read_bytes())
    save_by_renaming_over(path, path.read_bytes())
    path.with_suffix(".log").write_bytes(b"another file in the folder")


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("poll", [False, True])
def test_touch_chmod_and_a_save_of_the_same_bytes_are_silent(script: Path, poll: bool) -> None:
    async def test() -> None:
        async with watching(script, poll=poll) as watched:
            for number in range(1, 4):
                await asyncio.to_thread(do_nothing_of_importance, script)
                script.write_bytes(version(number))
                assert await watched.next() == {script: version(number)}

    run(test())


def test_content_that_differs_from_the_given_digest_is_told_without_a_save(script: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.py"
    other.write_bytes(b"other")

    async def test() -> None:
        async with watching() as watched:
            watched.watcher.watch({script: digest_of(b"what the worker runs"), other: digest_of(b"other")})
            assert await watched.next() == {script: version(0)}

    run(test())


# --- Gone, empty, half-written ----------------------------------------------------------------------------------------


def test_a_deleted_file_is_told_once_and_again_when_it_is_put_back(script: Path) -> None:
    async def test() -> None:
        async with watching(script) as watched:
            for _ in range(2):
                script.unlink()
                assert await watched.next() == {script: None}
                script.write_bytes(version(0))
                assert await watched.next() == {script: version(0)}

    run(test())


def test_a_file_that_was_not_there_is_told_when_it_comes(tmp_path: Path) -> None:
    script = tmp_path / "later" / "script.py"

    async def test() -> None:
        async with watching() as watched:
            watched.watcher.watch({script: None})
            script.parent.mkdir()
            script.write_bytes(version(1))
            assert await watched.next() == {script: version(1)}

    run(test())


@pytest.mark.usefixtures("patient")
def test_an_empty_file_waits_for_content(script: Path) -> None:
    looked = threading.Event()

    def empty_then_write() -> None:
        script.write_bytes(b"")
        assert looked.wait(LIMIT_SECONDS)
        script.write_bytes(version(1))

    async def test(monkeypatch: pytest.MonkeyPatch) -> None:
        def look_and_tell(path: Path, *, ask_for_writers: bool = True) -> Look:
            look = look_at(path, ask_for_writers=ask_for_writers)
            if look.content == b"":
                looked.set()
            return look

        monkeypatch.setattr(watcher_module, "look_at", look_and_tell)
        async with watching(script) as watched:
            await asyncio.to_thread(empty_then_write)
            assert await watched.next() == {script: version(1)}

    with pytest.MonkeyPatch.context() as monkeypatch:
        run(test(monkeypatch))


def test_a_file_that_stays_empty_is_told_after_half_a_second(script: Path) -> None:
    async def test() -> None:
        async with watching(script) as watched:
            start = time.monotonic()
            script.write_bytes(b"")
            assert await watched.next() == {script: b""}
            assert time.monotonic() - start >= 0.5

    run(test())


WRITE_HALF = (
    "import sys; f = open(sys.argv[1], 'wb'); f.write(b'half = 1'); f.flush(); print(flush=True); sys.stdin.read()"
)


@pytest.mark.usefixtures("patient")
def test_half_a_file_whose_writer_dies_is_told_as_it_is_then(script: Path) -> None:
    needs_leases(script)
    other = script.with_name("other.py")
    other.write_bytes(version(0))

    async def test() -> None:
        async with watching(script, other) as watched:
            arguments = [sys.executable, "-c", WRITE_HALF, str(script)]
            with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
                assert writer.stdout is not None
                await asyncio.to_thread(writer.stdout.readline)
                # The other file shows that the watcher was at work all the time, and is not held up.
                for number in range(1, 6):
                    other.write_bytes(version(number))
                    assert await watched.next() == {other: version(number)}
                writer.kill()
            assert await watched.next() == {script: b"half = 1"}

    run(test())


def test_a_writer_who_keeps_the_file_open_is_believed_after_half_a_second(script: Path) -> None:
    needs_leases(script)

    async def test() -> None:
        async with watching(script) as watched:
            with script.open("r+b") as file, mmap.mmap(file.fileno(), len(version(0))) as mapping:
                for number in range(1, 3):  # the second write makes no event and leaves the mtime as it is
                    start = time.monotonic()
                    mapping[:] = version(number)
                    assert await watched.next() == {script: version(number)}
                    assert time.monotonic() - start >= 0.5

    run(test())


def ledger_after(known: bytes, looks: list[tuple[float, bytes | None, Writer]]) -> list[bytes | None]:
    """Return what a file's ledger has to tell in the course of these looks."""
    file, told = WatchedFile(digest_of(known)), []
    for at, content, writer in looks:
        signature = None if content is None else (len(content),)
        file.see(Look(at, content, digest_of(content), signature, writer))
        if file.fresh:
            told.append(file.tell())
    return told


NONE, SOME, UNKNOWN = Writer


@pytest.mark.parametrize(
    ("looks", "told"),
    [
        pytest.param([(0, b"new", NONE)], [b"new"], id="nobody writes"),
        pytest.param([(0, b"old", NONE)], [], id="nothing new"),
        pytest.param([(0, b"half", SOME), (0.4, b"new", NONE)], [b"new"], id="the writer closes"),
        pytest.param([(0, b"half", SOME), (0.4, b"new", SOME), (0.8, b"new", SOME)], [], id="the writer writes again"),
        pytest.param([(0, b"new", SOME), (0.51, b"new", SOME), (2, b"new", SOME)], [b"new"], id="open for ever"),
        pytest.param(
            [(0, b"half", UNKNOWN), (0.01, b"new", UNKNOWN), (0.02, b"new", UNKNOWN)], [], id="unknown, moves"
        ),
        pytest.param([(0, b"new", UNKNOWN), (0.021, b"new", UNKNOWN)], [b"new"], id="unknown, stands still"),
        pytest.param([(0, b"", NONE), (0.4, b"new", NONE)], [b"new"], id="truncated, then written"),
        pytest.param([(0, b"", NONE), (0.51, b"", NONE)], [b""], id="empty"),
        pytest.param([(0, None, NONE), (0.4, b"new", NONE)], [b"new"], id="deleted, then written"),
        pytest.param([(0, None, NONE), (0.4, b"", NONE), (0.6, b"", NONE)], [], id="deleted, then empty"),
        pytest.param([(0, None, NONE), (0.51, None, NONE), (2, None, NONE)], [None], id="gone"),
        pytest.param([(0, None, NONE), (0.51, None, NONE), (2, b"old", NONE)], [None, b"old"], id="put back"),
        pytest.param([(0, None, NONE), (0.4, b"old", NONE)], [], id="put back in time"),
    ],
)
def test_a_file_counts_as_saved_when(looks: list[tuple[float, bytes | None, Writer]], told: list[bytes | None]) -> None:
    assert ledger_after(b"old", looks) == told


# --- Leases -----------------------------------------------------------------------------------------------------------


def run_program(program: str, *arguments: str) -> str:
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(program), *arguments]
    done = subprocess.run(command, timeout=LIMIT_SECONDS, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_a_writer_who_has_to_wait_for_our_read_does_not_kill_us(script: Path) -> None:
    needs_leases(script)
    program = """
        import fcntl, os, sys, threading, time
        from spark_runtime.supervise.watcher import Writer, _writers_held_back
        fd = os.open(sys.argv[1], os.O_RDONLY)
        writer = threading.Thread(target=lambda: open(sys.argv[1], "ab").close())
        with _writers_held_back(fd, True) as who:
            assert who is Writer.NONE
            writer.start()
            # The lease reads as given up once the kernel has told us that somebody waits.
            while fcntl.fcntl(fd, fcntl.F_GETLEASE) == fcntl.F_RDLCK:
                time.sleep(0.001)
            assert writer.is_alive()
        writer.join()
        print("alive")
    """
    assert run_program(program, str(script)) == "alive\n"


def test_without_a_writer_a_look_is_whole_whoever_comes_meanwhile(script: Path) -> None:
    needs_leases(script)
    program = """
        import sys, time
        until = time.monotonic() + 1
        while time.monotonic() < until:
            for part in (b"a" * 500, b"b" * 500):
                with open(sys.argv[1], "wb", buffering=0) as file:
                    file.write(part)
                    file.write(part)
    """
    script.write_bytes(b"a" * 1000)
    looks = []
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(program), str(script)]) as writer:
        while writer.poll() is None:
            looks.append(look_at(script))
    assert writer.returncode == 0
    assert {look.content for look in looks if look.writer is NONE} <= {b"a" * 1000, b"b" * 1000}


def test_the_signal_of_a_broken_lease_is_ignored_by_default() -> None:
    assert signal.getsignal(signal.SIGURG) is signal.SIG_DFL  # and its default, unlike that of SIGIO, is to do nothing


# --- Several files, several sets --------------------------------------------------------------------------------------


def test_files_that_settle_together_are_told_together(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_leases(script)
    other = script.with_name("other.py")
    other.write_bytes(version(0))
    seen = threading.Event()

    def look_and_tell(path: Path, *, ask_for_writers: bool = True) -> Look:
        look = look_at(path, ask_for_writers=ask_for_writers)
        if path == script and look.content == version(1):
            seen.set()
        return look

    def save_both() -> None:
        with other.open("wb") as file:
            file.write(version(1))
            file.flush()
            script.write_bytes(version(1))
            assert seen.wait(LIMIT_SECONDS)

    monkeypatch.setattr(watcher_module, "look_at", look_and_tell)
    monkeypatch.setattr(watcher_module, "FOLD_SECONDS", FOREVER_SECONDS)
    monkeypatch.setattr(watcher_module, "STILL_LONG_SECONDS", FOREVER_SECONDS)

    async def test() -> None:
        async with watching(script, other) as watched:
            await asyncio.to_thread(save_both)
            assert await watched.next() == {script: version(1), other: version(1)}

    run(test())


def test_the_set_of_files_may_change_while_files_are_saved(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("one", "two", "three")]
    paths = [folder / "file.py" for folder in folders]
    for path in paths:
        path.parent.mkdir()
        path.write_bytes(version(0))
    stop = threading.Event()

    def save_all() -> int:
        number = 0
        while not stop.is_set():
            number += 1
            for path in paths:
                save_by_renaming_over(path, version(number))
            time.sleep(0.001)
        return number

    async def test() -> None:
        told = {path: [version(0)] for path in paths}

        def on_saved(report: Report) -> None:
            for path, content in report.items():
                assert content is not None
                assert path in watched
                told[path].append(content)
            some_told.set()

        some_told = asyncio.Event()
        watcher = Watcher(on_saved)
        saves = asyncio.create_task(asyncio.to_thread(save_all))
        for number in range(60):
            watched = {path: digest_of(told[path][-1]) for i, path in enumerate(paths) if (number >> i) & 1 == 0}
            watcher.watch(watched)
            if watched:
                some_told.clear()
                await asyncio.wait_for(some_told.wait(), LIMIT_SECONDS)
        watched = {path: digest_of(told[path][-1]) for path in paths}
        watcher.watch(watched)
        stop.set()
        last = version(await saves)
        while any(contents[-1] != last for contents in told.values()):
            some_told.clear()
            await asyncio.wait_for(some_told.wait(), LIMIT_SECONDS)
        await watcher.aclose()
        for contents in told.values():
            assert contents == sorted(set(contents))

    run(test())


def test_watch_may_be_called_from_the_callback(script: Path) -> None:
    async def test() -> None:
        told: asyncio.Queue[bytes | None] = asyncio.Queue()

        def on_saved(report: Report) -> None:
            watcher.watch({path: digest_of(content) for path, content in report.items()})
            told.put_nowait(report[script])

        watcher = Watcher(on_saved)
        watcher.watch({script: digest_of(version(0))})
        for number in range(1, 11):
            save_by_renaming_over(script, version(number))
            assert await asyncio.wait_for(told.get(), LIMIT_SECONDS) == version(number)
        await watcher.aclose()
        assert told.empty()

    run(test())


def test_a_callback_that_fails_is_heard_and_does_not_end_the_watching(script: Path) -> None:
    async def test() -> None:
        heard: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

        def fail(report: Report) -> None:
            raise ValueError(report[script])

        asyncio.get_running_loop().set_exception_handler(lambda _, context: heard.put_nowait(context))
        watcher = Watcher(fail)
        watcher.watch({script: digest_of(version(0))})
        for number in range(1, 3):
            script.write_bytes(version(number))
            context = await asyncio.wait_for(heard.get(), LIMIT_SECONDS)
            assert context["exception"].args == (version(number),)
        await watcher.aclose()

    run(test())


# --- Without events, without rights -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("patient")
def test_poll_sees_saves_without_events(script: Path) -> None:
    async def test() -> None:
        async with watching(script, poll=True) as watched:
            for number, save in enumerate((save_in_place, save_by_renaming_over, save_by_swapping_a_link), start=1):
                await asyncio.to_thread(save, script, version(number))
                assert await watched.next() == {script: version(number)}
            assert "spark-watch-folders" not in {thread.name for thread in threading.enumerate()}

    run(test())


def test_without_a_free_inotify_instance_the_net_goes_on_and_it_is_told_once(
    script: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("watchfiles._rust_notify.RustNotify", refuse)

    async def test() -> None:
        async with watching(script) as watched:
            for number in range(1, 4):
                save_by_renaming_over(script, version(number))
                assert await watched.next() == {script: version(number)}
            assert "Too many open files" in await watched.troubles.get()
            assert watched.troubles.empty()

    run(test())


class DeafNotify:
    """A RustNotify whose events are all lost."""

    def __init__(self, *_: object) -> None:
        pass

    def __enter__(self) -> "DeafNotify":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def watch(self, debounce: int, step: int, timeout: int, stop: threading.Event) -> str:
        return "stop" if stop.wait(timeout / 1000) else "timeout"


class DyingNotify(DeafNotify):
    """A RustNotify that starts and then fails."""

    def watch(self, debounce: int, step: int, timeout: int, stop: threading.Event) -> str:
        raise RuntimeError("the watch failed")


def test_a_save_whose_event_is_lost_is_seen_by_the_net(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("watchfiles._rust_notify.RustNotify", DeafNotify)

    async def test() -> None:
        async with watching(script) as watched:
            for number, save in enumerate((save_in_place, save_by_renaming_over), start=1):
                save(script, version(number))
                assert await watched.next() == {script: version(number)}
            assert watched.troubles.empty()

    run(test())


def test_a_folder_watch_that_fails_later_is_told_and_the_net_goes_on(
    script: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("watchfiles._rust_notify.RustNotify", DyingNotify)

    async def test() -> None:
        async with watching(script) as watched:
            assert "the watch failed" in await asyncio.wait_for(watched.troubles.get(), LIMIT_SECONDS)
            save_by_renaming_over(script, version(1))
            assert await watched.next() == {script: version(1)}

    run(test())


def put_folder(path: Path) -> None:
    path.mkdir()


def put_named_pipe(path: Path) -> None:
    os.mkfifo(path)


def put_link_to_itself(path: Path) -> None:
    path.symlink_to(path.name)


def put_file_without_rights(path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    path.touch(mode=0o000)


@pytest.mark.parametrize("put", [put_folder, put_named_pipe, put_link_to_itself, put_file_without_rights])
def test_what_cannot_be_read_is_told_once_and_tried_again(script: Path, put: Callable[[Path], None]) -> None:
    async def test() -> None:
        async with watching(script) as watched:
            for number in range(1, 3):
                script.unlink()
                put(script)
                assert f"cannot read {script}" in await asyncio.wait_for(watched.troubles.get(), LIMIT_SECONDS)
                script.rename(script.with_name(f"away-{number}"))
                script.write_bytes(version(number))
                assert await watched.next() == {script: version(number)}
            assert watched.troubles.empty()

    run(test())


# --- Leaving nothing behind -------------------------------------------------------------------------------------------


def count_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(sys.platform != "linux", reason="counts in /proc")
@pytest.mark.parametrize("poll", [False, True])
def test_aclose_leaves_no_thread_and_no_descriptor(script: Path, poll: bool) -> None:
    async def test() -> None:
        descriptors, threads = count_descriptors(), set(threading.enumerate())
        for number in range(1, 21):
            async with watching(script, poll=poll) as watched:
                save_by_renaming_over(script, version(number))
                assert await watched.next() == {script: version(number)}
            assert set(threading.enumerate()) == threads
        # The thread in Rust closes its descriptors after we have let go of it, and nobody can wait for it. So those of
        # an earlier test may be counted at the start; 20 watchers that left something behind would be more.
        deadline = time.monotonic() + LIMIT_SECONDS / 5
        while count_descriptors() > descriptors and time.monotonic() < deadline:
            await asyncio.sleep(0.001)
        assert count_descriptors() <= descriptors

    run(test())


def test_aclose_may_come_at_once_and_twice(script: Path) -> None:
    async def test() -> None:
        threads = set(threading.enumerate())
        for _ in range(20):
            watched = Watched()
            watched.watch([script])
            for turns in range(3):
                await asyncio.sleep(0.001 * turns)
            await watched.watcher.aclose()
            await watched.watcher.aclose()
            script.write_bytes(version(1))
            assert watched.reports.empty()
            assert set(threading.enumerate()) == threads

    run(test())


def test_a_loop_that_ends_without_aclose_takes_the_watcher_with_it(script: Path) -> None:
    threads = set(threading.enumerate())

    async def test() -> None:
        watched = Watched()
        watched.watch([script])
        script.write_bytes(version(1))
        await watched.next()

    run(test())
    assert set(threading.enumerate()) == threads


def test_a_program_that_forgets_the_loop_still_ends(script: Path) -> None:
    program = """
        import asyncio, pathlib, sys, threading
        from spark_runtime.supervise.watcher import Watcher

        async def start():
            told = asyncio.Event()
            watcher = Watcher(lambda report: told.set())
            watcher.watch({pathlib.Path(sys.argv[1]): "0" * 64})
            await told.wait()
            while "spark-watch-folders" not in {thread.name for thread in threading.enumerate()}:
                await asyncio.sleep(0.01)
            return watcher

        loop = asyncio.new_event_loop()
        watcher = loop.run_until_complete(start())
        print("ends")
        import os; os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # asyncio says that a task was pending, rightly
    """
    assert run_program(program, str(script)) == "ends\n"
