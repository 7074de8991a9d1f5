"""A call that does nothing: how long one takes, and how many a second go through, against what people use today.

    python benchmarks/dispatch.py [--calls 2000] [--rounds 5]

Each side gets its turn in every round; the table has the medians over all rounds. Ours sends the request as JSON to a
WASM model that sends it back; the peers pickle it to a Python function that returns it.
"""

import argparse
import concurrent.futures
import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from models import JSON_MODEL, has, latencies, median, noop, p, table, timed

from spark_runtime import Model, Spark

REQUEST = {"xs": [1, 2, 3]}


@dataclass
class Side:
    """One contender: *call* makes one call and waits, *many* makes a number of calls and waits for all."""

    name: str
    call: Callable[[], object]
    many: Callable[[int], object]
    micros: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)


@contextmanager
def ours() -> Iterator[list[Side]]:
    with Spark([Model("echo", JSON_MODEL, entry="echo")]) as spark:

        def many(count: int) -> None:
            for call in [spark.submit(REQUEST, "echo") for _ in range(count)]:
                call.result()

        def mapped(count: int) -> None:
            for _ in spark.map("echo", (REQUEST for _ in range(count))):
                pass

        yield [
            Side("spark execute / submit", lambda: spark.execute(REQUEST, "echo"), many),
            Side("spark map", lambda: next(spark.map("echo", [REQUEST])), mapped),
        ]


@contextmanager
def executor(name: str, pool: concurrent.futures.Executor) -> Iterator[list[Side]]:
    def many(count: int) -> None:
        for call in [pool.submit(noop, REQUEST) for _ in range(count)]:
            call.result()

    with pool:
        yield [Side(name, lambda: pool.submit(noop, REQUEST).result(), many)]


@contextmanager
def multiprocessing_pool() -> Iterator[list[Side]]:
    with multiprocessing.Pool(1) as pool:

        def many(count: int) -> None:
            for call in [pool.apply_async(noop, (REQUEST,)) for _ in range(count)]:
                call.get()

        yield [Side("multiprocessing.Pool", lambda: pool.apply(noop, (REQUEST,)), many)]


@contextmanager
def pebble_pool() -> Iterator[list[Side]]:
    from pebble import ProcessPool

    with ProcessPool(max_workers=1) as pool:

        def many(count: int) -> None:
            for call in [pool.submit(noop, None, REQUEST) for _ in range(count)]:
                call.result()

        yield [Side("pebble", lambda: pool.submit(noop, None, REQUEST).result(), many)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    with ExitStack() as stack:
        process_pool = concurrent.futures.ProcessPoolExecutor(1)
        sides = stack.enter_context(executor("ProcessPoolExecutor", process_pool))
        sides += stack.enter_context(multiprocessing_pool())
        if has("loky"):
            from loky import ProcessPoolExecutor as Loky

            sides += stack.enter_context(executor("loky", Loky(1)))
        if has("pebble"):
            sides += stack.enter_context(pebble_pool())
        sides += stack.enter_context(ours())
        for side in sides:
            side.many(200)
        for _ in range(given.rounds):
            for side in sides:
                side.micros += latencies(side.call, given.calls)
            for side in sides:
                side.rates.append(given.calls / timed(lambda side=side: side.many(given.calls)))  # type: ignore[misc]
        peer = sides[0]
        rows = [
            [
                side.name,
                f"{p(side.micros, 0.5):.0f}",
                f"{p(side.micros, 0.99):.0f}",
                f"1/{p(peer.micros, 0.5) / p(side.micros, 0.5):.1f}",
                f"{median(side.rates) / 1000:.1f}",
                f"{median(side.rates) / median(peer.rates):.1f}",
            ]
            for side in sides
        ]
    head = ["one worker", "one call, p50 µs", "p99 µs", f"of {peer.name}", "pipelined, 1000/s", f"times {peer.name}"]
    table("A call that does nothing", head, rows)


if __name__ == "__main__":
    main()
