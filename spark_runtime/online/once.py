"""What several threads may want to do, and only one may."""

import threading


class Once:
    """Given to the first who takes it. Whoever has it may then call code of the user's without holding a lock."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def take(self) -> bool:
        """Return whether it is ours."""
        return self._lock.acquire(blocking=False)
