"""Nothing outlives a run: no process however it was started, no shared memory; and the supervisor does not grow."""

import json
import os
import signal
import time
import uuid
from pathlib import Path

import pytest
from harness import RunProcess, lives, running, write

MARK = "TEST_ORPHANS_MARK"  # inherited by every process of a run, whatever session or parent it has

GRANDCHILDREN = {
    "a subprocess": "kept.append(subprocess.Popen(['sleep', '300']))",
    "a subprocess with its own session": "kept.append(subprocess.Popen(['sleep', '300'], start_new_session=True))",
    "a subprocess with its own group": "kept.append(subprocess.Popen(['sleep', '300'], process_group=0))",
    "one that ignores signals": "kept.append(subprocess.Popen([sys.executable, '-c', STUBBORN]))",
    "one that ignores signals in its own session": (
        "kept.append(subprocess.Popen([sys.executable, '-c', STUBBORN], start_new_session=True))"
    ),
    "a daemon that forked twice": "daemon()",
    "a fork": "os.fork() or time.sleep(300)",
    "a stopped subprocess": "kept.append(subprocess.Popen(['sh', '-c', 'kill -STOP $$']))",
    "a fork pool": "pool('fork')",
    "a spawn pool": "pool('spawn')",
    "a forkserver pool": "pool('forkserver')",
}

SCRIPT = """
    import json, multiprocessing, os, subprocess, sys, time
    from multiprocessing import shared_memory

    CODE = "first"
    STUBBORN = "import signal, time; [signal.signal(n, signal.SIG_IGN) for n in (1, 2, 15)]; time.sleep(300)"
    kept = []

    def daemon():
        if os.fork() == 0:
            os.setsid()
            if os.fork():
                os._exit(0)
            time.sleep(300)
            os._exit(0)
        os.wait()

    def pool(method):
        made = multiprocessing.get_context(method).Pool(2)
        assert made.map(abs, [-1, -2]) == [1, 2]
        kept.append(made)

    def shared():
        locks = [multiprocessing.get_context("spawn").Lock() for _ in range(3)]
        block = shared_memory.SharedMemory(create=True, size=4096)
        kept.extend([*locks, block])
        return ["sem." + lock._semlock.name.lstrip("/") for lock in locks] + [block.name.lstrip("/")]

    def torch():
        state = spark.persist("state", lambda: {"n": 0})
        spark.expose(state=state)
        names = NAMES
        GRANDCHILD
        print("names", json.dumps(names))
        print("ready", os.getpid())
        print("at", state["n"])
        while not os.path.exists("finish"):
            spark.checkpoint()
            state["n"] += 1
            time.sleep(0.005)
"""


def script(grandchild: str = "pass", names: str = "[]") -> str:
    return SCRIPT.replace("GRANDCHILD", grandchild).replace("NAMES", names)


def marked(mark: str) -> set[int]:
    """Every living process of the run, by its environment."""
    found = set()
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if mark.encode() in (folder / "environ").read_bytes() and lives(int(folder.name)):
                    found.add(int(folder.name))
            except OSError:
                pass
    return found


def command_of(pid: int) -> str:
    try:
        return f"{pid} {Path(f'/proc/{pid}/cmdline').read_bytes().replace(bytes(1), b' ').decode()[:120]}"
    except OSError:
        return str(pid)


def wait_without(pids: set[int], seconds: float = 1.5) -> None:
    limit = time.monotonic() + seconds
    while any(map(lives, pids)) and time.monotonic() < limit:
        time.sleep(0.01)
    left = {pid for pid in pids if lives(pid)}
    names = [command_of(pid) for pid in left]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left, f"left over: {names}"


def wait_unlinked(names: list[str], seconds: float = 2.0) -> None:
    limit = time.monotonic() + seconds
    while any(Path("/dev/shm", name).exists() for name in names) and time.monotonic() < limit:
        time.sleep(0.01)
    left = [name for name in names if Path("/dev/shm", name).exists()]
    for name in left:
        Path("/dev/shm", name).unlink()
    assert not left


