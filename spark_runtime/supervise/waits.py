"""What happens as time passes: the bell that has scripts show their values, and a word when no checkpoint comes."""

from spark_runtime.supervise.lifecycle import State
from spark_runtime.supervise.picture import Picture
from spark_runtime.supervise.stage import Stage
from spark_runtime.supervise.timers import Timers
from spark_workers.messages import Where

TICK_SECONDS = 1 / 30
WHERE_SECONDS = 10.0
ANSWER_SECONDS = 1.0

RUNNING = ("starting", "running", "pausing", "reloading", "stopping")  # the script passes checkpoints, or may


class Waits:
    """Rings for the running script, and asks where it is when it does not come to a checkpoint that is waited for."""

    def __init__(self, stage: Stage, picture: Picture) -> None:
        self._stage = stage
        self._picture = picture
        self._timers = Timers()

    def tick(self) -> None:
        """Have the running script look up, now and thirty times a second."""
        current = self._stage.current
        if current is not None and self._picture.state in RUNNING:
            current.worker.ring()
        self._timers.start("tick", TICK_SECONDS, self.tick)

    def entered(self, state: State) -> None:
        """The run has come into *state*."""
        self._timers.cancel("where")
        self._timers.cancel("answer")
        if state in ("pausing", "stopping", "reloading"):
            self._timers.start("where", WHERE_SECONDS, lambda: self._ask(state))

    def answered(self) -> None:
        """The worker has said where it is."""
        self._timers.cancel("answer")

    def close(self) -> None:
        """Time does not matter any more."""
        self._timers.close()

    def _ask(self, state: State) -> None:
        if self._stage.current is None or self._picture.state != state:
            return
        self._stage.current.worker.send(Where())
        text = f"{state}: no checkpoint comes and the script does not answer; it is stuck in native code, or frozen"
        hint = "r restarts from the last snapshot"
        self._timers.start("answer", ANSWER_SECONDS, lambda: self._picture.note(f"{text} ({hint})"))
        self._timers.start("where", 3 * WHERE_SECONDS, lambda: self._ask(state))
