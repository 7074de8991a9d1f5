"""The supervisor's end of a channel, on a loop. Nothing here blocks."""

import os
import socket
from collections import deque
from collections.abc import Callable, Sequence

from spark_runtime.processes.loop import Loop
from spark_workers.channel import receive, send_with_descriptors
from spark_workers.frames import FrameBroken, FrameDecoder, encode_frame
from spark_workers.messages import Message, MessageBroken, decode, encode

OnMessage = Callable[[Message, list[int]], None]
OnClosed = Callable[[str], None]


class LoopChannel:
    """Messages over one socket. *on_closed* is called once, with the reason; empty when the other side just ended."""

    def __init__(self, loop: Loop, end: socket.socket, on_message: OnMessage, on_closed: OnClosed) -> None:
        end.setblocking(False)
        self._end = end
        self._on_message = on_message
        self._on_closed = on_closed
        self._loop = loop
        self._decoder = FrameDecoder()
        self._descriptors: deque[int] = deque()
        self._unsent: deque[tuple[memoryview, list[int]]] = deque()
        self._is_open = True
        self._loop.add_reader(end.fileno(), self._read)

    def send(self, message: Message, descriptors: Sequence[int] = ()) -> None:
        """Send a message; its *descriptors* are taken over and closed when they are on their way.

        To a channel that is closed nothing is sent: `on_closed` has told.
        """
        if not self._is_open:
            _close_all(descriptors)
            return
        frame = encode_frame(encode(message), len(descriptors))
        self._unsent.append((memoryview(frame), list(descriptors)))
        if len(self._unsent) == 1:
            self._write()

    def drain(self) -> None:
        """Take everything that has arrived. A grandchild may hold the other end open, so this ends at EAGAIN."""
        while self._is_open and self._read():
            pass

    def disown(self) -> None:
        """Close this end in a fork of this process, whose loop does not run."""
        self._is_open = False
        self._end.close()
        for _, descriptors in self._unsent:
            _close_all(descriptors)
        self._unsent.clear()

    def close(self) -> None:
        """Close this end; nothing is reported."""
        if not self._is_open:
            return
        self._is_open = False
        self._loop.remove_reader(self._end.fileno())
        self._loop.remove_writer(self._end.fileno())
        self._end.close()
        for _, descriptors in self._unsent:
            _close_all(descriptors)
        self._unsent.clear()
        _close_all(self._descriptors)

    def _read(self) -> bool:
        """Receive once; tell whether there may be more."""
        try:
            data, descriptors = receive(self._end)
        except BlockingIOError:
            return False
        except OSError as problem:
            self._lose(str(problem) if not isinstance(problem, ConnectionResetError) else "")
            return False
        self._descriptors.extend(descriptors)
        if not data:
            self._lose("")
            return False
        self._decoder.feed(data)
        try:
            self._deliver()
        except (FrameBroken, MessageBroken) as problem:
            self._lose(str(problem))
        return True

    def _deliver(self) -> None:
        while self._is_open and (frame := self._decoder.next_frame()) is not None:
            if frame.descriptors > len(self._descriptors):
                raise FrameBroken(f"{frame.descriptors} descriptors were announced, {len(self._descriptors)} came")
            taken = [self._descriptors.popleft() for _ in range(frame.descriptors)]
            self._on_message(decode(frame.payload), taken)

    def _write(self) -> None:
        try:
            while self._unsent:
                data, descriptors = self._unsent[0]
                sent = send_with_descriptors(self._end, data, descriptors)
                _close_all(descriptors)
                self._unsent[0] = (data[sent:], [])
                if sent == len(data):
                    self._unsent.popleft()
        except BlockingIOError:
            self._loop.add_writer(self._end.fileno(), self._write)
            return
        except OSError:
            pass  # the other side is gone; reading finds out, after what it sent last
        self._loop.remove_writer(self._end.fileno())

    def _lose(self, reason: str) -> None:
        self.close()
        self._on_closed(reason)


def _close_all(descriptors: "Sequence[int] | deque[int]") -> None:
    for descriptor in descriptors:
        os.close(descriptor)
