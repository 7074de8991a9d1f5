"""The pool's own loop: one plain thread that waits on descriptors and timers.

Not asyncio's, because a hop through an event loop costs more than a whole call; it fits the same small protocol, so
channels and nurseries live on either. Callbacks run on the loop's thread, one at a time. Everything but `post` and
`close` belongs to that thread.
"""

import heapq
import itertools
import logging
import math
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

_log = logging.getLogger("spark_runtime")
_READ, _WRITE = select.POLLIN, select.POLLOUT  # the same numbers as epoll's
_GONE = select.POLLHUP | select.POLLERR
LONGEST_SECONDS = 3600.0  # the system knows no waits of months
_MANY = 64  # timers that were cancelled before they are swept out

Callback = Callable[[], None]


class Timer:
    """A callback that will run at *when*, in monotonic seconds."""

    __slots__ = ("callback", "when")

    def __init__(self, when: float, callback: Callback) -> None:
        self.when = when
        self.callback: Callback | None = callback

    def cancel(self) -> None:
        """Have it not run; what it holds is let go at once."""
        self.callback = None


class PoolLoop:
    """See the module. The thread starts with `start` and ends with `close`."""

    def __init__(self, name: str = "spark-pool") -> None:
        # Bare, because what `selectors` puts around them costs more than the system call.
        self._epoll = select.epoll() if hasattr(select, "epoll") else None
        self._poll = self._epoll or select.poll()
        self._callbacks: dict[int, dict[int, Callback]] = {}
        self._timers: list[tuple[float, int, Timer]] = []
        self._numbers = itertools.count()
        self._posted: deque[Callback] = deque()
        self._wake_read, self._wake_write = os.pipe()
        for each in (self._wake_read, self._wake_write):
            os.set_blocking(each, False)
        self._poll.register(self._wake_read, _READ)
        self._is_woken = False
        self._is_closing = False
        self._has_ended = False
        self._waking = threading.Lock()  # also taken to close the pipe: its number may be another file's then
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def is_own_thread(self) -> bool:
        """Tell whether the caller runs on the loop."""
        return threading.current_thread() is self._thread

    def post(self, callback: Callback) -> None:
        """Have *callback* run soon on the loop; any thread may call this."""
        self._posted.append(callback)
        if not self._is_woken:
            self._is_woken = True
            self._wake()

    def nudge(self) -> None:
        """Have the loop look at what was posted, even if whoever posted it was kept from waking it."""
        self._wake()

    def close(self) -> None:
        """End the thread after what was posted, and wait for it; any other thread may call this."""
        self._is_closing = True
        self._wake()
        if not self.is_own_thread():
            self._thread.join()

    def disown(self) -> None:
        """Let go of everything in a fork of this process, whose loop thread does not exist."""
        self._waking = threading.Lock()  # whoever held it does not exist either
        self._end()

    @property
    def can_mute(self) -> bool:
        """Whether other threads may use `mute`: a poll object is not to be changed while its thread waits in it."""
        return self._epoll is not None

    def mute(self, fd: int) -> None:
        """Have *fd* not looked at, while another thread reads it."""
        assert self._epoll is not None
        if not self._has_ended:
            self._epoll.unregister(fd)

    def unmute(self, fd: int) -> None:
        """Have it looked at again; what has arrived meanwhile is told."""
        assert self._epoll is not None
        if not self._has_ended:
            self._epoll.register(fd, sum(self._callbacks.get(fd, {_READ: None})))

    # --- for the loop's own thread ---

    def add_reader(self, fd: int, callback: Callable[..., Any], *args: Any) -> None:
        """Call *callback* whenever *fd* can be read."""
        self._set(fd, _READ, (lambda: callback(*args)) if args else callback)

    def remove_reader(self, fd: int) -> bool:
        """Undo it; tell whether there was anything to undo."""
        return self._unset(fd, _READ)

    def add_writer(self, fd: int, callback: Callable[..., Any], *args: Any) -> None:
        """Call *callback* whenever *fd* can be written."""
        self._set(fd, _WRITE, (lambda: callback(*args)) if args else callback)

    def remove_writer(self, fd: int) -> bool:
        """Undo it; tell whether there was anything to undo."""
        return self._unset(fd, _WRITE)

    def call_later(self, delay: float, callback: Callable[..., Any], *args: Any) -> Timer:
        """Call *callback* once, after *delay* seconds."""
        timer = Timer(time.monotonic() + delay, lambda: callback(*args))
        heapq.heappush(self._timers, (timer.when, next(self._numbers), timer))
        return timer

    # --- the thread ---

    def _run(self) -> None:
        while not (self._is_closing and not self._posted):
            for fd, mask in self._wait():
                if fd == self._wake_read:
                    os.read(self._wake_read, 4096)
                    # After reading: what is posted between the two is among what is called below. The other way
                    # round its byte is read with the others, and nobody wakes this thread any more.
                    self._is_woken = False
                    continue
                wanted = self._callbacks.get(fd, {})
                for bit in (_READ, _WRITE):
                    if mask & (bit | _GONE) and (callback := wanted.get(bit)) is not None:
                        self._call(callback)
            while self._posted:
                self._call(self._posted.popleft())
            self._call_due()
        self._end()

    def _wait(self) -> list[tuple[int, int]]:
        """Wait until something can be read or written, was posted, or is due."""
        if self._posted or self._is_closing:
            seconds = 0.0
        elif self._timers:
            seconds = min(max(0.0, self._timers[0][0] - time.monotonic()), LONGEST_SECONDS)
        else:
            return self._poll.poll()
        milliseconds = math.ceil(seconds * 1000)  # up: a timer that is woken for too early waits again
        return self._poll.poll(milliseconds / 1000 if self._epoll is not None else milliseconds)

    def _call_due(self) -> None:
        now = time.monotonic()
        while self._timers and (self._timers[0][0] <= now or self._timers[0][2].callback is None):
            callback = heapq.heappop(self._timers)[2].callback
            if callback is not None:
                self._call(callback)
        if len(self._timers) > _MANY:
            live = [each for each in self._timers if each[2].callback is not None]
            if len(live) < len(self._timers) // 2:
                heapq.heapify(live)
                self._timers = live

    def _call(self, callback: Callback) -> None:
        try:
            callback()
        except BaseException:  # noqa: BLE001
            # A fault of ours must not end the one thread that every call depends on; it is told in full.
            _log.exception("an internal error of the pool, please report it")

    def _wake(self) -> None:
        with self._waking:
            try:
                if not self._has_ended:
                    os.write(self._wake_write, b"\0")
            except BlockingIOError:
                pass  # it is full, so the loop will wake

    def _end(self) -> None:
        with self._waking:
            self._has_ended = True
            if self._epoll is not None:
                self._epoll.close()
            os.close(self._wake_read)
            os.close(self._wake_write)

    def _set(self, fd: int, bit: int, callback: Callback) -> None:
        wanted = self._callbacks.setdefault(fd, {})
        was_known = bool(wanted)
        wanted[bit] = callback
        mask = sum(wanted)
        if was_known:
            self._poll.modify(fd, mask)
        else:
            self._poll.register(fd, mask)

    def _unset(self, fd: int, bit: int) -> bool:
        wanted = self._callbacks.get(fd)
        if wanted is None or wanted.pop(bit, None) is None:
            return False
        if wanted:
            self._poll.modify(fd, sum(wanted))
        else:
            del self._callbacks[fd]
            self._poll.unregister(fd)
        return True
