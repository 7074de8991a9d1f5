"""`spark run` from start to end, and a save in between."""

from pathlib import Path

from harness import running, write

COUNTING = """
    RATE = 1

    def torch():
        state = spark.persist("state", lambda: {"step": 0, "seen": []})
        spark.expose(state=state)
        print("begin at", state["step"], "rate", RATE)
        while state["step"] < 1_000_000:
            spark.checkpoint()
            state["step"] += RATE
            if RATE not in state["seen"]:
                state["seen"].append(RATE)
            import time; time.sleep(0.001)
"""


def test_a_save_reloads_the_code_and_keeps_the_state(tmp_path: Path) -> None:
    with running(write(tmp_path / "train.py", COUNTING)) as run:
        run.wait_printed("begin at 0 rate 1")
        run.wait_for("values", values=lambda shown: shown.get("state", {}).get("step", 0) > 5)
        run.save(COUNTING.replace("RATE = 1", "RATE = 2"))
        run.wait_for("reload")
        run.wait_printed("rate 2")
        assert "begin at 0 rate 2" not in run.printed()
        run.wait_for("values", values=lambda shown: shown.get("state", {}).get("seen") == [1, 2])
        assert run.stop() == 0
