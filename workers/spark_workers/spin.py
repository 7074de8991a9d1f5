"""Looking for a moment before going to sleep: being woken takes longer than a call that does little."""

import os
import select
import time

SPIN_SECONDS = 0.00005
QUICK_SECONDS = 0.0001  # a call that takes longer gains nothing worth having

_CAN_SPIN = hasattr(os, "sched_getaffinity") and len(os.sched_getaffinity(0)) > 1  # else nobody could write meanwhile


class Spin:
    """Looks at a descriptor until something can be read from it, for a short time at most."""

    def __init__(self, fd: int) -> None:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        self._poll = poll.poll

    def __call__(self) -> None:
        """Return when there is something to read, or it is time to wait for it in the kernel."""
        if not _CAN_SPIN:
            return
        poll, now = self._poll, time.perf_counter
        limit = now() + SPIN_SECONDS
        while not poll(0) and now() < limit:
            pass
