"""Calls that would never end: how soon a cancelled one has left its replica free again, and how exact a time limit is.

    python benchmarks/cancel.py                    about a minute and a half
    python benchmarks/cancel.py --quick            about half a minute

Everybody has one worker, and a call that spins keeps it busy. *Back in service* is from ``cancel()`` to the answer of
a call made right after it. The peers spin in Python, ours in the guest. The sides take turns.
"""

import argparse
import os
import select
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from models import SPIN_MODEL, burn, has, noop, p, table, timed

from spark_runtime import Model, Spark
from spark_runtime.errors import ExecuteTimeout

LIMIT_SECONDS = 0.5
BUSY_SECONDS = 0.002  # for which a call has been running when it is cancelled
LONG = 3_000_000  # numbers for `burn`: a fraction of a second


def spin() -> None:
    """Never end."""
    while True:
        pass


@dataclass
class Side:
    """One contender, with one worker."""

    name: str
    begin: Callable[[], Future[Any]]
    next_call: Callable[[], object]
    settle: Callable[[], object]
    pid: Callable[[], int] | None = None
    seconds: list[float] = field(default_factory=list)
    ended: list[float] = field(default_factory=list)

    def cancel(self, *, for_end: bool) -> None:
        """Cancel a call that spins; note when the next one was answered or, with *for_end*, when its process ended."""
        self.settle()
        pidfd = os.pidfd_open(self.pid()) if for_end and self.pid else None
        call = self.begin()
        while not call.running():
            time.sleep(0.0002)
        time.sleep(BUSY_SECONDS)
        began = time.perf_counter()
        call.cancel()
        if pidfd is not None:
            select.select([pidfd], [], [])
            self.ended.append((time.perf_counter() - began) * 1e3)
            os.close(pidfd)
        self.next_call()
        if pidfd is None:
            self.seconds.append((time.perf_counter() - began) * 1e3)


@contextmanager
def ours(name: str, cache: Path, interrupt: str = "kill", wants_spare: bool = True) -> Iterator[Side]:
    """A `Spark` with one replica. With *wants_spare* each round begins when the spare stands by."""
    with Spark([Model("spin", SPIN_MODEL, interrupt=interrupt)], cache_dir=cache) as spark:

        def settle() -> None:
            while wants_spare and not any(each.state == "spare" for each in spark.statistics().models[0].replicas):
                time.sleep(0.001)

        def pid() -> int:
            found = spark.statistics().models[0].replicas[0].pid
            assert found is not None
            return found

        def next_call() -> object:
            return spark.call("spin", "spin_bounded", 1)

        next_call()
        side = Side(name, lambda: spark.submit_call("spin", "spin"), next_call, settle, pid)
        if wants_spare:  # the first cancel is what asks for one
            call = side.begin()
            call.cancel()
        yield side


@contextmanager
def pebble_pool() -> Iterator[Side]:
    from pebble import ProcessPool

    with ProcessPool(max_workers=1) as pool:

        def next_call() -> object:
            return pool.submit(noop, None, 1).result()

        next_call()
        yield Side("pebble.ProcessPool", lambda: pool.submit(spin, None), next_call, lambda: None)


def first_cancel(cache: Path, rounds: int) -> Side:
    """Cancel the first call of a `Spark`: nothing stands by yet. Each time another one."""
    seconds: list[float] = []
    for _ in range(rounds):
        with ours("Spark, first cancel: no spare yet", cache, wants_spare=False) as side:
            side.cancel(for_end=False)
        seconds += side.seconds
    side.seconds = seconds
    return side


def executor_cancels() -> bool:
    """Tell whether a ProcessPoolExecutor stops a call that runs."""
    with ProcessPoolExecutor(1) as pool:
        call = pool.submit(burn, LONG)
        while not call.running():
            time.sleep(0.001)
        return call.cancel()


def time_limits(cache: Path, rounds: int) -> list[list[str]]:
    """How long after it was made a call with a limit fails."""
    errors: dict[str, list[float]] = {}
    with ExitStack() as stack:
        sides: dict[str, Callable[[], object]] = {}
        for interrupt in ("kill", "epoch"):
            spark = stack.enter_context(Spark([Model("spin", SPIN_MODEL, interrupt=interrupt)], cache_dir=cache))
            spark.call("spin", "spin_bounded", 1)
            sides[f"Spark, interrupt={interrupt!r}"] = lambda spark=spark: spark.call(  # type: ignore[misc]
                "spin", "spin", timeout=LIMIT_SECONDS
            )
        if has("pebble"):
            from pebble import ProcessPool

            pool = stack.enter_context(ProcessPool(max_workers=1))
            pool.submit(noop, None, 1).result()
            sides["pebble.ProcessPool"] = lambda: pool.submit(spin, LIMIT_SECONDS).result()
        for _ in range(rounds):
            for name, call in sides.items():
                errors.setdefault(name, []).append(timed(lambda call=call: _until_late(call)) * 1e3)  # type: ignore[misc]
    return [[name, *(f"{p(each, share):.1f}" for share in (0.5, 0.99))] for name, each in errors.items()]


def _until_late(call: Callable[[], object]) -> None:
    try:
        call()
    except (ExecuteTimeout, FutureTimeout):
        return
    raise SystemExit("a call that spins has come to an end")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cancels", type=int, default=200)
    parser.add_argument("--limits", type=int, default=20, help="calls that run into their time limit")
    parser.add_argument("--quick", action="store_true", help="50 cancels, 5 limits")
    options = parser.parse_args()
    cancels, limits = (50, 5) if options.quick else (options.cancels, options.limits)
    with tempfile.TemporaryDirectory(prefix="spark-bench-") as temporary:
        cache = Path(temporary)
        sides = [first_cancel(cache, max(10, cancels // 5))]
        with ExitStack() as stack:
            each = [
                stack.enter_context(ours("Spark, later: with the spare", cache)),
                stack.enter_context(ours("Spark, interrupt='epoch'", cache, interrupt="epoch", wants_spare=False)),
            ]
            if has("pebble"):
                each.append(stack.enter_context(pebble_pool()))
            for number in range(cancels):
                for side in each:
                    side.cancel(for_end=False)
                if number % 2:
                    each[0].cancel(for_end=True)
            sides += each
        late = time_limits(cache, limits)
    peer = next((side for side in sides if side.name.startswith("pebble")), None)
    rows = [
        [
            side.name,
            str(len(side.seconds)),
            f"{p(side.seconds, 0.5):.1f}",
            f"{p(side.seconds, 0.99):.1f}",
            f"{p(side.ended, 0.5):.1f}" if side.ended else "",
            f"1/{p(peer.seconds, 0.5) / p(side.seconds, 0.5):.1f}" if peer else "",
        ]
        for side in sides
    ]
    assert not executor_cancels()
    rows.append(["ProcessPoolExecutor", "1", "never", "never", "", ""])
    head = ["one worker, its call spins", "cancels", "back in service, p50 ms", "p99 ms", "process gone, p50 ms"]
    table("cancel()", [*head, "of pebble"], rows)
    table(f"A limit of {LIMIT_SECONDS * 1e3:.0f} ms", ["a call that spins", "fails after, p50 ms", "p99 ms"], late)


if __name__ == "__main__":
    main()
