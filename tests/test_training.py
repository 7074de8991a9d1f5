"""PyTorch training that is edited, killed and resumed ends with the very numbers of a run that was left alone."""

import importlib.util
import json
import os
import signal
import time
from pathlib import Path

import pytest
from harness import SECONDS, RunProcess, running, spark, wait_gone, write

pytestmark = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="PyTorch is not installed")

TRAINING = """
    import hashlib
    import os
    import time

    import torch as pt
    from torch import nn

    pt.set_num_threads(1)
    EDIT = 0


    def digest(values):
        return hashlib.sha256(b"".join(v.detach().numpy().tobytes() for v in values)).hexdigest()[:16]


    def fresh_model():
        return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Dropout(0.1), nn.Linear(32, 4))


    def gate(step):
        # Wait where the test wants to do something, so that chance decides nothing.
        while step in (60, 120, 180) and not os.path.exists(f"go-{step}"):
            time.sleep(0.005)


    def torch():
        pt.manual_seed(1) if not spark.has_persisted("model") else None
        model = spark.persist("model", fresh_model)
        optimizer = spark.persist("optimizer", lambda: pt.optim.Adam(model.parameters(), lr=1e-2))
        schedule = spark.persist("schedule", lambda: pt.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 0.999**n))
        state = spark.persist("state", lambda: {"step": 0, "loss": 0.0, "edits": []})
        spark.expose(state=state)
        assert optimizer.param_groups[0]["params"][0] is model[0].weight
        while state["step"] < 240:
            gate(state["step"])
            spark.checkpoint()
            x = pt.randn(8, 16)
            loss = (model(x) - x[:, :4]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            state["step"] += 1
            state["loss"] = loss.item()
            if EDIT not in state["edits"]:
                state["edits"].append(EDIT)
        moments = [t for s in optimizer.state.values() for t in (s["exp_avg"], s["exp_avg_sq"])]
        print("edits", state["edits"])
        print("END", state["step"], state["loss"], digest(model.parameters()), digest(moments), schedule.get_last_lr())
"""


def _end_of(text: str) -> str:
    return next(line for line in text.splitlines() if line.startswith("END"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The last line of a run that nobody touched."""
    folder = tmp_path_factory.mktemp("undisturbed")
    for step in GATES:
        _open(folder, step)
    done = spark("run", str(write(folder / "train.py", TRAINING)), "--no-watch", cwd=folder)
    assert done.returncode == 0, done.stderr
    return _end_of(done.stdout)


GATES = (60, 120, 180)


def _open(folder: Path, step: int) -> None:
    (folder / f"go-{step}").touch()


def _edit(run: RunProcess, source: str, gate: int) -> None:
    """Save *source* while the script waits at *gate*, and let it go on when the new code is ready."""
    run.save(source)
    run.wait_for("state", state="reloading")
    _open(run.script.parent, gate)
    run.wait_for("reload")


def _wait_until_on_disk(folder: Path, checkpoints: int) -> None:
    """Wait until a snapshot of so many checkpoints is on disk."""
    limit = time.monotonic() + SECONDS
    (record,) = folder.glob(".spark/train.py/runs/*/run.json")
    while json.loads(record.read_text())["step"] < checkpoints:
        assert time.monotonic() < limit, record.read_text()
        time.sleep(0.01)


def test_edits_that_change_nothing_leave_every_number_as_it_was(tmp_path: Path, undisturbed: str) -> None:
    with running(write(tmp_path / "train.py", TRAINING)) as run:
        run.wait_for("exposed")  # the first checkpoint is passed
        for edit, gate in enumerate(GATES, 1):
            _edit(run, TRAINING.replace("EDIT = 0", f"EDIT = {edit}"), gate)
        assert run.wait_end() == 0
        assert "edits [0, 1, 2, 3]" in run.printed()
        assert _end_of(run.printed()) == undisturbed


def test_a_killed_worker_goes_on_from_its_snapshot_to_the_same_numbers(tmp_path: Path, undisturbed: str) -> None:
    with running(write(tmp_path / "train.py", TRAINING)) as run:
        run.wait_for("exposed")  # the first checkpoint is passed
        _edit(run, TRAINING.replace("EDIT = 0", "EDIT = 1"), 60)  # a snapshot, and a second worker
        (worker,) = run.workers()
        os.kill(worker, signal.SIGKILL)
        assert "SIGKILL" in run.wait_for("error", kind="worker")["text"]
        _open(tmp_path, 120)
        _open(tmp_path, 180)
        assert run.wait_end() == 0
        assert _end_of(run.printed()) == undisturbed


def test_a_run_whose_every_process_was_killed_resumes_to_the_same_numbers(tmp_path: Path, undisturbed: str) -> None:
    script = write(tmp_path / "train.py", TRAINING)
    with running(script) as run:
        run.wait_for("exposed")  # the first checkpoint is passed
        _edit(run, TRAINING.replace("EDIT = 0", "EDIT = 1"), 60)
        _edit(run, TRAINING.replace("EDIT = 0", "EDIT = 2"), 120)
        _wait_until_on_disk(tmp_path, 62)
        family = [run.process.pid, *run.nurseries(), *run.workers()]
        for pid in family:
            os.kill(pid, signal.SIGKILL)
        wait_gone(family)
    _open(tmp_path, 180)
    with running(script, "--resume") as run:
        assert run.wait_end() == 0
        assert _end_of(run.printed()) == undisturbed


def test_an_edited_learning_rate_holds_from_the_next_step_on(tmp_path: Path) -> None:
    edited = TRAINING.replace("lr=1e-2", "lr=0.0").replace(
        'state = spark.persist("state"', 'optimizer.param_groups[0]["lr"] = 0.0; state = spark.persist("state"'
    )
    edited = edited.replace("schedule.step()", "print('WEIGHTS', digest(model.parameters()))")
    with running(write(tmp_path / "train.py", TRAINING)) as run:
        run.wait_for("exposed")  # the first checkpoint is passed
        _edit(run, edited, 60)
        _open(tmp_path, 120)
        _open(tmp_path, 180)
        assert run.wait_end() == 0
        weights = {line for line in run.printed().splitlines() if line.startswith("WEIGHTS")}
        assert len(weights) == 1, "with a learning rate of nothing the weights stay as they were trained"
