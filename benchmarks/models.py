"""What the model benchmarks share: the models, peers that may not be installed, and the table at the end."""

import importlib.util
import statistics
import time
from collections.abc import Callable
from pathlib import Path

MODELS = Path(__file__).parent.parent / "tests" / "models"
JSON_MODEL = MODELS / "json_model.wasm"
CPU_MODEL = MODELS / "cpu_model.wasm"
SPIN_MODEL = MODELS / "spin_model.wasm"
WORK_MODEL = MODELS / "wasi_work.wasm"


def has(package: str) -> bool:
    """Tell whether a peer is installed."""
    return importlib.util.find_spec(package) is not None


def noop(request: object) -> object:
    """What the peers run: nothing, as our echo model does next to nothing."""
    return request


def burn(count: int) -> float:
    """Compute for a while in Python; for peers that need something to be stopped."""
    total = 0.0
    for number in range(count):
        total += number * 0.5
    return total


def timed(action: Callable[[], object]) -> float:
    """Return how many seconds *action* took."""
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def latencies(call: Callable[[], object], count: int) -> list[float]:
    """Return how long each of *count* calls took, in microseconds."""
    return [timed(call) * 1e6 for _ in range(count)]


def p(values: list[float], share: float) -> float:
    """Return a quantile."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def median(values: list[float]) -> float:
    """Return the median."""
    return statistics.median(values)


def table(title: str, head: list[str], rows: list[list[str]]) -> None:
    """Print a table in Markdown, columns aligned."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]

    def line(row: list[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"

    print(f"\n{title}\n")
    print(line(head))
    print("|" + "|".join("-" * (width + 2) for width in widths) + "|")
    for row in rows:
        print(line(row))
