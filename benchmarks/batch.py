"""Files of rows: how many go through a second, and whether memory stays flat however many there are.

    python benchmarks/batch.py                     about two minutes
    python benchmarks/batch.py --quick             to 100,000 rows
    python benchmarks/batch.py --all               the peer gets the longest file too; some minutes more

Our side is ``spark batch``: rows are checked, keyed, written in order and synced to disk in groups, so that it can go
on after a crash. The peer is the script that people write: ``ProcessPoolExecutor.map`` in chunks of 256 over the lines
of the file, wasmtime's public interface in the workers, answers written line by line. The two take turns. Memory is
the peak of the process that reads and writes; the time is that of the whole command, its start included.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import peer
from models import JSON_MODEL, table

REPLICAS = (1, 2)
COUNTS = (10_000, 100_000, 1_000_000)
LONG = 1_000_000  # this many rows only with the most replicas, and the peer only if it is asked for
LOOK_SECONDS = 0.02

THEIRS = """
import json, sys
from concurrent.futures import ProcessPoolExecutor
import peer
code, source, output, workers = sys.argv[1:]
with ProcessPoolExecutor(int(workers), initializer=peer.load, initargs=(code,)) as pool:
    with open(source) as rows, open(output, "w") as answers:
        for answer in pool.map(peer.answer, map(json.loads, rows), chunksize=256):
            answers.write(json.dumps(answer) + "\\n")
"""


@dataclass(frozen=True)
class Measured:
    """One run of a command."""

    seconds: float
    peak: int  # bytes


def run(command: Sequence[str], temporary: Path) -> Measured:
    """Run a command to its end, looking at its memory."""
    environment = {
        **os.environ,
        "PYTHONPYCACHEPREFIX": str(temporary / "bytecode"),  # byte code is kept, as for any user, but nothing stays
        "SPARKRT_CACHE_DIR": str(temporary / "cache"),
    }
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    began, peak = time.perf_counter(), 0
    with (temporary / "log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=Path(__file__).parent, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
        while True:
            peak = max(peak, _peak(process.pid))
            try:
                status = process.wait(LOOK_SECONDS)
                break
            except subprocess.TimeoutExpired:
                continue
    seconds = time.perf_counter() - began
    if status:
        raise SystemExit(f"exit code {status}:\n{(temporary / 'log').read_text()[-2000:]}")
    return Measured(seconds, peak)


def _peak(pid: int) -> int:
    """The most memory that the process has had so far; the kernel keeps count."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # it has just ended
    return 0


def write_rows(path: Path, count: int) -> None:
    with path.open("w") as file:
        file.writelines(f'{{"xs": [{number}, {number + 1}, {number + 2}]}}\n' for number in range(count))


def count_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for _ in file)


@dataclass
class Sides:
    """The two commands, and what they left to be measured."""

    temporary: Path
    code: Path

    def ours(self, source: Path, replicas: int) -> Measured:
        output = self.temporary / "ours.jsonl"
        command = [sys.executable, "-m", "spark_cli", "batch", str(JSON_MODEL), str(source), "-o", str(output)]
        return self._measured([*command, "--replicas", str(replicas)], output, source)

    def theirs(self, source: Path, workers: int) -> Measured:
        output = self.temporary / "theirs.jsonl"
        command = [sys.executable, "-c", THEIRS, str(self.code), str(source), str(output), str(workers)]
        return self._measured(command, output, source)

    def _measured(self, command: list[str], output: Path, source: Path) -> Measured:
        measured = run(command, self.temporary)
        if count_lines(output) != count_lines(source):
            raise SystemExit(f"{output.name} has not one row for each row of the input")
        output.unlink()
        return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="to 100,000 rows")
    parser.add_argument("--all", action="store_true", help="also the peer's longest run")
    options = parser.parse_args()
    counts = COUNTS[:2] if options.quick else COUNTS
    rows: list[list[str]] = []
    peaks: dict[str, list[int]] = {"ours": [], "theirs": []}
    with tempfile.TemporaryDirectory(prefix="spark-bench-") as folder:
        temporary = Path(folder)
        sides = Sides(temporary, peer.compiled(JSON_MODEL, temporary))
        source = temporary / "rows.jsonl"
        write_rows(source, 100)
        sides.ours(source, 1)  # compiles the model, and everybody's byte code
        sides.theirs(source, 1)
        for count in counts:
            write_rows(source, count)
            for replicas in REPLICAS[-1:] if count >= LONG else REPLICAS:
                theirs = sides.theirs(source, replicas) if count < LONG or options.all else None
                ours = sides.ours(source, replicas)
                rows.append(_row(count, replicas, ours, theirs))
                print(*rows[-1], sep="   ", file=sys.stderr, flush=True)
            peaks["ours"].append(ours.peak)
            if theirs is not None:
                peaks["theirs"].append(theirs.peak)
    grown = [f"{each[-1] / each[0]:.2f} times over {len(each)} sizes" for each in (peaks["theirs"], peaks["ours"])]
    rows.append([f"memory, from {counts[0]:,} rows to the most", "", "", "", "", *grown])
    head = ["rows", "replicas", "peer, rows/s", "spark batch, rows/s", "times", "peer, peak MB", "spark batch, peak MB"]
    table("Batches of rows", head, rows)


def _row(count: int, replicas: int, ours: Measured, theirs: Measured | None) -> list[str]:
    our_words = [f"{count / ours.seconds:,.0f}", f"{ours.peak / 1e6:.0f}"]
    if theirs is None:
        return [f"{count:,}", str(replicas), "", our_words[0], "", "", our_words[1]]
    times = f"{theirs.seconds / ours.seconds:.1f}"
    rate = f"{count / theirs.seconds:,.0f}"
    return [f"{count:,}", str(replicas), rate, our_words[0], times, f"{theirs.peak / 1e6:.0f}", our_words[1]]


if __name__ == "__main__":
    main()
