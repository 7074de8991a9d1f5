"""Whether a call that failed is repeated, and when. A model is a pure function, so running it twice does no harm."""

import email.utils
from dataclasses import dataclass
from datetime import UTC, datetime

from spark_runtime.errors import EndpointAnswerInvalid, EndpointUnreachable, OnlineError

REPEATED = frozenset({408, 429, 502, 503, 504})


@dataclass(frozen=True, slots=True)
class Retry:
    """Repeats with longer and longer pauses.

    Attributes:
        retries: How often, at most.
        first_seconds: The pause before the first repetition; it doubles from one to the next.
        most_seconds: The longest pause that the endpoint did not ask for.
    """

    retries: int = 2
    first_seconds: float = 0.25
    most_seconds: float = 5.0

    def pause(self, repeated: int, problem: OnlineError, chance: float) -> float | None:
        """Return the seconds to wait before the call is repeated; None if it is not.

        Args:
            repeated: How often it was already.
            problem: What it ended in.
            chance: From 0 to 1, at random: calls that failed together do not come back together.
        """
        if repeated >= self.retries or not is_repeated(problem):
            return None
        pause = min(self.first_seconds * float(2**repeated), self.most_seconds) * (0.5 + chance / 2)
        asked = problem.details.get("retry_after")
        return max(pause, float(asked)) if isinstance(asked, int | float) else pause


def is_repeated(problem: OnlineError) -> bool:
    """Tell whether the same call may well succeed a moment later."""
    if isinstance(problem, EndpointUnreachable):
        return problem.details.get("reason") != "certificate"
    return problem.status in REPEATED and not isinstance(problem, EndpointAnswerInvalid)


def read_retry_after(text: str, now: datetime | None = None) -> float | None:
    """Return the seconds that a ``Retry-After`` header asks to wait; it gives a number or a date. None if neither."""
    text = text.strip()
    if text.isdecimal() and len(text) < 10:
        return float(text)
    try:
        when = email.utils.parsedate_to_datetime(text)
    except ValueError:
        return None
    if when.tzinfo is None:
        when = when.replace(tzinfo=UTC)
    return max(0.0, (when - (now or datetime.now(UTC))).total_seconds())
