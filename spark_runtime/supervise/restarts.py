"""When a script whose worker died is started again, and when it is parked."""

import random

FIRST_SECONDS = 0.1
LONGEST_SECONDS = 30.0
MOST_IN_A_ROW = 5  # six starts within a few seconds, then no more


class Restarts:
    """Counts deaths in a row. Only progress makes a row end: getting further than any worker before."""

    def __init__(self, random_fraction: "random.Random | None" = None) -> None:
        self._random = random_fraction or random.Random()  # noqa: S311 - jitter, not a secret
        self._in_a_row = 0
        self._furthest = 0

    def died(self, checkpoints: int, slack: int = 0, *, has_kept: bool = True) -> float | None:
        """A worker died after so many *checkpoints* of the run; return seconds to wait, or None to park.

        Where exactly it died is known only as of its last words, so getting *slack* further is no progress yet; nor is
        what a worker did that died before it had *kept* a snapshot, because the next one has it to do again.
        """
        if has_kept and checkpoints > self._furthest + slack:
            self._furthest = checkpoints
            self._in_a_row = 0
        self._in_a_row += 1
        if self._in_a_row > MOST_IN_A_ROW:
            return None
        delay = min(LONGEST_SECONDS, FIRST_SECONDS * 2.0 ** (self._in_a_row - 1))
        return delay * self._random.uniform(0.75, 1.25)

    def forgive(self) -> None:
        """New code, or somebody asked: begin counting anew."""
        self._in_a_row = self._furthest = 0
