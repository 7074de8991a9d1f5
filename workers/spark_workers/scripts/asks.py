"""What the supervisor has asked of the script, as flags that checkpoints act on."""

from dataclasses import dataclass, field

from spark_workers.scripts.errors import SparkCancelError, SparkControl, SparkReloadError, SparkStopError


@dataclass(slots=True)
class Asks:
    """Flags stay set until they are answered, so a swallowed signal is raised again at the next checkpoint."""

    paused: bool = False
    stop: bool = False
    leave: bool = False
    steps: int | None = None  # checkpoints left before the next pause
    cancelled: set[str] = field(default_factory=set)

    def pending(self) -> bool:
        """Tell whether checkpoints must take the slow way."""
        return self.paused or self.stop or self.leave or self.steps is not None or bool(self.cancelled)

    def take(self, what: str, count: int = 0) -> None:
        """Note one request."""
        if what == "pause":
            self.paused, self.steps = True, None
        elif what == "resume":
            self.paused, self.steps = False, None
        elif what == "step":
            self.paused, self.steps = False, count
        elif what in ("stop", "leave"):
            setattr(self, what, True)
        else:
            raise ValueError(f"a script cannot be asked to {what!r}")

    def signal(self, call: str | None) -> SparkControl | None:
        """Return what the checkpoint must raise, the most final request first; *call* is the one that is running."""
        if self.stop:
            return SparkStopError("stop was asked")
        if self.leave:
            return SparkReloadError("new code is waiting")
        if call is not None and call in self.cancelled:
            return SparkCancelError(f"call {call} was cancelled")
        return None

    def count_step(self) -> None:
        """A checkpoint is reached while stepping: pause here when enough have been passed."""
        if self.steps is not None:
            self.steps -= 1
            if self.steps <= 0:
                self.paused, self.steps = True, None
