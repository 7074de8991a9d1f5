"""From the save of a script to the first step of the new code: ``spark run`` against a restart by watchfiles.

    python benchmarks/reload.py                    all sizes, with and without PyTorch; about fifteen minutes
    python benchmarks/reload.py --quick            0 and 100 MB, three rounds; about two minutes

Both sides run the same model at the same time and are saved in turn. Each version of the script reports two moments:
when it is about to make its first step with the state of the version before, and when that step is done. Then it idles
at cheap steps of 1 ms until the next save, so neither side's save has to wait for a long step to end. The step changes
the whole state: no side gets away with not keeping it.
"""

import argparse
import math
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from programs import Program, prepare, running, save, show, spark_run, spread

MOMENTS = ("checkpoint", "step")
SETTLE_SECONDS = 1.0

# --- the state and its step, the same for both sides ---

PLAIN = """
def fresh(): return {"step": 0}
def step(state): state["step"] += 1
"""
NUMPY = """
import numpy as np
def fresh(): return np.zeros({count}, np.float32)
def step(state): np.add(state, 1, out=state)
"""
PYTORCH = """
import torch as pt
def layers(): return pt.nn.Sequential(*[pt.nn.Linear({width}, {width}, bias=False) for _ in range({depth})])
def step(model, adam):
    model(pt.ones(8, {width})).square().mean().backward()
    adam.step()
    adam.zero_grad()
"""

# --- our side ---

SPARK = """
def torch():
    state = spark.persist("state", fresh)
    spark.checkpoint()
    report("checkpoint")
    step(state)
    report("step")
    while True:
        spark.checkpoint()
        time.sleep(0.001)
"""
SPARK_PYTORCH = """
def torch():
    model = spark.persist("model", layers)
    adam = spark.persist("adam", lambda: pt.optim.Adam(model.parameters()))
    spark.checkpoint()
    report("checkpoint")
    step(model, adam)
    report("step")
    while True:
        spark.checkpoint()
        time.sleep(0.001)
"""

# --- the peer's side: it saves when watchfiles sends SIGINT, then leaves at once, without the interpreter's own end ---

PEER_LOOP = """
try:
    report("checkpoint")
    step({state})
    report("step")
    while True:
        time.sleep(0.001)
except KeyboardInterrupt:
    {save}
    os.replace({file!r} + ".new", {file!r})
    os._exit(0)
"""
PEER_PLAIN = """
import pickle
state = pickle.load(open({file!r}, "rb")) if os.path.exists({file!r}) else fresh()
"""
PEER_NUMPY = """
state = np.load({file!r}, mmap_mode="c") if os.path.exists({file!r}) else fresh()
"""
PEER_PYTORCH = """
if os.path.exists({file!r}):
    saved = pt.load({file!r}, mmap=True, weights_only=True)
    with pt.device("meta"):
        model = layers()
    model.load_state_dict(saved["model"], assign=True)
    adam = pt.optim.Adam(model.parameters())
    adam.load_state_dict(saved["adam"])
else:
    model = layers()
    adam = pt.optim.Adam(model.parameters())
"""
SAVE_PLAIN = 'with open({file!r} + ".new", "wb") as file: pickle.dump(state, file)'
SAVE_NUMPY = 'with open({file!r} + ".new", "wb") as file: np.save(file, state)'
SAVE_PYTORCH = 'pt.save({{"model": model.state_dict(), "adam": adam.state_dict()}}, {file!r} + ".new")'

# watchfiles' own loop, as quick as it can be told to be; by default it waits for 50 ms without a further change.
PEER = """
import sys
from watchfiles import run_process
quick = {"step": 1, "debounce": 20} if sys.argv[3] == "quick" else {}
command = f"{sys.executable} {sys.argv[2]}"
run_process(sys.argv[1], target=command, target_type="command", sigint_timeout=120, **quick)
"""


