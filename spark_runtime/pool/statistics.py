"""What `Spark.statistics` tells: frozen, so that it can be kept, compared and shown."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class ReplicaStatistics:
    """One replica.

    Attributes:
        state: starting, idle, busy or spare.
        calls: Answered by this replica, those of the processes before it included.
        restarts: How often its process was replaced.
        p50, p95: Seconds in the guest, over the last 512 calls; None before the first.
        memory_bytes: What the process takes, its share of shared pages included (PSS); None where nobody tells.
    """

    number: int
    pid: int | None
    state: str
    calls: int
    restarts: int
    p50: float | None
    p95: float | None
    memory_bytes: int | None


@dataclass(frozen=True, slots=True)
class ModelStatistics:
    """One loaded model. *state*: preparing, starting or ready. *waiting* and *running* count calls."""

    name: str
    state: str
    waiting: int
    running: int
    calls: int
    failures: int
    replicas: tuple[ReplicaStatistics, ...]


@dataclass(frozen=True, slots=True)
class Statistics:
    """A moment of a `Spark`.

    Attributes:
        evictions: Models that were unloaded to make room.
        loads: Models that were loaded, in all.
        cached: Loads whose code came from the cache.
    """

    models: tuple[ModelStatistics, ...]
    waiting: int
    running: int
    calls: int
    failures: int
    evictions: int
    loads: int
    cached: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


def memory_of(pid: int | None) -> int | None:
    """Return the proportional set size of a process in bytes, or None where it cannot be read."""
    if pid is None:
        return None
    try:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            for line in file:
                if line.startswith("Pss:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass  # it has ended, or this is not Linux
    return None


def quantile(ordered: list[float], share: float) -> float | None:
    """Return the value below which *share* of the sorted values lie."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None
