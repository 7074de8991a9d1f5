"""One end of a private socket pair, blocking: what the nursery and the workers hold.

The reading side belongs to one thread; any thread may send. A frame is sent whole under a lock, so an exception
between two frames (a signal, `KeyboardInterrupt`) is harmless and one inside a frame cannot happen: signals are held
back in the only place where it could.
"""

import array
import os
import signal
import socket
import threading
from collections import deque
from collections.abc import Sequence

from spark_workers.frames import FrameDecoder, encode_frame
from spark_workers.messages import Message, decode, encode

READ_SIZE = 256 * 1024
_MAX_FDS = 253


def receive(end: socket.socket, size: int = READ_SIZE, flags: int = 0) -> tuple[bytes, list[int]]:
    """Receive bytes and the descriptors that came with them; no bytes means that the other end is gone."""
    room = socket.CMSG_SPACE(_MAX_FDS * array.array("i").itemsize)
    cloexec = getattr(socket, "MSG_CMSG_CLOEXEC", 0)
    data, ancillary, _, _ = end.recvmsg(size, room, cloexec | flags)
    descriptors = array.array("i")
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            descriptors.frombytes(content[: len(content) - len(content) % descriptors.itemsize])
    return data, list(descriptors)


def send_with_descriptors(end: socket.socket, data: bytes | memoryview, descriptors: Sequence[int]) -> int:
    """Send some of *data*, the descriptors with its first byte; return how many bytes went out."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
    return end.sendmsg([data], rights)


class Channel:
    """Messages over one socket. `EOFError` says that the other side is gone."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._decoder = FrameDecoder()
        self._descriptors: deque[int] = deque()
        self._sending = threading.Lock()

    def fileno(self) -> int:
        """The socket's descriptor, for a selector."""
        return self._end.fileno()

    def send(self, message: Message, descriptors: Sequence[int] = ()) -> None:
        """Send one message, waiting while the other side is slow.

        Raises:
            MessageBroken: It cannot be encoded; nothing was sent.
            OSError: The other side is gone.
        """
        frame = memoryview(encode_frame(encode(message), len(descriptors)))
        with self._sending:
            held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
            try:
                sent = send_with_descriptors(self._end, frame, descriptors)
                while sent < len(frame):
                    sent += self._end.send(frame[sent:])
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, held)

    def receive(self) -> tuple[Message, list[int]]:
        """Wait for the next message and the descriptors that came with it.

        Raises:
            EOFError: The other side is gone.
            FrameBroken, MessageBroken: The other side does not speak our protocol.
        """
        while True:
            found = self.next_message()
            if found is not None:
                return found
            self.fill()

    def fill(self) -> None:
        """Receive once, whatever there is, waiting if there is nothing.

        Raises:
            EOFError: The other side is gone.
        """
        try:
            data, descriptors = receive(self._end)
        except ConnectionResetError:
            data, descriptors = b"", []
        self._descriptors.extend(descriptors)
        if not data:
            raise EOFError("the channel is closed")
        self._decoder.feed(data)

    def next_message(self) -> tuple[Message, list[int]] | None:
        """Return a message that has already arrived, or None."""
        frame = self._decoder.next_frame()
        if frame is None:
            return None
        return decode(frame.payload), [self._descriptors.popleft() for _ in range(frame.descriptors)]

    def take_rest(self) -> bytes:
        """Return what was received beyond the last message, for whoever reads the socket from now on."""
        return self._decoder.take_rest()

    def close(self) -> None:
        """Close the socket and every descriptor that nobody took."""
        self._end.close()
        while self._descriptors:
            os.close(self._descriptors.popleft())
