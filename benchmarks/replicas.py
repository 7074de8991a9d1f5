"""Replicas: how soon they answer, what another one takes, and what a second one brings.

    python benchmarks/replicas.py                  about a minute and a half
    python benchmarks/replicas.py --quick          about half a minute

The peer is a ProcessPoolExecutor whose workers load the same module through wasmtime's public interface. Unless a row
says otherwise both sides find machine code that was compiled before. The two take turns.
"""

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path

import peer
from models import CPU_MODEL, JSON_MODEL, median, p, table, timed
from programs import descendants

from spark_runtime import Model, Spark

REQUEST = {"xs": [1, 2, 3]}
COUNTS = (1, 2, 4, 8)
DRAWS = 1_000_000  # of the Monte Carlo method, in one call

# Both scripts print the moments of their first answer and of one from every worker, then stay until they are let go.
OURS = """
import sys, time
from spark_runtime import Model, Spark
model, cache, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
request = {"xs": [1, 2, 3]}
with Spark([Model("model", model, replicas=count)], cache_dir=cache) as spark:
    spark.execute(request)
    print(time.monotonic_ns(), flush=True)
    while any(each.state == "starting" for each in spark.statistics().models[0].replicas):
        time.sleep(0.0005)
    for _ in range(count):
        spark.execute(request)  # each goes to the one that has been idle for longest
    print(time.monotonic_ns(), flush=True)
    sys.stdin.read()
"""
THEIRS = """
import multiprocessing, sys, time
from concurrent.futures import ProcessPoolExecutor
import peer
code, _, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
request = {"xs": [1, 2, 3]}
barrier = multiprocessing.Barrier(count)
with ProcessPoolExecutor(count, initializer=peer.load_for_all, initargs=(code, barrier)) as pool:
    pool.submit(peer.answer, request).result()
    print(time.monotonic_ns(), flush=True)
    list(pool.map(peer.answer_of_each, [request] * count))
    print(time.monotonic_ns(), flush=True)
    sys.stdin.read()
"""


class Fresh:
    """A fresh Python that runs one of the scripts."""

    def __init__(self, script: str, temporary: Path, model: Path, cache: Path, count: int) -> None:
        began = time.monotonic_ns()
        # Byte code is kept as for any user, but where nothing of it stays.
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(temporary / "bytecode")}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        self._process = subprocess.Popen(
            [sys.executable, "-c", script, str(model), str(cache), str(count)],
            cwd=Path(__file__).parent,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._process.stdout is not None
        moments = [self._process.stdout.readline() for _ in range(2)]
        if not moments[-1]:
            raise SystemExit("a measured program failed")
        self.first, self.all = ((int(each) - began) / 1e6 for each in moments)  # milliseconds

    def megabytes(self) -> float:
        """Return the proportional set size of all its processes together."""
        family = [self._process.pid, *descendants(self._process.pid)]
        return sum(map(_pss, family)) / 1024

    def end(self) -> None:
        self._process.communicate()


def _pss(pid: int) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1])
    return 0


@dataclass
class Setting:
    """Where things lie, and how often each is measured."""

    temporary: Path
    rounds: int

    def sides(self) -> list[tuple[str, Path]]:
        return [(OURS, JSON_MODEL), (THEIRS, peer.compiled(JSON_MODEL, self.temporary))]

    @property
    def cache(self) -> Path:
        return self.temporary / "cache"


Row = list[str]


def row(what: str, ours: Sequence[float], theirs: Sequence[float] | None, unit: str, peer_words: str = "") -> Row:
    """One line: medians, and how many times less ours is."""
    our_words = f"{median(list(ours)):.1f} {unit} ({p(list(ours), 0):.1f}-{p(list(ours), 1):.1f})"
    if theirs is None:
        return [what, our_words, peer_words, ""]
    their_words = f"{median(list(theirs)):.1f} {unit} ({p(list(theirs), 0):.1f}-{p(list(theirs), 1):.1f})"
    return [what, our_words, their_words, f"1/{median(list(theirs)) / median(list(ours)):.1f}"]


def starts(setting: Setting) -> list[Row]:
    """From the start of a Python to its first answer."""
    firsts: dict[tuple[str, int], list[float]] = {}
    alls: dict[tuple[str, int], list[float]] = {}
    for turn in range(setting.rounds + 1):
        for count in (1, 4):
            for script, model in setting.sides():
                fresh = Fresh(script, setting.temporary, model, setting.cache, count)
                fresh.end()
                if turn:  # the first compiles models and byte code
                    firsts.setdefault((script, count), []).append(fresh.first)
                    alls.setdefault((script, count), []).append(fresh.all)
    return [
        row("fresh Python to first answer, 1 replica", firsts[OURS, 1], firsts[THEIRS, 1], "ms"),
        row("fresh Python to first answer, 4 replicas", firsts[OURS, 4], firsts[THEIRS, 4], "ms"),
        row("fresh Python to an answer from each of 4", alls[OURS, 4], alls[THEIRS, 4], "ms"),
    ]


