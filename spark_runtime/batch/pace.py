"""How many rows may be out at once, and when to think that over.

Too few and the replicas wait for rows; too many and a stop, which finishes what is out, takes long, and memory fills.
About two seconds' worth is right for both, and how much that is only the answers tell. So a batch runs in *segments*:
a segment gives rows with one window, lets all of them come back, and the rate of its answers sets the next window.
Coming to rest costs a round trip, and segments become longer, so it does not matter.
"""

import time
from collections.abc import Callable

LEAD_SECONDS = 2.0
MOST = 4096
GROWTH = 16  # at most, from one segment to the next: the first rows may be unlike the others
ROUNDS = 16  # a segment has at least so many windows of rows, or slow rows would come to rest all the time
FIRST_SECONDS = 0.05
LAST_SECONDS = 5.0


class Pace:
    """Chooses the window from the answers of the segment before."""

    def __init__(self, replicas: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.window = replicas
        self._least = replicas
        self._clock = clock
        self._seconds = FIRST_SECONDS
        self._begin()

    def given(self) -> None:
        """A row has been given out."""
        self._given += 1

    def answered(self) -> None:
        """A row has come back."""
        self._answered += 1
        if self._answered == 1:  # from here on: before it the model may have been loaded
            self._started = self._clock()

    def is_over(self) -> bool:
        """Tell whether the segment has been long enough."""
        return (
            self._answered > 1
            and self._given >= ROUNDS * self.window
            and self._clock() - self._started >= self._seconds
        )

    def end(self) -> None:
        """The segment is over and everything has come back."""
        if self._answered > ROUNDS:
            rate = (self._answered - 1) / max(self._clock() - self._started, 1e-6)
            wanted = min(int(rate * LEAD_SECONDS), self.window * GROWTH, MOST)
            self.window = max(wanted, self._least)
            self._seconds = min(self._seconds * 4, LAST_SECONDS)
        self._begin()

    def _begin(self) -> None:
        self._given = self._answered = 0
        self._started = 0.0