def bring_to_an_end(run: RunProcess, how: str) -> None:
    """Let the worker that has said it is ready end in this way."""
    pid = int(run.next_line("ready"))
    if how == "supervisor killed":
        run.process.kill()
        run.process.wait()
    elif how == "nursery killed":
        for each in run.nurseries():
            os.kill(each, signal.SIGKILL)
        run.next_line("ready")
    elif how == "worker killed":
        os.kill(pid, signal.SIGKILL)
        run.next_line("ready")
    elif how == "worker stopped":
        os.kill(pid, signal.SIGSTOP)
        run.next_line("ready")
    elif how == "reloaded":
        run.save(run.script.read_text().replace('"first"', '"second"'))
        run.next_line("ready")
    elif how == "restarted":
        run.ctl("restart")
        run.next_line("ready")
    elif how == "interrupted":
        assert run.stop() == 0
    elif how == "done":
        (run.script.parent / "finish").touch()
        assert run.wait_end() == 0
    else:
        raise ValueError(how)


def end_and_look(tmp_path: Path, source: str, how: str) -> None:
    mark = f"{MARK}={uuid.uuid4().hex}"
    with running(write(tmp_path / "train.py", source), **dict([mark.split("=")])) as run:
        names = json.loads(run.next_line("names"))
        run.next_line("at")
        for name in names:
            assert Path("/dev/shm", name).exists()
        theirs = marked(mark) - {run.process.pid}
        if how != "supervisor killed":
            theirs -= set(run.nurseries())
        assert theirs
        bring_to_an_end(run, how)
        wait_without(theirs)
        wait_unlinked(names)
    wait_without(marked(mark))


@pytest.mark.parametrize("kind", GRANDCHILDREN)
def test_a_killed_supervisor_leaves_no_process(tmp_path: Path, kind: str) -> None:
    end_and_look(tmp_path, script(GRANDCHILDREN[kind]), "supervisor killed")


@pytest.mark.parametrize("kind", GRANDCHILDREN)
def test_a_killed_worker_leaves_no_process(tmp_path: Path, kind: str) -> None:
    end_and_look(tmp_path, script(GRANDCHILDREN[kind]), "worker killed")


@pytest.mark.parametrize(
    "how",
    ["nursery killed", "worker stopped", "reloaded", "restarted", "interrupted", "done"],
)
@pytest.mark.parametrize(
    "kind", ["a subprocess", "one that ignores signals in its own session", "a daemon that forked twice"]
)
def test_other_ends_leave_no_process(tmp_path: Path, kind: str, how: str) -> None:
    end_and_look(tmp_path, script(GRANDCHILDREN[kind]), how)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["nursery killed", "worker stopped", "reloaded", "restarted", "interrupted", "done"])
@pytest.mark.parametrize("kind", GRANDCHILDREN)
def test_every_end_leaves_no_process(tmp_path: Path, kind: str, how: str) -> None:
    end_and_look(tmp_path, script(GRANDCHILDREN[kind]), how)


@pytest.mark.parametrize("how", ["reloaded", "interrupted", "done"])
def test_a_forkserver_pool_ends_with_its_worker(tmp_path: Path, how: str) -> None:
    end_and_look(tmp_path, script(GRANDCHILDREN["a forkserver pool"]), how)


@pytest.mark.parametrize(
    "how", ["supervisor killed", "worker killed", "nursery killed", "reloaded", "interrupted", "done"]
)
def test_semaphores_and_shared_memory_are_unlinked(tmp_path: Path, how: str) -> None:
    end_and_look(tmp_path, script(names="shared()"), how)


def test_a_supervisor_killed_before_the_script_is_ready_leaves_no_process(tmp_path: Path) -> None:
    mark = f"{MARK}={uuid.uuid4().hex}"
    for delay in (0.0, 0.05, 0.1, 0.2, 0.3):
        with running(write(tmp_path / "train.py", script()), **dict([mark.split("=")])) as run:
            time.sleep(delay)  # no outcome hangs on it: a moment is as good as another
            run.process.kill()
            run.process.wait()
            wait_without(marked(mark))


