"""The worker's side thread: it reads the channel and does nothing but put messages where they are waited for.

The script has the main thread. A message waits in a queue until the main thread reaches a checkpoint. Two kinds are
dealt with at once: the question where the script is, because it is asked when no checkpoint comes, and the answers of
models, because the script may be waiting for them.
"""

import os
import queue
import signal
import sys
import threading
from collections.abc import Callable

from spark_workers.channel import Channel
from spark_workers.frames import FrameBroken
from spark_workers.messages import Executed, ExecuteFailed, Here, Message, MessageBroken, Segment, Where

ORPHANED, MISLED = 70, 71  # exit codes of a worker whose channel ended, or made no sense

Arrived = tuple[Message, list[int]]


class Inbox:
    """Messages that have arrived.

    On the side thread *on_message*, when set, is called for each, and *on_answer* with each answer of a model.
    """

    def __init__(self, channel: Channel, is_own: Callable[[str], bool], knock: Callable[[], None]) -> None:
        self._channel = channel
        self._is_own = is_own
        self._knock = knock
        self._messages: queue.SimpleQueue[Arrived] = queue.SimpleQueue()
        self._segments: queue.SimpleQueue[Arrived] = queue.SimpleQueue()
        self._main = threading.main_thread().ident
        self.on_message: Callable[[], None] | None = None
        self.on_answer: Callable[[Executed | ExecuteFailed], None] | None = None

    def start(self) -> None:
        """Begin to read."""
        threading.Thread(target=self._read, name="spark-channel", daemon=True).start()

    def take(self, timeout: float | None = None) -> Arrived | None:
        """Wait for a message, *timeout* seconds at most, for ever without one."""
        try:
            return self._messages.get(timeout=timeout)
        except queue.Empty:
            return None

    def take_nowait(self) -> Arrived | None:
        """Return a message that is here, or None."""
        try:
            return self._messages.get_nowait()
        except queue.Empty:
            return None

    def segment(self) -> tuple[Segment, list[int]]:
        """Wait for the memory that was asked for."""
        message, descriptors = self._segments.get()
        assert isinstance(message, Segment)
        return message, descriptors

    def _read(self) -> None:
        # Signals are the main thread's; taken here one could raise over there in the middle of a frame.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            while True:
                message, descriptors = self._channel.receive()
                if isinstance(message, Segment):
                    self._segments.put((message, descriptors))
                elif isinstance(message, Where):
                    self._channel.send(Here(self._place()))
                elif isinstance(message, (Executed, ExecuteFailed)):
                    if self.on_answer is not None:
                        self.on_answer(message)
                else:
                    self._messages.put((message, descriptors))
                    self._knock()
                    if self.on_message is not None:
                        self.on_message()
        except (EOFError, OSError):
            os._exit(ORPHANED)  # the supervisor is gone, and the state with it: nothing is left to do here
        except (FrameBroken, MessageBroken) as problem:
            print(f"the supervisor sent what is no message: {problem}", file=sys.stderr, flush=True)
            os._exit(MISLED)

    def _place(self) -> str:
        """Where the main thread is: the innermost line of the user's code."""
        frame = sys._current_frames().get(self._main or 0)
        while frame is not None:
            if self._is_own(frame.f_code.co_filename):
                return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}()"
            frame = frame.f_back
        return ""
