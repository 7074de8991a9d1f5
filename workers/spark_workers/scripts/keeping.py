"""When the persisted values are handed to the supervisor, and what becomes of those that cannot be."""

import time
from collections.abc import Callable
from typing import Any

from spark_workers.messages import Message, Start, Unread
from spark_workers.scripts import randomness
from spark_workers.scripts.exposed import ExposedNames
from spark_workers.scripts.inbox import Inbox
from spark_workers.scripts.loops import Loops
from spark_workers.scripts.persist import Persisted
from spark_workers.scripts.snapshots import COST_FACTOR, RUNTIME, USUAL_SECONDS, Schedule, SnapshotRefused, Snapshots

_UNKNOWN = object()


class Keeper:
    """Takes snapshots of the script's values together with the runtime's own: loops, controls, random generators."""

    def __init__(
        self,
        persisted: Persisted,
        loops: Loops,
        exposed: ExposedNames,
        inbox: Inbox,
        send: Callable[[Message], None],
        note: Callable[..., None],
    ) -> None:
        self._persisted = persisted
        self._loops = loops
        self._exposed = exposed
        self._send = send
        self._note = note
        self._snapshots = Snapshots(send, inbox.segment)
        self._schedule = Schedule()
        self._dropped: dict[str, object] = {}  # keys that could not be kept, with the value they had then
        self._taken = 0.0
        self._cost = 0.0

    def begin(self) -> None:
        """The script runs from now on."""
        self._schedule.begin(self._persisted.content)

    def is_due(self) -> bool:
        """Tell whether a snapshot should be taken at this checkpoint."""
        return self._schedule.is_due()

    def can_afford(self) -> bool:
        """Tell whether another one now would stay within a snapshot's share of the script's time."""
        return time.monotonic() - self._taken >= COST_FACTOR * self._cost

    def restore(self, start: Start, descriptors: list[int]) -> int:
        """Put back what the snapshot in *start* holds; return how many checkpoints the run had passed."""
        load = self._snapshots.restore(start, descriptors)
        runtime: Any = load.values.pop(RUNTIME, {})
        unread = self._persisted.restore(load, runtime.get("versions", {}))
        positions = runtime.get("loops", {})
        self._loops.restore(positions, with_calls=not start.is_first)
        self._exposed.turned.update(runtime.get("turned", {}))
        if unread:
            self._send(Unread(unread))
        if "random" in runtime:
            randomness.restore(runtime["random"])
        return int(start.meta.get("checkpoints", 0))

    def take(self, checkpoints: int, *, last: bool = False) -> bool:
        """Hand the values to the supervisor; tell whether it had room for them.

        Args:
            checkpoints: How many the run has passed.
            last: Try those values again that could not be kept before.
        """
        began = time.monotonic()
        runtime = {
            "versions": self._persisted.versions,
            "loops": self._loops.positions,
            "turned": self._exposed.turned,
            "random": randomness.capture(),
        }
        values = self._persisted.content() if last else self._keepable()
        try:
            dropped = self._snapshots.take({**values, RUNTIME: runtime}, {"checkpoints": checkpoints})
        except SnapshotRefused as problem:
            self._note(f"{problem}; the state from before is kept", "warning")
            return False
        self._taken = time.monotonic()
        self._cost = self._taken - began
        self._tell_interval()
        for each in dropped:
            if each.key not in self._dropped:
                text = f"{each.path} is not kept over a reload ({each.reason}): its initializer makes it anew"
                self._note(text, "warning")
            self._dropped[each.key] = self._persisted.content().get(each.key)
        return True

    def _tell_interval(self) -> None:
        before = self._schedule.interval
        self._schedule.taken(self._cost)
        interval = self._schedule.interval
        if interval > max(before, 2 * USUAL_SECONDS):
            self._note(f"a snapshot holds the script for {self._cost:.1f} s, so one is taken every {interval:.0f} s")

    def _keepable(self) -> dict[str, Any]:
        """The values less those that could not be kept the last time: finding that out takes a while."""
        content = self._persisted.content()
        return {key: value for key, value in content.items() if self._dropped.get(key, _UNKNOWN) is not value}