@dataclass(frozen=True)
class Case:
    """One size of state, with PyTorch or without."""

    megabytes: int
    pytorch: bool

    def scripts(self, state_file: str) -> tuple[str, str]:
        """Return our script and the peer's."""
        if self.pytorch:
            # A third is the model, two thirds are Adam's moments; about ten layers.
            numbers = max(16, self.megabytes * 1e6 / 3 / 4)
            width = 2 ** round(math.log2(max(4.0, math.sqrt(numbers / 10))))
            state = PYTORCH.format(width=width, depth=max(1, round(numbers / width**2)))
            ours, load, names, store = SPARK_PYTORCH, PEER_PYTORCH, "model, adam", SAVE_PYTORCH
        elif self.megabytes:
            state = NUMPY.format(count=int(self.megabytes * 1e6 / 4))
            ours, load, names, store = SPARK, PEER_NUMPY, "state", SAVE_NUMPY
        else:
            state, ours, load, names, store = PLAIN, SPARK, PEER_PLAIN, "state", SAVE_PLAIN
        loop = PEER_LOOP.format(state=names, save=store.format(file=state_file), file=state_file)
        return state + ours, state + load.format(file=state_file) + loop

    def name(self) -> str:
        kind = "PyTorch, model + Adam" if self.pytorch else "NumPy" if self.megabytes else "plain Python"
        return f"{kind}, {self.megabytes} MB"


Times = dict[str, list[float]]


def measure(case: Case, rounds: int, temporary: Path, settings: str) -> tuple[Times, Times]:
    """Return our seconds and the peer's, from each save to each moment."""
    our_folder, their_folder = temporary / "spark", temporary / "peer"
    our_head, their_head = prepare(our_folder), prepare(their_folder)
    ours, theirs = case.scripts(str(temporary / "state"))
    (our_folder / "code").mkdir()
    (their_folder / "code").mkdir()
    sides = (
        (our_folder / "code" / "train.py", our_head + ours),
        (their_folder / "code" / "train.py", their_head + theirs),
    )
    for script, source in sides:
        script.write_text(source)
    peer = [sys.executable, "-c", PEER, str(sides[1][0].parent), str(sides[1][0]), settings]
    times: tuple[Times, Times] = ({each: [] for each in MOMENTS}, {each: [] for each in MOMENTS})
    with spark_run(our_folder, sides[0][0]) as spark, running(their_folder, peer) as watchfiles:
        programs = (spark, watchfiles)
        for program in programs:
            program.wait_for(0, "step")
        settle(programs)
        for version in range(1, rounds + 1):
            for side in (0, 1) if version % 2 else (1, 0):  # in turn, and each first as often as the other
                script, source = sides[side]
                saved = save(script, source.replace("VERSION = 0", f"VERSION = {version}"))
                for moment in MOMENTS:
                    times[side][moment].append(_since(saved, programs[side], version, moment))
                settle(programs)
    return times


def settle(programs: tuple[Program, ...]) -> None:
    """Let a user's second pass, and whatever a reload leaves to be done after it."""
    time.sleep(SETTLE_SECONDS)
    for program in programs:
        program.wait_quiet()


def _since(saved: int, program: Program, version: int, moment: str) -> float:
    return (program.wait_for(version, moment) - saved) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sizes", type=int, nargs="+", default=[0, 10, 100, 1000], metavar="MB")
    parser.add_argument("--no-torch", action="store_true", help="only without PyTorch")
    parser.add_argument("--torch-only", action="store_true", help="only with PyTorch")
    parser.add_argument("--quick", action="store_true", help="three rounds of 0 and 100 MB")
    parser.add_argument("--peer", choices=("quick", "default"), default="quick", help="watchfiles' step and debounce")
    options = parser.parse_args()
    rounds, sizes = (3, [0, 100]) if options.quick else (options.rounds, options.sizes)
    kinds = [False, True][options.torch_only : 1 if options.no_torch else 2]
    rows = []
    for case in [Case(size, pytorch) for pytorch in kinds for size in sizes]:
        with tempfile.TemporaryDirectory(prefix="spark-bench-") as temporary:
            ours, theirs = measure(case, rounds, Path(temporary), options.peer)
        for moment, text in zip(MOMENTS, ("about to step", "step done"), strict=True):
            ratio = statistics.median(theirs[moment]) / statistics.median(ours[moment])
            row = (case.name(), text, spread(theirs[moment]), spread(ours[moment]), f"{ratio:.1f}")
            rows.append(row)
            print(*row, sep="   ", file=sys.stderr, flush=True)
    show(
        f"Seconds from the save to the first step of the new code; median (least-most) of {rounds}",
        ("state", "moment", f"watchfiles, {options.peer} settings", "spark run", "times faster"),
        rows,
    )


if __name__ == "__main__":
    main()
