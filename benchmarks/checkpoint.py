"""What the runtime costs a script: checkpoints with nothing to do, loops, snapshots, and the first step after a reload.

    python benchmarks/checkpoint.py                about two minutes
    python benchmarks/checkpoint.py --quick        about one minute, with fewer repeats
    python benchmarks/checkpoint.py --no-torch

Everything is measured inside a script that ``spark run`` runs, as a script writes it: ``spark.checkpoint()``, with the
look-up of the attribute. A loop without the call is measured beside each loop with it and taken off. The yardstick is
a Python function whose body is ``pass``, called in the same process.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from programs import prepare, save, show, spark_run

Row = tuple[str, str, str, str]

# --- calls ---

CALLS = """
import json, sys
from time import perf_counter_ns as now

def nothing(): pass

def empty(n):
    for _ in range(n): pass
def function(n):
    for _ in range(n): nothing()
def checkpoint(n):
    for _ in range(n): spark.checkpoint()
def spark_range(n):
    for _ in spark.range(n): pass

def nanoseconds(*loops):
    "The median over repeats, for one call of each, less the empty loop; the loops take turns."
    times = {{each.__name__: [] for each in loops}}
    for _ in range({repeats}):
        for loop in loops:
            began = now(); empty({calls}); between = now(); loop({calls}); ended = now()
            times[loop.__name__].append((ended - between - (between - began)) / {calls})
    return {{name: sorted(each)[len(each) // 2] for name, each in times.items()}}
"""

IN_A_RUN = """
def ticks(seconds):
    "How long the calls took that were not quick, among as many as fit."
    slow, end = [], now() + seconds * 1e9
    while (began := now()) < end:
        spark.checkpoint()
        if (took := now() - began) > 10_000:
            slow.append(took)
    return sorted(slow)

def torch():
    spark.expose(numbers={"step": 1, "loss": 0.5})
    checkpoint(100_000)
    result = nanoseconds(function, checkpoint, spark_range)
    slow = ticks(3)
    result |= {"status": spark.controller.status, "ticks": len(slow) / 3, "tick": slow[len(slow) // 2]}
    print("RESULT", json.dumps(result), flush=True)
"""

AWAITED = """
async def awaited(n):
    for _ in range(n): await spark.checkpoint()
async def awaited_range(n):
    async for _ in spark.range(n): pass

async def torch():
    await awaited(100_000)
    times = {{"awaited": [], "awaited_range": []}}
    for _ in range({repeats}):
        for loop in (awaited, awaited_range):
            began = now(); empty({calls}); between = now(); await loop({calls}); ended = now()
            times[loop.__name__].append((ended - between - (between - began)) / {calls})
    result = {{name: sorted(each)[len(each) // 2] for name, each in times.items()}}
    print("RESULT", json.dumps(result | nanoseconds(function)), flush=True)
"""

WITHOUT_A_RUN = """
from spark_runtime import spark
print("RESULT", json.dumps(nanoseconds(function, checkpoint, spark_range)))
"""

# --- snapshots ---

# Every step writes into the whole state, so that a snapshot finds all of it changed.
HELD = """
from time import perf_counter
import json
import numpy as np

def torch():
    state = spark.persist("state", lambda: np.zeros({count}, np.float32))
    rows = np.array_split(state, 500)
    waited, number, began = [], 0, perf_counter()
    while perf_counter() - began < {seconds}:
        rows[number % 500] += 1
        number += 1
        before = perf_counter()
        spark.checkpoint()
        waited.append(perf_counter() - before)
        while perf_counter() - before < 0.001: pass
    ran = perf_counter() - began
    print("RESULT", json.dumps({{"ran": ran, "waited": sum(waited), "longest": max(waited)}}), flush=True)
"""

# --- the first steps after a reload ---

RESTORED = """
import torch as pt

def layers(): return pt.nn.Sequential(*[pt.nn.Linear(1024, 1024, bias=False) for _ in range({depth})])

def step(model, adam):
    began = time.perf_counter()
    model(pt.ones(8, 1024)).square().mean().backward()
    adam.step()
    adam.zero_grad()
    return time.perf_counter() - began

def torch():
    report("entered")
    model = spark.persist("model", layers)
    adam = spark.persist("adam", lambda: pt.optim.Adam(model.parameters()))
    report("restored")
    times = [step(model, adam) for _ in range(12)]
    report(f"first:{{times[0]:.5f}}:{{sorted(times[2:])[5]:.5f}}")
    report("stepped")
    try:
        while True:
            spark.checkpoint()
            time.sleep(0.001)
    finally:
        report("left")
"""


def result_of(output: str) -> dict[str, Any]:
    """Return what a script printed after RESULT."""
    found = [line for line in output.splitlines() if line.startswith("RESULT ")]
    if not found:
        raise SystemExit(f"the script gave no result:\n{output[-2000:]}")
    return json.loads(found[-1].removeprefix("RESULT "))


def run_script(folder: Path, source: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Run a script to its end under ``spark run``; return its result and the events of the run."""
    (folder / "code").mkdir(parents=True)
    script = folder / "code" / "script.py"
    script.write_text(source)
    with spark_run(folder, script, "--exit", "--no-watch") as run:
        run.process.wait(300)
        events = run.events()
    printed = "".join(each["data"] for each in events if each["event"] == "output")
    return result_of(printed), events


def measure_calls(folder: Path, repeats: int) -> list[Row]:
    head = CALLS.format(repeats=repeats, calls=1_000_000)
    sync, _ = run_script(folder / "sync", head + IN_A_RUN)
    awaited, _ = run_script(folder / "async", head + AWAITED.format(repeats=repeats, calls=1_000_000))
    plain = result_of(
        subprocess.run([sys.executable, "-c", head + WITHOUT_A_RUN], capture_output=True, text=True, check=True).stdout
    )

    def row(what: str, times: dict[str, Any], name: str, target: str) -> Row:
        return what, f"{times[name]:.0f} ns", target, f"{times[name] / times['function']:.2f}"

    return [
        row("function call, `pass`", sync, "function", ""),
        row(f"`spark.checkpoint()`, {sync['status']}", sync, "checkpoint", "≤ 150 ns"),
        row("`await spark.checkpoint()`, running", awaited, "awaited", "≤ 300 ns"),
        row("`for … in spark.range(n)`, an item", sync, "spark_range", ""),
        row("`async for … in spark.range(n)`, an item", awaited, "awaited_range", ""),
        row("`spark.checkpoint()`, plain python", plain, "checkpoint", ""),
        row("`spark.range(n)`, an item, plain python", plain, "spark_range", ""),
        (
            f"`spark.checkpoint()` over 10 µs: {sync['ticks']:.0f} a second",
            f"{sync['tick'] / 1000:.0f} µs",
            "≤ 1 % of the run",
            f"{sync['ticks'] * sync['tick'] / 1e7:.2f} %",
        ),
    ]


def measure_snapshots(folder: Path, megabytes: int, seconds: float) -> Row:
    source = HELD.format(count=int(megabytes * 1e6 / 4), seconds=seconds)
    result, events = run_script(folder / f"held {megabytes}", source)
    taken = [each["seconds"] for each in events if each["event"] == "snapshot"][:-1]  # the last is taken at the end
    # The next comes no sooner than 30 s or 50 times the cost: this is the share of a run that goes on.
    ever = max(taken, default=0.0) / max(30.0, 50 * max(taken, default=0.0))
    return (
        f"snapshots of {megabytes} MB in {result['ran']:.0f} s: {len(taken)}, held {sum(taken) * 1000:.1f} ms",
        f"{sum(taken) / result['ran']:.2%}; in a long run {ever:.2%}",
        "≤ 2 %",
        f"all checkpoints {result['waited'] / result['ran']:.2%}, longest {result['longest'] * 1000:.0f} ms",
    )


def measure_restore(folder: Path, megabytes: int, rounds: int) -> list[Row]:
    source = prepare(folder) + RESTORED.format(depth=max(1, round(megabytes / 3 / 4.2)))
    (folder / "code").mkdir()
    script = folder / "code" / "script.py"
    script.write_text(source)
    found: dict[str, list[float]] = {"handed": [], "restored": [], "first": [], "usual": []}
    with spark_run(folder, script) as run:
        run.wait_for(0, "stepped")
        for version in range(1, rounds + 1):
            run.wait_quiet()
            save(script, source.replace("VERSION = 0", f"VERSION = {version}"))
            run.wait_for(version, "stepped")
            left, entered = run.wait_for(version - 1, "left"), run.wait_for(version, "entered")
            found["handed"].append((entered - left) / 1e6)
            found["restored"].append((run.wait_for(version, "restored") - entered) / 1e6)
            _, first, usual = run.reported(version, "first").split(":")
            found["first"].append(float(first) * 1000)
            found["usual"].append(float(usual) * 1000)
        taken = [each["seconds"] * 1000 for each in run.events() if each["event"] == "snapshot"]
    middle = {name: statistics.median(values) for name, values in found.items()}
    kind = f"PyTorch, model + Adam, {megabytes} MB"
    return [
        (f"{kind}: snapshot", f"{statistics.median(taken):.0f} ms", "", f"most {max(taken):.0f} ms"),
        (
            f"{kind}: old code left to new code entered, state restored",
            f"{middle['handed']:.0f} ms",
            "",
            f"most {max(found['handed']):.0f} ms",
        ),
        (f"{kind}: its two `persist`", f"{middle['restored']:.1f} ms", "", ""),
        (
            f"{kind}: first Adam step after it",
            f"{middle['first']:.0f} ms",
            "",
            f"{middle['first'] / middle['usual']:.1f} times a usual step of {middle['usual']:.0f} ms",
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 100], metavar="MB")
    parser.add_argument("--seconds", type=float, default=20.0, help="how long a run with snapshots is")
    parser.add_argument("--no-torch", action="store_true")
    parser.add_argument("--quick", action="store_true", help="three rounds; the runs with snapshots stay 20 s long")
    options = parser.parse_args()
    rounds = 3 if options.quick else options.rounds
    with tempfile.TemporaryDirectory(prefix="spark-bench-") as temporary:
        folder = Path(temporary)
        rows = measure_calls(folder, rounds)
        rows += [measure_snapshots(folder, size, options.seconds) for size in options.sizes]
        if not options.no_torch:
            rows += measure_restore(folder / "restore", 100, rounds)
    show(
        f"What the runtime costs a script; medians of {rounds}",
        ("what", "measured", "target", "against `pass`, or as said"),
        rows,
    )


if __name__ == "__main__":
    main()