# --- nothing grows ---


def size_of(run: RunProcess) -> tuple[int, int, int]:
    """Descriptors and threads of the supervisor, zombies among the run's processes."""
    supervisor = run.process.pid
    descriptors = len(os.listdir(f"/proc/{supervisor}/fd"))
    threads = len(os.listdir(f"/proc/{supervisor}/task"))
    parents = {supervisor, *run.nurseries()}
    zombies = 0
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            zombies += fields[0] == "Z" and int(fields[1]) in parents
    return descriptors, threads, zombies


def wait_size(run: RunProcess, most: tuple[int, int, int], seconds: float = 4.0) -> None:
    limit = time.monotonic() + seconds
    while True:
        found = size_of(run)
        if all(a <= b for a, b in zip(found, most, strict=True)):
            return
        assert time.monotonic() < limit, f"descriptors, threads, zombies: {found}, but should be at most {most}"
        time.sleep(0.05)


def reload_and_crash(run: RunProcess, number: int, source: str) -> None:
    run.save(source.replace('"first"', f'"code {number}"'))
    os.kill(int(run.next_line("ready")), signal.SIGKILL)
    run.next_line("ready")


def nothing_grows(tmp_path: Path, rounds: int) -> None:
    source = script()
    with running(write(tmp_path / "train.py", source)) as run:
        run.next_line("ready")
        for number in range(5):
            reload_and_crash(run, number, source)
        nurseries = len(run.nurseries())
        descriptors, threads, _ = size_of(run)
        memory = resident(run.process.pid)
        for number in range(5, 5 + rounds):
            reload_and_crash(run, number, source)
        wait_size(run, (descriptors + 3, threads + 1, 0))
        assert len(run.nurseries()) <= max(nurseries, 2)
        assert resident(run.process.pid) - memory < 30 * 1024 * 1024
        assert run.stop() == 0


def resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_thirty_reloads_and_crashes_leave_no_descriptor_thread_or_zombie(tmp_path: Path) -> None:
    nothing_grows(tmp_path, 30)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_three_hundred_reloads_and_crashes_leave_no_descriptor_thread_or_zombie(tmp_path: Path) -> None:
    nothing_grows(tmp_path, 300)


def test_grandchildren_that_end_by_themselves_leave_no_zombie(tmp_path: Path) -> None:
    source = """
        import os, time

        def torch():
            for _ in range(20):
                if os.fork() == 0:
                    if os.fork() == 0:
                        os._exit(0)  # an orphan: the nursery gets it
                    os._exit(0)
                os.wait()
            print("ready")
            while True:
                spark.checkpoint()
                time.sleep(0.005)
    """
    with running(write(tmp_path / "train.py", source)) as run:
        run.next_line("ready")
        descriptors, threads, _ = size_of(run)
        wait_size(run, (descriptors + 3, threads + 1, 0))


# --- where forking is not safe ---


def test_spawned_workers_reload_with_their_state_and_come_back_from_a_crash(tmp_path: Path) -> None:
    source = script()
    with running(write(tmp_path / "train.py", source), SPARKRT_START="spawn") as run:
        run.next_line("ready")
        assert run.next_line("at") == "0"
        run.wait_for("values", values=lambda shown: shown.get("state", {}).get("n", 0) > 20)
        run.save(source.replace('"first"', '"second"'))
        pid = int(run.next_line("ready"))
        reloaded_at = int(run.next_line("at"))
        assert reloaded_at > 20
        os.kill(pid, signal.SIGKILL)
        assert "SIGKILL" in run.wait_for("error")["text"]
        run.next_line("ready")
        assert int(run.next_line("at")) >= reloaded_at
        assert run.stop() == 0


@pytest.mark.parametrize("kind", ["a subprocess with its own session", "a spawn pool"])
@pytest.mark.parametrize("how", ["supervisor killed", "worker killed", "reloaded", "done"])
def test_spawned_workers_leave_no_process(tmp_path: Path, how: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARKRT_START", "spawn")
    end_and_look(tmp_path, script(GRANDCHILDREN[kind]), how)