def cold_starts(setting: Setting) -> list[Row]:
    """The same when nothing was compiled before; the model is small, so this is the least that compiling takes."""
    times: dict[str, list[float]] = {OURS: [], THEIRS: []}
    for turn in range(max(3, setting.rounds // 2)):
        for script in times:
            fresh = Fresh(script, setting.temporary, JSON_MODEL, setting.temporary / f"cold{turn}", 1)
            fresh.end()
            times[script].append(fresh.first)
    return [row("fresh Python to first answer, compiled there and then", times[OURS], times[THEIRS], "ms")]


def one_more(setting: Setting) -> list[Row]:
    """What is added to a program that already runs."""
    code = peer.compiled(JSON_MODEL, setting.temporary)
    ours, theirs, again = [], [], []
    models = [Model(f"model{number}", JSON_MODEL, keep=True) for number in range(setting.rounds + 1)]
    with Spark(models, cache_dir=setting.cache, max_models=len(models)) as spark:
        spark.execute(REQUEST, "model0")
        for model in models[1:]:
            ours.append(timed(lambda name=model.name: spark.execute(REQUEST, name)) * 1e3)  # type: ignore[misc]
            theirs.append(timed(lambda: _once(code)) * 1e3)
        for _ in models[1:]:
            os.kill(_pid(spark, "model0"), signal.SIGKILL)
            again.append(timed(lambda: spark.execute(REQUEST, "model0")) * 1e3)
    return [
        row("one more replica in a running program, to its answer", ours, theirs, "ms"),
        row("an idle replica is killed: to the next answer", again, None, "ms", "never: BrokenProcessPool"),
    ]


def _once(code: Path) -> None:
    """As soon as the answer is there its time is over; the pool's end is not waited for."""
    pool = ProcessPoolExecutor(1, initializer=peer.load, initargs=(str(code),))
    pool.submit(peer.answer, REQUEST).result()
    pool.shutdown(wait=False)


def _pid(spark: Spark, name: str) -> int:
    pid = next(each for each in spark.statistics().models if each.name == name).replicas[0].pid
    assert pid is not None
    return pid


def memory(setting: Setting) -> list[Row]:
    """What all processes together take, by the number of replicas."""
    sizes: dict[str, list[float]] = {OURS: [], THEIRS: []}
    for count in COUNTS:
        for script, model in setting.sides():
            fresh = Fresh(script, setting.temporary, model, setting.cache, count)
            sizes[script].append(fresh.megabytes())
            fresh.end()
    slopes = {script: statistics.linear_regression(COUNTS, each).slope for script, each in sizes.items()}
    listed = {script: ", ".join(f"{each:.0f}" for each in sizes[script]) for script in sizes}
    ratio = slopes[THEIRS] / slopes[OURS]
    counts = ", ".join(map(str, COUNTS))
    return [
        [f"memory (PSS) of all processes, {counts} replicas", f"{listed[OURS]} MB", f"{listed[THEIRS]} MB", ""],
        ["memory of one more replica", f"{slopes[OURS]:.1f} MB", f"{slopes[THEIRS]:.1f} MB", f"1/{ratio:.1f}"],
    ]


def scaling(setting: Setting) -> list[Row]:
    """How many calls that compute go through, with one worker and with two."""
    calls = 12
    code = peer.compiled(CPU_MODEL, setting.temporary)
    seconds: dict[tuple[str, int], list[float]] = {}
    with ExitStack() as stack:
        sides: list[tuple[str, int, Callable[[], object]]] = []
        for count in (1, 2):
            pool = stack.enter_context(_executor(code, count))
            sides.append((THEIRS, count, lambda pool=pool: _all_theirs(pool, calls)))  # type: ignore[misc]
        for count in (1, 2):
            spark = Spark([Model("cpu", CPU_MODEL, replicas=count)], cache_dir=setting.cache)
            stack.enter_context(spark)
            sides.append((OURS, count, lambda spark=spark: _all_ours(spark, calls)))  # type: ignore[misc]
        for _, _, action in sides:
            action()
        for _ in range(setting.rounds):
            for name, count, action in sides:
                seconds.setdefault((name, count), []).append(timed(action))
    rates = {key: calls / median(each) for key, each in seconds.items()}
    factors = [rates[side, 2] / rates[side, 1] for side in (OURS, THEIRS)]
    each = [f"{rates[side, 1]:.0f} → {rates[side, 2]:.0f} calls/s" for side in (OURS, THEIRS)]
    return [
        ["calls that compute, 1 replica → 2", *each, f"{rates[OURS, 2] / rates[THEIRS, 2]:.2f} times"],
        ["times faster with the second replica", *(f"{factor:.2f}" for factor in factors), ""],
    ]


def _executor(code: Path, count: int) -> AbstractContextManager[ProcessPoolExecutor]:
    return ProcessPoolExecutor(count, initializer=peer.load, initargs=(str(code),))


def _all_ours(spark: Spark, calls: int) -> None:
    for call in [spark.submit_call("cpu", "montecarlo", DRAWS, 7 + number) for number in range(calls)]:
        call.result()


def _all_theirs(pool: ProcessPoolExecutor, calls: int) -> None:
    for call in [pool.submit(peer.call, "montecarlo", DRAWS, 7 + number) for number in range(calls)]:
        call.result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="five rounds")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="spark-bench-") as temporary:
        setting = Setting(Path(temporary), 5 if options.quick else options.rounds)
        parts = (scaling, one_more, starts, cold_starts, memory)
        rows = [line for part in parts for line in part(setting)]
    table(
        f"Replicas; median (least-most) of {setting.rounds}",
        ["what", "Spark", "ProcessPoolExecutor + wasmtime", "Spark's share"],
        rows,
    )


if __name__ == "__main__":
    main()
