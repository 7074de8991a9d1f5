"""The nursery from the supervisor's side: what it imports, what it forks, what it does with the dead."""

import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from harness import children, lives, running, write

from spark_runtime.processes.nursery import LOST, Process
from spark_runtime.supervise.nurseries import Nurseries

ENTRY = "nursery_work:start"  # written by the fixture below, found through PYTHONPATH

WORK = """
    import os, signal, subprocess, sys, time

    def start(channel, bell):
        kind = os.read(channel, 100).decode()
        if kind == "exit":
            return 7
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "family":
            child = subprocess.Popen(["sleep", "600"])
            os.write(channel, str(child.pid).encode())
        if kind == "tell":
            import random
            blas = os.environ.get("OPENBLAS_NUM_THREADS", "none")
            os.write(channel, f"{blas} {len(os.listdir('/proc/self/task'))} {'numpy' in sys.modules}".encode())
        os.read(channel, 1)
        return 0
"""


class Fleet:
    """A nursery, and one worker of it at a time."""

    def __init__(self, nurseries: Nurseries) -> None:
        self.nurseries = nurseries
        self._numbers = 0

    def start(self, kind: str) -> tuple[Process, "asyncio.Future[int]", int]:
        """Start a worker that does *kind*; return it, its status to come, and our end of its channel."""
        import socket

        self._numbers += 1
        ours, theirs = socket.socketpair()
        ours.sendall(kind.encode())
        status: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        process = Process(self._numbers, status.set_result, lambda stopped: None)
        null = [os.open(os.devnull, os.O_RDWR) for _ in range(3)]
        self.nurseries.start(process, ENTRY, [theirs.detach(), *null])
        return process, status, ours.detach()


@pytest.fixture
def fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Run an asynchronous test with a nursery of its own, and end everything after it."""
    write(tmp_path / "nursery_work.py", WORK)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def run(test: Callable[[Fleet], Awaitable[None]], modules: tuple[str, ...] = ()) -> None:
        async def main() -> None:
            left_out: list[str] = []
            nurseries = Nurseries(list(modules), set(), left_out.append)
            try:
                await asyncio.wait_for(test(Fleet(nurseries)), 20)
            finally:
                await nurseries.aclose()
            assert not children(os.getpid())

        asyncio.run(main())

    return run


async def told(descriptor: int) -> str:
    """Read what a worker writes."""
    return (await asyncio.to_thread(os.read, descriptor, 1000)).decode()


def test_exit_status_and_signal_of_a_worker_are_told(fleet: Callable[..., None]) -> None:
    async def test(fleet: Fleet) -> None:
        _, status, end = fleet.start("exit")
        assert await status == 7
        _, killed, other = fleet.start("kill")
        assert await killed == -signal.SIGKILL
        os.close(end)
        os.close(other)

    fleet(test)


def test_a_dead_workers_session_is_killed_before_its_death_is_told(fleet: Callable[..., None]) -> None:
    async def test(fleet: Fleet) -> None:
        process, status, end = fleet.start("family")
        grandchild = int(await told(end))
        assert lives(grandchild)
        process.kill()
        assert await status == -signal.SIGKILL
        assert not lives(grandchild)
        os.close(end)

    fleet(test)


def test_a_killed_nursery_takes_its_workers_along_and_another_takes_over(fleet: Callable[..., None]) -> None:
    async def test(fleet: Fleet) -> None:
        process, status, end = fleet.start("family")
        grandchild = int(await told(end))
        os.kill(fleet.nurseries.pids()[0], signal.SIGKILL)
        assert await status == LOST
        _, second, other = fleet.start("exit")
        assert await second == 7
        assert not lives(grandchild)
        assert process.pid is not None
        assert not lives(process.pid)
        os.close(end)
        os.close(other)

    fleet(test)


def test_numpy_imported_ahead_starts_no_thread_and_leaves_the_environment_alone(fleet: Callable[..., None]) -> None:
    pytest.importorskip("numpy")

    async def test(fleet: Fleet) -> None:
        _, status, end = fleet.start("tell")
        assert await told(end) == f"{os.environ.get('OPENBLAS_NUM_THREADS', 'none')} 1 True"
        os.close(end)
        assert await status == 0

    fleet(test, ("numpy",))


def test_a_module_that_cannot_be_imported_is_no_trouble(fleet: Callable[..., None]) -> None:
    async def test(fleet: Fleet) -> None:
        _, status, end = fleet.start("exit")
        assert await status == 7
        os.close(end)

    fleet(test, ("no_such_module", "antigravity_of_ours"))


@pytest.mark.slow
def test_a_package_whose_forks_hang_is_left_out_from_then_on(tmp_path: Path) -> None:
    packages = tmp_path / "packages"
    packages.mkdir()
    write(
        packages / "hanging.py",
        """
        import os, threading, time

        NURSERY = "nursery" in open("/proc/self/cmdline").read()
        threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
        if NURSERY:
            os.register_at_fork(after_in_child=lambda: time.sleep(600))
    """,
    )
    for number in range(20):  # enough to be worth importing ahead
        (packages / f"filler_{number}.py").touch()
    folder = tmp_path / "project"
    folder.mkdir()
    fillers = ", ".join(f"filler_{number}" for number in range(20))
    script = write(
        folder / "train.py",
        f"""
        import time, {fillers}

        def torch():
            import hanging
            print("begin", VERSION)
            while True:
                spark.checkpoint()
                time.sleep(0.01)

        VERSION = 1
    """,
    )
    with running(script, PYTHONPATH=str(packages)) as run:
        run.wait_printed("begin 1")
        run.wait_for("note", text=lambda text: "hanging is not imported ahead" in text, seconds=30)
        run.save(script.read_text().replace("VERSION = 1", "VERSION = 2"))
        run.wait_printed("begin 2")
        assert run.stop() == 0


def test_two_fresh_workers_draw_different_random_numbers(tmp_path: Path) -> None:
    source = """
        import random

        def torch():
            print("drew", random.random())
            spark.expose(f=torch)
            spark.checkpoint()
    """
    drawn = set()
    script = write(tmp_path / "train.py", source)
    for _ in range(2):
        with running(script, "--exit") as run:
            run.wait_end()
            drawn.add(run.printed())
    assert len(drawn) == 2


@pytest.mark.skipif(sys.platform != "linux", reason="control groups are Linux'")
def test_a_worker_that_runs_out_of_memory_is_named_and_started_again(tmp_path: Path) -> None:
    group = Path(f"/sys/fs/cgroup/memory/sparkrt-{os.getpid()}")
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(256 << 20))
    except OSError as problem:
        pytest.skip(f"no control group for memory here: {problem}")
    script = write(
        tmp_path / "train.py",
        f"""
        import os, time

        def torch():
            state = spark.persist("state", lambda: {{"step": 0}})
            print("begin at", state["step"])
            for step in range(1_000_000):
                spark.checkpoint()
                state["step"] += 1
                time.sleep(0.002)
                if os.path.exists("eat"):
                    os.rename("eat", "eaten")
                    with open("{group}/cgroup.procs", "w") as file:
                        file.write(str(os.getpid()))
                    hoard = [bytearray(os.urandom(1 << 20)) for _ in range(1000)]
    """,
    )
    try:
        with running(script) as run:
            run.wait_for("snapshot")
            (tmp_path / "eat").touch()
            assert "the kernel had run out of memory" in run.wait_for("error", kind="worker")["text"]
            run.wait_for("note", text=lambda text: "from the snapshot at checkpoint" in text)
            run.wait_for("state", state="running")
            assert run.stop() == 0
    finally:
        group.rmdir()
